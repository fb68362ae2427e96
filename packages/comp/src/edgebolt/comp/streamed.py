"""Pruning files: a layer is read, pruned and written before the next is read."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgebolt.common.files import replaced
from edgebolt.comp.calls import family_of
from edgebolt.comp.checkpoint import Skeleton
from edgebolt.comp.mpnet import kept_heads
from edgebolt.comp.pruned_models import pruned_class, pruned_config, stock_config
from edgebolt.comp.readout import Readout
from edgebolt.comp.sweep import Slimmed

__all__ = ["LayersInFiles"]

# What comes along from beside the weights. Not the model card, which describes the dense model; not code, as nothing
# here runs it; nor anything that is not known, which may be the weights in another format.
BESIDE = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*.txt",
    "unigram.json",
    "bpe.codes",
    "*.model",  # SentencePiece
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "modules.json",  # sentence-transformers: its list of modules, and those behind the model, whose width stays
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "[0-9]_*/*",
)

ONE_FILE_UP_TO = 2 * 1024**3  # bytes; larger models stay in one file a layer


class LayersInFiles:
    """The layers of a checkpoint, and a folder where the pruned ones are put together.

    Each pruned layer is a file of its own in ``output/.pruning`` until the last is done, so that an interrupted run
    goes on behind the layers that it has finished.

    Args:
        skeleton: the dense model.
        output: folder of the pruned model.
    """

    def __init__(self, skeleton: Skeleton, output: Path) -> None:
        self.skeleton, self.output, self.config = skeleton, output, skeleton.config
        self.kind = family_of(self.config)
        self.parts = output / ".pruning"
        self.dtype = skeleton.dtype

    def __len__(self) -> int:
        return len(self.skeleton.anatomy.layers)

    def dense(self, index: int) -> nn.Module:
        """Read from the checkpoint."""
        return self.skeleton.layer(index)

    def readout(self, tokens: Tensor) -> Readout | None:
        """Of the head, which may be the embeddings, these rows are read."""
        anatomy, names = self.skeleton.anatomy, self.skeleton.names
        if anatomy.family.norm is None or not isinstance(getattr(anatomy.model, "lm_head", None), nn.Linear):
            return None
        stored = names.get("lm_head.weight") or names[f"{anatomy.prefix}{anatomy.family.embedding}.weight"]
        rows = self.skeleton.checkpoint.rows(stored, tokens.tolist())
        return Readout(anatomy.backbone.get_submodule(anatomy.family.norm), rows)

    def _part(self, index: int) -> Path:
        return self.parts / f"layer-{index:05d}.safetensors"

    def store(self, index: int, layer: nn.Module, slimmed: Slimmed) -> None:
        """Write a file."""
        layer = layer.to(self.dtype)
        tensors = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
        plain = slimmed.to_plain()
        if self.kind == "mpnet":
            plain["heads"] = kept_heads(layer)
        with replaced(self._part(index), durable=True) as partial:
            save_file(tensors, partial, metadata={"slimmed": json.dumps(plain)})

    def stored(self, index: int) -> Slimmed | None:
        """What that file says."""
        if not self._part(index).exists():
            return None
        plain = self._slimmed(index)
        plain.pop("heads", None)
        return Slimmed(**{**plain, "error": tuple(plain["error"])})

    def _slimmed(self, index: int) -> dict[str, Any]:
        with safe_open(self._part(index), framework="pt") as file:
            return dict(json.loads(file.metadata()["slimmed"]))

    def assemble(self, uniform: bool) -> None:
        """Put the pruned model together: weights, then the config, without which nothing can be loaded.

        Args:
            uniform: write a config of the stock class, all layers being equally wide.
        """
        positions = sorted(int(path.stem.removeprefix("layer-")) for path in self.parts.glob("layer-*.safetensors"))
        self._write_weights(positions)
        parts = [self._slimmed(index) for index in positions]
        before = getattr(self.config, "pruned", None) or {}
        names = before.get("layers") or list(range(len(self)))
        pruned: dict[str, Any] = {
            "layers": [names[index] for index in positions],
            "neurons": [len(part["neurons"]) for part in parts],
            "groups": [len(part["groups"]) for part in parts],
        }
        if self.kind == "mpnet":
            pruned["heads"] = [part["heads"] for part in parts]
        config = self._pruned_config(positions, pruned, uniform)
        self._copy_beside()
        with replaced(self.output / "config.json", durable=True) as partial:
            partial.write_text(config.to_json_string())

    def _pruned_config(self, positions: list[int], pruned: dict[str, Any], uniform: bool) -> Any:
        config = copy.deepcopy(self.config)
        if uniform:
            stock_config(config, positions, pruned["neurons"][0])
        else:
            pruned_config(config, pruned_class(type(self.skeleton.model)), positions, pruned)
        config.dtype = self.dtype
        return config

    def _write_weights(self, positions: list[int]) -> None:
        """One file, or one for each layer of a large model and one for the rest."""
        skeleton = self.skeleton
        inside = f"{skeleton.anatomy.prefix}{skeleton.anatomy.family.layers}."
        rest = {
            name: skeleton.checkpoint.tensor(stored)
            for name, stored in skeleton.names.items()
            if not name.startswith(inside)
        }
        sizes = sum(self._part(index).stat().st_size for index in positions)
        sizes += sum(tensor.nbytes for tensor in rest.values())
        if sizes <= ONE_FILE_UP_TO:
            for number, index in enumerate(positions):
                rest.update(self._renamed(index, number))
            self._save(rest, "model.safetensors")
            return
        count = len(positions) + 1
        weight_map: dict[str, str] = {}
        for number in range(count):
            tensors = rest if number == 0 else self._renamed(positions[number - 1], number - 1)
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._save(tensors, name)
            weight_map.update(dict.fromkeys(tensors, name))
        with replaced(self.output / "model.safetensors.index.json", durable=True) as partial:
            partial.write_text(json.dumps({"metadata": {"total_size": sizes}, "weight_map": weight_map}, indent=1))

    def _save(self, tensors: dict[str, Tensor], name: str) -> None:
        with replaced(self.output / name, durable=True) as partial:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, {"format": "pt"})

    def _renamed(self, index: int, number: int) -> dict[str, Tensor]:
        prefix = self.skeleton.layer_prefix(number)
        with safe_open(self._part(index), framework="pt") as file:
            return {f"{prefix}{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _copy_beside(self) -> None:
        """Tokenizer, chat templates, generation config, licence: :data:`BESIDE`."""
        folder = self.skeleton.checkpoint.folder
        for path in sorted({path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()}):
            target = self.output / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
