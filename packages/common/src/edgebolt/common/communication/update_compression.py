"""Any codec in a plain Trainer: what would training be like if its updates had to travel?"""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from edgebolt.common.communication.codec import Codec
from edgebolt.common.communication.message import Tensors

__all__ = ["UpdateCompression"]


class UpdateCompression(Callback):
    """Replaces gradients, or the change of the weights every few steps, by what a codec makes of them.

    Logs, at each compression, ``compression/ratio`` (encoded bytes over those of the tensors) and
    ``compression/error`` (Euclidean norm of what was lost, over that of what was to be sent). The encoded bytes sum up
    in ``sent_bytes``, those of the tensors in ``dense_bytes``. In a federated run codecs belong to the algorithm
    instead: ``Algorithm(down=..., up=...)``.

    Args:
        codec: any :class:`~edgebolt.common.communication.Codec`.
        on: ``"gradients"``: before every step of the optimizer, after gradients were accumulated and unscaled, before
            they are clipped. ``"weights"``: after every ``every`` steps the weights become those at the last such
            instant plus the compressed change since, as if each of these changes travelled to a server.
        every: optimizer steps between two compressions of weights.
        error_feedback: what was lost is added to the next message.

    Raises:
        ValueError: for arguments that are out of range; when ``fit`` begins, in a federated run.

    Example::

        >>> import lightning as L
        >>> from edgebolt.common.communication import TopK
        >>> compression = UpdateCompression(TopK(ratio=0.99), error_feedback=True)
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[compression], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        codec: Codec,
        on: Literal["gradients", "weights"] = "gradients",
        every: int = 1,
        error_feedback: bool = False,
    ) -> None:
        if not isinstance(codec, Codec):
            raise ValueError(f"codec={codec!r}: pass a codec, such as TopK(ratio=0.9).")
        if on not in ("gradients", "weights"):
            raise ValueError(f"on={on!r}: use 'gradients' or 'weights'.")
        if type(every) is not int or every < 1:
            raise ValueError(f"every={every!r}: use a whole number of steps, 1 or more.")
        if on == "gradients" and every != 1:
            raise ValueError(f"every={every}: gradients are compressed at every step; use on='weights'.")
        self.codec, self.on, self.every, self.error_feedback = codec, on, every, error_feedback
        self.sent_bytes = self.dense_bytes = 0
        self._residual: Tensors = {}
        self._anchor: Tensors = {}
        self._compressed_at = 0  # the optimizer step after which weights were compressed last

    @property
    def ratio(self) -> float:
        """Encoded bytes over those of the tensors, of all messages so far."""
        return self.sent_bytes / max(1, self.dense_bytes)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a federated strategy, in which steps of several clients follow each other."""
        from edgebolt.common.federated import FederatedStrategy  # here, for it imports this package

        if isinstance(trainer.strategy, FederatedStrategy):
            raise ValueError(
                "UpdateCompression compresses one stream of steps, and a federated run has one a visit: give the "
                "codec to the algorithm instead, Algorithm(down=..., up=...)."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember where the weights are, unless a checkpoint has said so."""
        if self.on == "weights" and not self._anchor:
            self._anchor = {name: tensor.clone() for name, tensor in self._weights(pl_module).items()}
        self._anchor = {name: tensor.to(pl_module.device) for name, tensor in self._anchor.items()}
        self._residual = {name: tensor.to(pl_module.device) for name, tensor in self._residual.items()}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Compress the gradients of this optimizer's parameters."""
        if self.on == "gradients":
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            gradients = {n: p.grad for n, p in pl_module.named_parameters() if p.grad is not None and id(p) in own}
            for name, gradient in self._sent(pl_module, gradients).items():
                gradients[name].copy_(gradient)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compress the change of the weights, if it is time."""
        step = trainer.global_step
        if self.on != "weights" or step == self._compressed_at or step % self.every:
            return
        self._compressed_at = step
        weights = self._weights(pl_module)
        changes = self._sent(pl_module, {name: weight - self._anchor[name] for name, weight in weights.items()})
        for name, change in changes.items():
            weights[name].copy_(self._anchor[name] + change)
        self._anchor = {name: weight.clone() for name, weight in weights.items()}

    @staticmethod
    def _weights(module: pl.LightningModule) -> Tensors:
        return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _sent(self, module: pl.LightningModule, tensors: Tensors) -> Tensors:
        """What arrives of these tensors, and the books about it."""
        kept = self._residual
        total = {name: tensor + kept[name] if name in kept else tensor for name, tensor in tensors.items()}
        message = self.codec.encode(total)
        sent = self.codec.decode(message)
        lost = {name: total[name] - sent[name] for name in total}
        if self.error_feedback:
            self._residual = {**kept, **lost}
        dense = sum(tensor.nbytes for tensor in total.values())
        self.sent_bytes += message.nbytes
        self.dense_bytes += dense
        squares = [sum(t.double().square().sum() for t in part.values()) for part in (lost, total)]
        error = (torch.as_tensor(squares[0]) / torch.as_tensor(squares[1]).clamp(min=1e-300)).sqrt()
        module.log("compression/ratio", message.nbytes / max(1, dense))
        module.log("compression/error", error.float())
        return sent

    def state_dict(self) -> dict[str, Any]:
        """Residual, anchor and sums, so that a resumed run goes on as if it had not been broken off."""
        return {
            "residual": self._residual,
            "anchor": self._anchor,
            "compressed_at": self._compressed_at,
            "sent_bytes": self.sent_bytes,
            "dense_bytes": self.dense_bytes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._residual, self._anchor = state_dict["residual"], state_dict["anchor"]
        self._compressed_at = state_dict["compressed_at"]
        self.sent_bytes, self.dense_bytes = state_dict["sent_bytes"], state_dict["dense_bytes"]
