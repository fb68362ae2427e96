"""A device that generates text with a cloud's help."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch import nn

from edgebolt.common.decoding import Link, TokenChoice
from edgebolt.hat.adapter import HatAdapter
from edgebolt.hat.cloud_engine import CloudEngine
from edgebolt.hat.cloud_model import CloudModel
from edgebolt.hat.conversation import Conversation, Drafting
from edgebolt.hat.dialogue import Chunking, Dialogue, Timings
from edgebolt.hat.fingerprint import fingerprint
from edgebolt.hat.grpc_link import GrpcLink
from edgebolt.hat.link import CloudLink, InProcess
from edgebolt.hat.medusa import MedusaConversation, MedusaHeads
from edgebolt.hat.row_format import FORMATS
from edgebolt.hat.split_model import SplitModel, split
from edgebolt.hat.tls import DeviceKeys

__all__ = ["Generation", "HatClient"]


@dataclass  # not frozen: Lightning walks through what a prediction gives
class Generation:
    """A text, and what it took.

    Args:
        tokens: the new ones.
        timings: when they came, and what took how long (:func:`edgebolt.hat.draw_timeline`).
        rounds: verifications by the cloud; the first token needs none.
        drafted: tokens drafted on the device.
        accepted: of those, tokens that the whole model would have chosen itself.
        hits: rounds that began with what had been drafted ahead.
        sent: bytes of messages to the cloud; 0 in process.
        received: bytes of messages from it.
    """

    tokens: list[int]
    timings: Timings
    rounds: int
    drafted: int
    accepted: int
    hits: int
    sent: int
    received: int

    @property
    def accept_length(self) -> float:
        """Tokens a round, the model's own one included; 1 without drafts."""
        return (len(self.tokens) - 1) / self.rounds if self.rounds else 1.0


class HatClient:
    """The device's side of HAT, over gRPC.

    Args:
        address: of the cloud, ``host:port``; None runs the cloud's layers in this process too.
        model: a decoder, or the parts of one.
        adapter: Λ; None drafts nothing.
        device_layers: of the device, where ``model`` is whole.
        rows: format of hidden states on the link, a key of ``FORMATS``; by default the model's own dtype, which loses
            nothing.
        keys: certificates; without them only a loopback address is taken.
        drafting: threshold, length and branches of drafts.
        chunking: of prompts.
        timeout: seconds without an answer after which the link counts as lost.
        retries: how often in a row a lost link is opened anew.
        shape: holds messages back as a link of so many bytes a second would, for experiments on one machine
            (:class:`GrpcLink`).
        heads: Medusa's, which draft in place of Λ: the baseline U-Medusa. ``drafting`` is not used then.

    Raises:
        ValueError: for arguments out of range, both Λ and heads, or a shape without a link.
        LinkLostError: if the cloud cannot be reached.
        DeviceRefusedError: if it has another model or protocol.

    Example::

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20))
        >>> with HatClient(None, model, device_layers=1) as client:
        ...     found = client.generate([3, 1, 4], new_tokens=5, stops=())
        >>> len(found.tokens), found.rounds
        (5, 4)
    """

    def __init__(
        self,
        address: str | None,
        model: nn.Module | SplitModel,
        adapter: HatAdapter | None = None,
        device_layers: int = 2,
        rows: str | None = None,
        keys: DeviceKeys | None = None,
        drafting: Drafting | None = None,
        chunking: Chunking | None = None,
        timeout: float = 30.0,
        retries: int = 5,
        shape: Link | None = None,
        heads: MedusaHeads | None = None,
    ) -> None:
        if adapter is not None and heads is not None:
            raise ValueError("adapter and heads: a text is drafted by one of them, give the other as None.")
        if address is None and shape is not None:
            raise ValueError(f"address=None, shape={shape}: there is no link to shape, give a cloud's address.")
        self.parts = model if isinstance(model, SplitModel) else split(model, device_layers)
        self.adapter, self.drafting, self.chunking, self.retries = adapter, drafting, chunking, retries
        self.heads = heads
        dtype = str(next(self.parts.input.parameters()).dtype).removeprefix("torch.")
        rows = dtype if rows is None else rows
        if rows not in FORMATS:
            raise ValueError(f"rows={rows!r}: use one of {sorted(FORMATS)}.")
        self.link: CloudLink
        if address is None:
            passed = None if rows == dtype else rows
            self.link = InProcess(CloudEngine(CloudModel(self.parts.middle)), passed)
        else:
            name = fingerprint(self.parts)
            self.link = GrpcLink(address, self.parts.width, name, rows, keys, timeout, shape=shape)
        self._dialogue: Dialogue | None = None
        self._bytes = (0, 0)

    def stream(
        self,
        prompt: Sequence[int],
        new_tokens: int = 128,
        choice: TokenChoice | None = None,
        request: int = 0,
        stops: Collection[int] | None = None,
    ) -> Iterator[list[int]]:
        """The new tokens of a text, round by round; :attr:`last` tells afterwards what it took.

        Args:
            prompt: token ids.
            new_tokens: to generate at most.
            choice: of tokens; by default the likeliest.
            request: number of the text among those with the same seed.
            stops: tokens that end the text; by default the model's.
        """
        conversation = (
            Conversation(self.parts, self.adapter, prompt, new_tokens, choice, self.drafting, request, stops)
            if self.heads is None
            else MedusaConversation(self.parts, self.heads, prompt, new_tokens, choice, request=request, stops=stops)
        )
        self._dialogue, self._bytes = Dialogue(conversation, self.link, self.chunking, self.retries), self._traffic()
        yield from self._dialogue

    def generate(
        self,
        prompt: Sequence[int],
        new_tokens: int = 128,
        choice: TokenChoice | None = None,
        request: int = 0,
        stops: Collection[int] | None = None,
    ) -> Generation:
        """A whole text; arguments as for :meth:`stream`."""
        for _ in self.stream(prompt, new_tokens, choice, request, stops):
            pass
        return self.last

    @property
    def last(self) -> Generation:
        """What the last text took.

        Raises:
            RuntimeError: before the first one.
        """
        if self._dialogue is None:
            raise RuntimeError("No text has been generated yet.")
        conversation, (sent, received) = self._dialogue.conversation, self._traffic()
        return Generation(
            conversation.text[conversation.prompt_length :],
            self._dialogue.timings,
            conversation.rounds,
            conversation.drafted,
            conversation.accepted,
            conversation.hits,
            sent - self._bytes[0],
            received - self._bytes[1],
        )

    def _traffic(self) -> tuple[int, int]:
        return (self.link.sent, self.link.received) if isinstance(self.link, GrpcLink) else (0, 0)

    def close(self) -> None:
        """Close the link."""
        if isinstance(self.link, GrpcLink):
            self.link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
