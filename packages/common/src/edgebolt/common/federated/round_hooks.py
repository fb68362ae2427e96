"""The strategy's own callback: books steps, closes rounds, logs them, labels the progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from edgebolt.common.federated.algorithm import Algorithm
from edgebolt.common.federated.checks import check_trainer
from edgebolt.common.federated.round_loader import RoundLoader

if TYPE_CHECKING:
    from edgebolt.common.federated.strategy import FederatedStrategy

__all__ = ["RoundHooks"]


class RoundHooks(Callback):
    """Stands between the device half's callbacks and the user's.

    Validation of an epoch runs at its last batch, before ``on_train_epoch_end``, so the round is closed and
    aggregated in ``on_train_batch_end``.
    """

    def __init__(self, strategy: FederatedStrategy) -> None:
        self._strategy = strategy
        self._labelled: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Label whatever progress bar there is."""
        if not isinstance(trainer.train_dataloader, RoundLoader):
            raise ValueError(
                f"The training data are a {type(trainer.train_dataloader).__name__} of loaders: give one DataLoader, "
                "whose dataset is cut by client."
            )
        if is_overridden("on_train_batch_end", pl_module):
            rank_zero_warn(
                f"{type(pl_module).__name__}.on_train_batch_end runs after a visit's last step has been sent: change "
                "weights in optimizer_step or in a ClientCallback's on_train_batch_end instead."
            )
        if type(self._strategy.algorithm).evaluation is not Algorithm.evaluation:
            if not trainer.val_dataloaders:
                rank_zero_warn("The algorithm validates clients one by one, but fit() was given no validation data.")
            elif isinstance(trainer.val_dataloaders, list | dict) and len(trainer.val_dataloaders) > 1:
                raise ValueError(
                    f"There are {len(trainer.val_dataloaders)} validation loaders, and each would be followed by "
                    "every client's own split: give one."
                )
        bar = trainer.progress_bar_callback
        if bar is None or bar is self._labelled:
            return
        self._labelled, plain = bar, bar.get_metrics

        def get_metrics(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
            return {**self._position(), **plain(trainer, pl_module)}

        bar.get_metrics = get_metrics  # type: ignore[method-assign]

    def _position(self) -> dict[str, str]:
        loop = self._strategy.loop
        if loop is None or not loop.visits:
            return {}
        position = {"round": str(loop.server.round if loop.running else loop.server.round - 1)}
        return {**position, "visit": f"{loop.opened}/{len(loop.visits)}", "sim": f"{loop.server.now:.3g}s"}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a callback that has turned accumulation on."""
        if trainer.accumulate_grad_batches != 1:
            check_trainer(trainer, 1)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Book the step; on the round's last one, aggregate, so that validation sees the new global model."""
        loop = self._strategy.loop
        assert loop is not None
        if loop.steps:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            loop.step_done(loss if isinstance(loss, torch.Tensor) else None)
        loop.advance()
        if not loop.running:
            self._log(trainer, loop.history[-1])
            if rejected := [o.visit.client for o in loop.outcomes if o.reason == "non-finite"]:
                rank_zero_warn(f"Round {loop.history[-1]['round']}: updates with NaN or infinity dropped: {rejected}.")

    def _log(self, trainer: pl.Trainer, row: dict[str, float]) -> None:
        """Straight to the loggers, exact, and to those who monitor: `self.log` costs as much as a step, each time."""
        figures = {name: value for name, value in row.items() if name != "round"}
        for logger in trainer.loggers:
            logger.log_metrics({**figures, "epoch": row["round"]}, step=trainer.global_step - 1)
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}
        trainer.callback_metrics.update(tensors)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stopped in mid-round: the module shows the global model."""
        self._strategy.show_global()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Interrupted: the module shows the global model."""
        self._strategy.show_global()
