"""Devices and time: what a device can do, populations of devices, costs of training, simulated clocks, measuring."""

from edgebolt.common.devices.clock import Clock
from edgebolt.common.devices.cost import CostModel, StepCost, count_step
from edgebolt.common.devices.fleet import Fleet, FleetState
from edgebolt.common.devices.profile import DeviceProfile
from edgebolt.common.devices.profiler import DeviceProfiler
from edgebolt.common.devices.saved import SavedBytes
from edgebolt.common.devices.undependability import Cut, Undependability

__all__ = [
    "Clock",
    "CostModel",
    "Cut",
    "DeviceProfile",
    "DeviceProfiler",
    "Fleet",
    "FleetState",
    "SavedBytes",
    "StepCost",
    "Undependability",
    "count_step",
]
