"""One text over one link: chunks of the prompt, rounds, and what to do when the link or the cloud forgets."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor

from edgebolt.common.decoding import MovingAverage
from edgebolt.hat.chunk_size import chunk_size
from edgebolt.hat.conversation import Conversation
from edgebolt.hat.link import CloudLink, LinkLostError
from edgebolt.hat.timeline import Span
from edgebolt.hat.upload import Upload

__all__ = ["Chunking", "Dialogue", "Timings", "UploadRefusedError"]


class UploadRefusedError(RuntimeError):
    """The cloud says that it can never run an upload, and why."""


@dataclass(frozen=True)
class Chunking:
    """How a prompt is cut.

    Args:
        tokens: of a chunk; None: solved for each chunk (:func:`edgebolt.hat.chunk_size`); the whole prompt where it is
            larger.
        smallest, largest: bounds of the solution.
        stages: of the cloud's pipeline.
        first: tokens of a chunk while the uplink has not been measured.
        ahead: chunks that are sent before the first of them is answered; by default one more than there are stages, so
            that each has one.
    """

    tokens: int | None = None
    smallest: int = 8
    largest: int = 512
    stages: int = 1
    first: int = 32
    ahead: int | None = None

    def __post_init__(self) -> None:
        counts = (self.tokens, self.smallest, self.stages, self.first, self.ahead)
        if any(count is not None and count < 1 for count in counts) or self.smallest > self.largest:
            raise ValueError(f"{self}: all numbers are at least 1, and smallest is at most largest.")


@dataclass
class Timings:
    """When the tokens of a text came, in seconds from its beginning.

    Args:
        tokens: seconds of each token, those of one round at once.
        spans: what took how long, in the order in which it ended (:func:`edgebolt.hat.draw_timeline`).
    """

    tokens: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token (TTFT)."""
        return self.tokens[0]

    @property
    def between(self) -> float:
        """Seconds between two tokens, on average (TBT); 0 for a single one."""
        return (self.tokens[-1] - self.tokens[0]) / max(len(self.tokens) - 1, 1)


class Dialogue:
    """Drives a conversation over a link until its text is complete.

    Args:
        conversation: the device's half.
        link: to the cloud.
        chunking: of the prompt.
        retries: how often in a row a lost link is opened anew.
        clock: seconds, for the timings.

    Attributes:
        timings: when tokens came.
        recovered: how often the cloud had to be given anew what it did not hold.
    """

    def __init__(
        self,
        conversation: Conversation,
        link: CloudLink,
        chunking: Chunking | None = None,
        retries: int = 5,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.conversation, self.link = conversation, link
        self.chunking, self.retries, self.clock = Chunking() if chunking is None else chunking, retries, clock
        self.name = secrets.token_bytes(16)
        self.timings, self.recovered = Timings(), 0
        self._sequence, self._answered, self._from = 0, 0, 1
        self._last: Upload | None = None
        self._start = 0.0
        self._step = MovingAverage()  # seconds of looking one step ahead
        self._away: dict[int, tuple[str, float, int]] = {}  # uploads without an answer: work, when, rows

    def __iter__(self) -> Iterator[list[int]]:
        """The text's new tokens, round by round.

        Raises:
            LinkLostError: if the link stays lost.
            UploadRefusedError: if the cloud refuses an upload.
        """
        conversation, self._start = self.conversation, self.clock()
        try:
            deep = self._prompt()
            begun = self._now()
            new = conversation.begin(deep)
            while True:
                self._note("verify", begun, len(new))
                self.timings.tokens += [self.timings.spans[-1].end] * len(new)
                yield new
                if conversation.done:
                    return
                upload = self._draft()
                self._send(upload)
                self._look_ahead(len(upload.rows))
                deep = self._answer()
                begun = self._now()
                new = conversation.receive(deep)
        finally:
            self.link.end(self.name)

    def _now(self) -> float:
        return self.clock() - self._start

    def _note(self, work: str, begun: float, tokens: int) -> None:
        self.timings.spans.append(Span("device", work, begun, self._now(), tokens))

    def _prompt(self) -> Tensor:
        conversation, ahead = self.conversation, self.chunking.ahead or self.chunking.stages + 1
        while (left := conversation.prompt_length - conversation.held) > 0:
            if self._sequence - self._answered >= ahead:
                self._answer(self._sequence - ahead + 1)
            tokens, begun = self._tokens(left), self._now()
            chunk = conversation.chunk(tokens)
            self._note("prompt", begun, len(chunk.rows))
            self._send(chunk)
        begun = self._now()
        conversation.read_prompt()
        if conversation.adapter is not None:
            self._note("adapter", begun, conversation.prompt_length)
        return self._answer()

    def _draft(self) -> Upload:
        begun = self._now()
        while self.conversation.drafts:
            self.conversation.draft()
        upload = self.conversation.upload()
        self._note("draft", begun, len(upload.rows))
        return upload

    def _look_ahead(self, rows: int) -> None:
        """As many steps as are expected to end before the answer is there; if nothing is known, until it is."""
        link = self.link
        wait = link.cloud_seconds(link.batch_tokens()) + 2 * rows * (link.row_seconds() or 0.0)
        begun, steps = self._now(), 0
        last = begun
        while not link.arrived(self.name) and (not wait or last - begun + self._step(0.0) <= wait):
            if not self.conversation.look_ahead():
                break
            steps, before, last = steps + 1, last, self._now()
            self._step.update(last - before)
        if steps:
            self._note("ahead", begun, steps)

    def _tokens(self, left: int) -> int:
        rule, seconds, left = self.chunking, self.link.row_seconds(), min(left, self.link.most_rows)
        if rule.tokens is not None:
            return min(rule.tokens, left)
        if not seconds:
            return min(rule.first if seconds is None else rule.largest, left)
        batch = self.link.batch_tokens()
        return chunk_size(left, seconds, self.link.cloud_seconds, batch, rule.stages, rule.smallest, rule.largest)

    def _send(self, upload: Upload) -> None:
        self._sequence += 1
        self._last = upload
        work = "prompt" if upload.start < self.conversation.prompt_length else "draft"
        self._away[self._sequence] = (work, self._now(), len(upload.rows))
        try:
            self.link.send(self.name, self._sequence, upload)
        except LinkLostError:
            self._reopen()

    def _answer(self, wanted: int | None = None) -> Tensor:
        """What the cloud gives for the upload number ``wanted``, by default the last one."""
        wanted = self._sequence if wanted is None else wanted
        attempts = 0
        while True:
            try:
                answer = self.link.receive(self.name)
            except LinkLostError:
                attempts += 1
                if attempts > self.retries:
                    raise
                self._reopen()
                continue
            attempts = 0
            if answer.sequence in self._away:
                work, sent, rows = self._away.pop(answer.sequence)
                self.timings.spans.append(Span("away", work, sent, self._now(), rows))
            if answer.sequence < self._from:
                continue  # to what was sent before the cloud was given anew what it had lost
            if answer.refused is not None:
                raise UploadRefusedError(answer.refused)
            if answer.held is not None:
                self._resend(answer.held)
                wanted = self._sequence
                continue
            self._answered = max(self._answered, answer.sequence)
            if answer.sequence >= wanted:
                assert answer.deep is not None
                return answer.deep

    def _resend(self, held: int) -> None:
        """Give the cloud what it does not hold, and the last upload again."""
        assert self._last is not None
        last, self.recovered = self._last, self.recovered + 1
        self._from = self._sequence + 1
        rows = min(self.chunking.tokens or self.chunking.largest, self.link.most_rows)
        for upload in self.conversation.resent(min(held, last.start), last.start, rows):
            self._send(upload)
        self._send(replace(last, kept=()))  # what the cloud has now is the text itself, and no tree

    def _reopen(self) -> None:
        for attempt in range(1, self.retries + 1):
            try:
                self.link.reopen()
                if self._last is not None:
                    self.link.send(self.name, self._sequence, self._last)
                return
            except LinkLostError:
                if attempt == self.retries:
                    raise
