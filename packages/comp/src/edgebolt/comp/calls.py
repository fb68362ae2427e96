"""Running the layers of a model one by one: what the first gets, and what each is called with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgebolt.common.anatomy import Anatomy
from edgebolt.comp.blocks import stub_type

__all__ = [
    "Calibration",
    "Call",
    "capture",
    "capture_batches",
    "first_sequences",
    "run_layer",
    "scaled_inputs",
    "watching",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Calibration:
    """Hidden states of calibration batches, and with what each layer is called.

    Attributes:
        hidden: a batch each: float32, sequences by tokens by width; what enters the first layer.
        calls: a batch each, a layer each: the other arguments.
        real: a batch each: bool, sequences by tokens; False where there is padding.
        ids: a batch each: the token ids, where the model was given such.
        folder: of the files that hidden states are mapped to; None: they are in memory.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    real: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    folder: Path | None = None

    def forget(self) -> None:
        """Let the hidden states go, and their files."""
        self.hidden.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def vocabulary(self) -> Tensor | None:
        """All tokens that occur, ascending; None if some batch was no token ids."""
        if len(self.ids) < len(self.hidden):
            return None
        occurring: Tensor = torch.cat([ids.flatten() for ids in self.ids]).unique()  # type: ignore[no-untyped-call]
        return occurring


class _EnoughError(Exception):
    """The last layer was called: what comes after it need not run."""


class _Recorder(nn.Module):
    """Stands in a layer's place, notes what it is called with and gives the hidden states back."""

    def __init__(self, notes: list[tuple[Tensor, Call]], last: bool, wrap: type[tuple[Tensor]] | None) -> None:
        super().__init__()
        self.notes, self.last, self.wrap = notes, last, wrap

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.notes.append((hidden, (args, kwargs)))
        if self.last:
            raise _EnoughError
        return (hidden,) if self.wrap is tuple else hidden


def mapped(hidden: Tensor, file: Path) -> Tensor:
    """A float32 copy that is mapped to a file."""
    flat = torch.from_file(str(file), shared=True, size=hidden.numel(), dtype=torch.float32)
    return flat.view(hidden.shape).copy_(hidden)


def capture(model: nn.Module, runs: list[Callable[[], object]], folder: Path | None = None) -> Calibration:
    """Run the model once for each batch, its layers left out, and note what the layers would have got.

    Args:
        model: a transformers model.
        runs: each runs the model on one batch, in whatever way.
        folder: where the hidden states are mapped to files, as they come; None: they stay in memory.

    Raises:
        ValueError: if a run did not reach the layers.
    """
    anatomy = Anatomy(model)
    layers = anatomy.layers
    dense = list(layers)
    calibration = Calibration(folder=folder)
    masks: list[Tensor | None] = []
    seen: list[Tensor] = []

    def note_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        masks.append(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor):
            seen.append(ids)

    hook = anatomy.backbone.register_forward_pre_hook(note_mask, with_kwargs=True)
    try:
        for run in runs:
            notes: list[tuple[Tensor, Call]] = []
            for index in range(len(dense)):
                wrap = stub_type(family_of(model.config))
                layers[index] = _Recorder(notes, index == len(dense) - 1, wrap)
            with torch.no_grad():
                try:
                    run()
                except _EnoughError:
                    pass
                else:
                    raise ValueError(
                        f"A calibration batch ran through {type(model).__name__} without reaching its last layer: "
                        "it must call the model's forward."
                    )
            hidden = notes[0][0]
            real = masks[-1]
            real = torch.ones(hidden.shape[:2], dtype=torch.bool) if real is None else real.bool()
            if folder is None:
                calibration.hidden.append(hidden.detach().to(torch.float32, copy=True))
            else:
                calibration.hidden.append(mapped(hidden.detach(), folder / f"{len(calibration.hidden)}.bin"))
            calibration.calls.append(_without_cache([call for _, call in notes]))
            calibration.real.append(real.to(hidden.device))
            calibration.ids += seen[-1:]
            seen.clear()
    finally:
        hook.remove()
        for index, layer in enumerate(dense):
            layers[index] = layer
    return calibration


def _without_cache(calls: list[Call]) -> list[Call]:
    """The same calls, in float32 and without a key-value cache, which a second run of a layer would add to."""
    known: dict[int, Any] = {}  # tensors that all layers share stay one

    def plain(value: Any) -> Any:
        if id(value) in known:
            return known[id(value)]
        result = value
        if isinstance(value, Tensor):
            result = value.float() if value.is_floating_point() else value
        elif isinstance(value, tuple):
            result = tuple(plain(item) for item in value)
        elif hasattr(value, "update") and hasattr(value, "get_seq_length"):
            result = None
        known[id(value)] = result
        return result

    return [
        (
            tuple(plain(value) for value in args),
            {name: plain(value) if name != "use_cache" else False for name, value in kwargs.items()},
        )
        for args, kwargs in calls
    ]


def family_of(config: Any) -> str:
    """``model_type`` of the dense family."""
    return str(config.model_type).removeprefix("comp_")


def run_layer(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Hidden states after one layer."""
    args, kwargs = call
    with torch.no_grad():
        out = layer(hidden, *args, **kwargs)
    after: Tensor = out[0] if isinstance(out, tuple) else out
    return after


def capture_batches(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Calibration:
    """:func:`capture` of a model that is run on batches of arguments, in evaluation mode."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        runs: list[Callable[[], object]] = [
            partial(model, **{name: tensor.to(device) for name, tensor in batch.items()}) for batch in batches
        ]
        return capture(model, runs)
    finally:
        model.train(training)


@contextmanager
def watching(layer: nn.Module, path: str) -> Iterator[list[Tensor]]:
    """A list that gets what the projection at ``path`` is given, each time that the layer runs."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    hook = layer.get_submodule(path).register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def scaled_inputs(layer: nn.Module, path: str, scale: Tensor, mean: Tensor | None = None) -> Iterator[None]:
    """Inside the block, the projection at ``path`` gets its inputs multiplied by ``scale``, one number each.

    With a ``mean``, they are scaled around it: what is missing on average is as if it were in the projection's bias.
    """

    def scaled(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = args[0] * scale if mean is None else (args[0] - mean) * scale + mean
        return inputs, *args[1:]

    hook = layer.get_submodule(path).register_forward_pre_hook(scaled)
    try:
        yield
    finally:
        hook.remove()


def first_sequences(call: Call, sequences: int, count: int) -> Call:
    """The call of a layer with the first of a batch's sequences; what all sequences share stays."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:count] if value.dim() > 1 and len(value) == sequences else value
        return tuple(cut(item) for item in value) if isinstance(value, tuple) else value

    args, kwargs = call
    return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}
