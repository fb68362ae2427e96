"""What a pruning removed, where, and how long it took: the manifest of a pruned model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebolt.common.files import replaced

if TYPE_CHECKING:
    from edgebolt.comp.comp import Comp
    from edgebolt.comp.plan import Plan, Survey
    from edgebolt.comp.sweep import Seconds, Slimmed

__all__ = ["Report", "versions"]


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    return {name: version(name) for name in ("edgebolt-comp", "torch", "transformers", "safetensors")}


@dataclass
class Report:
    """What was removed.

    Attributes:
        options: arguments of :class:`~edgebolt.comp.Comp`.
        parameters: of the whole model, before and after.
        ratio: share of the layers' parameters that went; differs from the wanted one by rounding.
        importance: of each dense layer.
        effect: of each dense layer, how far the network's output is from the dense one's without a quarter of the
            layer's neurons: the Kullback-Leibler divergence of the next token's chances, or ``1 − cos`` of the last
            hidden states where the model is no causal language model; empty where it was not measured.
        dropped: dense layers that went as a whole.
        layers: for each layer that is left: ``layer``, its index in the model that was given; ``neurons`` and
            ``groups``, the indices that are left; ``variance`` of the mask; ``error``, the missing share of the
            feed-forward output's energy before and after the recovery.
        units: neurons and key-value heads of a dense layer; of the largest, where they differ.
        calibration: SHA-256 of the calibration tokens.
        seconds: by stage; of an interrupted run, those since it went on.
        base: the dense model's name.
        files: bytes of weights on disk before and after; zeros for a loaded model.
        versions: of the libraries.
    """

    options: dict[str, Any]
    parameters: tuple[int, int]
    ratio: float
    importance: list[float]
    effect: list[float]
    dropped: list[int]
    layers: list[dict[str, Any]]
    calibration: str
    seconds: dict[str, float]
    base: str = ""
    files: tuple[int, int] = (0, 0)
    units: tuple[int, int] = (0, 0)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        options: Comp,
        plan: Plan,
        survey: Survey,
        slimmed: dict[int, Slimmed],
        before: int,
        after: int,
        calibration: str,
        seconds: Seconds,
        layer_parameters: int,
        units: tuple[int, int],
    ) -> Report:
        """The report of a run."""
        return cls(
            options={**asdict(options), "protect": list(options.protect)},
            parameters=(before, after),
            ratio=(before - after) / layer_parameters,
            importance=survey.importance,
            effect=survey.effect(),
            dropped=plan.dropped,
            layers=[{"layer": index, **left.to_plain()} for index, left in sorted(slimmed.items())],
            calibration=calibration,
            seconds=dict(seconds.by_stage),
            units=units,
            versions=versions(),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        with replaced(path, durable=True) as partial:
            Path(partial).write_text(json.dumps(self.to_plain(), indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read ``comp.json``."""
        return cls.from_plain(json.loads(Path(path).read_text()))

    def to_plain(self) -> dict[str, Any]:
        """In built-ins."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Report:
        """The inverse of :meth:`to_plain`."""
        pairs = {name: tuple(plain[name]) for name in ("parameters", "files", "units")}
        return cls(**{**plain, **pairs})

    def stages(self) -> str:
        """Seconds of each stage and its share, the longest first; of an interrupted run, those since it went on."""
        total = max(sum(self.seconds.values()), 1e-9)
        order = sorted(self.seconds.items(), key=lambda item: -item[1])
        return ", ".join(f"{stage} {spent:.1f} ({spent / total:.0%})" for stage, spent in order)

    def summary(self) -> str:
        """One line."""
        before, after = self.parameters
        widths = [len(entry["neurons"]) for entry in self.layers]
        dropped = f"layers {self.dropped} dropped; " if self.dropped else ""
        where = "the others" if dropped else "each layer"
        return (
            f"COMP: {before / 1e6:,.1f} M parameters -> {after / 1e6:,.1f} M ({self.ratio:.1%} of the layers'); "
            f"{dropped}{min(widths)} to {max(widths)} neurons left in {where}."
        )
