"""What generated texts took, as metrics."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import nn
from torchmetrics import MeanMetric, SumMetric

from edgebolt.common.tables import print_table
from edgebolt.hat.client import Generation

__all__ = ["GenerationMetrics"]


class GenerationMetrics(L.Callback):
    """Gathers time to the first token, time between tokens, accept length and bytes over a prediction.

    At the end a table is printed, and the values go to the Trainer's loggers.

    Args:
        table: whether to print it.

    Attributes:
        values: ``generate/ttft`` and ``generate/tbt`` (seconds, means over texts), ``generate/accept_length`` (tokens
            a round, over all rounds), ``generate/hit_rate`` (rounds that began with what was drafted ahead),
            ``generate/texts``, ``generate/tokens``, ``generate/bytes_up`` and ``generate/bytes_down`` (sums).

    Example::

        >>> GenerationMetrics(table=False).values
        {}
    """

    def __init__(self, table: bool = True) -> None:
        self.table, self.values = table, dict[str, float]()
        self._metrics = self._new()

    @staticmethod
    def _new() -> nn.ModuleDict:
        means = ("ttft", "tbt", "accept_length", "hit_rate")
        sums = ("texts", "tokens", "bytes_up", "bytes_down")
        return nn.ModuleDict({**{name: MeanMetric() for name in means}, **{name: SumMetric() for name in sums}})

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._metrics, self.values = self._new(), {}

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take a batch's texts in."""
        for text in outputs:
            self.update(text)

    def update(self, text: Generation) -> None:
        """Take one text in."""
        found: dict[str, Any] = dict(self._metrics.items())
        found["ttft"].update(text.timings.first)
        if len(text.tokens) > 1:
            found["tbt"].update(text.timings.between)
            found["accept_length"].update(text.accept_length, text.rounds)
            found["hit_rate"].update(text.hits / text.rounds, text.rounds)
        found["texts"].update(1)
        found["tokens"].update(len(text.tokens))
        found["bytes_up"].update(text.sent)
        found["bytes_down"].update(text.received)

    def compute(self) -> dict[str, float]:
        """The values so far; means of nothing are left out."""
        found: dict[str, Any] = dict(self._metrics.items())
        return {f"generate/{name}": float(part.compute()) for name, part in found.items() if part.update_called}

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log and print."""
        self.values = self.compute()
        for logger in trainer.loggers:
            logger.log_metrics(self.values)
        if self.table and trainer.is_global_zero and self.values:
            rows = {name.removeprefix("generate/"): f"{value:.4g}" for name, value in self.values.items()}
            print_table("Generated texts", {"value": rows})
