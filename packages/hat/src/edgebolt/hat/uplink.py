"""How fast the uplink is, from when uploads have come to the cloud."""

from __future__ import annotations

from dataclasses import dataclass

from edgebolt.common.decoding import MovingAverage

__all__ = ["Uplink"]


@dataclass(eq=False)
class _Sent:
    """An upload on its way."""

    size: int
    at: float  # on the device's clock
    before: _Sent | None  # the upload before it, until this one is answered
    came: float | None = None  # on the cloud's clock


class Uplink:
    """Measures by two uploads of which one was sent right behind the other, by the same conversation or by two.

    The second has had the link from the moment on at which the first had come only if it waited for that; else the
    time in which nothing was sent would count too. It waited where the device took less time between the two than the
    first one took on the link, and that is told by how much later the second came: half of it is the margin. Clocks of
    device and cloud need not agree, for only differences are used.

    Any two tell that the link is not slower than what has come between them: a link that is faster than the device
    computes is never waited for, and this is all that is known of it.

    Args:
        smallest: bytes of an upload that tells of the link; smaller ones tell more of its latency.

    Attributes:
        least: bytes a second that the link has at least.

    Example::

        >>> uplink = Uplink()
        >>> uplink.sent(b"a", 1, 8000, at=0.0)
        >>> uplink.sent(b"b", 1, 8000, at=0.1)
        >>> uplink.came(b"a", 1, at=71.0)
        >>> uplink.came(b"b", 1, at=75.0)
        >>> uplink.speed
        2000.0
    """

    def __init__(self, smallest: int = 4096) -> None:
        self.smallest = smallest
        self._speed = MovingAverage()
        self.least: float | None = None
        self._open: dict[tuple[bytes, int], _Sent] = {}
        self._last: _Sent | None = None

    @property
    def speed(self) -> float | None:
        """Bytes a second; None while nothing is known."""
        return self._speed.value

    def sent(self, conversation: bytes, sequence: int, size: int, at: float) -> None:
        """An upload goes behind all others."""
        self._last = self._open[conversation, sequence] = _Sent(size, at, self._last)

    def came(self, conversation: bytes, sequence: int, at: float | None) -> None:
        """The cloud has answered an upload that had come to it ``at`` its own clock; None: it does not say."""
        sent = self._open.pop((conversation, sequence), None)
        if sent is None:
            return
        sent.came = at
        before, sent.before = sent.before, None  # else all that was ever sent would be kept
        if at is None or before is None or before.came is None or sent.size < self.smallest:
            return
        took, apart = at - before.came, sent.at - before.at
        if took > 0:
            self.least = max(self.least or 0.0, sent.size / took)
        if took > 0 and 2 * apart <= took * min(1.0, before.size / sent.size):
            self._speed.update(sent.size / took)

    def forget(self, conversation: bytes) -> None:
        """A conversation is over: what it has sent is answered no more."""
        for key in [key for key in self._open if key[0] == conversation]:
            del self._open[key]

    def restart(self) -> None:
        """The link was opened anew: what was on its way is lost."""
        self._open.clear()
        self._last = None
