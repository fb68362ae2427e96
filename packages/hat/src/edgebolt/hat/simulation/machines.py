"""Devices, links and a cloud on simulated time.

What is simulated is the time alone: conversations, uploads, batches and answers are those of the real client and
server (or of texts whose drafts are drawn, :class:`edgebolt.hat.simulation.TracedText`), and each step is given the
seconds that it takes on the machine that is modelled. Nothing depends on the speed of the machine that simulates.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import simpy
from torch import Tensor

from edgebolt.common.decoding import BatchDelay, Link, MovingAverage
from edgebolt.hat.chunk_size import chunk_size
from edgebolt.hat.cloud_engine import Answer, CloudEngine
from edgebolt.hat.dialogue import Timings
from edgebolt.hat.upload import Upload

__all__ = ["CloudTiming", "DeviceTiming", "SimulatedCloud", "SimulatedDevice", "SimulatedText", "Text"]

Steps = Generator[simpy.Event, Any, None]


class Text(Protocol):
    """What is simulated of a conversation: :class:`edgebolt.hat.Conversation`, or one that is drawn."""

    prompt_length: int
    done: bool

    @property
    def held(self) -> int: ...  # noqa: D102

    @property
    def drafts(self) -> bool: ...  # noqa: D102

    def chunk(self, tokens: int) -> Upload: ...  # noqa: D102
    def read_prompt(self) -> None: ...  # noqa: D102
    def begin(self, deep: Tensor) -> list[int]: ...  # noqa: D102
    def draft(self) -> None: ...  # noqa: D102
    def upload(self) -> Upload: ...  # noqa: D102
    def look_ahead(self) -> bool: ...  # noqa: D102
    def receive(self, deep: Tensor) -> list[int]: ...  # noqa: D102


@dataclass(frozen=True)
class CloudTiming:
    """Seconds of a batch in a pipeline of equal stages.

    Args:
        stages: ``P``.
        stage_base: seconds of a stage, whatever the batch.
        stage_token: more, for each token.
        overlapped: whether a batch enters the first stage as soon as the one before has left it; else it waits until
            that has left the last one, as with a scheduler that reads each batch's outcome before it plans the next.
    """

    stages: int
    stage_base: float
    stage_token: float
    overlapped: bool = True

    def stage(self, tokens: float) -> float:
        """Seconds of a batch of ``tokens`` in one stage."""
        return self.stage_base + self.stage_token * tokens


@dataclass(frozen=True)
class DeviceTiming:
    """Seconds of a device's own work.

    Args:
        draft: a step of the draft: first layers, Λ and head on one token, or on a few branches.
        plain: the first layers on one token, which is all that a device does that does not draft.
        head: the head on the rows that come back.
        prompt_base: the first layers on a chunk, whatever its length.
        prompt_token: more, for each token.
        adapter_token: Λ on a token of the prompt, which a device that drafts reads once it is on its way.
        tree: what a tree's rows take in place of drafting (Medusa's heads and the first layers); 0 without.
    """

    draft: float
    plain: float
    head: float
    prompt_base: float
    prompt_token: float
    adapter_token: float = 0.0
    tree: float = 0.0


class SimulatedCloud:
    """Makes batches whenever the first stage is free.

    Args:
        environment: simpy's.
        engine: conversations and batches.
        timing: of a batch.

    Attributes:
        batches: for each batch, when it began, its tokens, and the seconds that it was in one stage.
        monitor: ``g`` and ``μ`` as measured: moving averages with a history of 0.8.
    """

    def __init__(self, environment: simpy.Environment, engine: CloudEngine, timing: CloudTiming) -> None:
        self.environment, self.engine, self.timing = environment, engine, timing
        self.batches: list[tuple[float, int, float]] = []
        whole = [timing.stages * timing.stage(2**power) for power in range(13)]
        self.delay, self.tokens = BatchDelay(whole), MovingAverage()
        self.ready = 0.0  # when the answers that are being given leave the last stage
        self._free = [0.0] * timing.stages
        self._wake = environment.event()
        environment.process(self._run())

    def take(self, key: Any, sequence: int, upload: Upload, deliver: Callable[[Answer], None]) -> None:
        """An upload has arrived."""
        self.engine.take(key, sequence, upload, deliver)
        if not self._wake.triggered:
            self._wake.succeed()

    def _run(self) -> Steps:
        while True:
            self.ready = self.environment.now
            batch = self.engine.batch()
            if not batch:
                self._wake = self.environment.event()
                yield self._wake
                continue
            tokens = sum(rows for _, rows in batch)
            stage = self.timing.stage(tokens)
            left = self.environment.now
            for number, free in enumerate(self._free):
                left = max(left, free) + stage
                self._free[number] = left
            self.ready = left
            self.batches.append((self.environment.now, tokens, stage))
            self.delay.update(tokens, left - self.environment.now)
            self.tokens.update(tokens)
            self.engine.finish(batch, self.engine.run(batch))  # answers are given now, and leave when they are ready
            yield self.environment.timeout(self._free[0 if self.timing.overlapped else -1] - self.environment.now)


@dataclass
class SimulatedDevice:
    """A device: one processor, one uplink, one downlink, shared by its texts in order of asking.

    Args:
        environment: simpy's.
        timing: of its own work.
        link: to the cloud.
        row_bytes: ``A``, of a row on the link.
        message_bytes: of a message beside its rows.
    """

    environment: simpy.Environment
    timing: DeviceTiming
    link: Link
    row_bytes: int
    message_bytes: int = 64
    up: MovingAverage = field(default_factory=MovingAverage)

    def __post_init__(self) -> None:
        self.processor = simpy.PriorityResource(self.environment)
        self.uplink, self.downlink = simpy.Resource(self.environment), simpy.Resource(self.environment)

    def work(self, seconds: float, urgent: bool = True) -> Steps:
        """Use the processor; what is not urgent waits for all that is."""
        with self.processor.request(priority=0 if urgent else 1) as mine:
            yield mine
            yield self.environment.timeout(seconds)

    @property
    def busy(self) -> bool:
        """Whether the processor is at work."""
        return self.processor.count > 0

    def upload(self, rows: int, sent: simpy.Event | None = None) -> Steps:
        """Send rows up; the bytes hold the uplink, the latency does not: ``sent`` is when the uplink is free."""
        size = rows * self.row_bytes + self.message_bytes
        with self.uplink.request() as mine:
            yield mine
            started = self.environment.now
            yield self.environment.timeout(size / self.link.up)
            if size >= 4096:  # smaller ones tell more about the latency than about the link
                self.up.update(size / (self.environment.now - started))
        if sent is not None:
            sent.succeed()
        yield self.environment.timeout(self.link.latency)

    def download(self, rows: int) -> Steps:
        """Get rows down."""
        with self.downlink.request() as mine:
            yield mine
            yield self.environment.timeout((rows * self.row_bytes + self.message_bytes) / self.link.down)
        yield self.environment.timeout(self.link.latency)


class SimulatedText:
    """One text of a device, from its request to its last token.

    Args:
        device: whose it is.
        cloud: that it uses.
        text: what is generated.
        chunked: whether the prompt is cut so that upload and cloud overlap.
        ahead: whether the device drafts ahead while it waits.
        drafting: whether it has Λ.
        first: tokens of a chunk while the uplink has not been measured.
        smallest: tokens of a chunk at least.
        largest: tokens of a chunk at most.
        block: tokens that the device's layers run over at once, where the prompt is cut (ours).

    Attributes:
        timings: when tokens came, in simulated seconds from the request.
        up, down: rows that travelled.
        process: simpy's process, to wait for.
    """

    _names = count()

    def __init__(
        self,
        device: SimulatedDevice,
        cloud: SimulatedCloud,
        text: Text,
        chunked: bool = True,
        ahead: bool = True,
        drafting: bool = True,
        first: int = 32,
        smallest: int = 8,
        largest: int = 512,
        block: int = 64,
    ) -> None:
        self.device, self.cloud, self.text = device, cloud, text
        self.chunked, self.ahead, self.smallest, self.largest = chunked, ahead, smallest, largest
        self.block, self.drafting, self.first = block, drafting, first
        self.environment = device.environment
        self.timings, self.up, self.down = Timings(), 0, 0
        self._name, self._sequence, self._done = next(self._names), 0, 0
        self._block = self.environment.event()
        self.process = self.environment.process(self._run())

    def _run(self) -> Steps:
        begun = self.environment.now
        deep = yield from self._prompt()
        new = self.text.begin(deep)
        while True:
            yield from self.device.work(self.device.timing.head)
            self.timings.tokens += [self.environment.now - begun] * len(new)
            if self.text.done:
                break
            while self.text.drafts:
                self.text.draft()
                timing = self.device.timing
                yield from self.device.work(timing.draft if self.drafting else timing.plain)
            upload = self.text.upload()
            if upload.parents is not None:
                yield from self.device.work(self.device.timing.tree)
            answered = self._send(upload)
            if self.ahead:
                yield from self._look_ahead(len(upload.rows), answered)
            yield answered
            new = self.text.receive(_value(answered))
        self.cloud.engine.end(self._name)

    def _prompt(self) -> Generator[simpy.Event, Any, Tensor]:
        """The device's layers run over the prompt in blocks, and what they have done goes up in chunks."""
        text = self.text
        self.environment.process(self._read())
        while True:
            while self._done == text.held:
                yield self._block
            left = text.prompt_length - text.held
            upload = text.chunk(min(self._chunk(left) if self.chunked else left, self._done - text.held))
            uploaded = self.environment.event()
            answered = self._send(upload, uploaded)
            if text.held == text.prompt_length:
                text.read_prompt()
                if self.drafting:
                    yield from self.device.work(self.device.timing.adapter_token * text.prompt_length)
                yield answered
                return _value(answered)
            yield uploaded  # the next chunk is sized by what is known when the link is free

    def _read(self) -> Steps:
        timing, length = self.device.timing, self.text.prompt_length
        while self._done < length:
            block = min(self.block if self.chunked else length, length - self._done)
            yield from self.device.work(timing.prompt_base + timing.prompt_token * block)
            self._done += block
            self._block.succeed()
            self._block = self.environment.event()

    def _chunk(self, left: int) -> int:
        if self.device.up.value is None:
            return min(self.first, left)
        row = self.device.row_bytes / self.device.up.value
        delay, batch = self.cloud.delay, self.cloud.tokens(1.0)
        timing = self.cloud.timing
        stages = timing.stages if timing.overlapped else 1  # a chunk waits for as much of the pipeline as is not free
        return chunk_size(left, row, delay, batch, stages, self.smallest, self.largest)

    def _send(self, upload: Upload, uploaded: simpy.Event | None = None) -> simpy.Event:
        """Send, and say when the answer is there."""
        self._sequence += 1
        self.up += len(upload.rows)
        answered = self.environment.event()
        self.environment.process(self._carry(self._sequence, upload, uploaded, answered))
        return answered

    def _carry(self, sequence: int, upload: Upload, uploaded: simpy.Event | None, answered: simpy.Event) -> Steps:
        yield from self.device.upload(len(upload.rows), uploaded)

        def deliver(answer: Answer) -> None:
            self.environment.process(self._return(answer, self.cloud.ready - self.environment.now, answered))

        self.cloud.take(self._name, sequence, upload, deliver)

    def _return(self, answer: Answer, seconds: float, answered: simpy.Event) -> Steps:
        if answer.deep is None:
            raise RuntimeError(f"The simulated cloud has not run an upload: {answer}")
        yield self.environment.timeout(seconds)
        self.down += len(answer.deep)
        if len(answer.deep):
            yield from self.device.download(len(answer.deep))
        answered.succeed(answer.deep)

    def _look_ahead(self, rows: int, answered: simpy.Event) -> Steps:
        """λ steps: as many as are expected to end before the answer is there, while nothing else needs the device."""
        size = rows * self.device.row_bytes + self.device.message_bytes
        wait = self.device.link.latency + size / self.device.up(self.device.link.up)
        wait += self.cloud.delay(self.cloud.tokens(1.0)) + self.device.link.down_seconds(size)
        for _ in range(int(wait / self.device.timing.draft)):
            if answered.triggered or self.device.busy or not self.text.look_ahead():
                return
            yield from self.device.work(self.device.timing.draft, urgent=False)


def _value(answered: simpy.Event) -> Tensor:
    """What an answer brought."""
    found = answered.value
    assert isinstance(found, Tensor)
    return found
