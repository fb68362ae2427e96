"""Instruction tuning: a causal language model under LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import Perplexity

from edgebolt.common.text.fine_tuning import FineTuning, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CausalLM"]

IGNORED = -100  # transformers' and PyTorch's label for what is no target


class CausalLM(FineTuning):
    """``AutoModelForCausalLM`` under LoRA; its head is frozen.

    Batches are dicts of ``input_ids``, ``attention_mask`` and ``labels``, int64 ``[batch, tokens]``, with labels of
    -100 wherever nothing is to be learned (prompt, padding), as :class:`~edgebolt.common.text.InstructionData` makes
    them. Logs ``val_loss``, ``val_acc`` (share of answer tokens that are predicted, torchmetrics) and
    ``val_perplexity`` (of the answers, torchmetrics), and the same under ``test_``.

    Args:
        model: ``"smollm2"``, a path, a hub name, or a loaded model with a language-model head.
        ranks, targets, scale, dropout: of LoRA, see :func:`~edgebolt.common.lora.add_lora`.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        schedule: ``"linear"`` (to 0 over the Trainer's epochs, which are rounds in a federated run) or ``"constant"``.
        bits: 4 or 8: the frozen base is quantised.

    Raises:
        ValueError: for arguments that are out of range.
        OSError: if the model cannot be found; the message says what to install.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        ...                      vocab_size=40)
        >>> CausalLM(LlamaForCausalLM(config), ranks=2).ranks
        [2, 2]
    """

    def __init__(
        self,
        model: str | PreTrainedModel = "smollm2",
        ranks: int | Sequence[int] = 8,
        targets: Sequence[str] = ("query", "value"),
        scale: float = 2.0,
        dropout: float = 0.05,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.01,
        schedule: Schedule = "linear",
        bits: Literal[4, 8] | None = None,
    ) -> None:
        super().__init__(
            "AutoModelForCausalLM",
            model,
            ranks=ranks,
            targets=targets,
            scale=scale,
            dropout=dropout,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            bits=bits,
        )
        self.save_hyperparameters(ignore=() if isinstance(model, str) else ("model",))
        base: Any = self.model.get_base_model()
        words: int = base.config.vocab_size
        for split in ("val", "test"):
            setattr(self, f"{split}_acc", MulticlassAccuracy(words, average="micro", ignore_index=IGNORED))
            setattr(self, f"{split}_perplexity", Perplexity(ignore_index=IGNORED))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val_loss``, ``val_acc`` and ``val_perplexity``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``test_loss``, ``test_acc`` and ``test_perplexity``."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: dict[str, Tensor], split: str) -> None:
        output = self(**batch)
        answers = batch["labels"][:, 1:] != IGNORED
        logits, targets = output.logits[:, :-1][answers], batch["labels"][:, 1:][answers]  # [answer tokens, words]
        size = len(targets)
        self.log(f"{split}_loss", output.loss, batch_size=size)
        accuracy: Any = getattr(self, f"{split}_acc")
        perplexity: Any = getattr(self, f"{split}_perplexity")
        accuracy(logits, targets)
        perplexity(logits[None], targets[None])
        self.log(f"{split}_acc", accuracy, prog_bar=True, batch_size=size)
        self.log(f"{split}_perplexity", perplexity, prog_bar=True, batch_size=size)
