"""What a device remembers, in files on the device, named by their content."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from edgebolt.common.files import replaced

__all__ = ["DeviceMemories"]

_NAME = re.compile(r"[0-9a-f]{64}")


class DeviceMemories:
    """The last few versions of a device's memory, ``<sha256>.memory`` each.

    The server knows their names alone. It may ask for an older one: after a visit whose answer was lost, or when it
    was resumed from an older checkpoint. What was written or asked for most recently is kept.

    Args:
        folder: of this device; it is made where it is missing.
        keep: versions.

    Raises:
        ValueError: if ``keep`` is below 1.

    Example::

        >>> import tempfile
        >>> memories = DeviceMemories(tempfile.mkdtemp())
        >>> memories.get(memories.put(b"what was learned"))
        b'what was learned'
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 4) -> None:
        if type(keep) is not int or keep < 1:
            raise ValueError(f"keep={keep!r}: keep 1 version or more.")
        self.folder, self.keep = Path(folder), keep

    def put(self, memory: bytes) -> str:
        """Keep a version, on the disk when this returns, and give its name; the oldest goes."""
        name = hashlib.sha256(memory).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        if path.exists():
            os.utime(path)
        else:
            with replaced(path, durable=True) as partial:
                partial.write_bytes(memory)
        versions = sorted(self.folder.glob("*.memory"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for old in versions[self.keep :]:
            if old != path:
                old.unlink(missing_ok=True)
        return name

    def get(self, name: str) -> bytes:
        """A version.

        Raises:
            FileNotFoundError: if it is not here.
            ValueError: if it is damaged, or ``name`` is none.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a memory.")
        path = self._path(name)
        if not path.exists():
            raise FileNotFoundError(
                f"This device has no version {name[:12]} of its memory: it keeps the last {self.keep}. Was its "
                "state-dir moved or emptied, or the server resumed from a checkpoint that is older than that?"
            )
        memory = path.read_bytes()
        if hashlib.sha256(memory).hexdigest() != name:
            raise ValueError(f"Version {name[:12]} of this device's memory is damaged.")
        os.utime(path)
        return memory

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.memory"
