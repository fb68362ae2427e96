"""Text classification with a pre-trained model under LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from edgebolt.common.text.fine_tuning import FineTuning, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TextClassifier"]


class TextClassifier(FineTuning):
    """``AutoModelForSequenceClassification`` under LoRA, with a head that is trained in full.

    Batches are dicts of ``input_ids`` and ``attention_mask``, int64 ``[batch, tokens]``, and ``labels``, int64
    ``[batch]``, as :class:`~edgebolt.common.text.TextClassificationData` makes them. Logs ``val_loss``, ``val_acc``,
    ``test_loss`` and ``test_acc`` (micro accuracy of torchmetrics).

    Args:
        model: ``"minilm"``, a path, a hub name, or a loaded model with a classification head.
        num_classes: size of the head.
        ranks, targets, scale, dropout: of LoRA, see :func:`~edgebolt.common.lora.add_lora`.
        learning_rate: of AdamW, for LoRA.
        head_learning_rate: for the head; None: the same.
        weight_decay: of AdamW.
        schedule: ``"linear"`` (to 0 over the Trainer's epochs, which are rounds in a federated run) or ``"constant"``.
        bits: 4 or 8: the frozen base is quantised.

    Raises:
        ValueError: for arguments that are out of range.
        OSError: if the model cannot be found; the message says what to install.

    Example::

        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        ...                     num_labels=4)
        >>> TextClassifier(BertForSequenceClassification(config), num_classes=4, ranks=[1, 2]).ranks
        [1, 2]
    """

    def __init__(
        self,
        model: str | PreTrainedModel = "minilm",
        num_classes: int = 2,
        ranks: int | Sequence[int] = 8,
        targets: Sequence[str] = ("query", "value"),
        scale: float = 2.0,
        dropout: float = 0.05,
        learning_rate: float = 5e-4,
        head_learning_rate: float | None = None,
        weight_decay: float = 0.01,
        schedule: Schedule = "linear",
        bits: Literal[4, 8] | None = None,
    ) -> None:
        super().__init__(
            "AutoModelForSequenceClassification",
            model,
            ranks=ranks,
            targets=targets,
            scale=scale,
            dropout=dropout,
            learning_rate=learning_rate,
            head_learning_rate=head_learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            bits=bits,
            num_labels=num_classes,
        )
        self.save_hyperparameters(ignore=() if isinstance(model, str) else ("model",))
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_acc``."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``test_loss`` and ``test_acc``."""
        self._evaluate(batch, "test", self.test_acc)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Logits, ``[batch, classes]``."""
        logits: Tensor = self(**batch).logits
        return logits

    def _evaluate(self, batch: dict[str, Tensor], split: str, accuracy: Any) -> None:
        output, size = self(**batch), len(batch["labels"])
        accuracy(output.logits, batch["labels"])
        self.log(f"{split}_loss", output.loss, batch_size=size)
        self.log(f"{split}_acc", accuracy, prog_bar=True, batch_size=size)
