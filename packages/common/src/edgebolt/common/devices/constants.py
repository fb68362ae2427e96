"""Every number of the simulated Jetson fleet, fixed in one place before any method is compared.

Each number states where it comes from:

* *NVIDIA board data*: printed in the data sheet of the board.
* *reported for this group's testbeds*: told of the 80-device testbed that several of the reproduced papers share;
  remembered or read second hand, not checked against the papers themselves.
* *assumed*: our completion; no source. Change it here and every result changes alike.

Speeds are **effective floating-point training rates**. The INT8 TOPS on a Jetson's box are inference peaks and are
never used as a training rate.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "BOARDS",
    "LATENCY_S",
    "RADIO_POWER_W",
    "REDRAW_PERIOD_ROUNDS",
    "RING_BANDS_BPS",
    "RING_DISTANCES_M",
    "WIFI_MAX_BPS",
    "WIFI_MIN_BPS",
    "Board",
]

GIB = 2**30
SYSTEM_MEMORY_BYTES = 2 * GIB  # assumed: what the operating system and the desktop keep for themselves
TX2_FLOPS = 0.4e12  # assumed: effective rate in mode 0; 30 % of the 1.33 TFLOPS fp16 peak (NVIDIA board data)
NX_SPEED_UP = 2.6  # assumed: Xavier NX mode 0 over TX2 mode 0, so 1.04 TFLOP/s (board data: 21 TOPS int8)
AGX_SPEED_UP = 5.0  # assumed: AGX Xavier mode 0 over TX2 mode 0, so 2 TFLOP/s (board data: 22-32 TOPS int8)


@dataclass(frozen=True)
class Board:
    """One kind of board in all its power modes.

    Attributes:
        name: Name that the device profiles carry.
        share: Number of these boards in the fleet of 80.
        flops: Effective FLOP/s of every power mode, fastest first.
        power_w: Power in W while training, per power mode.
        memory_bytes: Memory that training may use: the board's less the system's.

    Example::

        >>> from edgebolt.common.devices.constants import BOARDS
        >>> [(board.name, board.share, len(board.flops)) for board in BOARDS]
        [('jetson-tx2', 30, 4), ('jetson-xavier-nx', 40, 8), ('jetson-agx-xavier', 10, 8)]
    """

    name: str
    share: int
    flops: tuple[float, ...]
    power_w: tuple[float, ...]
    memory_bytes: int


BOARDS: tuple[Board, ...] = (
    Board(
        name="jetson-tx2",  # NVIDIA board data: 256-core Pascal, 8 GB
        share=30,  # reported for this group's testbeds
        # Four modes: reported for this group's testbeds. Their relative speeds: assumed.
        flops=tuple(TX2_FLOPS * factor for factor in (1.0, 0.85, 0.7, 0.6)),
        # Ends 15 W (Max-N) and 7.5 W (Max-Q): NVIDIA board data. Even steps between: assumed.
        power_w=(15.0, 12.5, 10.0, 7.5),
        memory_bytes=8 * GIB - SYSTEM_MEMORY_BYTES,
    ),
    Board(
        name="jetson-xavier-nx",  # NVIDIA board data: 384-core Volta, 8 GB
        share=40,  # reported for this group's testbeds
        # Eight modes: reported for this group's testbeds. Even steps from 1 to 0.58: assumed.
        flops=tuple(TX2_FLOPS * NX_SPEED_UP * factor for factor in (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58)),
        # Ends 15 W and 10 W: NVIDIA board data. Even steps between: assumed.
        power_w=tuple(15.0 - 5.0 * mode / 7 for mode in range(8)),
        memory_bytes=8 * GIB - SYSTEM_MEMORY_BYTES,
    ),
    Board(
        name="jetson-agx-xavier",  # NVIDIA board data: 512-core Volta, 32 GB
        share=10,  # reported for this group's testbeds
        # Eight modes: reported for this group's testbeds. Even steps from 1 to about 0.52: assumed. (Sibling papers
        # speak of a factor of up to 100 between the best AGX and the worst TX2 mode; here it is 8.3. With 100 no
        # setting of the reproduced methods could balance a round.)
        flops=tuple(TX2_FLOPS * AGX_SPEED_UP * factor for factor in (1.0, 0.93, 0.86, 0.79, 0.73, 0.66, 0.59, 0.52)),
        # Ends 30 W and 15 W: NVIDIA board data. Even steps between: assumed.
        power_w=tuple(30.0 - 15.0 * mode / 7 for mode in range(8)),
        memory_bytes=32 * GIB - SYSTEM_MEMORY_BYTES,
    ),
)

REDRAW_PERIOD_ROUNDS = 20  # reported for this group's testbeds: power modes are re-drawn every 20 rounds

RING_DISTANCES_M = (2.0, 8.0, 14.0, 20.0)  # to the router, 20 devices each: reported for this group's testbeds
WIFI_MIN_BPS = 1e6  # reported for this group's testbeds: 1-30 Mb/s, measured with iperf3
WIFI_MAX_BPS = 30e6
# assumed: each ring has an equal part of the range, the nearest ring the fastest; within it uniform, and the same
# rate both ways.
_STEP_BPS = (WIFI_MAX_BPS - WIFI_MIN_BPS) / len(RING_DISTANCES_M)
RING_BANDS_BPS: tuple[tuple[float, float], ...] = tuple(
    (WIFI_MAX_BPS - (ring + 1) * _STEP_BPS, WIFI_MAX_BPS - ring * _STEP_BPS) for ring in range(len(RING_DISTANCES_M))
)

RADIO_POWER_W = 1.5  # assumed: power of the radio while it sends or receives
# assumed: shares of a visit's time in download, training and upload, in which it may die
FAILURE_PHASES = (0.1, 0.8, 0.1)
LATENCY_S = 0.0  # assumed: a transfer takes its bits divided by the bandwidth and nothing else
