"""What one device can do: speed, memory, power, link and reliability."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgebolt.common.devices.constants import LATENCY_S
from edgebolt.common.files import replaced

__all__ = ["DeviceProfile"]

_POSITIVE = frozenset({"flops", "memory_bytes", "up_bps", "down_bps"})
_RATES = frozenset({"failure_rate", "online_rate"})


def check_field(name: str, value: Any) -> None:
    """Raise a ValueError if ``value`` is not allowed for the field ``name`` of a profile."""
    if name == "name":
        if not isinstance(value, str) or not value:
            raise ValueError(f"name must be a non-empty str, got {value!r}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if name == "memory_bytes" and not isinstance(value, int):
        raise ValueError(f"memory_bytes must be a whole number of bytes, got {value!r}")
    if name in _POSITIVE and value <= 0:
        raise ValueError(f"{name} must be above 0, got {value!r}")
    if name in _RATES and not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")


@dataclass(frozen=True)
class DeviceProfile:
    """What one device can do, in plain numbers.

    Attributes:
        name: Name of the device or of its kind.
        flops: Effective FLOP/s while training (not the peak of the data sheet, and not INT8 operations).
        memory_bytes: Memory that training may use, in bytes.
        power_w: Power while computing, in W.
        radio_w: Power while sending or receiving, in W.
        up_bps: Bandwidth from the device to the server, in **bits** per second.
        down_bps: Bandwidth from the server to the device, in bits per second.
        failure_rate: Probability that a visit dies before its upload arrives.
        online_rate: Probability that the device is reachable in a round.

    Raises:
        ValueError: If a number is not finite, negative, zero where it divides, or a rate is outside ``[0, 1]``.

    Example::

        >>> from edgebolt.common.devices import DeviceProfile
        >>> phone = DeviceProfile("phone", flops=1e12, memory_bytes=6 * 2**30, power_w=4.0, radio_w=1.5,
        ...                       up_bps=8e6, down_bps=16e6)
        >>> phone.compute_seconds(3e12), phone.download_seconds(1_000_000), phone.upload_seconds(1_000_000)
        (3.0, 0.5, 1.0)
        >>> phone.energy_joules(compute_s=3.0, radio_s=1.5)
        14.25
    """

    name: str
    flops: float
    memory_bytes: int
    power_w: float
    radio_w: float
    up_bps: float
    down_bps: float
    failure_rate: float = 0.0
    online_rate: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_field(field.name, getattr(self, field.name))

    def compute_seconds(self, flops: float) -> float:
        """Seconds for ``flops`` floating-point operations: operations divided by the effective rate."""
        return flops / self.flops

    def download_seconds(self, nbytes: int) -> float:
        """Seconds until ``nbytes`` bytes have come from the server: latency plus bits divided by bandwidth."""
        return LATENCY_S + 8 * nbytes / self.down_bps

    def upload_seconds(self, nbytes: int) -> float:
        """Seconds until ``nbytes`` bytes have reached the server: latency plus bits divided by bandwidth."""
        return LATENCY_S + 8 * nbytes / self.up_bps

    def energy_joules(self, compute_s: float, radio_s: float) -> float:
        """Energy in J: ``power_w * compute_s + radio_w * radio_s``; waiting is free (assumed)."""
        return self.power_w * compute_s + self.radio_w * radio_s

    def to_json(self, path: str | os.PathLike[str], measured: Mapping[str, Any] | None = None) -> None:
        """Write the profile as plain JSON, at once or not at all.

        Args:
            path: The file; an older one is replaced, missing folders are made.
            measured: Figures behind the profile, kept in a section ``measured`` that :meth:`from_json` skips.
        """
        path = Path(path)
        content: dict[str, Any] = asdict(self)
        if measured is not None:
            content["measured"] = dict(measured)
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            partial.write_text(text, encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> DeviceProfile:
        """Read a profile that :meth:`to_json`, a ``DeviceProfiler`` or a person wrote.

        Raises:
            ValueError: If the file is no JSON object, a key is missing or unknown, or a value is not allowed.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: a device profile is a JSON object, got {type(content).__name__}")
        content.pop("measured", None)
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(content) - set(known)):
            raise ValueError(f"{path}: unknown keys {unknown}; a device profile has {known} and may have 'measured'")
        required = [field.name for field in fields(cls) if field.default is MISSING]
        if missing := [name for name in required if name not in content]:
            raise ValueError(f"{path}: missing keys {missing}")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
