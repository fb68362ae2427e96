"""The cloud without a link: conversations, their caches, and the order in which uploads are run.

The gRPC server, the in-process link and the simulator drive the same engine; it knows no clock and no thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from edgebolt.common.decoding import cache_bytes, cache_length, new_cache
from edgebolt.hat.batching import next_batch
from edgebolt.hat.upload import Upload

if TYPE_CHECKING:
    from transformers import DynamicCache

__all__ = ["Answer", "CloudEngine", "Job", "Limits"]


@dataclass(frozen=True)
class Limits:
    """What the cloud takes on.

    Args:
        batch_tokens: rows of a batch; None: all that waits, prompts whole.
        cache_bytes: of all conversations' keys and values; those that have been idle longest go first, and their
            devices upload them anew.
        conversations: that are held; the one that has been idle longest goes first. Those whose uploads wait are
            kept, so that there can be more for a while.

    Raises:
        ValueError: for a limit that is not above 0.
    """

    batch_tokens: int | None = 512
    cache_bytes: int = 4 << 30
    conversations: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value}: use a number above 0.")


@dataclass(frozen=True)
class Answer:
    """To one upload: what the middle layers give, or what keeps the cloud from running it.

    Args:
        sequence: of the upload.
        deep: for the upload's last ``reply`` rows, shape ``[reply, width]``.
        held: positions that the cloud holds, where the upload builds on more: it is to be sent again behind the rest.
        refused: why the upload can never be run.
    """

    sequence: int
    deep: Tensor | None = None
    held: int | None = None
    refused: str | None = None


@dataclass(eq=False)
class Job:
    """An upload that waits.

    Args:
        key: of the conversation.
        sequence: of the upload in it.
        upload: what is to be run.
        deliver: each called once with the answer.
    """

    key: Hashable
    sequence: int
    upload: Upload
    deliver: list[Callable[[Answer], None]]
    done: int = 0
    cache: DynamicCache | None = None  # that it is run with, from the making of a batch on
    place: int = 0  # in the order of arrival

    @property
    def rows(self) -> int:
        """Rows that are left to run."""
        return len(self.upload.rows) - self.done

    @property
    def verifies(self) -> bool:
        """Whether an answer is wanted for all rows, or for a tree: it is not cut then."""
        upload = self.upload
        return upload.reply == len(upload.rows) or upload.reply > 1 or upload.parents is not None

    def part(self, rows: int) -> Upload:
        """The next rows, as an upload of their own."""
        whole = self.upload
        return Upload(
            whole.start + self.done,
            whole.rows[self.done : self.done + rows],
            whole.reply if rows == self.rows else 0,
            () if self.done else whole.kept,
            whole.parents,
        )


@dataclass(eq=False)
class _Held:
    """A conversation in the cloud."""

    cache: DynamicCache = field(default_factory=new_cache)
    jobs: list[Job] = field(default_factory=list)
    newest: int = 0  # sequence of the newest upload that was taken on
    answer: Answer | None = None  # the last one that was given
    quiet: bool = False  # nothing has been answered since the last sweep


class Layers(Protocol):
    """What an engine runs: :class:`edgebolt.hat.CloudModel`, or what stands in for it."""

    def run(self, work: Sequence[tuple[DynamicCache, Upload]]) -> list[Tensor]: ...


class CloudEngine:
    """Takes uploads, makes batches of them, and answers each once.

    An upload that comes twice is run once and answered as before; one that is older than the newest of its
    conversation is dropped. One that builds on more than is held (after an eviction, a restart, or when an upload
    before it was lost) is answered with what is held.

    Args:
        model: the middle layers.
        limits: what is taken on.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from edgebolt.hat import CloudModel, Conversation, split
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> parts = split(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20)), device_layers=1)
        >>> engine, answers = CloudEngine(CloudModel(parts.middle)), []
        >>> engine.take("a text", 1, Conversation(parts, None, [3, 1, 4]).chunk(8), answers.append)
        >>> engine.step(), answers[0].deep.shape
        (True, torch.Size([1, 8]))
    """

    def __init__(self, model: Layers, limits: Limits | None = None) -> None:
        self.model, self.limits = model, Limits() if limits is None else limits
        self._held: OrderedDict[Hashable, _Held] = OrderedDict()  # idle longest first
        self._position_bytes, self._places = 0, count()

    @property
    def conversations(self) -> int:
        """Conversations that are held."""
        return len(self._held)

    @property
    def cached(self) -> int:
        """Bytes of all keys and values."""
        return sum(cache_length(held.cache) for held in self._held.values()) * self._position_bytes

    def take(self, key: Hashable, sequence: int, upload: Upload, deliver: Callable[[Answer], None]) -> None:
        """Take an upload on.

        One that comes again while it waits is answered as often, four times at most: on which of several streams the
        device still listens is not known here, and what is read last need not be what was sent last.

        Args:
            key: of the conversation; one that is not held begins.
            sequence: of the upload, growing in the conversation.
            upload: what is to be run.
            deliver: called once, from :meth:`take`, :meth:`batch` or :meth:`finish`; never for an upload that was
                dropped as an old one.
        """
        if key not in self._held:
            while len(self._held) >= self.limits.conversations and self._evict(waiting=False):
                pass
            self._held[key] = _Held()
        held = self._held[key]
        self._held.move_to_end(key)
        if sequence > held.newest:
            held.newest = sequence
            held.jobs.append(Job(key, sequence, upload, [deliver], place=next(self._places)))
            return
        for job in held.jobs:
            if job.sequence == sequence:
                job.deliver = [*job.deliver[-3:], deliver]
                return
        if held.answer is not None and held.answer.sequence == sequence:
            deliver(held.answer)

    def waiting(self, key: Hashable) -> int:
        """Uploads of a conversation that wait for an answer."""
        return len(self._held[key].jobs) if key in self._held else 0

    def waiting_rows(self, key: Hashable) -> list[int]:
        """Rows of each upload of a conversation that waits for an answer."""
        return [len(job.upload.rows) for job in self._held[key].jobs] if key in self._held else []

    def end(self, key: Hashable) -> None:
        """Let a conversation go."""
        self._held.pop(key, None)

    def sweep(self) -> int:
        """Let the conversations go that were idle from the last call on, of which there may be no device any more.

        Returns:
            How many. A device that does come back uploads its text anew.
        """
        idle = [key for key, held in self._held.items() if held.quiet and not held.jobs]
        for key in idle:
            self.end(key)
        for held in self._held.values():
            held.quiet = True
        return len(idle)

    def batch(self) -> list[tuple[Job, int]]:
        """The next batch and how many rows of each job it has; empty if nothing can be run.

        Between this and :meth:`finish`, no other batch may be made.
        """
        while waiting := self._ready():
            if batch := self._with_room(next_batch(waiting, self.limits.batch_tokens)):
                return batch  # else the last one was refused, and others may wait
        return []

    def _ready(self) -> list[Job]:
        """The next upload of each conversation, in order of arrival; those that build on what is not held are told."""
        waiting: list[Job] = []
        for held in list(self._held.values()):
            while held.jobs and not held.jobs[0].done and not _builds_on(held.jobs[0].upload, held.cache):
                job = held.jobs[0]
                self._answer(held, job, Answer(job.sequence, held=cache_length(held.cache)))
            for job in held.jobs[:1]:
                job.cache = held.cache
                waiting.append(job)
        return sorted(waiting, key=lambda job: job.place)

    def _with_room(self, batch: list[tuple[Job, int]]) -> list[tuple[Job, int]]:
        """Let idle conversations go for a batch; jobs that have no room even so wait, or are refused if alone."""
        spared = {job.key for job, _ in batch}
        while batch:
            need = self.cached + sum(rows for _, rows in batch) * self._position_bytes
            if need <= self.limits.cache_bytes:
                break
            if self._evict(spared):
                continue
            if len(batch) == 1 and len(spared) > 1:
                spared = {batch[0][0].key}  # the others wait, with caches that can go
                continue
            job, _ = batch.pop()
            if not batch:
                held = self._held[job.key]
                reason = f"The cloud holds {self.limits.cache_bytes} bytes at most, which this text exceeds."
                self._answer(held, job, Answer(job.sequence, refused=reason))
                self.end(job.key)
        return batch

    def _evict(self, spared: frozenset[Hashable] | set[Hashable] = frozenset(), waiting: bool = True) -> bool:
        """Let the conversation go that has been idle longest; if there is none, the cache of one that waits."""
        found = [key for key in self._held if key not in spared]
        idle = next((key for key in found if not self._held[key].jobs), None)
        if idle is not None:
            del self._held[idle]
            return True
        key = next((key for key in found if cache_length(self._held[key].cache)), None)
        if key is None or not waiting:
            return False
        self._held[key].cache = new_cache()  # its uploads are answered with "nothing is held"
        for job in self._held[key].jobs:
            job.done = 0
        return True

    def run(self, batch: list[tuple[Job, int]]) -> list[Tensor]:
        """Run a batch: the one slow call; may be made from another thread."""
        return self.model.run([(job.cache, job.part(rows)) for job, rows in batch if job.cache is not None])

    def finish(self, batch: list[tuple[Job, int]], results: list[Tensor]) -> None:
        """Answer what is complete."""
        for (job, rows), deep in zip(batch, results, strict=True):
            held = self._held.get(job.key)
            if held is None or job not in held.jobs or held.cache is not job.cache:
                continue  # ended or let go meanwhile
            job.done += rows
            if not self._position_bytes:
                self._position_bytes = cache_bytes(held.cache) // cache_length(held.cache)
            if not job.rows:
                self._answer(held, job, Answer(job.sequence, deep))

    def fail(self, batch: list[tuple[Job, int]], reason: str) -> None:
        """Refuse what :meth:`run` has failed on, and let its conversations go."""
        for job, _ in batch:
            held = self._held.get(job.key)
            if held is not None and job in held.jobs:
                self._answer(held, job, Answer(job.sequence, refused=reason))
                self.end(job.key)

    def step(self) -> bool:
        """One batch from beginning to end; False if there was nothing to run."""
        batch = self.batch()
        if batch:
            self.finish(batch, self.run(batch))
        return bool(batch)

    def _answer(self, held: _Held, job: Job, answer: Answer) -> None:
        held.jobs.remove(job)
        held.answer, held.quiet = answer, False
        for deliver in job.deliver:
            deliver(answer)


def _builds_on(upload: Upload, cache: DynamicCache) -> bool:
    """Whether a cache holds what an upload keeps."""
    if not upload.kept:
        return upload.start <= cache_length(cache)
    return upload.start - len(upload.kept) <= cache_length(cache) and max(upload.kept) < cache_length(cache)
