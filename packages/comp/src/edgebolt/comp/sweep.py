"""The two passes over the layers, of which one at a time is in memory."""

from __future__ import annotations

import ctypes
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from edgebolt.comp.blocks import Block, attention_block, ffn_block, keep_heads, keep_neurons, matrix
from edgebolt.comp.calls import Calibration, Call, run_layer, watching
from edgebolt.comp.importance import BlockInfluence
from edgebolt.comp.least_squares import Sublayer
from edgebolt.comp.plan import Plan
from edgebolt.comp.recovery import fold, recovered_weight
from edgebolt.comp.selection import select

if TYPE_CHECKING:
    from edgebolt.comp.comp import Comp

__all__ = ["Layers", "Seconds", "Slimmed", "layer_importance", "prune_layers"]


@dataclass
class Slimmed:
    """What is left of one layer.

    Attributes:
        neurons: indices of the neurons that stay, ascending.
        groups: indices of the key-value heads that stay.
        variance: of the mask of the feed-forward part.
        error: share of the feed-forward output's energy that is missing: before the recovery, and after.
    """

    neurons: list[int]
    groups: list[int]
    variance: float = 0.0
    error: tuple[float, float] = (0.0, 0.0)

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "error": list(self.error)}


class Layers(Protocol):
    """Where dense layers come from and pruned ones go: a model in memory, or files."""

    kind: str
    config: Any

    def __len__(self) -> int: ...

    def dense(self, index: int) -> nn.Module:
        """A float32 copy of a layer, in evaluation mode, that may be changed."""

    def store(self, index: int, layer: nn.Module, slimmed: Slimmed) -> nn.Module:
        """Keep a pruned layer; returns it as it was stored, rounded to the model's dtype, in float32."""

    def stored(self, index: int) -> tuple[nn.Module, Slimmed] | None:
        """A layer that an interrupted run has finished."""


class Seconds:
    """Seconds spent, by stage."""

    def __init__(self) -> None:
        self.by_stage: dict[str, float] = defaultdict(float)

    @contextmanager
    def spent(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.by_stage[stage] += time.perf_counter() - start


@dataclass
class Streams:
    """Hidden states of all batches, in memory, or in mapped files where they are large."""

    batches: list[Tensor]
    folder: Path | None = None
    files: list[Path] = field(default_factory=list)

    def copy(self) -> Streams:
        """A second stream with the same values."""
        other = Streams([], self.folder)
        for batch in self.batches:
            other.batches.append(other.room(batch).copy_(batch))
        return other

    def room(self, like: Tensor) -> Tensor:
        """An empty tensor of the same shape."""
        if self.folder is None:
            return torch.empty_like(like)
        path = self.folder / f"stream-{id(self):x}-{len(self.files)}.bin"
        self.files.append(path)
        flat = torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype)
        return flat.view(like.shape)


def counted(calibration: Calibration, batch: int, skip_first: bool) -> Tensor:
    """Which tokens of a batch count: no padding, and without the first where that is asked for."""
    real = calibration.real[batch]
    return real & (real.cumsum(1) > 1) if skip_first else real  # padding may be on the left


def layer_importance(
    layers: Layers,
    calibration: Calibration,
    streams: Streams,
    seconds: Seconds,
    skip_first: bool = False,
    done: Callable[[], object] = lambda: None,
) -> list[float]:
    """One pass through the dense layers; the streams are used up.

    Returns:
        The importance of each layer.
    """
    scores = []
    for index in range(len(layers)):
        with seconds.spent("load"):
            layer = layers.dense(index)
        influence = BlockInfluence()
        with seconds.spent("importance"):
            for batch, hidden in enumerate(streams.batches):
                out = run_layer(layer, hidden, calibration.calls[batch][index])
                real = counted(calibration, batch, skip_first)
                influence.add(hidden[real], out[real])
                hidden.copy_(out)
        scores.append(influence.value)
        done()
    return scores


def prune_layers(
    layers: Layers,
    calibration: Calibration,
    teacher: Streams,
    plan: Plan,
    options: Comp,
    seconds: Seconds,
    done: Callable[[], object] = lambda: None,
) -> tuple[dict[int, Slimmed], int]:
    """The second pass: the dense model's stream and the pruned model's run side by side through the layers.

    Args:
        layers: source and sink.
        calibration: the calls, and which tokens are real.
        teacher: what enters the first layer; used up.
        plan: what goes; changed where a layer hands its quota on.
        options: the user's.
        seconds: where the time is added.
        done: called after each layer.

    Returns:
        What is left, by index of the dense layer, and how many neurons could not be removed in all.
    """
    student = teacher  # until something is removed
    slimmed: dict[int, Slimmed] = {}
    unmet = 0
    layer: nn.Module
    small: nn.Module
    for index in range(len(layers)):
        layer = small = nn.Identity()  # the last one's memory is free before the next is read
        _trim()
        with seconds.spent("load"):
            layer = layers.dense(index)
        total = ffn_block(layers.kind, layer).units
        dropped = index in plan.dropped
        touched = dropped or plan.neurons[index] > 0 or plan.groups[index] > 0
        same = student is teacher
        if touched and same:
            student = teacher.copy()
        if dropped:
            with seconds.spent("teacher"):
                _advance(layer, teacher, calibration, index)
            done()
            continue
        finished = layers.stored(index)
        if finished is not None or not touched:
            with seconds.spent("teacher"):
                _advance(layer, teacher, calibration, index)
            if finished is None:
                groups = attention_block(layers.kind, layer, layers.config).units
                left = Slimmed(list(range(total)), list(range(groups)))
                small = layers.store(index, layer, left)
            else:
                small, left = finished
        else:
            small, left = _prune_layer(
                layers, index, layer, calibration, teacher, student, same, plan, options, seconds
            )
        slimmed[index] = left
        if student is not teacher:
            with seconds.spent("student"):
                _advance(small, student, calibration, index)
        if plan.neurons[index]:
            missing = len(left.neurons) - (total - plan.neurons[index])
            if missing > 0:
                unmet += plan.hand_on(index, missing, options.round_to)
        done()
    return slimmed, unmet


def _advance(layer: nn.Module, streams: Streams, calibration: Calibration, index: int) -> None:
    for batch, hidden in enumerate(streams.batches):
        hidden.copy_(run_layer(layer, hidden, calibration.calls[batch][index]))


def _prune_layer(
    layers: Layers,
    index: int,
    layer: nn.Module,
    calibration: Calibration,
    teacher: Streams,
    student: Streams,
    same: bool,
    plan: Plan,
    options: Comp,
    seconds: Seconds,
) -> tuple[nn.Module, Slimmed]:
    """Prune one layer and let the teacher pass it."""
    kind, config = layers.kind, layers.config
    blocks: list[tuple[Block, int]] = []
    if plan.groups[index]:
        blocks.append((attention_block(kind, layer, config), plan.groups[index]))
    if plan.neurons[index]:
        blocks.append((ffn_block(kind, layer), plan.neurons[index]))
    groups = torch.arange(attention_block(kind, layer, config).units)
    neurons = torch.arange(ffn_block(kind, layer).units)
    variance, error = 0.0, (0.0, 0.0)
    dense = layer if len(blocks) == 1 else layers.dense(index)
    changes: list[tuple[Block, Tensor, Tensor]] = []
    for number, (block, remove) in enumerate(blocks):
        last = number == len(blocks) - 1
        sums = _sums(dense, layer, block, index, calibration, teacher, student, same, last, options, seconds)
        if last:  # the weights make room for the square matrices, and are read again
            dense.to("meta")
            layer.to("meta")
            _trim()
        with seconds.spent("selection"):
            kept = _choose(sums, block, remove, options)
        if len(kept) == block.units:  # the bound was met at once: the layer stays as it is
            continue
        with seconds.spent("recovery"):
            found = recovered_weight(sums, block, kept, options.recover, options.ridge, options.variance_bound)
        changes.append((block, kept.cpu(), found.weight))
        if block.name == "attention":
            groups = kept.cpu()
        else:
            energy = max(sums.energy, 1e-30)
            neurons, variance, error = kept, found.variance, (found.before / energy, found.after / energy)
        if not last:
            _change(layers, layer, changes)
        same = False
    del sums
    with seconds.spent("load"):
        layer = layers.dense(index)
    _change(layers, layer, changes)
    left = Slimmed(neurons.tolist(), groups.tolist(), variance, error)
    return layers.store(index, layer, left), left


def _trim() -> None:
    """Give the system back what was freed: glibc keeps tensors of up to 32 MiB, a layer or so of them."""
    with suppress(OSError, AttributeError, TypeError):  # another libc, or none
        ctypes.CDLL(None).malloc_trim(0)


def _change(layers: Layers, layer: nn.Module, changes: list[tuple[Block, Tensor, Tensor]]) -> None:
    """Take out of a layer what does not stay, and give the projections behind it their weights."""
    for block, kept, weight in changes:
        if block.name == "attention":
            keep_heads(layers.kind, layer, kept, layers.config)
        else:
            keep_neurons(layers.kind, layer, kept)
        fold(layer.get_submodule(block.consumer), weight)


def _choose(sums: Sublayer, block: Block, remove: int, options: Comp) -> Tensor:
    problem = sums.masks(block.unit, consume=options.recover != "lstsq")
    bound = options.variance_bound if options.at_bound == "hand_on" else float("inf")
    arguments = (options.score, options.step, bound, options.ridge)
    kept = select(problem, remove, *arguments)
    missing = len(kept) - (block.units - remove)
    if missing and block.name == "ffn":  # the bound was met: back to the next multiple
        fewer = remove - -(-missing // options.round_to) * options.round_to
        kept = select(problem, max(0, fewer), *arguments)
    return kept


def _sums(
    dense: nn.Module,
    layer: nn.Module,
    block: Block,
    index: int,
    calibration: Calibration,
    teacher: Streams,
    student: Streams,
    same: bool,
    last: bool,
    options: Comp,
    seconds: Seconds,
) -> Sublayer:
    """Run the layer on both streams and sum up what its projection gets and gives; the last time, go on.

    ``dense`` and ``layer`` are one as long as nothing of the layer is pruned.
    """
    sums = Sublayer(matrix(layer.get_submodule(block.consumer)))
    for batch, entering in enumerate(teacher.batches):
        call = calibration.calls[batch][index]
        with seconds.spent("teacher"):
            out, inputs, target = _watched(dense, block, entering, call)
        if not same:
            del inputs  # the widest of what is held
            with seconds.spent("student"):
                out_student, inputs, given = _watched(layer, block, student.batches[batch], call)
            if options.target == "residual":
                # What the dense model has after the sum, less what this model brings to it by the other way.
                if block.name == "ffn":
                    target = out - out_student + given
                else:
                    target = target + entering - student.batches[batch]
        with seconds.spent("sums"):
            real = counted(calibration, batch, options.skip_first)
            sums.add(inputs[real], target[real])
        del inputs, target  # before the next batch runs
        if last:
            entering.copy_(out)
    return sums


def _watched(layer: nn.Module, block: Block, hidden: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """What leaves the layer; what its projection gets, and gives before its bias."""
    with watching(layer, block.consumer) as seen:
        out = run_layer(layer, hidden, call)
    ((inputs, given),) = seen
    bias: Any = layer.get_submodule(block.consumer).bias
    return out, inputs, given if bias is None else given - bias.detach()
