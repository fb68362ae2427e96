"""Measure the machine that runs a Trainer into a device profile."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from edgebolt.common.devices.constants import RADIO_POWER_W, WIFI_MAX_BPS, WIFI_MIN_BPS
from edgebolt.common.devices.cost import CostModel, count_step
from edgebolt.common.devices.profile import DeviceProfile

__all__ = ["DeviceProfiler"]

_MIDDLE_BPS = (WIFI_MIN_BPS + WIFI_MAX_BPS) / 2


class DeviceProfiler(Callback):
    """Passive callback that measures *this* machine while any Trainer fits any module.

    At the first batch the module's ``training_step`` and backward run once more through
    :func:`~edgebolt.common.quiet.quiet` and are counted; training itself is not changed, bit for bit. Then ``warmup``
    steps pass and ``steps`` steps are timed, from the start to the end of a batch, loading excluded. The effective
    FLOP/s are operations per step divided by the median step time. A step is one batch, also under gradient
    accumulation and beside a federated strategy, where steps of visits with different settings mix in the median.

    Peak memory is, on CUDA, the most that torch had allocated since the first batch. Elsewhere it is the growth of the
    peak resident size of the process since training began, a lower bound: 0 says that something before needed more.

    Power, bandwidth and rates cannot be measured from here; they are the arguments', and their defaults are assumed:
    15 W, 1.5 W and the middle of the 1-30 Mb/s Wi-Fi range.

    Args:
        path: JSON file that is written at the end of training and read by :meth:`DeviceProfile.from_json`; None: no
            file.
        steps: Steps that are timed.
        warmup: Steps that pass before.
        name: Name of the profile.
        power_w: Power while computing, in W. Assumed unless you measured it.
        radio_w: Power while sending or receiving, in W. Assumed likewise.
        up_bps: Bandwidth to the server, in bits per second. Assumed likewise.
        down_bps: Bandwidth from the server, in bits per second. Assumed likewise.
        failure_rate: Probability that a visit dies.
        online_rate: Probability that the device is reachable in a round.
        memory_bytes: Memory that training may use; None: all memory of the GPU or of the machine.
        cost: Source of the operations per step, e.g. ``CostModel(flops_per_sample=...)``; None: count them.
        batch_size: Samples in a batch; None: the first dimension of the batch's first tensor. Needed only where
            ``cost`` or the module states operations by samples.

    Attributes:
        profile: The measured :class:`DeviceProfile`; None before the end of training.
        measured: The figures behind it, as they stand in the JSON file.

    Raises:
        ValueError: If ``steps`` is below 1, ``warmup`` below 0 or a profile argument is not allowed.

    Example::

        >>> from edgebolt.common.devices import DeviceProfiler
        >>> profiler = DeviceProfiler(path="this-machine.json", steps=10, power_w=30.0)
        >>> profiler.profile is None    # L.Trainer(callbacks=[profiler]).fit(module, data) fills it
        True
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        steps: int = 20,
        warmup: int = 3,
        name: str = "measured",
        power_w: float = 15.0,
        radio_w: float = RADIO_POWER_W,
        up_bps: float = _MIDDLE_BPS,
        down_bps: float = _MIDDLE_BPS,
        failure_rate: float = 0.0,
        online_rate: float = 1.0,
        memory_bytes: int | None = None,
        cost: CostModel | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if steps < 1 or warmup < 0:
            raise ValueError(f"steps must be at least 1 and warmup at least 0, got steps={steps!r}, warmup={warmup!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 sample, got {batch_size!r}")
        self._stated: dict[str, Any] = {
            "name": name,
            "power_w": power_w,
            "radio_w": radio_w,
            "up_bps": up_bps,
            "down_bps": down_bps,
            "failure_rate": failure_rate,
            "online_rate": online_rate,
        }
        DeviceProfile(flops=1.0, memory_bytes=1 if memory_bytes is None else memory_bytes, **self._stated)
        self.path = None if path is None else Path(path)
        self.steps = steps
        self.warmup = warmup
        self.memory_bytes = memory_bytes
        self.cost = cost
        self.batch_size = batch_size
        self.profile: DeviceProfile | None = None
        self.measured: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        self._flops: float | None = None
        self._saved_bytes: int | None = None
        self._seconds: list[float] = []
        self._passed = 0
        self._started: float | None = None
        self._resident_at_start: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer of another package.

        Raises:
            TypeError: If ``trainer`` is not a ``lightning.pytorch.Trainer``.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"DeviceProfiler works with lightning.pytorch.Trainer, got {type(trainer).__module__}."
                f"{type(trainer).__qualname__}; write 'import lightning as L' and use L.Trainer"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._begin()
        self._resident_at_start = _peak_resident_bytes()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the first batch; start the watch for those that are timed."""
        if self._flops is None and batch is not None:  # None: an idle batch of a federated round
            self._count(pl_module, batch)
            if pl_module.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(pl_module.device)
        if self._flops is not None and self._passed >= self.warmup and len(self._seconds) < self.steps:
            _synchronize(pl_module.device)
            self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop the watch."""
        self._passed += 1
        if self._started is not None:
            _synchronize(pl_module.device)
            self._seconds.append(time.perf_counter() - self._started)
            self._started = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the profile, print it and write it."""
        if not self._seconds or self._flops is None:
            rank_zero_warn(
                f"DeviceProfiler measured nothing: training ended after {self._passed} steps with "
                f"warmup={self.warmup}; train longer or lower the warmup"
            )
            return
        device = pl_module.device
        step_s = median(self._seconds)
        memory = self.memory_bytes if self.memory_bytes is not None else _memory_bytes(device)
        self.profile = DeviceProfile(flops=self._flops / step_s, memory_bytes=memory, **self._stated)
        self.measured = {
            "device": _device_name(device),
            "torch": torch.__version__,
            "timed_steps": len(self._seconds),
            "step_seconds": step_s,
            "steps_per_second": 1 / step_s,
            "flops_per_step": self._flops,
            "flops_per_second": self._flops / step_s,
            "peak_memory_bytes": self._peak_bytes(device),
            "saved_for_backward_bytes": self._saved_bytes,
            "assumed": sorted({"power_w", "radio_w", "up_bps", "down_bps", "failure_rate", "online_rate"}),
        }
        if trainer.is_global_zero:
            print(self.table())
            if self.path is not None:
                self.profile.to_json(self.path, self.measured)

    def table(self) -> str:
        """The measured figures as plain text, a line each.

        Raises:
            RuntimeError: If nothing has been measured yet.
        """
        if self.profile is None:
            raise RuntimeError("nothing has been measured yet; fit a module with this callback first")
        figures = self.measured
        rows = [
            ("device", figures["device"]),
            ("steps per second", f"{figures['steps_per_second']:.2f} (median of {figures['timed_steps']} steps)"),
            ("operations per step", f"{figures['flops_per_step']:.4g} FLOP"),
            ("effective speed", f"{figures['flops_per_second']:.4g} FLOP/s"),
            ("peak memory", _bytes_text(figures["peak_memory_bytes"])),
            ("saved for backward", _bytes_text(figures["saved_for_backward_bytes"])),
            ("memory", _bytes_text(self.profile.memory_bytes)),
            ("power (stated)", f"{self.profile.power_w:g} W computing, {self.profile.radio_w:g} W radio"),
            ("link (stated)", f"{self.profile.up_bps / 1e6:g} Mb/s up, {self.profile.down_bps / 1e6:g} Mb/s down"),
        ]
        width = max(len(label) for label, _ in rows)
        title = f"Device profile '{self.profile.name}'"
        return "\n".join([title, *(f"  {label:<{width}}  {text}" for label, text in rows)])

    def _count(self, module: LightningModule, batch: Any) -> None:
        by_samples = callable(getattr(module, "flops", None)) or (
            self.cost is not None and self.cost.flops_per_sample is not None
        )
        if module.automatic_optimization:
            step = count_step(module, batch)
            self._saved_bytes = step.saved_bytes
        if by_samples or not module.automatic_optimization or step.flops == 0:
            size = self.batch_size or _batch_size(batch)
            self._flops = size * (self.cost or CostModel()).sample_flops(module, batch, size, {})
        else:
            self._flops = float(step.flops)

    def _peak_bytes(self, device: torch.device) -> int | None:
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        peak = _peak_resident_bytes()
        return None if peak is None or self._resident_at_start is None else peak - self._resident_at_start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as error:  # not a Unix
        raise ValueError("the memory of this machine is unknown; give DeviceProfiler(memory_bytes=...)") from error


def _peak_resident_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors(value)


def _batch_size(batch: Any) -> int:
    for tensor in _tensors(batch):
        if tensor.ndim:
            return len(tensor)
    raise ValueError(f"no batch size can be seen in a batch of type {type(batch).__name__}; give batch_size=...")


def _bytes_text(nbytes: int | None) -> str:
    if nbytes is None:
        return "not measured"
    return f"{nbytes:,} bytes ({nbytes / 2**20:.1f} MiB)"
