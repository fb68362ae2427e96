"""Engines by their names."""

from __future__ import annotations

from typing import Literal, TypeAlias

from edgebolt.common.engines.engine import Engine, Serial
from edgebolt.common.engines.ranks import Ranks
from edgebolt.common.engines.ray_engine import RayEngine

__all__ = ["EngineLike", "chosen_engine"]

EngineLike: TypeAlias = Engine | Serial | Literal["serial", "ranks", "ray"]

_NAMES: dict[str, type[Engine] | type[Serial]] = {"serial": Serial, "ranks": Ranks, "ray": RayEngine}


def chosen_engine(engine: EngineLike) -> Engine | Serial:
    """An engine, made with its defaults where only its name is given.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if isinstance(engine, Engine | Serial):
        return engine
    if isinstance(engine, str):
        if engine not in _NAMES:
            raise ValueError(f"engine={engine!r}: use one of {sorted(_NAMES)}, or an Engine such as RayEngine(4).")
        return _NAMES[engine]()
    raise TypeError(f"engine={engine!r}: use one of {sorted(_NAMES)}, or an Engine such as RayEngine(4).")
