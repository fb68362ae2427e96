"""Large device memories beside a checkpoint: immutable files, named by their content.

A folder that is overwritten in place would be newer than an older checkpoint; files named by content never are, and
a device that did not train since the last checkpoint costs nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from edgebolt.common.files import replaced

__all__ = ["DeviceFiles", "remove_unlisted"]

_FILE, _KEY = "edgebolt.file", "edgebolt.tensor"
_OURS = re.compile(r"[0-9a-f]{64}-[0-9a-f]{8}\.safetensors|\.[0-9a-f]{64}-[0-9a-f]{8}\.safetensors\.\d+\.partial")


class DeviceFiles:
    """Writes and reads the tensors of device memories: ``devices/<sha256>-<run>.safetensors`` beside the checkpoint.

    Files are written before the checkpoint that lists them, each to a temporary name first, so that a crash leaves at
    most a file that nothing lists. When a checkpoint is removed or replaced, the files that this process wrote and no
    other checkpoint of this process lists go too; :func:`remove_unlisted` removes those of other processes.

    Args:
        inline_bytes: memories of fewer bytes, all devices together, stay inside the checkpoint.
    """

    def __init__(self, inline_bytes: int = 32 * 2**20) -> None:
        self.inline_bytes = inline_bytes
        self._run = uuid.uuid4().hex[:8]  # two runs in one folder do not delete each other's files
        self._filed: dict[tuple[Path, int], tuple[dict[str, Any], str]] = {}
        self._listed: dict[str, set[Path]] = {}
        self._written: set[Path] = set()

    def put(
        self, memories: dict[int, dict[str, Any]], touched: Iterable[int], checkpoint: str | os.PathLike[str]
    ) -> dict[int, dict[str, Any]]:
        """The memories with their tensors moved to files, if they are large.

        Args:
            memories: client -> memory.
            touched: clients whose memory may have changed since the last call for the same folder.
            checkpoint: path of the checkpoint that is about to be written.
        """
        checkpoint = checkpoint if "://" in str(checkpoint) else Path(checkpoint).resolve()
        changed = set(touched)
        self._filed = {key: value for key, value in self._filed.items() if key[1] not in changed}
        tensors = {client: _tensors(memory) for client, memory in memories.items()}
        if "://" in str(checkpoint) or sum(t.nbytes for held in tensors.values() for t in held) < self.inline_bytes:
            return memories
        folder = Path(checkpoint).parent / "devices"
        folder.mkdir(parents=True, exist_ok=True)
        for client, memory in memories.items():
            known = self._filed.get((folder, client))  # whoever owns the folder may have removed its file
            if tensors[client] and (known is None or not _path(folder, known[1]).exists()):
                named = {str(index): tensor for index, tensor in enumerate(tensors[client])}
                digest = self._write(folder, named)
                keys = iter(named)
                self._filed[folder, client] = (_mapped(memory, lambda _: {_FILE: digest, _KEY: next(keys)}), digest)  # noqa: B023
        filed = {client: self._filed[folder, client] for client in memories if (folder, client) in self._filed}
        self._listed[str(checkpoint)] = {_path(folder, digest) for _, digest in filed.values()}
        return {**memories, **{client: memory for client, (memory, _) in filed.items()}}

    def get(
        self, memories: dict[int, dict[str, Any]], checkpoint: str | os.PathLike[str]
    ) -> dict[int, dict[str, Any]]:
        """The memories with the tensors of their files.

        Raises:
            FileNotFoundError: if a file is missing: the checkpoint was moved without its ``devices`` folder.
            ValueError: if a file is damaged.
        """
        folder = Path(checkpoint).parent / "devices"
        opened: dict[str, dict[str, torch.Tensor]] = {}

        def read(leaf: dict[str, str]) -> torch.Tensor:
            digest = leaf[_FILE]
            if digest not in opened:
                opened[digest] = _read(_path(folder, digest), digest)
            return opened[digest][leaf[_KEY]]

        return {client: _mapped(memory, read, marked=True) for client, memory in memories.items()}

    def forget(self, checkpoint: str | os.PathLike[str]) -> None:
        """A checkpoint is gone."""
        self._listed.pop(str(checkpoint if "://" in str(checkpoint) else Path(checkpoint).resolve()), None)
        self.sweep()

    def begin_run(self) -> None:
        """Another run begins, perhaps from an older checkpoint: what was written of its devices may not hold."""
        self._filed.clear()

    def sweep(self) -> None:
        """Delete the files that this process wrote and that no checkpoint of this process lists."""
        for path in self._written - set().union(*self._listed.values()):
            self._written.discard(path)
            path.unlink(missing_ok=True)
            self._filed = {key: value for key, value in self._filed.items() if _path(key[0], value[1]) != path}

    def _write(self, folder: Path, tensors: dict[str, torch.Tensor]) -> str:
        # clone: safetensors refuses tensors that share storage
        blob = safetensors.torch.save({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()})
        digest = f"{hashlib.sha256(blob).hexdigest()}-{self._run}"
        path = _path(folder, digest)
        if not path.exists():
            with replaced(path, durable=True) as partial:
                partial.write_bytes(blob)
            self._written.add(path)
        return digest


def remove_unlisted(checkpoint: Path, state: Any) -> None:
    """Delete what killed processes have left: device files beside a checkpoint that it does not list.

    In a folder that holds anything else than that checkpoint and its ``devices``, nothing is deleted: it might be
    another checkpoint that needs them.

    Args:
        checkpoint: the path of the checkpoint, which is on the disk.
        state: what it holds.
    """
    folder = checkpoint.parent / "devices"
    if not folder.is_dir() or set(checkpoint.parent.iterdir()) != {checkpoint, folder}:
        return
    listed = {_path(folder, digest) for digest in _listed(state)}
    for path in folder.iterdir():
        if path not in listed and _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _listed(node: Any) -> Iterator[str]:
    if isinstance(node, dict) and _FILE in node:
        yield node[_FILE]
    elif isinstance(node, dict | list | tuple):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _listed(value)


def _path(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.safetensors"


def _read(path: Path, digest: str) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: a checkpoint of a federated run with large device memories needs the `devices` "
            "folder beside it; move both together."
        )
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != digest.partition("-")[0]:
        raise ValueError(f"{path} is damaged: its content does not match its name. Resume from another checkpoint.")
    tensors: dict[str, torch.Tensor] = safetensors.torch.load(blob)
    return tensors


def _tensors(node: Any) -> list[torch.Tensor]:
    """All tensors of a nested structure, in order."""
    found: list[torch.Tensor] = []
    _mapped(node, found.append)
    return found


def _mapped(node: Any, change: Callable[[Any], Any], marked: bool = False) -> Any:
    """The structure with ``change`` applied to its tensors, or to the marks that stand for them."""
    if isinstance(node, dict):
        if marked and _FILE in node:
            return change(node)
        return {key: _mapped(value, change, marked) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_mapped(value, change, marked) for value in node)
    return change(node) if isinstance(node, torch.Tensor) and not marked else node
