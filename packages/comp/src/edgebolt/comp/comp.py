"""COMP: layers by importance, then neurons by what the least-squares mask loses with them."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from edgebolt.common.files import replaced
from edgebolt.common.text import find_model
from edgebolt.comp.allocation import Allocation
from edgebolt.comp.blocks import attention_block, ffn_block, parameter_count
from edgebolt.comp.calibration_texts import Texts, batches_of, fingerprint
from edgebolt.comp.calls import Calibration, capture, capture_batches
from edgebolt.comp.checkpoint import Checkpoint, Skeleton
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.plan import Plan, make_plan
from edgebolt.comp.pruned_models import is_pruned, pruned_class
from edgebolt.comp.recovery import Recovery
from edgebolt.comp.report import Report
from edgebolt.comp.scores import SCORES
from edgebolt.comp.streamed import LayersInFiles
from edgebolt.comp.support import check_supported
from edgebolt.comp.sweep import Layers, Seconds, Streams, layer_importance, prune_layers

__all__ = ["Comp"]

MAPPED_ABOVE = 1024**3  # bytes of one stream of hidden states


@dataclass(frozen=True, kw_only=True)
class Comp:
    """Structured pruning after training (Xu et al. 2025, arXiv 2501.15255): no gradients, one layer in memory at once.

    From the paper (abstract and digests; its body was not available): whole layers go first, by the cosine between
    what enters and leaves them; every other layer then has a rate of its own; neurons of its dense layers go in
    rounds, by a score built on matrix condition, the variance of the mask being kept in a bound; and the mask of those
    that stay is tuned by least squares and folded into the weights. Ours: all formulas and numbers beyond that, each
    of them an argument.

    Args:
        ratio: share of the parameters of all transformer layers that goes; embeddings and heads stay. 0 changes
            nothing.
        depth_fraction: share of ``ratio`` that whole layers take, rounded down.
        protect: layers that are never dropped; negative indices count from the output.
        allocation: ``"inverse_importance"``: the less important a remaining layer, the more it loses;
            ``"uniform"``.
        largest_rate: share of its prunable parameters that no layer loses more than.
        score: a name in :data:`~edgebolt.comp.SCORES`.
        step: share of a layer's neurons that a round removes.
        variance_bound: of the mask of a layer.
        at_bound: what happens there: ``"damp"``: the ridge grows until the mask varies less; ``"hand_on"``: the last
            round is undone and halved, and what the layer still should lose, the layers behind it do, as far as they
            can (``Report.unmet`` says what nobody could).
        recover: ``"none"``; ``"mask"``, the paper's; ``"lstsq"``: solve for all of the projection's weight.
        target: ``"sublayer"``: the projection is to give what it gave in the dense model; ``"residual"``: it also is
            to make up for what is missing in the sum that it is added to (not for encoders, which normalise there).
        ridge: share of the mean diagonal, in all recoveries.
        prune_attention: key-value heads go too, with the query heads that read them, at the same rate.
        round_to: what the number of neurons that are left is a multiple of. 64 suits GPUs and 4-bit blocks.
        uniform: all layers lose equally many neurons, so that transformers loads the result without this package.
        samples: sequences of calibration text.
        length: tokens of each.
        batch_size: sequences that run through a layer at once.
        skip_first: leave the first token of each sequence, an attention sink in many models, out of all sums.
        seed: of the draw of the calibration texts.

    Raises:
        ValueError: for an argument that is out of range.

    Example::

        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=16, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        ...                      vocab_size=50)
        >>> model = LlamaForCausalLM(config)
        >>> report = Comp(ratio=0.3).prune(model, torch.randint(50, (8, 32)), progress=False)
        >>> type(model).__name__, len(model.model.layers) < 5, 0.28 < report.ratio < 0.32
        ('CompLlamaForCausalLM', True, True)
    """

    ratio: float = 0.2
    depth_fraction: float = 0.5
    protect: Sequence[int] = (0,)
    allocation: Allocation = "inverse_importance"
    largest_rate: float = 0.8
    score: str = "condition"
    step: float = 0.05
    variance_bound: float = 0.1
    at_bound: Literal["damp", "hand_on"] = "damp"
    recover: Recovery = "mask"
    target: Literal["sublayer", "residual"] = "sublayer"
    ridge: float = 1e-2
    prune_attention: bool = False
    round_to: int = 8
    uniform: bool = False
    samples: int = 128
    length: int = 128
    batch_size: int = 16
    skip_first: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("ratio", 0, 0.95),
            ("depth_fraction", 0, 1),
            ("largest_rate", 0.01, 0.99),
            ("step", 1e-6, 1),
            ("variance_bound", 0, float("inf")),
            ("ridge", 1e-12, float("inf")),
            ("round_to", 1, 4096),
            ("samples", 1, float("inf")),
            ("length", 2, float("inf")),
            ("batch_size", 1, float("inf")),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name}={value!r}: use a number from {low} to {high}.")
        for name in ("round_to", "samples", "length", "batch_size"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r}: use a whole number.")
        for name, known in (
            ("allocation", ("inverse_importance", "uniform")),
            ("recover", ("none", "mask", "lstsq")),
            ("target", ("sublayer", "residual")),
            ("score", tuple(SCORES)),
            ("at_bound", ("damp", "hand_on")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {known}.")
        if self.uniform and self.at_bound == "hand_on":
            raise ValueError("uniform=True with at_bound='hand_on': layers that hand on are not equally wide.")
        if self.uniform and self.prune_attention:
            raise ValueError(
                "uniform=True with prune_attention=True: transformers' own classes cannot express fewer heads at the "
                "same head size. Leave one of them out."
            )

    def prune(
        self,
        model: str | Path | nn.Module,
        texts: Texts,
        output: str | Path | None = None,
        tokenizer: Any = None,
        progress: bool = True,
    ) -> Report:
        """Prune a model.

        Args:
            model: a folder or name of a checkpoint, which is read and written a layer at a time; or a loaded
                transformers model, which is changed in place.
            texts: calibration: strings, lists of token ids, or int64 of sequences by tokens.
            output: folder of the pruned model, for a checkpoint. It is new, or one that an interrupted run of the same
                job left, which goes on behind the layers that it has finished.
            tokenizer: of the model; None: that which lies beside the checkpoint.
            progress: show a bar.

        Returns:
            What was removed. For a checkpoint it lies in ``output/comp.json`` too.

        Raises:
            NotImplementedError: for a family that cannot be pruned; the message says what can be done.
            ValueError: for texts that are too short, and for more than can go.
            FileExistsError: if ``output`` holds something else.
        """
        if isinstance(model, nn.Module):
            if output is not None:
                raise ValueError(
                    f"output={str(output)!r}: a loaded model is changed in place; call its save_pretrained."
                )
            return self._prune_loaded(model, texts, tokenizer, progress)
        if output is None:
            raise ValueError("output=None: name the folder of the pruned model, or pass a loaded model.")
        return self._prune_files(str(model), texts, Path(output), tokenizer, progress)

    def prune_captured(self, model: Any, calibration: Calibration, digest: str = "", progress: bool = True) -> Report:
        """Prune a loaded model on hidden states that were captured from it, whatever the batches looked like.

        Args:
            model: a transformers model, changed in place.
            calibration: from :func:`~edgebolt.comp.calls.capture`.
            digest: names the calibration data in the report.
            progress: show a bar.
        """
        self._check(model.config)
        if not self.uniform:
            pruned_class(type(model))  # raises now rather than after the work
        layers = LayersInMemory(model)
        before, total = parameter_count(model), sum(map(parameter_count, layers.layers))
        units = _units(layers, list(layers.layers))
        seconds, bar = Seconds(), _bar(len(layers), progress)
        with bar:
            plan, slimmed, unmet = self._passes(layers, list(layers.layers), calibration, seconds, bar, None)
        if self.ratio:
            layers.apply(self.uniform)
        after = parameter_count(model)
        return Report.of(self, plan, slimmed, unmet, before, after, digest, seconds, total, units)

    def _prune_loaded(self, model: Any, texts: Texts, tokenizer: Any, progress: bool) -> Report:
        kind = self._check(getattr(model, "config", None))
        batches = self._batches(texts, tokenizer, kind)
        calibration = capture_batches(model, batches)
        return self.prune_captured(model, calibration, fingerprint(batches), progress)

    def _prune_files(self, name: str, texts: Texts, output: Path, tokenizer: Any, progress: bool) -> Report:
        import transformers

        folder = _local(name)
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = self._check(config)
        if tokenizer is None and not isinstance(texts, Tensor) and len(texts) and isinstance(texts[0], str):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        batches = self._batches(texts, tokenizer, kind)
        digest = fingerprint(batches)
        skeleton = Skeleton(config, Checkpoint(folder))
        if not self.uniform:
            pruned_class(type(skeleton.model))
        weights = sorted(folder / file for file in set(skeleton.checkpoint.files.values()))
        stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weights}
        job = {"comp": _plain(self), "model": name, "weights": stamps, "calibration": digest}
        state = _open_output(output, job)
        before, total = parameter_count(skeleton.model), sum(map(parameter_count, skeleton.anatomy.layers))
        dense_bytes = sum(size for size, _ in stamps.values())
        skeleton.open_embeddings(torch.cat([batch["input_ids"].flatten() for batch in batches]))
        model = skeleton.model
        calibration = capture(model, [partial(model, **batch) for batch in batches])
        layers = LayersInFiles(skeleton, output)
        units = _units(layers, list(skeleton.anatomy.layers))
        seconds, bar = Seconds(), _bar(len(layers), progress)
        with bar:
            plan, slimmed, unmet = self._passes(
                layers, list(skeleton.anatomy.layers), calibration, seconds, bar, state
            )
        with seconds.spent("write"):
            layers.assemble(self.uniform)
        after = before - _removed(skeleton, output)
        report = Report.of(self, plan, slimmed, unmet, before, after, digest, seconds, total, units)
        report.base = name
        small_bytes = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        report.files = (dense_bytes, small_bytes)
        report.save(output / "comp.json")
        shutil.rmtree(layers.parts)
        return report

    def _check(self, config: Any) -> str:
        if config is None:
            raise TypeError("The model has no config: pass a transformers model, a folder, or a name on the hub.")
        kind = check_supported(config)
        if self.target == "residual" and kind in ("bert", "roberta", "mpnet"):
            raise ValueError(f"target='residual': {kind} normalises the sum, so use 'sublayer'.")
        if self.uniform and is_pruned(config):
            raise ValueError("uniform=True: the model has unequal layers already. Start from the dense one.")
        if self.uniform and getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise ValueError(
                "uniform=True: this model scales the attention of each layer by its place, and transformers would "
                "take the new places for it. Leave uniform out."
            )
        return kind

    def _batches(self, texts: Texts, tokenizer: Any, kind: str) -> list[dict[str, Tensor]]:
        padded = kind in ("bert", "roberta", "mpnet")
        return batches_of(texts, tokenizer, self.samples, self.length, self.batch_size, self.seed, padded)

    def _passes(
        self,
        layers: Layers,
        shapes: list[nn.Module],
        calibration: Calibration,
        seconds: Seconds,
        bar: Any,
        state: Path | None,
    ) -> tuple[Plan, dict[int, Any], int]:
        with _streams(calibration) as streams:
            if state is not None and state.exists():
                plan = Plan(**json.loads(state.read_text()))
                bar.update(len(layers))
            else:
                if self.ratio:
                    importance = layer_importance(
                        layers, calibration, streams.copy(), seconds, self.skip_first, bar.update
                    )
                else:
                    importance = [1.0] * len(layers)
                    bar.update(len(layers))
                plan = make_plan(layers.kind, layers.config, shapes, importance, self)
                if state is not None:
                    with replaced(state, durable=True) as partial_file:
                        partial_file.write_text(json.dumps(plan.to_plain()))
            slimmed, unmet = prune_layers(layers, calibration, streams, plan, self, seconds, bar.update)
        return plan, slimmed, unmet


def _plain(options: Comp) -> dict[str, Any]:
    return {**asdict(options), "protect": list(options.protect)}


def _removed(skeleton: Skeleton, output: Path) -> int:
    """Parameters that the files no longer hold."""
    small = Checkpoint(output)
    after = 0
    for name in small.files:
        after += small.tensor(name).numel()
    dense = sum(skeleton.checkpoint.tensor(stored).numel() for stored in skeleton.names.values())
    return dense - after


def _units(layers: Layers, modules: list[nn.Module]) -> tuple[int, int]:
    """Neurons and key-value heads of the largest layer."""
    neurons = max(ffn_block(layers.kind, layer).units for layer in modules)
    return neurons, max(attention_block(layers.kind, layer, layers.config).units for layer in modules)


def _bar(layers: int, progress: bool) -> Any:
    return tqdm(total=2 * layers, desc="COMP", unit="layer", disable=not progress)


def _local(name: str) -> Path:
    """The folder of a checkpoint: itself, or where the hub's files are kept."""
    place = Path(find_model(name))
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(place), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))


@contextlib.contextmanager
def _streams(calibration: Calibration) -> Iterator[Streams]:
    """The first layer's input, in mapped files where it is large."""
    size = sum(batch.nbytes for batch in calibration.hidden)
    if size <= MAPPED_ABOVE:
        yield Streams(calibration.hidden)
        return
    with tempfile.TemporaryDirectory(prefix="comp-") as folder:
        mapped = Streams(calibration.hidden, Path(folder)).copy()
        calibration.hidden.clear()
        yield mapped


def _open_output(output: Path, job: dict[str, Any]) -> Path:
    """Make or re-enter the folder of a run; returns the file of its plan."""
    parts = output / ".pruning"
    note = parts / "job.json"
    if note.exists():
        was = json.loads(note.read_text())
        if was != json.loads(json.dumps(job)):
            different = sorted(
                {key for key in job["comp"] if was["comp"].get(key) != json.loads(json.dumps(job["comp"][key]))}
                | {key for key in ("model", "weights", "calibration") if was[key] != job[key]}
            )
            raise FileExistsError(
                f"{output} holds an interrupted run with other {different}: run it again as it was, or remove "
                f"{parts}, or choose another output."
            )
    elif output.exists() and any(path != parts for path in output.iterdir()):
        raise FileExistsError(f"output={str(output)!r} is not empty: choose a new folder.")
    parts.mkdir(parents=True, exist_ok=True)
    with replaced(note, durable=True) as partial_file:
        partial_file.write_text(json.dumps(job))
    return parts / "plan.json"
