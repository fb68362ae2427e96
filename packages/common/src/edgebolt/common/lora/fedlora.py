"""FedLoRA: federated averaging of LoRA, and the callback that sets ranks before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn

from edgebolt.common.federated import ClientCallback, FedAvg, FederatedStrategy
from edgebolt.common.federated.algorithm import Weights
from edgebolt.common.federated.checks import require_lightning_trainer
from edgebolt.common.federated.fedavg import Moments
from edgebolt.common.lora.ranks import ranks_of, set_ranks

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["FedLoRA", "FedLoRAStrategy", "LoraRanks"]


class LoraRanks(ClientCallback):
    """Gives the module's LoRA layers other ranks before training begins, at the scale that they have.

    Works in any Trainer, on any module that holds a PEFT model with LoRA, before optimizers are made and checkpoints
    are read.

    Args:
        ranks: one for all layers, or one for each, input first; None: as the module has them.

    Raises:
        ValueError: for ranks below 1; in ``setup``, if the module has no LoRA or another number of layers.

    Example::

        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[LoraRanks([2, 4, 6])], accelerator="cpu", logger=False)
    """

    def __init__(self, ranks: int | Sequence[int] | None = None) -> None:
        each = [ranks] if isinstance(ranks, int) else ranks
        if each is not None and not (len(each) and all(type(rank) is int and rank >= 1 for rank in each)):
            raise ValueError(f"ranks={ranks!r}: use whole numbers of 1 or more, or None for those of the module.")
        self.ranks = ranks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the ranks; refuse a Trainer of another namespace, and a module without LoRA."""
        require_lightning_trainer(trainer, type(self).__name__)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        here = ranks_of(pl_module)
        if not here:
            raise ValueError(
                f"{type(self).__name__} finds no LoRA in {type(pl_module).__name__}: add it in the module's __init__ "
                "with edgebolt.common.lora.add_lora(model) or peft.get_peft_model(model, LoraConfig(...))."
            )
        set_ranks(pl_module, self.choose(here))

    def choose(self, ranks: list[int]) -> list[int]:
        """From the ranks that the module has to those that it gets, input first."""
        if self.ranks is None:
            return ranks
        return [self.ranks] * len(ranks) if isinstance(self.ranks, int) else list(self.ranks)


class FedLoRA(FedAvg):
    """Federated averaging of LoRA: every device trains all layers at one rank; ``A`` and ``B`` are averaged apart.

    The plain baseline of federated fine-tuning (FedIT, Zhang et al. 2023): :class:`FedAvg` of whatever requires
    gradients, which is LoRA and the head. Averages of ``A`` and of ``B`` are not the average of ``B A``.

    Args:
        rank: one for all layers and devices; None: the ranks of the module.
        weights: ``"samples"`` or ``"uniform"``.
        moments: ``"reset"`` or ``"keep"``, at every visit.

    Raises:
        ValueError: for arguments that are out of range; when ``fit`` begins, if the module has no LoRA.

    Example::

        >>> FedLoRA(rank=8).callbacks[0].ranks
        8
    """

    def __init__(self, rank: int | None = None, weights: Weights = "samples", moments: Moments = "reset") -> None:
        super().__init__(weights, moments)
        self.callbacks.append(LoraRanks(rank))


class FedLoRAStrategy(FederatedStrategy):
    """:class:`FedLoRA` as a strategy of its own; ``Trainer(strategy="fedlora")`` once this package is imported.

    Args:
        rank: one for all layers and devices; None: the ranks of the module.
        weights: ``"samples"`` or ``"uniform"``.
        moments: ``"reset"`` or ``"keep"``, at every visit.
        **kwargs: those of ``FederatedStrategy``.
    """

    strategy_name = "fedlora"

    def __init__(
        self, rank: int | None = None, weights: Weights = "samples", moments: Moments = "reset", **kwargs: Any
    ) -> None:
        super().__init__(algorithm=FedLoRA(rank, weights, moments), **kwargs)


StrategyRegistry.register("fedlora", FedLoRAStrategy, description="Federated averaging of LoRA", override=True)
