"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replaced"]


@contextmanager
def replaced(path: str | os.PathLike[str], durable: bool = False) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` once the block ends without an error.

    Whoever reads finds the former file or the new one, whole. What a killed process has left is called
    ``.{name}.{process id}.partial`` and lies beside it.

    Args:
        path: the file; its folder must exist.
        durable: flush the file, and then its name, to the disk, so that they outlast a power cut.

    Example::

        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "notes.txt"
        >>> with replaced(target) as partial:
        ...     _ = partial.write_text("all of it")
        >>> [file.name for file in target.parent.iterdir()]
        ['notes.txt']
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if durable:
            _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
