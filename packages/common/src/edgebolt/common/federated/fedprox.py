"""FedProx: federated averaging with a proximal term, and the term alone for any Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import StrategyRegistry

from edgebolt.common.federated.algorithm import Weights
from edgebolt.common.federated.checks import require_lightning_trainer
from edgebolt.common.federated.client import ClientCallback
from edgebolt.common.federated.fedavg import FedAvg, Moments
from edgebolt.common.federated.strategy import FederatedStrategy

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch.optim import Optimizer

    from edgebolt.common.federated.device import Device
    from edgebolt.common.federated.visit import Visit

__all__ = ["FedProx", "FedProxStrategy", "Proximal"]


class Proximal(ClientCallback):
    """Adds ``mu / 2 * ||w - w_start||^2`` to the loss, through its gradient ``mu * (w - w_start)``.

    ``w_start`` is the model that the client was sent. In a plain ``Trainer`` it is the model with which ``fit``
    began, which keeps a fine-tuned model near its pre-trained one. Applied before gradient clipping.

    Args:
        mu: strength; Li et al. 2020 search {0.001, 0.01, 0.1, 1}.

    Raises:
        ValueError: for a negative ``mu``.

    Example::

        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[Proximal(mu=0.01)], accelerator="cpu", logger=False)
    """

    def __init__(self, mu: float = 0.01) -> None:
        if not mu >= 0:
            raise ValueError(f"mu={mu!r}: use 0 (federated averaging) or more.")
        self.mu = mu
        self._anchors: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._saved: list[torch.Tensor] = []  # a plain fit's anchors, for checkpoints

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a Trainer of another namespace; forget another fit's anchors."""
        require_lightning_trainer(trainer, "Proximal")
        self._saved = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The anchor of a plain fit, or of the fit that is resumed."""
        if not isinstance(trainer.strategy, FederatedStrategy):
            self._drop_anchor(pl_module)
            if self._saved and [a.shape for a in self._saved] != [a.shape for _, a in self._anchors]:
                raise ValueError(
                    "The checkpoint's proximal anchors are those of another model, or of other layers of it."
                )
            if self._saved:
                self._anchors = [(p, saved.to(p)) for (p, _), saved in zip(self._anchors, self._saved, strict=True)]
            self._saved = [anchor for _, anchor in self._anchors]

    def state_dict(self) -> dict[str, Any]:
        """The anchors of a plain fit; those of a visit are taken anew."""
        return {"anchors": self._saved} if self._saved else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The anchors of the fit that is resumed."""
        self._saved = state_dict["anchors"]

    def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit) -> None:
        """The anchor of a visit."""
        self._drop_anchor(module)

    def _drop_anchor(self, module: pl.LightningModule) -> None:
        self._anchors = [(p, p.detach().clone()) for p in module.parameters() if p.requires_grad]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the term's gradient."""
        if self.mu:
            with torch.no_grad():
                for parameter, anchor in self._anchors:
                    if parameter.grad is not None:
                        parameter.grad.add_(parameter - anchor, alpha=self.mu)


class FedProx(FedAvg):
    """Federated averaging whose clients are held near the model they were sent.

    Source: Li et al., "Federated Optimization in Heterogeneous Networks", 2020, equation 2 and algorithm 2. Their
    partial work of stragglers is not part of it: plan fewer steps for those with a ``configure`` part.

    Args:
        mu: strength of the proximal term.
        weights: ``"samples"`` or ``"uniform"``.
        moments: ``"reset"`` or ``"keep"``, at every visit.

    Example::

        >>> FedProx(mu=0.1).callbacks[0].mu
        0.1
    """

    def __init__(self, mu: float = 0.01, weights: Weights = "samples", moments: Moments = "reset") -> None:
        super().__init__(weights, moments)
        self.callbacks.append(Proximal(mu))


class FedProxStrategy(FederatedStrategy):
    """:class:`FedProx` as a strategy of its own; ``Trainer(strategy="fedprox")`` once this package is imported.

    Args:
        mu: strength of the proximal term.
        weights: ``"samples"`` or ``"uniform"``.
        moments: ``"reset"`` or ``"keep"``, at every visit.
        **kwargs: those of ``FederatedStrategy``.
    """

    strategy_name = "fedprox"

    def __init__(
        self, mu: float = 0.01, weights: Weights = "samples", moments: Moments = "reset", **kwargs: Any
    ) -> None:
        super().__init__(algorithm=FedProx(mu, weights, moments), **kwargs)


StrategyRegistry.register("fedprox", FedProxStrategy, description="FedAvg with a proximal term", override=True)
