"""A population of devices as a handful of arrays: who is how fast, in which round, and who fails."""

from __future__ import annotations

import copy
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgebolt.common.devices.constants import (
    BOARDS,
    FAILURE_PHASES,
    RADIO_POWER_W,
    REDRAW_PERIOD_ROUNDS,
    RING_BANDS_BPS,
    WIFI_MAX_BPS,
    WIFI_MIN_BPS,
)
from edgebolt.common.devices.profile import DeviceProfile
from edgebolt.common.devices.table import read_profiles
from edgebolt.common.devices.undependability import Cut, Undependability
from edgebolt.common.random import stream

__all__ = ["Fleet", "FleetState"]

_KEPT_ROUNDS = 4
_NUMBERS = [field.name for field in fields(DeviceProfile) if field.name != "name"]


@dataclass(frozen=True)
class FleetState:
    """The whole population in one round: read-only arrays of length ``len(fleet)``, indexed by client.

    Attributes:
        flops: float64, effective FLOP/s.
        memory_bytes: int64, memory that training may use.
        power_w: float64, W while computing.
        radio_w: float64, W while sending or receiving.
        up_bps: float64, bits per second to the server.
        down_bps: float64, bits per second from the server.
        failure_rate: float64, probability that a visit dies.
        online: bool, whether the device can be reached in this round.

    Example::

        >>> from edgebolt.common.devices import Fleet
        >>> state = Fleet.jetson(80).at(0)
        >>> state.flops.shape, str(state.online.dtype)
        ((80,), 'bool')
    """

    flops: NDArray[np.float64]
    memory_bytes: NDArray[np.int64]
    power_w: NDArray[np.float64]
    radio_w: NDArray[np.float64]
    up_bps: NDArray[np.float64]
    down_bps: NDArray[np.float64]
    failure_rate: NDArray[np.float64]
    online: NDArray[np.bool_]


class Fleet:
    """A population of simulated devices.

    The population is a few arrays, never an object a device: 100,000 devices cost milliseconds a round. Everything
    random is drawn from a stream of its own (:mod:`edgebolt.common.random`) that is named by the seed, the purpose and
    the round: the same seed gives the same devices, links and failures to every algorithm, whatever was asked before.

    Build one with :meth:`jetson`, :meth:`uniform`, :meth:`from_profiles` or :meth:`from_csv`; the constructor is for
    fleets of another making.

    Args:
        kinds: The kinds of device; each a sequence of profiles, one for every power mode of the kind.
        kind: The kind of every device, an int array of shape ``[n]``.
        seed: Seed of modes, bandwidths, presence and failures.
        ring: The bandwidth ring of every device, an int array of shape ``[n]``; None: bandwidths of the profiles.
        ring_bands_bps: Lowest and highest bandwidth of every ring, bits per second; drawn uniformly in each round,
            the same both ways.
        redraw_every: Rounds after which the power modes are drawn again.

    Raises:
        ValueError: If the fleet is empty, an index is out of range, or ``redraw_every`` is below 1.

    Example::

        >>> from edgebolt.common.devices import Fleet
        >>> fleet = Fleet.jetson(80, seed=1)
        >>> fleet
        Fleet(80 devices of 3 kinds, seed=1)
        >>> slow, fast = fleet.at(0).flops.min(), fleet.at(0).flops.max()
        >>> bool(2 < fast / slow < 9)
        True
        >>> bool((fleet.at(0).flops == fleet.at(19).flops).all())   # power modes hold for 20 rounds
        True
    """

    def __init__(
        self,
        kinds: Sequence[Sequence[DeviceProfile]],
        kind: NDArray[np.integer[Any]],
        seed: int = 0,
        ring: NDArray[np.integer[Any]] | None = None,
        ring_bands_bps: Sequence[tuple[float, float]] = RING_BANDS_BPS,
        redraw_every: int = REDRAW_PERIOD_ROUNDS,
    ) -> None:
        if not kinds or not all(kinds):
            raise ValueError("a fleet needs at least one kind of device, and every kind at least one profile")
        if redraw_every < 1:
            raise ValueError(f"redraw_every must be at least 1 round, got {redraw_every!r}")
        self.seed = seed
        self.redraw_every = redraw_every
        self._kind = _indices("kind", kind, len(kinds))
        self._ring = None if ring is None else _indices("ring", ring, len(ring_bands_bps))
        if self._ring is not None and len(self._ring) != len(self._kind):
            raise ValueError(f"ring must name one ring a device: {len(self._kind)} devices, got {len(self._ring)}")
        self._bands = np.asarray(ring_bands_bps, dtype=np.float64)
        # One row a profile: the modes of a kind lie next to each other, the first one at `_first[kind]`.
        profiles = [profile for modes in kinds for profile in modes]
        self._modes = np.array([len(modes) for modes in kinds], dtype=np.int64)
        self._redrawn = bool((self._modes > 1).any())
        self._first = np.concatenate([[0], np.cumsum(self._modes)[:-1]])
        self._names = np.array([profile.name for profile in profiles])
        self._table = {
            name: np.array([getattr(profile, name) for profile in profiles], dtype=_dtype(name)) for name in _NUMBERS
        }
        self._undependability: Undependability | None = None
        self._forget()

    def _forget(self) -> None:
        self._gathered: OrderedDict[int, dict[str, NDArray[Any]]] = OrderedDict()
        self._states: OrderedDict[int, FleetState] = OrderedDict()

    @classmethod
    def uniform(cls, n: int, profile: DeviceProfile | None = None, seed: int = 0) -> Fleet:
        """A fleet of ``n`` equal devices.

        Args:
            n: Number of devices.
            profile: What each can do; None: a Jetson Xavier NX in its fastest mode at the middle of the Wi-Fi range.
            seed: Seed of presence and failures.
        """
        if profile is None:
            nx = BOARDS[1]
            middle = (WIFI_MIN_BPS + WIFI_MAX_BPS) / 2
            profile = DeviceProfile(
                nx.name, nx.flops[0], nx.memory_bytes, nx.power_w[0], RADIO_POWER_W, up_bps=middle, down_bps=middle
            )
        return cls([[profile]], np.zeros(_count(n), dtype=np.int64), seed)

    @classmethod
    def jetson(
        cls,
        n: int,
        seed: int = 0,
        failure_rate: float = 0.0,
        online_rate: float = 1.0,
        redraw_every: int = REDRAW_PERIOD_ROUNDS,
        speed: float = 1.0,
    ) -> Fleet:
        """The Jetson testbed of the reproduced papers, at any size.

        TX2, Xavier NX and AGX Xavier in proportion 30:40:10 and four Wi-Fi rings of equal size, both exact by the
        largest remainder and dealt out by seeded permutations. All numbers, with their sources, stand in
        :mod:`edgebolt.common.devices.constants`.

        Args:
            n: Number of devices; 80 is the testbed.
            seed: Seed of everything random.
            failure_rate: Probability that a visit dies, the same for all devices.
            online_rate: Probability that a device is reachable in a round, the same for all devices.
            redraw_every: Rounds after which the power modes are drawn again.
            speed: Factor on the FLOP/s of all boards. A small model on slower boards stands for a larger one: below 1
                computing weighs more beside sending.

        Raises:
            ValueError: If there is no device, or ``speed`` is not a finite number above 0.
        """
        n = _count(n)
        if not 0 < speed < math.inf:
            raise ValueError(f"speed={speed!r}: use a finite factor above 0")
        kinds = [
            [
                DeviceProfile(
                    f"{board.name}/mode{mode}",
                    flops * speed,
                    board.memory_bytes,
                    power_w,
                    RADIO_POWER_W,
                    up_bps=WIFI_MIN_BPS,  # stands for the link until the ring's draw takes its place
                    down_bps=WIFI_MIN_BPS,
                    failure_rate=failure_rate,
                    online_rate=online_rate,
                )
                for mode, (flops, power_w) in enumerate(zip(board.flops, board.power_w, strict=True))
            ]
            for board in BOARDS
        ]
        kind = _deal(n, [board.share for board in BOARDS], stream(seed, "board"))
        ring = _deal(n, [1] * len(RING_BANDS_BPS), stream(seed, "ring"))
        return cls(kinds, kind, seed, ring, redraw_every=redraw_every)

    @classmethod
    def from_profiles(cls, profiles: Sequence[DeviceProfile], seed: int = 0) -> Fleet:
        """A fleet with one device for every profile, in this order.

        Raises:
            ValueError: If there are no profiles.
        """
        if not profiles:
            raise ValueError("a fleet needs at least one device, got no profiles")
        return cls([[profile] for profile in profiles], np.arange(len(profiles)), seed)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], seed: int = 0) -> Fleet:
        """A fleet from a table of devices.

        The first line names the columns: the fields of :class:`DeviceProfile` (``failure_rate`` and ``online_rate``
        may be left out) and, if wanted, ``count``, the number of equal devices that a line stands for. Clients are
        numbered in the order of the lines.

        Raises:
            ValueError: If a column is missing, unknown or doubled, or a cell is not allowed; the message names the
                line and the column.
        """
        profiles, counts = read_profiles(path)
        return cls([[profile] for profile in profiles], np.repeat(np.arange(len(profiles)), counts), seed)

    def undependable(self, undependability: Undependability) -> Fleet:
        """The same devices, failing and going offline in this way instead of by the rates of their profiles.

        Args:
            undependability: groups of failure rates, presence, and where visits die.

        Raises:
            ValueError: If it says something of another number of devices.

        Example::

            >>> from edgebolt.common.devices import Fleet, Undependability
            >>> fleet = Fleet.jetson(80).undependable(Undependability(rates=(0.1, 0.3, 0.5)))
            >>> 0 < int(fleet.at(0).online.sum()) < 80
            True
        """
        undependability.groups(len(self), self.seed)
        fleet = copy.copy(self)
        fleet._undependability = undependability
        fleet._forget()
        return fleet

    def __len__(self) -> int:
        return len(self._kind)

    def __repr__(self) -> str:
        return f"Fleet({len(self)} devices of {len(self._modes)} kinds, seed={self.seed})"

    def at(self, round: int) -> FleetState:
        """The population in one round; the last few rounds are kept.

        Args:
            round: Number of the round, from 0.

        Raises:
            ValueError: If ``round`` is negative.
        """
        if round < 0:
            raise ValueError(f"rounds are counted from 0, got {round!r}")
        state = self._states.get(round)
        if state is None:
            state = _remember(self._states, round, self._draw(round))
        return state

    def profile(self, client: int, round: int) -> DeviceProfile:
        """One device in one round, as :meth:`at` has it.

        Args:
            client: Number of the device, from 0.
            round: Number of the round, from 0.

        Raises:
            IndexError: If there is no such device.
        """
        self._check_client(client)
        state = self.at(round)
        row = self._rows_of(round)["row"][client]
        return DeviceProfile(
            name=str(self._names[row]),
            flops=float(state.flops[client]),
            memory_bytes=int(state.memory_bytes[client]),
            power_w=float(state.power_w[client]),
            radio_w=float(state.radio_w[client]),
            up_bps=float(state.up_bps[client]),
            down_bps=float(state.down_bps[client]),
            failure_rate=float(state.failure_rate[client]),
            online_rate=float(self._online_rates(round)[client]),
        )

    def cut(self, client: int, steps: int, round: int, stage: int = 0) -> Cut | None:
        """Where a visit dies.

        A visit fails with the device's ``failure_rate``, at a place that is uniform over its time, of which a tenth
        is taken to be the download and a tenth the upload (:class:`Undependability` may say otherwise). The draw
        belongs to (seed, round, client, stage) alone: it is the same for every algorithm, and a rate that is
        raised keeps the failures of the lower one.

        Args:
            client: Number of the device.
            steps: Training steps of the visit; 0 is a visit without training.
            round: Number of the round, from 0.
            stage: Stage of the visit in its lane.

        Returns:
            Steps that are done when it dies and shares of the messages that got through, or None if it survives.

        Raises:
            IndexError: If there is no such device.
            ValueError: If ``steps`` or ``round`` is negative.

        Example::

            >>> from edgebolt.common.devices import Fleet
            >>> Fleet.jetson(80).cut(client=3, steps=10, round=0) is None
            True
            >>> Fleet.jetson(80, failure_rate=1.0).cut(client=3, steps=10, round=0)
            Cut(steps=..., down=..., up=...)
        """
        self._check_client(client)
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps!r}")
        if round < 0:
            raise ValueError(f"rounds are counted from 0, got {round!r}")
        rate = self._rows_of(round)["failure_rate"][client]
        if rate == 0:
            return None
        chance, place = stream(self.seed, "failure", round, client, stage).random(2)
        phases = FAILURE_PHASES if self._undependability is None else self._undependability.phases
        return Cut.at(float(place), steps, phases) if chance < rate else None

    def _check_client(self, client: int) -> None:
        if not 0 <= client < len(self):
            raise IndexError(f"the fleet has clients 0 to {len(self) - 1}, got {client!r}")

    def _rows_of(self, round: int) -> dict[str, NDArray[Any]]:
        """The columns of the profile table, one entry a device, in the power modes of this round."""
        period = round // self.redraw_every if self._redrawn else 0
        columns = self._gathered.get(period)
        if columns is None:
            mode = (stream(self.seed, "mode", period).random(len(self)) * self._modes[self._kind]).astype(np.int64)
            row = self._first[self._kind] + mode
            columns = {"row": row} | {name: _frozen(column[row]) for name, column in self._table.items()}
            if self._undependability is not None:
                columns["failure_rate"] = _frozen(self._undependability.failure_rates(len(self), self.seed))
            _remember(self._gathered, period, columns)
        return columns

    def _online_rates(self, round: int) -> NDArray[np.float64]:
        if self._undependability is not None:
            return self._undependability.online_rates(len(self), self.seed, round)
        rates: NDArray[np.float64] = self._rows_of(round)["online_rate"]
        return rates

    def _draw(self, round: int) -> FleetState:
        columns = dict(self._rows_of(round))
        del columns["row"], columns["online_rate"]
        if self._ring is not None:
            low, high = self._bands[self._ring].T
            link = _frozen(low + (high - low) * stream(self.seed, "bandwidth", round).random(len(self)))
            columns |= {"up_bps": link, "down_bps": link}
        rate = self._online_rates(round)
        return FleetState(**columns, online=_frozen(stream(self.seed, "online", round).random(len(self)) < rate))


def _count(n: int) -> int:
    if n < 1:
        raise ValueError(f"a fleet needs at least one device, got {n!r}")
    return n


def _dtype(name: str) -> type[np.generic]:
    return np.int64 if name == "memory_bytes" else np.float64


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)  # states are shared by everyone who asks for the round
    return array


def _indices(name: str, values: NDArray[np.integer[Any]], size: int) -> NDArray[np.int64]:
    array = np.array(values, dtype=np.int64)
    if array.ndim != 1 or len(array) == 0 or array.min() < 0 or array.max() >= size:
        raise ValueError(f"{name} must be a non-empty list of indices from 0 to {size - 1}")
    return array


def _remember(memo: OrderedDict[int, Any], key: int, value: Any) -> Any:
    memo[key] = value
    while len(memo) > _KEPT_ROUNDS:
        memo.popitem(last=False)
    return value


def _deal(n: int, shares: Sequence[int], rng: np.random.Generator) -> NDArray[np.int64]:
    """Give each of ``n`` devices a group: sizes by the largest remainder, order by a permutation."""
    quotas = n * np.asarray(shares) / sum(shares)
    sizes = np.floor(quotas).astype(np.int64)
    by_remainder = np.argsort(sizes - quotas, kind="stable")
    sizes[by_remainder[: n - sizes.sum()]] += 1
    return rng.permutation(np.repeat(np.arange(len(shares)), sizes))
