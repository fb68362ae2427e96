"""Caesar: traffic compressed both ways, leaning on the old model that each device has."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from edgebolt.caesar.batch_sizes import LevelledBatches
from edgebolt.caesar.importance import Divergence, Reference, UploadRatios
from edgebolt.caesar.introduction import Introduction
from edgebolt.caesar.ratios import dense_bytes
from edgebolt.caesar.staleness import DownloadRatios
from edgebolt.common.communication import Codec, HybridSign, TopK
from edgebolt.common.communication.packed import Scope
from edgebolt.common.federated import (
    Algorithm,
    ClientCallback,
    Configure,
    ErrorFeedback,
    FederatedStrategy,
    KeepModel,
    Outcome,
    Selector,
    Server,
    Visit,
    WeightedMean,
)
from edgebolt.common.federated.labels import LabelSource

__all__ = ["Caesar", "CaesarStrategy"]


class Caesar(Algorithm):
    """Federated learning with few bytes and little deviation: both directions compressed, batch sizes levelled.

    Source: J. Liu et al., "Caesar: A Low-deviation Compression Approach for Efficient Federated Learning" (arXiv
    2412.19989). The body of the paper could not be read; formulas come from two summaries and from a re-implementation
    that cites its equations. What was found in neither is a named option here, and marked.

    A round: a device is sent the model with the share ``θ_d = (1 - δ/t) 0.6`` of its entries degraded to signs
    (:class:`~edgebolt.caesar.DownloadRatios`, :class:`~edgebolt.common.communication.HybridSign`), the more the
    fresher its own old model is, with which it fills them in. It trains, with a batch size at which all end together
    (:class:`~edgebolt.caesar.LevelledBatches`), and sends the largest entries of its change, the fewer the less its
    data matter (:class:`~edgebolt.caesar.UploadRatios`, :class:`~edgebolt.common.communication.TopK`). The server's
    own model is exact: ``w <- w + 1/|N| Σ_i Δ_i``. Before the first round every device reports how its labels are
    distributed, its batch size, and how long a step takes it.

    Args:
        max_download: ``θ_d^max``.
        min_upload, max_upload: ``θ_u^min`` and ``θ_u^max``.
        clusters: encodings a round for devices that have a model, by staleness; None: one for each staleness. That
            there are clusters is remembered, their number inferred.
        scope: ``"tensor"`` (as the re-implementation has it) or ``"global"``; unknown in the paper.
        min_numel: tensors with fewer entries travel whole: biases and normalisation; inferred.
        balance: ``λ`` of the importance: weight of the volume; 1: nobody reports labels.
        divergence: ``g`` of the importance, ``"exp"``, ``"inverse"`` or ``"linear"``; inferred.
        reference: ``Φ_0``, ``"pooled"`` or ``"uniform"``; inferred.
        level_batches: whether batch sizes are levelled.
        max_batch, min_batch: ``b_max`` (None: the loader's batch size) and ``b_min``; inferred.
        probe_steps: steps of the first measurement; 0: none, then all have their largest batch until measured.
        error_feedback: what is dropped from an update is added to the device's next one; not the paper's, as far as
            is known, and then old by some rounds.
        labels: where the labels are, see :func:`~edgebolt.common.federated.labels.find_labels`.
        selector: who trains; default: a uniform sample.
        down, up: other codecs, such as ``Dense()`` for an ablation; those that read the visit's settings
            ``"down_ratio"`` and ``"up_ratio"`` get Caesar's ratios.

    Raises:
        ValueError: for arguments that are out of range.

    Example::

        >>> from edgebolt.common.devices import Fleet
        >>> from edgebolt.common.federated import Dirichlet, FederatedStrategy
        >>> strategy = FederatedStrategy(Caesar(), clients=Dirichlet(80, alpha=0.2), per_round=8, local_steps=30,
        ...                              fleet=Fleet.jetson(80))
    """

    def __init__(
        self,
        max_download: float = 0.6,
        min_upload: float = 0.1,
        max_upload: float = 0.6,
        clusters: int | None = 3,
        scope: Scope = "tensor",
        min_numel: int = 1024,
        balance: float = 0.5,
        divergence: Divergence = "exp",
        reference: Reference = "pooled",
        level_batches: bool = True,
        max_batch: int | None = None,
        min_batch: int = 4,
        probe_steps: int = 1,
        error_feedback: bool = False,
        labels: LabelSource = None,
        selector: Selector | None = None,
        down: Codec | None = None,
        up: Codec | None = None,
    ) -> None:
        if type(probe_steps) is not int or probe_steps < 0:
            raise ValueError(f"probe_steps={probe_steps!r}: use a whole number of steps, 0 or more.")
        self.probe_steps = probe_steps if level_batches else 0
        self.level_batches = level_batches
        self.asks_labels = balance < 1 and min_upload < max_upload
        down = HybridSign(setting="down_ratio", scope=scope, min_numel=min_numel) if down is None else down
        up = TopK(setting="up_ratio", scope=scope, min_numel=min_numel) if up is None else up
        configure: list[Configure] = [
            DownloadRatios(max_download, clusters),
            UploadRatios(min_upload, max_upload, balance, divergence, reference),
        ]
        if level_batches:
            configure.append(LevelledBatches(max_batch, min_batch))
        callbacks: list[ClientCallback] = [KeepModel(), Introduction(labels, self.asks_labels)]
        super().__init__(
            selector=selector,
            configure=configure,
            aggregator=WeightedMean("uniform"),
            down=down,
            up=up,
            callbacks=[ErrorFeedback(up), *callbacks] if error_feedback else callbacks,
        )

    def enrol(self, server: Server) -> list[Visit]:
        """Every device introduces itself: labels, batch size, speed."""
        if not (self.asks_labels or self.level_batches):
            return []
        settings = {"introduce": True}
        return [
            Visit(client, 0, start=None, probe=self.probe_steps, settings=settings)
            for client in range(server.population)
        ]

    def figures(self, server: Server, outcomes: list[Outcome]) -> dict[str, float]:
        """Means of the round's ratios and batch sizes, and ``caesar/paper_bytes``: ``(1 - θ) Q``, positions unpaid."""
        if not outcomes:
            return {}
        settings = [outcome.visit.settings for outcome in outcomes]
        figures = {f"caesar/{name}": fmean(s[name] for s in settings) for name in ("down_ratio", "up_ratio")}
        sizes = [o.visit.batch_size for o in outcomes if o.visit.batch_size]
        if sizes:
            figures["caesar/batch_size"] = fmean(sizes)
        dense = dense_bytes(server.models["global"])
        sent = [
            (1 - o.visit.settings["down_ratio"]) + bool(o.up_bytes) * (1 - o.visit.settings["up_ratio"])
            for o in outcomes
        ]
        return {**figures, "caesar/paper_bytes": dense * sum(sorted(sent))}


class CaesarStrategy(FederatedStrategy):
    """:class:`Caesar` as a strategy of its own; ``Trainer(strategy="caesar")`` once this package is imported.

    Args:
        max_download, min_upload, max_upload, clusters, scope, min_numel, balance, level_batches, max_batch, min_batch,
            error_feedback: see :class:`Caesar`.
        **kwargs: those of ``FederatedStrategy``.
    """

    strategy_name = "caesar"

    def __init__(
        self,
        max_download: float = 0.6,
        min_upload: float = 0.1,
        max_upload: float = 0.6,
        clusters: int | None = 3,
        scope: Scope = "tensor",
        min_numel: int = 1024,
        balance: float = 0.5,
        level_batches: bool = True,
        max_batch: int | None = None,
        min_batch: int = 4,
        error_feedback: bool = False,
        **kwargs: Any,
    ) -> None:
        algorithm = Caesar(
            max_download,
            min_upload,
            max_upload,
            clusters,
            scope,
            min_numel,
            balance,
            level_batches=level_batches,
            max_batch=max_batch,
            min_batch=min_batch,
            error_feedback=error_feedback,
        )
        super().__init__(algorithm=algorithm, **kwargs)


StrategyRegistry.register("caesar", CaesarStrategy, description="Traffic compressed both ways", override=True)
