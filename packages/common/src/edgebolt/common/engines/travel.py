"""What goes to another process, and the error that names what cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgebolt.common.communication import Message
from edgebolt.common.engines.job import Job

__all__ = ["dumped", "same_tensors"]


def dumped(job: Job, dumps: Callable[[Any], bytes]) -> bytes:
    """Pickle a job.

    Raises:
        TypeError: names the attribute that cannot be pickled.
    """
    try:
        return dumps(job)
    except Exception as error:
        place = _culprit({name: getattr(job, name) for name in job.__dataclass_fields__}, dumps)
        raise TypeError(
            f"{place} cannot be sent to a worker ({error}): open files, connections, locks and handles where they are "
            "used, or leave them out of what is pickled with __getstate__."
        ) from error


def _culprit(parts: dict[str, Any], dumps: Callable[[Any], bytes], depth: int = 6) -> str:
    """The name of the innermost part that cannot be pickled: ``module.tokenizer.lock``."""
    for name, part in parts.items():
        try:
            dumps(part)
        except Exception:
            inner: dict[str, Any] = {}
            if isinstance(part, dict):
                inner = {f"[{key!r}]": value for key, value in part.items()}
            elif isinstance(part, list | tuple):
                inner = {f"[{index}]": value for index, value in enumerate(part)}
            elif hasattr(part, "__dict__"):
                state = vars(part)
                own = {key: value for key, value in state.items() if key not in ("_modules", "_trainer", "_fabric")}
                inner = {f".{key}": value for key, value in {**own, **state.get("_modules", {})}.items()}
            found = _culprit(inner, dumps, depth - 1) if depth else ""
            return f"{name}{found}" if found else f"{name}, a {type(part).__name__},"
    return ""


def same_tensors(message: Message) -> tuple[object, ...]:
    """Equal for messages that share their tensors and differ in their visits alone."""
    header = {name: value for name, value in message.header.items() if name != "visit"}
    return (*map(id, message.tensors.values()), repr(header))
