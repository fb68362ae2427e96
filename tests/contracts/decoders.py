"""What the suite of decoders runs: a row for each way to decode, and the model that all must agree with."""

import asyncio
import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import simpy
import torch
from torch import nn

from edgebolt.common.decoding import LayerStack, Link, Segment, TokenChoice, new_cache
from edgebolt.hat import (
    MEDUSA_TREE,
    Chunking,
    CloudEngine,
    CloudLink,
    CloudModel,
    CloudServer,
    Conversation,
    Dialogue,
    Drafting,
    GrpcLink,
    HatAdapter,
    InProcess,
    MedusaConversation,
    MedusaHeads,
    fingerprint,
    split,
)
from edgebolt.hat.simulation import CloudTiming, DeviceTiming, SimulatedCloud, SimulatedDevice, SimulatedText

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
VOCABULARY, STOP = 40, 5


@cache
def model() -> nn.Module:
    """A random Llama in float64, with weights so large that its logits are not flat."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=160)
        found = LlamaForCausalLM(config).double().eval()
        with torch.no_grad():
            for weight in found.parameters():
                weight.mul_(3 if weight.dim() == 2 else 1)
    return found


class NoisyMiddle(nn.Module):
    """In place of Λ the middle layers themselves, with noise on their weights: drafts that are right now and then."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        noisy, generator = copy.deepcopy(model()), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in noisy.parameters():
                drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight.add_(noise * weight.abs().mean() * drawn)
        self.layers = LayerStack.of(noisy, 2, 5)

    def forward(self, rows, cache, positions=None, mask=None):
        return self.layers(rows, [Segment(cache, len(rows), positions, mask)])


noisy = cache(NoisyMiddle)


@cache
def split_once():
    """The model's parts."""
    return split(model(), 2)


@cache
def autoregressive(length: int, new_tokens: int, choice: str, request: int) -> list[int]:
    """The text token by token, by transformers' own model and cache."""
    start, chosen = prompt(length), CHOICES[choice]()
    text, cached, following = list(start), new_cache(), torch.tensor([start])
    while True:
        with torch.no_grad():
            logits = model()(following, past_key_values=cached, use_cache=True).logits[0, -1]
        text.append(chosen(logits, request, len(text), text))
        if text[-1] == STOP or len(text) == length + new_tokens:
            return text
        following = torch.tensor([text[-1:]])


@dataclass(frozen=True)
class Decoded:
    """A text, and what is asked about how it came about."""

    text: list[int]
    drafted: int
    accepted: int
    hits: int


def hat(noise: float | None, drafting: Drafting, chunk: int = 7, steps: int = 4) -> Callable[..., Decoded]:
    """HAT over the in-process link; without noise, with a Λ that is not trained."""

    def decode(prompt, new_tokens, choice, request) -> Decoded:
        adapter = HatAdapter(model()) if noise is None else noisy(noise)
        parts = split_once()
        conversation = Conversation(parts, adapter, prompt, new_tokens, choice, drafting, request, {STOP})
        return conversed(conversation, InProcess(CloudEngine(CloudModel(parts.middle)), steps=steps), chunk)

    return decode


def conversed(conversation: Conversation, link: CloudLink, chunk: int) -> Decoded:
    """The text of a conversation over a link."""
    for _ in Dialogue(conversation, link, Chunking(chunk)):
        pass
    return Decoded(conversation.text, conversation.drafted, conversation.accepted, conversation.hits)


def u_shape(prompt, new_tokens, choice, request) -> Decoded:
    """HAT's baseline without drafts."""
    parts = split_once()
    conversation = Conversation(parts, None, prompt, new_tokens, choice, None, request, {STOP})
    return conversed(conversation, InProcess(CloudEngine(CloudModel(parts.middle))), 160)


def medusa(tree) -> Callable[..., Decoded]:
    """Medusa's heads, not trained: they guess what the model's own head says of the place before."""

    def decode(prompt, new_tokens, choice, request) -> Decoded:
        parts = split_once()
        conversation = MedusaConversation(
            parts, MedusaHeads(parts), prompt, new_tokens, choice, tree, request=request, stops={STOP}
        )
        return conversed(conversation, InProcess(CloudEngine(CloudModel(parts.middle))), 7)

    return decode


def over_grpc(prompt, new_tokens, choice, request) -> Decoded:
    """HAT over a real stream on loopback."""
    parts = split_once()
    conversation = Conversation(parts, noisy(0.1), prompt, new_tokens, choice, Drafting(0.2, 6, 3), request, {STOP})
    with served(parts) as address:
        link = GrpcLink(address, parts.width, fingerprint(parts), "float64")
        try:
            return conversed(conversation, link, 7)
        finally:
            link.close()


def simulated(prompt, new_tokens, choice, request) -> Decoded:
    """HAT on simulated time, beside another text."""
    environment, parts = simpy.Environment(), split_once()
    cloud = SimulatedCloud(environment, CloudEngine(CloudModel(parts.middle)), CloudTiming(4, 0.004, 0.00003))
    texts = []
    for number, start in enumerate((prompt, [7, 8, 9])):
        drafting = Drafting(0.2, 6, 3)
        found = Conversation(parts, noisy(0.1), start, new_tokens, choice, drafting, request + 100 * number, {STOP})
        device = SimulatedDevice(
            environment, DeviceTiming(0.009, 0.006, 0.002, 0.007, 0.0002), Link(7e6, 12e6, 0.002), 256
        )
        SimulatedText(device, cloud, found)
        texts.append(found)
    environment.run()
    return Decoded(texts[0].text, texts[0].drafted, texts[0].accepted, texts[0].hits)


@contextmanager
def served(parts) -> Iterator[str]:
    """A cloud in a thread of its own."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    found: dict[str, Any] = {}

    async def serve() -> None:
        engine = CloudEngine(CloudModel(parts.middle))
        found["server"] = CloudServer(engine, parts.width, fingerprint(parts), parts.longest)
        found["port"] = await found["server"].start(port=0)
        ready.set()
        await found["server"].wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield f"127.0.0.1:{found['port']}"
    finally:
        asyncio.run_coroutine_threadsafe(found["server"].stop(0.1), loop).result(30)
        thread.join(30)
        loop.close()


DECODERS = {
    **{
        f"hat-threshold{threshold}-branches{branches}-chunk{chunk}": hat(0.1, Drafting(threshold, 6, branches), chunk)
        for threshold, branches, chunk in itertools.product((0, 0.6, 1.01), (0, 3), (1, 7, 160))
        if chunk == 7 or threshold == 0.6
    },
    "hat-good-draft": hat(0.01, Drafting(0.0, 6, 3)),
    "hat-bad-draft": hat(1.0, Drafting(0.0, 6, 3)),
    "hat-untrained": hat(None, Drafting(0.0, 6, 3)),
    "hat-far-ahead": hat(0.05, Drafting(0.3, 4, 5), steps=9),
    "hat-grpc": over_grpc,
    "hat-simulated": simulated,
    "u-medusa": medusa(MEDUSA_TREE),
    "u-medusa-chain": medusa((-1, 0, 1)),
    "u-medusa-wide": medusa((-1, -1, -1, -1, 2, 2)),
    "u-shape": u_shape,
}

CHOICES = {
    "greedy": lambda: TokenChoice(),
    "sampled": lambda: TokenChoice(temperature=1.0, seed=3),
    "top-k-and-p": lambda: TokenChoice(temperature=0.8, top_k=20, top_p=0.9, seed=4),
    "no-repeats": lambda: _no_repeats(),
}


def _no_repeats() -> TokenChoice:
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    return TokenChoice(processors=[RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(2)])


def prompt(length: int) -> list[int]:
    """Random tokens."""
    return torch.randint(6, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
