"""Safetensors checkpoints, read a layer at a time."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from edgebolt.common.anatomy import Anatomy

__all__ = ["Checkpoint", "GatheredEmbedding", "Skeleton"]


class Checkpoint:
    """The tensors of a folder of safetensors.

    Args:
        folder: with ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.

    Raises:
        FileNotFoundError: if there are none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if single.exists():  # in the order in which transformers looks for them
            with safe_open(single, framework="pt") as file:
                self.files: dict[str, str] = dict.fromkeys(file.keys(), single.name)
        elif index.exists():
            self.files = json.loads(index.read_text())["weight_map"]
        else:
            raise FileNotFoundError(
                f"{folder} holds neither model.safetensors nor model.safetensors.index.json. For a checkpoint in "
                "another format, load it with transformers and call save_pretrained, or pass the loaded model."
            )

    def tensor(self, name: str) -> Tensor:
        """One tensor, as it is stored."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def parameters(self, names: Iterable[str]) -> int:
        """How many numbers some tensors hold; read from the heads of the files."""
        names, count = list(names), 0
        for shard in sorted({self.files[name] for name in names}):
            with safe_open(self.folder / shard, framework="pt") as file:
                shapes = [file.get_slice(name).get_shape() for name in names if self.files[name] == shard]
            count += sum(map(math.prod, shapes))
        return count

    def rows(self, name: str, indices: Iterable[int]) -> Tensor:
        """Some rows of a matrix, the others unread."""
        with safe_open(self.folder / self.files[name], framework="pt") as file:
            matrix = file.get_slice(name)
            return torch.cat([matrix[index : index + 1] for index in indices])


class GatheredEmbedding(nn.Module):
    """An embedding of the tokens that occur, in the place of the whole table."""

    def __init__(self, tokens: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.tokens, self.rows = tokens, rows

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the tokens ``ids``."""
        return self.rows[torch.searchsorted(self.tokens, ids)]


class Skeleton:
    """A model without weights, whose parts are filled from a checkpoint when they are needed.

    Args:
        config: of the model.
        checkpoint: its tensors.

    Raises:
        ValueError: if the checkpoint lacks a tensor that the model has: nothing is made up; or if its config names no
            class of transformers.
    """

    def __init__(self, config: Any, checkpoint: Checkpoint) -> None:
        self.config, self.checkpoint = config, checkpoint
        from edgebolt.comp import pruned_models

        names = config.architectures or [""]
        made = getattr(transformers, names[0], None) or getattr(pruned_models, names[0], None)
        if made is None:
            raise ValueError(
                f"{checkpoint.folder / 'config.json'} has architectures={config.architectures}, of which transformers "
                "knows none: write there what the weights are of, such as LlamaForCausalLM, lest a head is lost."
            )
        with torch.device("meta"):
            self.model: Any = made(config)
        self.model.eval()
        self.anatomy = Anatomy(self.model)
        self.names = self._match()

    @property
    def dtype(self) -> torch.dtype:
        """Of the layers' weights in the checkpoint."""
        name = next(name for name in self.names if name.startswith(self.layer_prefix(0)))
        return self.checkpoint.tensor(self.names[name]).dtype

    def layer_prefix(self, index: int) -> str:
        """What the names of a layer's parameters begin with."""
        return f"{self.anatomy.prefix}{self.anatomy.family.layers}.{index}."

    def _match(self) -> dict[str, str]:
        """Names in the model -> names in the checkpoint, which may lack the backbone's prefix or have old names."""
        base = f"{self.model.base_model_prefix}."
        tied = set(self.model.all_tied_weights_keys)
        found: dict[str, str] = {}
        missing = []
        for name in self.model.state_dict():
            bare = name.removeprefix(base)
            old = [
                other.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                for other in (name, bare, base + name)
            ]
            match = next((other for other in (name, bare, base + name, *old) if other in self.checkpoint.files), None)
            if match is not None:
                found[name] = match
            elif name not in tied:
                missing.append(name)
        if missing:
            raise ValueError(
                f"{self.checkpoint.folder} lacks {len(missing)} tensors of {type(self.model).__name__}, such as "
                f"{missing[:3]}: load it with transformers, see what it warns of, and save_pretrained it anew."
            )
        return found

    def layer(self, index: int) -> nn.Module:
        """A layer with its weights, in float32 and evaluation mode."""
        layer: Any = copy.deepcopy(self.anatomy.layers[index])
        prefix = self.layer_prefix(index)
        tensors = {
            name.removeprefix(prefix): self.checkpoint.tensor(stored).float()
            for name, stored in self.names.items()
            if name.startswith(prefix)
        }
        layer.load_state_dict(tensors, assign=True)
        layer.chunk_size_feed_forward = 0  # as LayersInMemory.dense has it
        dense: nn.Module = layer.eval()
        return dense

    def open_embeddings(self, ids: Tensor) -> None:
        """Fill all that comes before the layers; of the token embeddings only the rows of these tokens."""
        tokens = ids.unique()  # type: ignore[no-untyped-call]
        backbone, family = self.anatomy.backbone, self.anatomy.family
        skipped = (f"{family.layers}.", f"{family.embedding}.")
        for path, module in backbone.named_modules():
            if f"{path}.".startswith(skipped):
                continue
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                for name, buffer in list(module.named_buffers(recurse=False)):
                    module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
                with torch.no_grad():
                    self.model._init_weights(module)  # transformers' own way to fill what no checkpoint holds
            for name, parameter in list(module.named_parameters(recurse=False)):
                stored = self.names[f"{self.anatomy.prefix}{path}.{name}" if path else f"{self.anatomy.prefix}{name}"]
                value = nn.Parameter(self.checkpoint.tensor(stored), parameter.requires_grad)
                setattr(module, name, value)
        rows = self.checkpoint.rows(self.names[f"{self.anatomy.prefix}{family.embedding}.weight"], tokens.tolist())
        parent, _, name = family.embedding.rpartition(".")
        setattr(backbone.get_submodule(parent), name, GatheredEmbedding(tokens, rows))
