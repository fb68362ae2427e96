"""HAT and its baselines on simulated time."""

from edgebolt.hat.simulation.fleet import METHODS, Method, Simulated, simulate
from edgebolt.hat.simulation.machines import CloudTiming, DeviceTiming, SimulatedCloud, SimulatedDevice, SimulatedText
from edgebolt.hat.simulation.measured_delay import measured_delay
from edgebolt.hat.simulation.settings import CNN_13B, SPECBENCH_7B, Setting
from edgebolt.hat.simulation.traced_text import DrawnRounds, Round, TracedText

__all__ = [
    "CNN_13B",
    "METHODS",
    "SPECBENCH_7B",
    "CloudTiming",
    "DeviceTiming",
    "DrawnRounds",
    "Method",
    "Round",
    "Setting",
    "Simulated",
    "SimulatedCloud",
    "SimulatedDevice",
    "SimulatedText",
    "TracedText",
    "measured_delay",
    "simulate",
]
