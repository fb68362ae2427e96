"""COMP: layers by importance, then neurons by what the least-squares mask loses with them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from edgebolt.common.files import replaced
from edgebolt.common.text import find_model
from edgebolt.comp.allocation import Allocation
from edgebolt.comp.blocks import attention_block, ffn_block, parameter_count
from edgebolt.comp.calibration_texts import Texts, batches_of, fingerprint
from edgebolt.comp.calls import Calibration, capture, capture_batches, mapped
from edgebolt.comp.checkpoint import Checkpoint, Skeleton
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.plan import Plan, Survey, make_plan
from edgebolt.comp.pruned_models import is_pruned, pruned_class
from edgebolt.comp.recovery import Recovery
from edgebolt.comp.report import Report, versions
from edgebolt.comp.scores import SCORES
from edgebolt.comp.streamed import BESIDE, LayersInFiles
from edgebolt.comp.support import check_supported
from edgebolt.comp.sweep import Layers, Seconds, Slimmed, prune_layers, survey_layers

__all__ = ["Comp"]

MAPPED_ABOVE = 1024**3  # bytes of hidden states


@dataclass(frozen=True, kw_only=True)
class Comp:
    """Structured pruning after training (Xu et al. 2025, arXiv 2501.15255): no gradients, one layer in memory at once.

    From the paper (abstract and digests; its body was not available): whole layers go first, by the cosine between
    what enters and leaves them; every other layer then has a rate of its own; neurons of its dense layers go in
    rounds, by a score built on matrix condition, the variance of the mask being kept in a bound; and the mask of those
    that stay is tuned by least squares. Ours: folding it into the weights, and all formulas and numbers beyond that,
    each of them an argument. Two defaults are not the paper's: no whole layers go, and all of the projection's weight
    is solved for; ``depth_fraction=0.5, recover="mask", ridge=0.01`` is nearer to it.

    One run of the dense model, layer by layer, collects the sums that all is decided and solved with. They lie in
    files until the rates are known: of each layer, ``4 n²`` bytes for ``n`` neurons. Those of a checkpoint are in
    ``output/.pruning``; those of a loaded model in the system's temporary folder, which ``TMPDIR`` chooses.

    Args:
        ratio: share of the parameters of all transformer layers that goes; embeddings and heads stay. 0 changes
            nothing.
        depth_fraction: share of ``ratio`` that whole layers take, rounded down.
        protect: layers that are never dropped; negative indices count from the output.
        allocation: how much each remaining layer loses. ``"effect"``: what costs least at the end of the network goes,
            the cost being measured there for each layer with a quarter of its neurons gone; ``"inverse_importance"``:
            the less important a layer, the more; ``"uniform"``.
        largest_rate: share of its prunable parameters that no layer loses more than.
        score: a name in :data:`~edgebolt.comp.SCORES`.
        step: share of a layer's neurons that a round removes.
        variance_bound: of the mask of a layer: a round that passes it is undone and halved, and in the end the ridge
            grows until the mask keeps to it. With ``recover="lstsq"`` it only shapes the rounds.
        recover: ``"none"``; ``"mask"``, the paper's; ``"lstsq"``: solve for all of the projection's weight.
        ridge: share of the mean diagonal, in all recoveries.
        prune_attention: key-value heads go too, with the query heads that read them.
        round_to: what the number of neurons that are left is a multiple of. 64 suits GPUs and 4-bit blocks.
        uniform: all layers lose equally many neurons, so that transformers loads the result without this package.
        samples: sequences of calibration text.
        length: tokens of each.
        batch_size: sequences that run through a layer at once.
        effect_sequences: how many of the first batch's sequences the effect is measured on.
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
        >>> type(model).__name__, 0.28 < report.ratio < 0.32
        ('CompLlamaForCausalLM', True)
    """

    ratio: float = 0.2
    depth_fraction: float = 0.0
    protect: Sequence[int] = (0,)
    allocation: Allocation = "effect"
    largest_rate: float = 0.7
    score: str = "condition"
    step: float = 0.05
    variance_bound: float = 0.1
    recover: Recovery = "lstsq"
    ridge: float = 0.5
    prune_attention: bool = False
    round_to: int = 8
    uniform: bool = False
    samples: int = 128
    length: int = 128
    batch_size: int = 16
    effect_sequences: int = 4
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
            ("effect_sequences", 1, float("inf")),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ValueError(f"{name}={value!r}: use a number from {low} to {high}.")
        for name in ("round_to", "samples", "length", "batch_size", "effect_sequences"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r}: use a whole number.")
        for name, known in (
            ("allocation", get_args(Allocation)),
            ("recover", get_args(Recovery)),
            ("score", tuple(SCORES)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {known}.")
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
                job and library versions left, which goes on behind the layers that it has finished.
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
            calibration: from :func:`~edgebolt.comp.calls.capture`. Its hidden states are used up: capture anew for
                another pruning.
            digest: names the calibration data in the report.
            progress: show a bar.
        """
        self._check(model.config)
        if not self.uniform:
            pruned_class(type(model))  # raises now rather than after the work
        layers = LayersInMemory(model)
        before, total = parameter_count(model), sum(map(parameter_count, layers.layers))
        units = _units(layers, list(layers.layers))
        self._check_sizes(layers.kind, layers.config, list(layers.layers))
        with tempfile.TemporaryDirectory(prefix="comp-") as folder:
            _map_large(calibration, Path(folder))
            plan, survey, slimmed, seconds = self._passes(
                layers, list(layers.layers), calibration, Path(folder), progress, resumable=False
            )
        if self.ratio:
            layers.apply(self.uniform)
        after = parameter_count(model)
        return Report.of(self, plan, survey, slimmed, before, after, digest, seconds, total, units)

    def _prune_loaded(self, model: Any, texts: Texts, tokenizer: Any, progress: bool) -> Report:
        kind = self._check(getattr(model, "config", None))
        batches = self._batches(texts, tokenizer, kind, model.config)
        calibration = capture_batches(model, batches)
        return self.prune_captured(model, calibration, fingerprint(batches), progress)

    def _prune_files(self, name: str, texts: Texts, output: Path, tokenizer: Any, progress: bool) -> Report:
        import transformers

        folder = _local(name)
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = self._check(config)
        if tokenizer is None and not isinstance(texts, Tensor) and len(texts) and isinstance(texts[0], str):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        batches = self._batches(texts, tokenizer, kind, config)
        digest = fingerprint(batches)
        skeleton = Skeleton(config, Checkpoint(folder))
        if not self.uniform:
            pruned_class(type(skeleton.model))
        weights = sorted(folder / file for file in set(skeleton.checkpoint.files.values()))
        stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weights}
        shapes = list(skeleton.anatomy.layers)
        self._check_sizes(kind, config, shapes)
        job = {
            "comp": _plain(self),
            "model": name,
            "weights": stamps,
            "config": hashlib.sha256((folder / "config.json").read_bytes()).hexdigest(),
            "calibration": digest,
            "versions": versions(),
        }
        _open_output(output, job)
        if (output / "comp.json").exists():  # all was done but to tidy up
            _tidy(output)
            return Report.load(output / "comp.json")
        before, total = parameter_count(skeleton.model), sum(map(parameter_count, skeleton.anatomy.layers))
        dense_bytes = sum(size for size, _ in stamps.values())
        skeleton.open_embeddings(torch.cat([batch["input_ids"].flatten() for batch in batches]))
        model = skeleton.model
        layers = LayersInFiles(skeleton, output)
        units = _units(layers, shapes)
        hidden_bytes = 4 * config.hidden_size * sum(batch["input_ids"].numel() for batch in batches)
        large = hidden_bytes > MAPPED_ABOVE
        place = Path(tempfile.mkdtemp(prefix="hidden-", dir=layers.parts)) if large else None
        calibration = capture(model, [partial(model, **batch) for batch in batches], place)
        plan, survey, slimmed, seconds = self._passes(
            layers, shapes, calibration, layers.parts, progress, resumable=True
        )
        with seconds.spent("write"):
            layers.assemble(self.uniform)
        small = Checkpoint(output)
        after = before - skeleton.checkpoint.parameters(skeleton.names.values()) + small.parameters(small.files)
        report = Report.of(self, plan, survey, slimmed, before, after, digest, seconds, total, units)
        report.base = name
        small_bytes = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        report.files = (dense_bytes, small_bytes)
        report.save(output / "comp.json")
        _tidy(output)
        return report

    def _check(self, config: Any) -> str:
        if config is None:
            raise TypeError("The model has no config: pass a transformers model, a folder, or a name on the hub.")
        kind = check_supported(config)
        if self.uniform and is_pruned(config):
            raise ValueError("uniform=True: the model has unequal layers already. Start from the dense one.")
        if self.uniform and getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise ValueError(
                "uniform=True: this model scales the attention of each layer by its place, and transformers would "
                "take the new places for it. Leave uniform out."
            )
        return kind

    def _check_sizes(self, kind: str, config: Any, shapes: list[nn.Module]) -> None:
        """Whether as much can go: that is known before anything is run."""
        make_plan(kind, config, shapes, _alike(shapes), replace(self, allocation="uniform"))

    def _batches(self, texts: Texts, tokenizer: Any, kind: str, config: Any) -> list[dict[str, Tensor]]:
        padded, pad = kind in ("bert", "roberta", "mpnet"), getattr(config, "pad_token_id", None) or 0
        return batches_of(texts, tokenizer, self.samples, self.length, self.batch_size, self.seed, padded, pad)

    def _passes(
        self,
        layers: Layers,
        shapes: list[nn.Module],
        calibration: Calibration,
        folder: Path,
        progress: bool,
        resumable: bool,
    ) -> tuple[Plan, Survey, dict[int, Slimmed], Seconds]:
        """Survey, plan, prune; what is left in the folder lets an interrupted run go on."""
        seconds = Seconds()
        with tqdm(total=2 * len(layers), desc="COMP", unit="layer", disable=not progress) as bar:
            if self.ratio:
                survey = survey_layers(layers, calibration, folder, self, seconds, resumable, bar.update)
            else:
                survey = _alike(shapes)
                bar.update(len(layers))
            calibration.forget()
            plan = make_plan(layers.kind, layers.config, shapes, survey, self)
            slimmed = prune_layers(layers, plan, survey, folder, self, seconds, bar.update)
        return plan, survey, slimmed, seconds


def _alike(shapes: list[nn.Module]) -> Survey:
    """Of layers that nothing is known of."""
    return Survey([1.0] * len(shapes), [{} for _ in shapes])


def _plain(options: Comp) -> dict[str, Any]:
    return {**asdict(options), "protect": list(options.protect)}


def _units(layers: Layers, modules: list[nn.Module]) -> tuple[int, int]:
    """Neurons and key-value heads of the largest layer."""
    neurons = max(ffn_block(layers.kind, layer).units for layer in modules)
    return neurons, max(attention_block(layers.kind, layer, layers.config).units for layer in modules)


def _local(name: str) -> Path:
    """The folder of a checkpoint: itself, or where the hub's files are kept."""
    place = Path(find_model(name))
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(place), allow_patterns=["*.safetensors", "*.json", *BESIDE]))


def _map_large(calibration: Calibration, folder: Path) -> None:
    """Move large hidden states to mapped files, if they are on the CPU."""
    batches = calibration.hidden
    if not batches[0].is_cuda and sum(batch.nbytes for batch in batches) > MAPPED_ABOVE:
        calibration.folder = Path(tempfile.mkdtemp(prefix="hidden-", dir=folder))
        for number, batch in enumerate(batches):
            batches[number] = mapped(batch, calibration.folder / f"{number}.bin")


def _open_output(output: Path, job: dict[str, Any]) -> None:
    """Make or re-enter the folder of a run."""
    parts = output / ".pruning"
    note = parts / "job.json"
    if note.exists():
        was, now = _flat(json.loads(note.read_text())), _flat(json.loads(json.dumps(job)))
        different = sorted(key for key in was | now if (key in was, was.get(key)) != (key in now, now.get(key)))
        if different:
            raise FileExistsError(
                f"{output} holds an interrupted run with other {different}: run it again as it was, or remove "
                f"{parts}, or choose another output."
            )
    elif output.exists() and any(path != parts for path in output.iterdir()):
        raise FileExistsError(f"output={str(output)!r} is not empty: choose a new folder.")
    parts.mkdir(parents=True, exist_ok=True)
    # What a run that was killed was in the middle of.
    for left in (*parts.glob("hidden-*"), *parts.glob(".*.partial"), *output.glob(".*.partial")):
        _remove(left)
    with replaced(note, durable=True) as partial_file:
        partial_file.write_text(json.dumps(job))


def _flat(job: dict[str, Any]) -> dict[str, Any]:
    """Options and libraries beside the rest, under the names by which a message calls them."""
    rest = {key: value for key, value in job.items() if key not in ("comp", "versions")}
    libraries = {f"version of {name}": value for name, value in job.get("versions", {}).items()}
    return {**job.get("comp", {}), **libraries, **rest}


def _tidy(output: Path) -> None:
    """Remove what a run went on from. The job goes last: by it the run is known if this is broken off."""
    parts = output / ".pruning"
    for path in parts.iterdir():
        if path.name != "job.json":
            _remove(path)
    shutil.rmtree(parts)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
