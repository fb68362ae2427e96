"""HetLoRA: each device has a rank of its own."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor

from edgebolt.common.communication import Tensors
from edgebolt.common.federated import Algorithm, FederatedStrategy, Outcome, Server, Visit, WeightedMean
from edgebolt.common.federated.algorithm import merge
from edgebolt.common.lora.fedlora import LoraRanks
from edgebolt.common.lora.names import pairs

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch.optim import Optimizer

    from edgebolt.common.federated import Device

__all__ = ["HetLoRA", "HetLoRAStrategy"]


def truncate(tensors: Tensors, rank: int) -> Tensors:
    """The first ``rank`` rows of each ``A`` and columns of each ``B``; all else as it is."""
    cut: Tensors = {}
    for a, b in pairs(tensors):
        cut |= {a: tensors[a][:rank].contiguous(), b: tensors[b][:, :rank].contiguous()}
    return {**tensors, **cut}


def pad(tensors: Tensors, like: dict[str, torch.Size]) -> Tensors:
    """The inverse on the device: zeros where another device has higher ranks.

    They stay zero under any optimizer that leaves a weight of 0 with a gradient of 0 alone, as SGD and Adam do, for
    the gradient of each half is a multiple of the other half.
    """
    wide: Tensors = {}
    for a, b in pairs(tensors):
        wide[a] = tensors[a].new_zeros(like[a])
        wide[b] = tensors[b].new_zeros(like[b])
        wide[a][: len(tensors[a])] = tensors[a]
        wide[b][:, : tensors[b].shape[1]] = tensors[b]
    return {**tensors, **wide}


class RankSlice:
    """Which tensors a device is sent: LoRA up to its rank ``settings["rank"]``, and all that is not LoRA."""

    def key(self, visit: Visit) -> Hashable:
        """Visits of one rank are sent the same."""
        rank: int | None = visit.settings.get("rank")
        return rank

    def __call__(self, tensors: Tensors, visit: Visit) -> Tensors:
        """The tensors that are sent."""
        return truncate(tensors, visit.settings["rank"])


class RankBySpeed:
    """Gives each visit a rank: the fastest device of the population the largest, the slowest the smallest.

    In HetLoRA ranks follow what devices can hold; which rank each has is not said, so the even spread over the order
    of speeds is our completion. A device that has pruned its rank keeps what it has reported.
    """

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def __call__(self, server: Server, visits: list[Visit]) -> list[Visit]:
        """The visits with ``settings["rank"]``."""
        seconds = server.reports["step_seconds"].nan_to_num(nan=0.0).numpy()
        place = np.argsort(np.argsort(-seconds, kind="stable"), kind="stable") / max(1, server.population - 1)
        ranks = np.rint(self.low + (self.high - self.low) * place).astype(int)
        pruned = server.reports.get("rank")
        if pruned is not None:
            known = ~pruned.isnan().numpy()
            ranks[known] = pruned.numpy()[known].astype(int)
        return [replace(v, settings={**v.settings, "rank": int(ranks[v.client])}) for v in visits]


class PaddedRank(LoraRanks):
    """The device's half: pads to the module's rank, punishes the last ranks, and prunes them once they shrink."""

    def __init__(self, rank: int | None, low: int, prune: float, penalty: float) -> None:
        super().__init__(rank)
        self.low, self.prune, self.penalty = low, prune, penalty
        self._rank = self._kept = 0
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def install(self, device: Device, visit: Visit, tensors: Tensors) -> Tensors:
        """Zeros where other devices have higher ranks."""
        device.memory.pop("hetlora/tail", None)  # of a visit that was broken off
        return pad(tensors, self._shapes)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Set the ranks and remember the shapes."""
        super().setup(trainer, pl_module, stage)
        self._shapes = {name: parameter.shape for name, parameter in pl_module.named_parameters()}

    def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit) -> None:
        """Remember the norm of the last ranks."""
        parameters = dict(module.named_parameters())
        self._pairs = [(parameters[a], parameters[b]) for a, b in pairs(parameters)]
        self._rank = visit.settings.get("rank", 0)
        self._kept = max(self.low, int(self.prune * self._rank))
        device.memory.setdefault("hetlora/tail", self._tail())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient of ``λ Σ ‖B[:, γr:]‖ ‖A[γr:, :]‖``."""
        if not self.penalty or self._kept >= self._rank:
            return
        span = slice(self._kept, self._rank)
        with torch.no_grad():
            for a, b in self._pairs:
                norm_a, norm_b = a[span].norm(), b[:, span].norm()
                if a.grad is not None and norm_a > 0:
                    a.grad[span].add_(a[span], alpha=float(self.penalty * norm_b / norm_a))
                if b.grad is not None and norm_b > 0:
                    b.grad[:, span].add_(b[:, span], alpha=float(self.penalty * norm_a / norm_b))

    def on_client_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit
    ) -> dict[str, Any] | None:
        """Prune if the last ranks shrank."""
        before = device.memory.pop("hetlora/tail")
        if visit.probe:
            return None
        shrank = self._kept < self._rank and self._tail() < before
        device.memory["hetlora/rank"] = self._kept if shrank else self._rank
        return {"rank": device.memory["hetlora/rank"]} if shrank else None

    def upload(self, device: Device, visit: Visit, update: Tensors) -> Tensors:
        """Nothing beyond the device's rank."""
        return update if visit.probe else truncate(update, device.memory["hetlora/rank"])

    def _tail(self) -> float:
        span = slice(self._kept, self._rank)
        with torch.no_grad():
            return sum(float(a[span].norm() * b[:, span].norm()) for a, b in self._pairs)


class ZeroPadded:
    """Averages LoRA of different ranks as if it were padded with zeros.

    ``"norm"``: the weight of a device in a pair is ``‖B_i A_i‖_F``, so that padded, little-trained adapters do not
    water down the others (HetLoRA's sparsity-weighted aggregation; per pair, our reading). What is not LoRA is
    averaged by samples.
    """

    def __init__(self, weights: Literal["norm", "samples"]) -> None:
        self.weights = weights
        self._mean = WeightedMean()

    def __call__(self, server: Server, model: Tensors, updates: list[tuple[Outcome, Tensors]]) -> Tensors:
        """The merged model."""
        merged = self._mean(server, {n: t for n, t in model.items() if "lora_" not in n}, updates)
        samples = server.reports["samples"]
        for a, b in pairs(model):
            held = [(outcome, update[a], update[b]) for outcome, update in updates if a in update]
            shares = [float(samples[outcome.visit.client]) for outcome, *_ in held]
            if self.weights == "norm":
                norms = [_product_norm(model[a][: len(da)] + da, model[b][:, : len(da)] + db) for _, da, db in held]
                shares = norms if any(norms) else [1.0] * len(norms)
            # What a device does not hold is zero there: its difference from the model is the model, negative.
            wide_a = [torch.cat([da, -model[a][len(da) :]]) for _, da, _ in held]
            wide_b = [torch.cat([db, -model[b][:, db.shape[1] :]], 1) for *_, db in held]
            merged[a] = merge(model[a], list(zip(shares, wide_a, strict=True)))
            merged[b] = merge(model[b], list(zip(shares, wide_b, strict=True)))
        return {name: merged[name] for name in model}


def _product_norm(a: Tensor, b: Tensor) -> float:
    """``‖B A‖_F`` by ``tr(BᵀB AAᵀ)``, without the dense product."""
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


class HetLoRA(Algorithm):
    """Federated LoRA at a rank of its own for each device, in all layers.

    Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", 2024: a device
    gets the first ``r_i`` ranks, punishes and prunes its last ones, and the server pads with zeros and weighs by the
    norm of the adapters. Its scale must not depend on the device's rank, so it is the module's, constant.

    Args:
        min_rank, max_rank: of the slowest and of the fastest device; all layers of the module get the latter.
        prune: ``γ``: a device whose last ``(1 - γ) r`` ranks shrank in a visit gives them up; 1: never.
        penalty: ``λ`` on the norm of these ranks; assumed.
        weights: ``"norm"`` (the paper) or ``"samples"``.

    Raises:
        ValueError: for arguments that are out of range; when ``fit`` begins, if the module has no LoRA.

    Example::

        >>> HetLoRA(min_rank=2, max_rank=8).configure[0].high
        8
    """

    def __init__(
        self,
        min_rank: int = 2,
        max_rank: int = 8,
        prune: float = 0.99,
        penalty: float = 1e-3,
        weights: Literal["norm", "samples"] = "norm",
    ) -> None:
        if not 1 <= min_rank <= max_rank:
            raise ValueError(f"min_rank={min_rank!r}, max_rank={max_rank!r}: use 1 or more, the smaller one first.")
        if not 0 < prune <= 1 or not penalty >= 0:
            raise ValueError(f"prune={prune!r}, penalty={penalty!r}: use a share above 0 up to 1, and 0 or more.")
        if weights not in ("norm", "samples"):
            raise ValueError(f"weights={weights!r}: use 'norm' or 'samples'.")
        super().__init__(
            configure=[RankBySpeed(min_rank, max_rank)],
            aggregator=ZeroPadded(weights),
            submodel=RankSlice(),
            callbacks=[PaddedRank(max_rank, min_rank, prune, penalty)],
        )

    def enrol(self, server: Server) -> list[Visit]:
        """Every device runs one step, so that the order of speeds is known."""
        return [Visit(client, 0, start=None, probe=1) for client in range(server.population)]


class HetLoRAStrategy(FederatedStrategy):
    """:class:`HetLoRA` as a strategy of its own; ``Trainer(strategy="hetlora")`` once this package is imported.

    Args:
        min_rank, max_rank, prune, penalty, weights: see :class:`HetLoRA`.
        **kwargs: those of ``FederatedStrategy``.
    """

    strategy_name = "hetlora"

    def __init__(
        self,
        min_rank: int = 2,
        max_rank: int = 8,
        prune: float = 0.99,
        penalty: float = 1e-3,
        weights: Literal["norm", "samples"] = "norm",
        **kwargs: Any,
    ) -> None:
        super().__init__(algorithm=HetLoRA(min_rank, max_rank, prune, penalty, weights), **kwargs)


StrategyRegistry.register("hetlora", HetLoRAStrategy, description="LoRA at ranks of devices", override=True)
