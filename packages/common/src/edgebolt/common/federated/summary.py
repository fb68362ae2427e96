"""The record of a federated run: a row a round in a CSV file, and a figure."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from edgebolt.common.federated.checks import require_lightning_trainer
from edgebolt.common.federated.results_plot import compare
from edgebolt.common.federated.strategy import FederatedStrategy
from edgebolt.common.files import replaced

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["FederatedSummary"]


class FederatedSummary(Callback):
    """Writes a row a round into ``rounds.csv`` and, when training ends, draws ``rounds.png``.

    A row holds the round's exact figures (``strategy.history[-1]``: simulated time in s, bytes up and down, energy in
    J, visits, failures, mean waiting time in s, training losses), ``bytes_up_total`` and ``bytes_down_total`` since
    the run began, and every scalar metric that was logged in this round; a round without validation has no validation
    metric. The file is replaced as a whole after each round, so a reader never sees half a row. Rows travel with
    checkpoints: a resumed run goes on with the rows of its checkpoint.

    Args:
        folder: Where the files go; made if missing. A new ``fit`` replaces the files of an earlier one.
        metric: What the figure shows; a name that was given to ``self.log``.
        figure: Whether to draw the figure. Without matplotlib there is a warning and no figure.

    Attributes:
        rows: A dict of built-ins for each finished round.

    Raises:
        TypeError: In ``setup``, for a Trainer of another namespace.
        ValueError: In ``setup`` for ``fit``, if the Trainer's strategy is not federated.

    Example::

        >>> import lightning as L
        >>> from edgebolt.common.federated import FedAvgStrategy
        >>> trainer = L.Trainer(strategy=FedAvgStrategy(), callbacks=[FederatedSummary("runs/fedavg")], logger=False)
    """

    def __init__(self, folder: str | os.PathLike[str], metric: str = "val_acc", figure: bool = True) -> None:
        self.folder, self.metric, self.figure = Path(folder), metric, figure
        self.rows: list[dict[str, float]] = []
        self._lines: list[str] = []  # the file's lines for all rows but the last
        self._columns: list[str] = []
        self._earlier: dict[str, Any] = {}  # metrics as the round before left them

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what has no rounds, and begin an empty record."""
        require_lightning_trainer(trainer, "FederatedSummary")
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, FederatedStrategy):
            raise ValueError(
                f"FederatedSummary writes a row a round, and {type(trainer.strategy).__name__} has no rounds: give "
                "the Trainer strategy=FederatedStrategy(...), or leave the callback out."
            )
        if self.figure and find_spec("matplotlib") is None:
            warnings.warn(
                f"FederatedSummary draws no {self.folder / 'rounds.png'}, for matplotlib is missing: "
                "pip install 'edgebolt-common[plot]'. rounds.csv is written all the same; figure=False silences this.",
                stacklevel=2,
            )
        self.rows, self._lines, self._columns, self._earlier = [], [], [], {}
        self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the metrics of earlier rounds, which Lightning keeps."""
        self._earlier = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record before a ``ModelCheckpoint`` that saves here, or a run resumed from it would lack this round."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._record(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the round with what training logged."""
        self._record(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        self._draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Draw what there is."""
        self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The rows, in built-ins."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the rows of a checkpoint."""
        self.rows, self._lines, self._columns = [dict(row) for row in state_dict["rows"]], [], []

    def _record(self, trainer: pl.Trainer) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, FederatedStrategy)  # setup() has checked it
        if not strategy.history or strategy.loop is None or strategy.loop.running:
            return  # the epoch ended in mid-round
        for figures in strategy.history[len(self.rows) :]:  # several, if checkpoints of former rounds lack rows
            self._append(figures)
        for name, value in trainer.callback_metrics.items():
            # What has been logged since is a new tensor, even if the value is the same.
            fresh = name not in strategy.history[-1] and value is not self._earlier.get(name)
            if fresh and (scalar := torch.as_tensor(value)).numel() == 1:
                self.rows[-1][name] = scalar.item()
        if trainer.is_global_zero:
            self._write()

    def _append(self, figures: Mapping[str, float]) -> None:
        row = {name: value if isinstance(value, int) else float(value) for name, value in figures.items()}
        for way in ("up", "down"):
            before = self.rows[-1][f"bytes_{way}_total"] if self.rows else 0
            row[f"bytes_{way}_total"] = before + row[f"round/bytes_{way}"]
        self.rows.append(row)

    def _write(self) -> None:
        """Replace the file; only the last row can differ from what has been written, so only it is formatted."""
        if any(name not in self._columns for name in self.rows[-1]):
            self._columns, self._lines = list(dict.fromkeys(name for row in self.rows for name in row)), []
        while len(self._lines) < len(self.rows) - 1:
            self._lines.append(self._line(self.rows[len(self._lines)]))
        header = _csv_line(self._columns)
        with replaced(self.folder / "rounds.csv") as partial:
            partial.write_text("".join([header, *self._lines, self._line(self.rows[-1])]), encoding="utf-8")

    def _line(self, row: Mapping[str, float]) -> str:
        return _csv_line([repr(row[name]) if name in row else "" for name in self._columns])

    def _draw(self, trainer: pl.Trainer) -> None:
        if not (self.figure and self.rows and trainer.is_global_zero) or find_spec("matplotlib") is None:
            return
        assert isinstance(trainer.strategy, FederatedStrategy)
        name = type(trainer.strategy.algorithm).__name__
        try:
            compare({name: self.rows}, self.folder / "rounds.png", self.metric, f"{name}, {len(self.rows)} rounds")
        except ValueError as error:
            warnings.warn(f"FederatedSummary draws no {self.folder / 'rounds.png'}: {error}", stacklevel=2)


def _csv_line(cells: Sequence[str]) -> str:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
