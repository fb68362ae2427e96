"""Training Λ: the device's draft learns what the whole model says."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgebolt.common.decoding import Segment, new_cache
from edgebolt.hat.adapter import HatAdapter
from edgebolt.hat.conversation import Drafting
from edgebolt.hat.split_model import split

__all__ = ["HatDistillation", "accept_length"]


def accept_length(agrees: Tensor, confident: Tensor, longest: int) -> Tensor:
    """Tokens a round, were a round to begin at each place of a text.

    A draft goes on while it is confident, at most ``longest`` tokens; those up to the first that differs are accepted,
    and the target adds one. Exact where the text is what the target itself goes on with.

    Args:
        agrees: whether draft and target choose the same next token, boolean, shape ``[places]``.
        confident: whether the draft's chance reaches the threshold, boolean, shape ``[places]``.
        longest: tokens of a draft.

    Returns:
        Shape ``[places]``; at least 1.

    Example::

        >>> accept_length(torch.tensor([True, True, False]), torch.tensor([True, True, True]), longest=4).tolist()
        [3.0, 2.0, 1.0]
    """
    taken = (agrees & confident).float()
    run, found = torch.ones_like(taken), torch.ones_like(taken)
    for ahead in range(min(longest, len(taken))):
        following = torch.zeros_like(taken)
        following[: len(taken) - ahead] = taken[ahead:]
        run = run * following
        found = found + run
    return found


class HatDistillation(L.LightningModule):
    """Trains a :class:`HatAdapter` against the whole model, in any Trainer.

    ``SmoothL1(Λ(h_in), h_deep) + ce_weight · CE(softmax(head(h_deep)), softmax(head(Λ(h_in))))`` (HAT, a digest),
    with ``h_in`` from the device's layers and ``h_deep`` from the last layer, over whole texts at once: the device's
    layers are exact when it drafts, so that nothing that Λ gets differs from training but after a wrong token. Soft
    targets, means over tokens and widths, AdamW and its numbers are ours.

    A batch is ``input_ids`` with ``attention_mask`` (padding on the right), a tensor of token ids, or what
    :meth:`features` has made of one.

    Args:
        model: a decoder with a language-model head; it is frozen.
        device_layers: of the device.
        key_value_heads: of Λ; by default those of the model.
        learning_rate: of AdamW, after ``warmup`` steps, then along a cosine to a tenth at the end of training.
        ce_weight: of the cross-entropy.
        normed: compare the hidden states after the final norm instead of before it, where a few large channels count
            for most of SmoothL1 (ours).
        noise: of ``h_in`` in training, uniform in ``± noise``, as EAGLE has it (ours).
        warmup: steps.
        drafting: threshold and length by which ``expected_accept_len`` is taken.

    Logs:
        ``train/loss``, ``train/loss_reg``, ``train/loss_ce``; ``val/`` the same and ``val/top1_agree`` (share of
        places where both choose the same next token) and ``val/expected_accept_len`` (:func:`accept_length`).

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> module = HatDistillation(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20)), device_layers=1)
        >>> loss, _ = module.losses(torch.randint(20, (2, 6)))
        >>> loss.requires_grad, [name for name, part in module.named_parameters() if part.requires_grad][:1]
        (True, ['adapter.layers.layers.0.norm.weight'])
    """

    def __init__(
        self,
        model: nn.Module,
        device_layers: int = 2,
        key_value_heads: int | None = None,
        learning_rate: float = 1e-3,
        ce_weight: float = 0.1,
        normed: bool = False,
        noise: float = 0.0,
        warmup: int = 50,
        drafting: Drafting | None = None,
    ) -> None:
        super().__init__()
        if not learning_rate > 0 or ce_weight < 0 or noise < 0 or warmup < 0:
            raise ValueError(
                f"learning_rate={learning_rate}, ce_weight={ce_weight}, noise={noise}, warmup={warmup}: the rate is "
                "above 0, the others are not negative."
            )
        self.parts = split(model, device_layers)
        self.adapter = HatAdapter(model, key_value_heads)
        model.requires_grad_(False)
        self.whole = [model]  # in a list: a checkpoint holds the adapter alone
        self.learning_rate, self.ce_weight, self.normed, self.noise = learning_rate, ce_weight, normed, noise
        self.warmup, self.drafting = warmup, Drafting() if drafting is None else drafting

    @torch.no_grad()
    def features(self, batch: Any) -> dict[str, Tensor]:
        """What the frozen model gives for a batch: worth keeping, it is most of a step.

        Returns:
            ``rows`` and ``deep``, shape ``[tokens, width]``, all texts one behind the other, and ``lengths``.
        """
        if next(self.whole[0].parameters()).device != self.device:
            self.whole[0].to(self.device)  # no part of this module, so that Lightning does not move it
        tokens = batch if isinstance(batch, Tensor) else batch["input_ids"]
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        lengths = (torch.full(tokens.shape, 1, device=tokens.device) if mask is None else mask).sum(1)
        counts = [int(count) for count in lengths if count]
        packed = torch.cat([text[: int(count)] for text, count in zip(tokens, lengths, strict=True)])
        positions = torch.cat([torch.arange(count) for count in counts]).to(packed.device)
        rows = self.parts.input.embedding(packed, positions)
        rows = self.parts.input.layers(rows, [Segment(new_cache(), count) for count in counts])
        deep = self.parts.middle(rows, [Segment(new_cache(), count) for count in counts])
        return {"rows": rows, "deep": deep, "lengths": lengths[lengths > 0]}

    def losses(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and its parts with the two logits."""
        given = isinstance(batch, dict) and "deep" in batch
        found = batch if given else self.features(batch)
        weight = next(self.adapter.parameters())
        rows, deep = found["rows"].to(weight.dtype), found["deep"].to(weight.dtype)
        if self.training and self.noise:
            rows = rows + (torch.rand_like(rows) - 0.5) * 2 * self.noise
        segments = [Segment(new_cache(), int(count)) for count in found["lengths"]]
        drafted = self.adapter.layers(rows, segments)
        norm, head = self.parts.output.norm.forward, self.parts.output.head.forward
        ours, theirs = norm(drafted), norm(deep)
        regression = F.smooth_l1_loss(ours, theirs) if self.normed else F.smooth_l1_loss(drafted, deep)
        with torch.no_grad():
            target = head(theirs)
        logits = head(ours)
        entropy = F.cross_entropy(logits.float(), target.float().softmax(-1))
        loss = regression + self.ce_weight * entropy
        return loss, {"loss_reg": regression, "loss_ce": entropy, "logits": logits, "target": target}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss, parts = self.losses(batch)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": parts[name] for name in ("loss_reg", "loss_ce")})
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Losses, agreement and accept length of a batch."""
        batch = batch if isinstance(batch, dict) and "deep" in batch else self.features(batch)
        loss, parts = self.losses(batch)
        agrees = parts["logits"].argmax(-1) == parts["target"].argmax(-1)
        sure = parts["logits"].float().softmax(-1).amax(-1) >= self.drafting.threshold
        lengths = [int(count) for count in batch["lengths"]]
        texts = zip(torch.split(agrees, lengths), torch.split(sure, lengths), strict=True)
        rounds = torch.cat([accept_length(same, confident, self.drafting.longest) for same, confident in texts])
        found = {"loss": loss, "loss_reg": parts["loss_reg"], "loss_ce": parts["loss_ce"]}
        found |= {"top1_agree": agrees.float().mean(), "expected_accept_len": rounds.mean()}
        # weighted by tokens, so that batches of unequal length count for what they are
        self.log_dict({f"val/{name}": value for name, value in found.items()}, prog_bar=True, batch_size=len(agrees))

    def configure_optimizers(self) -> Any:
        """AdamW on the adapter, with warm-up and a cosine to a tenth."""
        optimizer = torch.optim.AdamW(self.adapter.parameters(), self.learning_rate, betas=(0.9, 0.95))
        steps = max(int(self.trainer.estimated_stepping_batches), self.warmup + 1)
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (self.warmup + 1), total_iters=self.warmup)
        rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - self.warmup, self.learning_rate / 10)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], [self.warmup])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
