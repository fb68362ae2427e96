"""LEGEND: federated LoRA whose depth follows what each device can do."""

from __future__ import annotations

from collections.abc import Hashable
from statistics import fmean
from typing import Any, Literal

from lightning.pytorch.strategies import StrategyRegistry

from edgebolt.common.communication import Codec, Tensors
from edgebolt.common.federated import Algorithm, FederatedStrategy, Outcome, Selector, Server, Visit, WeightedMean
from edgebolt.common.federated.algorithm import Weights
from edgebolt.common.lora import adapter_layers, layers_held
from edgebolt.legend.configuration import LCD, Anchor
from edgebolt.legend.lora_depth import LoraDepth, Ranks

__all__ = ["Legend", "LegendStrategy", "TopLayers"]


class TopLayers:
    """Which tensors a device is sent: the LoRA of its top layers, and all that is not LoRA.

    A part for ``Algorithm(submodel=...)``. The device takes the LoRA that it is not sent from the beginning of the
    run, where ``B`` is zero: those layers are the pre-trained ones.

    Example::

        >>> import torch
        >>> model = {f"layer.{i}.lora_A.weight": torch.ones(1) for i in range(3)} | {"head": torch.ones(1)}
        >>> sorted(TopLayers()(model, Visit(client=0, steps=1, settings={"depth": 1})))
        ['head', 'layer.2.lora_A.weight']
    """

    def key(self, visit: Visit) -> Hashable:
        """Visits of one depth are sent the same."""
        depth: int | None = visit.settings.get("depth")
        return depth

    def __call__(self, tensors: Tensors, visit: Visit) -> Tensors:
        """The tensors that are sent."""
        depth = visit.settings.get("depth")
        layers = adapter_layers(tensors)
        lowest = 0 if depth is None or not layers else max(layers.values()) + 1 - depth
        return {name: tensor for name, tensor in tensors.items() if layers.get(name, lowest) >= lowest}


class Legend(Algorithm):
    """Federated fine-tuning with LoRA on unequal devices: each trains as many layers as its speed allows.

    Source: J. Liu et al., "LEGEND: ... federated fine-tuning" (arXiv 2412.20004; IEEE TMC 24(11), 2025). From its
    abstract: LoRA depth counted from the output, ranks that grow towards the output, an algorithm that configures both
    for heterogeneous devices; from summaries: capacity estimation, the greedy LCD, aggregation by layer. The method
    section could not be read: **the formulas below are completions**, and each is an argument of its own.

    A round: :class:`~edgebolt.legend.LCD` turns estimated times ``t_i(k) = f_i + k μ_i + β_i Σ r_l`` into depths; a
    device is sent its layers (:class:`TopLayers`), trains them (:class:`~edgebolt.legend.LoraDepth`) and sends them
    back; each layer is averaged over those that hold it,
    ``θ_l <- θ_l + Σ_{i in N_l} w_i Δ_{i,l} / Σ_{i in N_l} w_i``. Before the first round every device is asked to run
    ``probe_steps`` steps and to report, which costs time and energy.

    Args:
        anchor: ``"deadline"`` (default: nothing is fitted), ``"quantile"`` or ``"fastest"``, see
            :func:`~edgebolt.legend.choose_depths`; inferred.
        quantile: for ``anchor="quantile"``; inferred.
        ranks: ``"increasing"`` (the paper's), ``"uniform"``, ``"decreasing"`` (ablations), a sequence, or None.
        budget: sum of all ranks ``Φ``; None: that of the module.
        step: ``λ``, the difference of neighbouring ranks; that ranks are an arithmetic sequence is inferred.
        min_depth: ``k_min``; inferred.
        max_waiting: bound ``ε_w`` on the mean waiting time, seconds; None: none; inferred.
        depth: the same depth for all devices instead of LCD's: an ablation.
        smoothing: ``ρ`` of the moving averages; the group's usual 0.8, as remembered.
        freeze_below: ``"omit"``: LoRA below a device's depth is neither sent nor used there; ``"load"``: it is sent,
            used and frozen; which of them the paper does is unknown.
        weights: ``w_i``: ``"samples"`` or ``"uniform"``; which of them is unknown.
        probe_steps: steps of the first measurement, 0: none: then a device's first visit trains all layers, or
            counts as the median of those that were measured; inferred.
        selector, down, up: as in any :class:`~edgebolt.common.federated.Algorithm`.

    Raises:
        ValueError: for arguments that are out of range; when ``fit`` begins, if the module has no LoRA.

    Example::

        >>> from edgebolt.common.devices import Fleet
        >>> from edgebolt.common.federated import Dirichlet, FederatedStrategy
        >>> strategy = FederatedStrategy(Legend(), clients=Dirichlet(80, alpha=0.5), per_round=10, local_steps=3,
        ...                              fleet=Fleet.jetson(80))
    """

    def __init__(
        self,
        anchor: Anchor = "deadline",
        quantile: float = 0.25,
        ranks: Ranks = "increasing",
        budget: int | None = None,
        step: float = 1.0,
        min_depth: int = 1,
        max_waiting: float | None = None,
        depth: int | None = None,
        smoothing: float = 0.8,
        freeze_below: Literal["omit", "load"] = "omit",
        weights: Weights = "samples",
        probe_steps: int = 1,
        selector: Selector | None = None,
        down: Codec | None = None,
        up: Codec | None = None,
    ) -> None:
        if type(probe_steps) is not int or probe_steps < 0:
            raise ValueError(f"probe_steps={probe_steps!r}: use a whole number of steps, 0 or more.")
        self.probe_steps = probe_steps
        super().__init__(
            selector=selector,
            configure=[LCD(anchor, quantile, min_depth, max_waiting, depth, smoothing, freeze_below)],
            aggregator=WeightedMean(weights),
            submodel=TopLayers() if freeze_below == "omit" else None,
            down=down,
            up=up,
            callbacks=[LoraDepth(ranks=ranks, budget=budget, step=step)],
        )

    def enrol(self, server: Server) -> list[Visit]:
        """Every device is asked what it can do: forward and backward time at full depth, links, memory."""
        if not self.probe_steps:
            return []
        settings = {"depth": layers_held(server.models["global"])}
        return [
            Visit(client, 0, start=None, probe=self.probe_steps, settings=settings)
            for client in range(server.population)
        ]

    def figures(self, server: Server, outcomes: list[Outcome]) -> dict[str, float]:
        """``legend/depth``: the mean depth of the round's visits."""
        depths = [outcome.visit.settings["depth"] for outcome in outcomes]
        return {"legend/depth": fmean(depths)} if depths else {}


class LegendStrategy(FederatedStrategy):
    """:class:`Legend` as a strategy of its own; ``Trainer(strategy="legend")`` once this package is imported.

    Args:
        anchor, quantile, ranks, budget, step, min_depth, freeze_below: see :class:`Legend`.
        **kwargs: those of ``FederatedStrategy``.
    """

    strategy_name = "legend"

    def __init__(
        self,
        anchor: Anchor = "deadline",
        quantile: float = 0.25,
        ranks: Ranks = "increasing",
        budget: int | None = None,
        step: float = 1.0,
        min_depth: int = 1,
        freeze_below: Literal["omit", "load"] = "omit",
        **kwargs: Any,
    ) -> None:
        algorithm = Legend(anchor, quantile, ranks, budget, step, min_depth, freeze_below=freeze_below)
        super().__init__(algorithm=algorithm, **kwargs)


StrategyRegistry.register("legend", LegendStrategy, description="LoRA depth by device speed", override=True)
