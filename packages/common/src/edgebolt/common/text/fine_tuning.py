"""What the text modules share: a pre-trained model under LoRA, its optimizer and its small checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from edgebolt.common.lora import (
    adapter_layers,
    add_lora,
    export_adapter,
    pairs,
    prepare_quantized,
    quantization,
    ranks_of,
    set_ranks,
)
from edgebolt.common.text.sources import load_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FineTuning", "Schedule"]

Schedule = Literal["linear", "constant"]


class FineTuning(pl.LightningModule):
    """A pre-trained transformer under LoRA as a ``LightningModule``: base of the text modules.

    Its checkpoints hold what is trained (LoRA, head) and leave out the frozen base, which is read again from where it
    came from; ``load_from_checkpoint`` works as always.

    Args:
        auto_class: name of the class of transformers that loads the model.
        model: a name for :func:`~edgebolt.common.text.find_model`, a path, a hub name, or a loaded model.
        ranks: of LoRA: one for all layers, or one for each, input first.
        targets: projections that get LoRA, see :func:`~edgebolt.common.lora.add_lora`.
        scale: of LoRA, ``alpha / r``.
        dropout: of LoRA.
        learning_rate: of AdamW, for LoRA.
        head_learning_rate: of AdamW, for the head; None: the same.
        weight_decay: of AdamW.
        schedule: ``"linear"``: the rates fall to 0 over the Trainer's ``max_epochs`` (rounds, in a federated run);
            ``"constant"``: they stay.
        bits: 4 or 8: the frozen base is quantised by bitsandbytes.
        pretrained: further arguments for ``from_pretrained``.

    Raises:
        ValueError: for rates, schedules, ranks or bits that are out of range.
    """

    def __init__(
        self,
        auto_class: str,
        model: str | PreTrainedModel,
        *,
        ranks: int | Sequence[int],
        targets: Sequence[str],
        scale: float,
        dropout: float,
        learning_rate: float,
        head_learning_rate: float | None = None,
        weight_decay: float,
        schedule: Schedule,
        bits: Literal[4, 8] | None,
        **pretrained: Any,
    ) -> None:
        super().__init__()
        self.rates = (learning_rate, learning_rate if head_learning_rate is None else head_learning_rate)
        if not all(rate > 0 for rate in self.rates) or not weight_decay >= 0:
            raise ValueError(
                f"learning_rate={learning_rate!r}, head_learning_rate={head_learning_rate!r}, "
                f"weight_decay={weight_decay!r}: use rates above 0 and a decay of 0 or more."
            )
        if schedule not in ("linear", "constant"):
            raise ValueError(f"schedule={schedule!r}: use 'linear' or 'constant'.")
        self.weight_decay, self.schedule = weight_decay, schedule
        base: Any = model
        if isinstance(model, str):
            quantized = {} if bits is None else {"quantization_config": quantization(bits)}
            base = load_pretrained(auto_class, model, **{"dtype": torch.float32, **pretrained, **quantized})
            base = base if bits is None else prepare_quantized(base)
        elif bits is not None:
            raise ValueError(f"bits={bits!r} with a loaded {type(model).__name__}: give its name or folder instead.")
        # transformers loads models in evaluation mode, which Lightning would keep: dropout would be off.
        self.model = add_lora(base, ranks, targets, scale, dropout).train()
        self.trained = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        self.strict_loading = False  # checkpoints lack the base; `on_load_checkpoint` checks what must be there

    @property
    def ranks(self) -> list[int]:
        """The LoRA rank of each layer, input first."""
        return ranks_of(self.model)

    def forward(self, **batch: Tensor) -> Any:
        """The transformers model's own output for ``input_ids``, ``attention_mask``, ``labels`` ..."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own loss: cross-entropy."""
        loss: Tensor = self(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW over what requires gradients: LoRA in the first group, the head in the second."""
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if ("lora_" in name) == lora], "lr": rate}
            for lora, rate in zip((True, False), self.rates, strict=True)
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=self.weight_decay)
        epochs = self.trainer.max_epochs
        if self.schedule == "constant" or epochs is None or epochs < 1:
            return optimizer
        return [optimizer], [LambdaLR(optimizer, lambda epoch: max(0.0, 1 - epoch / epochs))]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen base."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in self.trained}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the checkpoint's ranks, which a callback may have set.

        Raises:
            ValueError: if it lacks something that is trained here.
        """
        state = checkpoint["state_dict"]
        if missing := sorted(self.trained - state.keys()):
            raise ValueError(
                f"The checkpoint lacks {len(missing)} tensors that this module trains, {missing[0]} first: it is that "
                "of another model, or of other targets."
            )
        ranks = {name: len(state[name]) for name, _ in pairs(state)}
        layers = adapter_layers(ranks)
        of_layer = {layers[name]: rank for name, rank in ranks.items() if name in layers}
        set_ranks(self.model, [of_layer[layer] for layer in sorted(of_layer)])

    def export_adapter(self, path: str | os.PathLike[str]) -> None:
        """Write LoRA and head as a folder that plain PEFT loads; see :func:`~edgebolt.common.lora.export_adapter`."""
        export_adapter(self.model, path)
