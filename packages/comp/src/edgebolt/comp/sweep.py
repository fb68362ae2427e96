"""One pass over the dense layers that measures them, and one that prunes; a layer at a time is in memory."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgebolt.common.files import replaced
from edgebolt.comp.blocks import Block, attention_block, ffn_block, keep_heads, keep_neurons, matrix, prunable_blocks
from edgebolt.comp.calls import Calibration, first_sequences, run_layer, scaled_inputs, watching
from edgebolt.comp.heap import trim
from edgebolt.comp.importance import BlockInfluence
from edgebolt.comp.least_squares import Sublayer
from edgebolt.comp.plan import Plan, Survey
from edgebolt.comp.readout import Readout, effect_at_the_end
from edgebolt.comp.recovery import fold, recovered_weight
from edgebolt.comp.selection import RemovalOrder, removal_order

if TYPE_CHECKING:
    from edgebolt.comp.comp import Comp

__all__ = ["Layers", "Seconds", "Slimmed", "prune_layers", "survey_layers"]

PROBED = 0.25  # share of a block's units without which its effect is measured
FREE = 1e-6  # rise of the objective up to which units that went cost nothing


@dataclass
class Slimmed:
    """What is left of one layer.

    Attributes:
        neurons: indices of the neurons that stay, ascending.
        groups: indices of the key-value heads that stay.
        variance: of the mask of the feed-forward part.
        error: share of the feed-forward output's energy that is missing: before the recovery, and after. Of a
            projection with a bias, it is that around the mean.
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

    def readout(self, tokens: Tensor) -> Readout | None:
        """Of a causal language model, among these tokens; None for any other model."""

    def store(self, index: int, layer: nn.Module, slimmed: Slimmed) -> None:
        """Keep a pruned layer, in the model's dtype."""

    def stored(self, index: int) -> Slimmed | None:
        """What is left of a layer that an interrupted run has finished."""


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
class Branch:
    """A few sequences of a model of which one block alone is pruned.

    Attributes:
        index: layer of the block.
        name: of the block.
        hidden: where the sequences are, behind the layers that were run.
    """

    index: int
    name: str
    hidden: Tensor


def counted(calibration: Calibration, batch: int, skip_first: bool) -> Tensor:
    """Which tokens of a batch count: no padding, and without the first where that is asked for."""
    real = calibration.real[batch]
    return real & (real.cumsum(1) > 1) if skip_first else real  # padding may be on the left


def survey_layers(
    layers: Layers,
    calibration: Calibration,
    folder: Path,
    options: Comp,
    seconds: Seconds,
    resumable: bool = False,
    done: Callable[[int], object] = lambda count: None,
) -> Survey:
    """Run the dense model layer by layer: what each does, in which order its units go, and what that does in the end.

    Args:
        layers: of the model.
        calibration: what enters the first layer, which is used up; with what each is called.
        folder: where the sums of each layer go, a file each, to be solved with when the rates are known.
        options: the user's.
        seconds: where the time is added.
        resumable: leave a file with the state after each layer, and go on from it where there is one.
        done: called with the number of layers behind which the run is.

    Returns:
        What was found out.
    """
    hidden, state = calibration.hidden, folder / "survey.safetensors"
    found, branches = Survey([], []), list[Branch]()
    if resumable and state.exists():
        found, branches = _resume(state, hidden)
        done(len(found.importance))
    probes = min(options.effect_sequences, len(hidden[0]))
    measured = options.allocation == "effect" and not options.uniform
    for index in range(len(found.importance), len(layers)):
        entering = hidden[0][:probes].clone()
        influence, sums = _run_dense(layers, calibration, index, options, seconds)
        trim()
        orders, scales = dict[str, RemovalOrder](), dict[str, tuple[Tensor, Tensor | None]]()
        for block, own in sums:
            own.save(_sums_file(folder, index, block.name))
            with seconds.spent("selection"):
                orders[block.name], scale = _order(own, block, options, measured)
            if scale is not None:
                scales[block.name] = scale, None if own.mean is None else own.mean.float()
        del sums, own
        trim()
        if measured:
            with seconds.spent("load"):
                layer = layers.dense(index)
            with seconds.spent("effect"):
                call = first_sequences(calibration.calls[0][index], len(hidden[0]), probes)
                for branch in branches:
                    branch.hidden = run_layer(layer, branch.hidden, call)
                for block in prunable_blocks(layers.kind, layer, layers.config, options.prune_attention):
                    if block.name in scales:
                        with scaled_inputs(layer, block.consumer, *scales[block.name]):
                            branches.append(Branch(index, block.name, run_layer(layer, entering, call)))
            del layer
        found.importance.append(influence.value)
        found.orders.append(orders)
        if resumable:
            with seconds.spent("write"):
                _save(state, hidden, found, branches)
        done(1)
    real = counted(calibration, 0, options.skip_first)[:probes]
    with seconds.spent("effect"):
        tokens = calibration.vocabulary()
        readout = layers.readout(tokens) if branches and tokens is not None else None
        for branch in branches:
            effect = effect_at_the_end(readout, hidden[0][:probes], branch.hidden, real)
            found.orders[branch.index][branch.name].effect = max(effect, 1e-12)
    return found


def _run_dense(
    layers: Layers, calibration: Calibration, index: int, options: Comp, seconds: Seconds
) -> tuple[BlockInfluence, list[tuple[Block, Sublayer]]]:
    """Let all batches pass a layer; its weights are free afterwards."""
    with seconds.spent("load"):
        layer = layers.dense(index)
    influence, sums = BlockInfluence(), list[tuple[Block, Sublayer]]()
    for block in prunable_blocks(layers.kind, layer, layers.config, options.prune_attention):
        consumer: Any = layer.get_submodule(block.consumer)
        sums.append((block, Sublayer(matrix(consumer), centred=consumer.bias is not None)))
    for batch, entering in enumerate(calibration.hidden):
        real = counted(calibration, batch, options.skip_first)
        with seconds.spent("forward"), ExitStack() as stack:
            seen = [stack.enter_context(watching(layer, block.consumer)) for block, _ in sums]
            leaving = run_layer(layer, entering, calibration.calls[batch][index])
            influence.add(entering[real], leaving[real])
        entering.copy_(leaving)
        del leaving
        with seconds.spent("sums"):
            for (_, own), watched in zip(sums, seen, strict=True):
                (inputs,) = watched
                watched.clear()
                own.add(inputs[real])
        del inputs  # the widest of what is held
    return influence, sums


def _order(sums: Sublayer, block: Block, options: Comp, measured: bool) -> tuple[RemovalOrder, Tensor | None]:
    """The order of a block; and what its inputs are scaled by where its effect is measured, zero for units that go."""
    most = max(0, min(int(options.largest_rate * block.units), block.units - 1))
    problem = sums.masks(block.unit, consume=True)
    order = removal_order(problem, most, options.score, options.step, options.variance_bound, options.ridge)
    if not measured or not order.gone:
        return order, None
    # Where a quarter is dead, its removal costs nothing and says nothing of what costs something.
    telling = [gone for gone, rise in zip(order.gone, order.rises, strict=True) if rise > FREE] or order.gone[-1:]
    order.probed = min(telling, key=lambda gone: abs(gone - PROBED * block.units))
    kept = order.kept(order.probed).to(problem.gram.device)
    mask = problem.tuned(kept, options.ridge)
    scale = torch.zeros_like(problem.linear).index_copy_(0, kept, mask)
    return order, scale.repeat_interleave(block.unit).float()


def prune_layers(
    layers: Layers,
    plan: Plan,
    survey: Survey,
    folder: Path,
    options: Comp,
    seconds: Seconds,
    done: Callable[[int], object] = lambda count: None,
) -> dict[int, Slimmed]:
    """Cut each layer that stays to what the plan says, and make up for what went.

    Args:
        layers: source and sink.
        plan: what goes.
        survey: in which order.
        folder: with the sums of the survey.
        options: the user's.
        seconds: where the time is added.
        done: called after each layer.

    Returns:
        What is left, by index of the dense layer.
    """
    slimmed: dict[int, Slimmed] = {}
    for index in range(len(layers)):
        if index not in plan.dropped:
            slimmed[index] = layers.stored(index) or _prune_layer(
                layers, index, plan, survey, folder, options, seconds
            )
        done(1)
    return slimmed


def _prune_layer(
    layers: Layers, index: int, plan: Plan, survey: Survey, folder: Path, options: Comp, seconds: Seconds
) -> Slimmed:
    with seconds.spent("load"):
        layer = layers.dense(index)
    kind, config = layers.kind, layers.config
    left = Slimmed(list(range(ffn_block(kind, layer).units)), list(range(attention_block(kind, layer, config).units)))
    for block in prunable_blocks(layers.kind, layer, layers.config, options.prune_attention):
        remove = (plan.neurons if block.name == "ffn" else plan.groups)[index]
        if not remove:
            continue
        kept = survey.orders[index][block.name].kept(remove)
        consumer = layer.get_submodule(block.consumer)
        with seconds.spent("recovery"):
            sums = Sublayer.load(_sums_file(folder, index, block.name), matrix(consumer))
            found = recovered_weight(
                sums, block, kept.to(sums.gram.device), options.recover, options.ridge, options.variance_bound
            )
            del sums
        if block.name == "attention":
            keep_heads(kind, layer, kept, config)
            left.groups = kept.tolist()
        else:
            keep_neurons(kind, layer, kept)
            left.neurons, left.variance, left.error = kept.tolist(), found.variance, (found.before, found.after)
        fold(consumer, found)
    with seconds.spent("write"):
        layers.store(index, layer, left)
    trim()
    return left


def _sums_file(folder: Path, index: int, name: str) -> Path:
    return folder / f"sums-{index:05d}-{name}.safetensors"


def _save(path: Path, hidden: list[Tensor], found: Survey, branches: list[Branch]) -> None:
    """All that a survey needs to go on behind the layers that it has finished."""
    tensors = {f"hidden.{number}": batch for number, batch in enumerate(hidden)}
    tensors |= {f"branch.{number}": branch.hidden for number, branch in enumerate(branches)}
    notes = {
        "survey": json.dumps(found.to_plain()),
        "branches": json.dumps([(branch.index, branch.name) for branch in branches]),
    }
    with replaced(path, durable=True) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, notes)


def _resume(path: Path, hidden: list[Tensor]) -> tuple[Survey, list[Branch]]:
    with safe_open(path, framework="pt") as file:
        notes = file.metadata()
        for number, batch in enumerate(hidden):
            batch.copy_(file.get_tensor(f"hidden.{number}"))
        branches = [
            Branch(index, name, file.get_tensor(f"branch.{number}"))
            for number, (index, name) in enumerate(json.loads(notes["branches"]))
        ]
    return Survey.from_plain(json.loads(notes["survey"])), branches
