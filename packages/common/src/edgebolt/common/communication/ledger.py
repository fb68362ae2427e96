"""The traffic ledger: one entry for every message."""

import csv
import operator
import os
from array import array
from typing import Any, Literal

import numpy as np
import torch

from edgebolt.common.files import replaced

__all__ = ["TrafficLedger"]

# Typecode of the array in memory and dtype of the tensor in a state, in the order of the CSV's columns.
_COLUMNS = {
    "round": ("q", torch.int64),
    "client": ("q", torch.int64),
    "up": ("b", torch.bool),
    "nbytes": ("q", torch.int64),
    "time": ("d", torch.float64),
    "kind": ("h", torch.int16),
    "delivered": ("b", torch.bool),
}
_MAX_KINDS = 2**15


class TrafficLedger:
    """Counts the bytes of a run, exactly, an entry a message.

    Entries live in typed arrays (36 bytes each), so a run of millions of messages stays small. The bytes of messages
    that were not delivered count as well: they were sent.

    Example::

        >>> ledger = TrafficLedger()
        >>> ledger.add(round=0, client=7, direction="down", nbytes=1000, time=0.0)
        >>> ledger.add(round=0, client=7, direction="up", nbytes=400, time=2.5)
        >>> ledger.total_bytes, ledger.by_round()
        (1400, {0: (400, 1000)})
    """

    def __init__(self) -> None:
        self._columns: dict[str, array[Any]] = {name: array(code) for name, (code, _) in _COLUMNS.items()}
        self._kinds: dict[str, int] = {}
        self._up = 0
        self._down = 0

    def add(
        self,
        *,
        round: int,
        client: int,
        direction: Literal["up", "down"],
        nbytes: int,
        time: float,
        kind: str = "model",
        delivered: bool = True,
    ) -> None:
        """Enters one message.

        Args:
            round: Communication round, from 0.
            client: Client number, from 0.
            direction: ``"up"`` from client to server, ``"down"`` from server to client.
            nbytes: Bytes that were sent.
            time: Simulated time in seconds at which the message arrived, or was lost.
            kind: What the message was about ("model", "enrol" ...), at most 32768 different ones.
            delivered: False if the message was lost on the way.

        Raises:
            ValueError: If a number is negative or not finite, or the direction unknown. Nothing is entered then.
            TypeError: If `round`, `client` or `nbytes` is not an integer.
        """
        round, client, nbytes = operator.index(round), operator.index(client), operator.index(nbytes)
        if not (0 <= round < 2**63 and 0 <= client < 2**63 and 0 <= nbytes < 2**63):
            raise ValueError(f"round, client and nbytes must lie in [0, 2^63), got {round}, {client} and {nbytes}")
        if not 0.0 <= time < float("inf"):
            raise ValueError(f"time must be finite seconds >= 0, got {time!r}")
        if direction != "up" and direction != "down":
            raise ValueError(f"direction must be 'up' or 'down', got {direction!r}")
        code = self._kinds.get(kind)
        if code is None:
            code = self._new_kind(kind)
        up = direction == "up"
        columns = self._columns
        columns["round"].append(round)
        columns["client"].append(client)
        columns["up"].append(up)
        columns["nbytes"].append(nbytes)
        columns["time"].append(time)
        columns["kind"].append(code)
        columns["delivered"].append(bool(delivered))
        if up:
            self._up += nbytes
        else:
            self._down += nbytes

    def _new_kind(self, kind: str) -> int:
        if type(kind) is not str:
            raise TypeError(f"kind must be a str, got {kind!r}")
        if len(self._kinds) >= _MAX_KINDS:
            raise ValueError(f"a ledger holds {_MAX_KINDS} kinds at most, {kind!r} is one too many: use fewer names")
        return self._kinds.setdefault(kind, len(self._kinds))

    @property
    def total_bytes(self) -> int:
        """All bytes sent, both ways."""
        return self._up + self._down

    @property
    def up_bytes(self) -> int:
        """Bytes sent by clients."""
        return self._up

    @property
    def down_bytes(self) -> int:
        """Bytes sent by the server."""
        return self._down

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds; ``entries()["kind"]`` indexes them."""
        return tuple(self._kinds)

    def __len__(self) -> int:
        return len(self._columns["round"])

    def entries(self) -> dict[str, np.ndarray[Any, Any]]:
        """Returns copies of the columns, each of shape (entries,).

        ``round``, ``client``, ``nbytes`` are int64, ``time`` float64, ``kind`` int16 (see `kinds`); ``up`` and
        ``delivered`` are bool.
        """
        return {name: column.numpy() for name, column in self._tensors().items()}

    def by_round(self) -> dict[int, tuple[int, int]]:
        """Returns {round: (up bytes, down bytes)}, ascending."""
        totals: dict[int, list[int]] = {}
        columns = self._columns
        for number, up, nbytes in zip(columns["round"], columns["up"], columns["nbytes"], strict=True):
            totals.setdefault(number, [0, 0])[0 if up else 1] += nbytes
        return {number: (totals[number][0], totals[number][1]) for number in sorted(totals)}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes all entries; the file appears whole or not at all.

        Args:
            path: Target file; its folder must exist.
        """
        kinds, columns = self.kinds, self._columns
        with replaced(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["round", "client", "direction", "nbytes", "time", "kind", "delivered"])
            for number, client, up, nbytes, time, kind, delivered in zip(*columns.values(), strict=True):
                direction = "up" if up else "down"
                writer.writerow([number, client, direction, nbytes, repr(time), kinds[kind], bool(delivered)])

    def state_dict(self) -> dict[str, Any]:
        """Returns tensors of shape (entries,) and the list of kinds; loads under ``torch.load(weights_only=True)``."""
        return {**self._tensors(), "kinds": list(self._kinds)}

    def _tensors(self) -> dict[str, torch.Tensor]:
        columns = self._columns
        return {name: torch.tensor(np.array(columns[name]), dtype=dtype) for name, (_, dtype) in _COLUMNS.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces all entries by those of `state`.

        Raises:
            ValueError: If `state` is not what `state_dict` returns; the ledger is left as it was.
        """
        if state.keys() != {*_COLUMNS, "kinds"}:
            raise ValueError(f"a ledger's state has the keys {[*_COLUMNS, 'kinds']}, got {list(state)}")
        columns: dict[str, array[Any]] = {}
        for name, (code, dtype) in _COLUMNS.items():
            values = state[name]
            if not isinstance(values, torch.Tensor) or values.dtype != dtype or values.ndim != 1:
                raise ValueError(f"column {name!r} must be a tensor of {dtype} and one dimension, got {values!r}")
            if not bool(((values >= 0) & (values < float("inf"))).all()):
                raise ValueError(f"column {name!r} holds negative or non-finite values")
            columns[name] = array(code, values.cpu().numpy().tobytes())
        if len({len(column) for column in columns.values()}) != 1:
            raise ValueError(f"the columns differ in length: { {name: len(c) for name, c in columns.items()} }")
        names = state["kinds"]
        if not isinstance(names, list) or not all(type(name) is str for name in names):
            raise ValueError(f"'kinds' must be a list of str, got {names!r}")
        kinds = {name: code for code, name in enumerate(names)}
        if len(kinds) != len(names) or max(columns["kind"], default=-1) >= len(kinds):
            raise ValueError(f"'kinds' must be distinct and as many as the codes in use, got {names!r}")
        self._columns, self._kinds = columns, kinds
        self._up = sum(nbytes for nbytes, up in zip(columns["nbytes"], columns["up"], strict=True) if up)
        self._down = sum(columns["nbytes"]) - self._up

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TrafficLedger):
            return NotImplemented
        return self._columns == other._columns and self._kinds == other._kinds

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"TrafficLedger({len(self)} entries, up_bytes={self._up}, down_bytes={self._down})"
