"""What the tests of HAT run: tiny models, drafts of known quality, and the text that all of it must give."""

import asyncio
import copy
import queue
import socket
import threading
import time
from functools import cache

import grpc
import torch
from torch import nn

from edgebolt.common.decoding import LayerStack, Segment, TokenChoice, cache_length, new_cache
from edgebolt.hat import (
    FORMATS,
    Chunking,
    CloudEngine,
    CloudModel,
    CloudServer,
    Conversation,
    Dialogue,
    Drafting,
    GrpcLink,
    InProcess,
    LinkLostError,
    Upload,
    fingerprint,
    split,
)
from edgebolt.hat.wire import PROTOCOL, SERVICE, hat_pb2, written_upload

VOCABULARY, WIDTH, LONGEST = 40, 32, 160
CHOICE = TokenChoice(temperature=1.0, seed=3)  # the greedy texts of such models repeat one token
POSITION_BYTES = 3 * 2 * 16 * 8  # of the cloud's cache: 3 layers, keys and values of two heads, float64


def _lively(found: nn.Module) -> nn.Module:
    """In float64, with weights so large that the logits, not the noise of sampling, choose most tokens."""
    with torch.no_grad():
        for weight in found.parameters():
            weight.mul_(3 if weight.dim() == 2 else 1)
        found.lm_head.weight.mul_(8)
    return found.double().eval()


@cache
def llama(seed: int = 0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=LONGEST)
        return _lively(LlamaForCausalLM(config))


@cache
def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        untied = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
        config = GPT2Config(n_embd=WIDTH, n_layer=4, n_head=4, vocab_size=VOCABULARY, n_positions=48, **untied)
        return _lively(GPT2LMHeadModel(config))


def prompt(length: int) -> list[int]:
    return torch.randint(6, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@cache
def _text(before: tuple[int, ...], new_tokens: int, model: nn.Module, choice: TokenChoice) -> tuple[int, ...]:
    text, cached, following = list(before), new_cache(), torch.tensor([list(before)])
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(following, past_key_values=cached, use_cache=True).logits[0, -1]
        text.append(choice(logits, 0, len(text), text))
        following = torch.tensor([text[-1:]])
    return tuple(text)


def autoregressive(before, new_tokens: int, model: nn.Module | None = None, choice=CHOICE) -> list[int]:
    """The text token by token, by transformers' own model and cache; nothing stops it."""
    return list(_text(tuple(before), new_tokens, llama() if model is None else model, choice))


class Middle(nn.Module):
    """In place of Λ the middle layers themselves: drafts are right, but where noise or ``wrong`` spoils them.

    Behind the positions of ``wrong`` the likeliest token becomes the least likely one.
    """

    def __init__(self, noise: float = 0.0, wrong=(), model: nn.Module | None = None, device_layers: int = 2) -> None:
        super().__init__()
        mine, generator = copy.deepcopy(llama() if model is None else model), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in mine.parameters():
                drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                weight.add_(noise * weight.abs().mean() * drawn)
        self.layers = LayerStack.of(mine, device_layers, mine.config.num_hidden_layers)
        self.wrong = torch.tensor(sorted(wrong), dtype=torch.long)

    def forward(self, rows, cache, positions=None, mask=None):
        if positions is None:
            positions = torch.arange(cache_length(cache), cache_length(cache) + len(rows))
        found = self.layers(rows, [Segment(cache, len(rows), positions, mask)])
        return torch.where(torch.isin(positions, self.wrong)[:, None], -found, found)


def conversation(length=5, new_tokens=24, adapter=None, drafting=None, **options) -> Conversation:
    options = {"stops": (), **options}
    return Conversation(parts(), adapter, prompt(length), new_tokens, CHOICE, drafting, **options)


@cache
def parts():
    return split(llama(), 2)


def engine(limits=None) -> CloudEngine:
    return CloudEngine(CloudModel(parts().middle), limits)


ALWAYS = Drafting(threshold=0.0, longest=4, branches=3)
MIXED = Drafting(threshold=0.3, longest=6, branches=2)


class Recorder(InProcess):
    """Keeps what passes."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.uploads: list[Upload] = []
        self.answers = []

    def send(self, name, sequence, upload) -> None:
        self.uploads.append(upload)
        super().send(name, sequence, upload)

    def receive(self, name):
        self.answers.append(super().receive(name))
        return self.answers[-1]


class Faulty(InProcess):
    """Loses and doubles uploads and answers, as a broken stream does: all that is on its way when it breaks."""

    def __init__(self, engine, generator, lost: float, doubled: float) -> None:
        super().__init__(engine)
        self.generator, self.lost, self.doubled = generator, lost, doubled
        self.opened = 0

    def send(self, name, sequence, upload) -> None:
        if self.generator.random() < self.lost:
            return
        for _ in range(1 + (self.generator.random() < self.doubled)):
            super().send(name, sequence, upload)

    def receive(self, name):
        if self.generator.random() < self.lost:
            raise LinkLostError("broken")
        return super().receive(name)

    def reopen(self) -> None:
        self.opened += 1
        self._answers.clear()


class Gated(CloudModel):
    """Runs nothing before it is let."""

    def __init__(self) -> None:
        super().__init__(parts().middle)
        self.begun, self.gate = threading.Event(), threading.Event()

    def run(self, work):
        self.begun.set()
        assert self.gate.wait(20)
        return super().run(work)


class Served:
    """A server on the loopback interface, in a thread with a loop of its own.

    ``with`` starts it and stops it without grace.
    """

    def __init__(self, port: int = 0, limits=None, keys=None, cloud=None, host="127.0.0.1", **options) -> None:
        self.port, self.keys, self.host = port, keys, host
        self.engine = engine(limits) if cloud is None else cloud
        self.options = {"fingerprint": fingerprint(parts()), "longest": LONGEST, **options}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def run(self, coroutine, timeout=60):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def __enter__(self):
        self.thread.start()
        self.run(self._start())
        return self

    async def _start(self) -> None:
        self.server = CloudServer(self.engine, WIDTH, **self.options)
        self.port = await self.server.start(self.host, self.port, self.keys)

    def stop(self, grace=0.0) -> None:
        self.run(self.server.stop(grace))

    def __exit__(self, *_) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def link(self, **options) -> GrpcLink:
        options = {"fingerprint": fingerprint(parts()), "rows": "float64", "timeout": 30, "backoff": 0.02, **options}
        return GrpcLink(self.address, WIDTH, **options)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def until(true, seconds=30.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.005)


def talk(length=9, new_tokens=16, noise=0.03):
    return conversation(length, new_tokens, Middle(noise), ALWAYS)


def spoken(dialogue):
    for _ in dialogue:
        pass
    return dialogue.conversation.text


ROWS = FORMATS["float64"]


class Stub:
    """A device written by hand: sends what it is told and hears what comes."""

    def __init__(self, served, hello=None, channel=None) -> None:
        self.channel = grpc.insecure_channel(served.address) if channel is None else channel
        call = self.channel.stream_stream(f"/{SERVICE}/Converse", bytes, hat_pb2.FromCloud.FromString)
        self.outgoing = queue.SimpleQueue()
        self.stream = call(iter(self.outgoing.get, None), timeout=15)
        if hello is None:
            hello = hat_pb2.Hello(protocol=PROTOCOL, model=served.options["fingerprint"], rows="float64")
        self.send(hello=hello)

    def send(self, **message):
        self.outgoing.put(hat_pb2.FromDevice(**message).SerializeToString())

    def upload(self, name, sequence, start, rows, reply):
        message = written_upload(name, sequence, Upload(start, rows, reply), ROWS)
        self.send(upload=message)
        return message

    def hear(self):
        message = next(self.stream)
        return getattr(message, message.WhichOneof("kind"))

    def close(self):
        self.outgoing.put(None)
        self.stream.cancel()
        self.channel.close()


def rows(count, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deep(message):
    return ROWS.decode(message.rows, len(message.rows) // ROWS.row_bytes(WIDTH), WIDTH)


def goes_on(served):
    """The server serves others."""
    found = served.link()
    try:
        assert spoken(Dialogue(talk(3, 4), found)) == autoregressive(prompt(3), 4)
    finally:
        found.close()


def alone(given):
    """What the middle layers give for one text."""
    with torch.no_grad():
        return parts().middle(given, [Segment(new_cache(), len(given))])


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def texts(link, count, dialogues, new_tokens=20, **chunking):
    """Dialogues whose rounds take turns."""
    dialogues += [
        Dialogue(conversation(9 + key, new_tokens, Middle(0.03), ALWAYS), link, Chunking(4, **chunking), retries=50)
        for key in range(count)
    ]
    going = {id(dialogue): iter(dialogue) for dialogue in dialogues}
    while going:
        for key, each in list(going.items()):
            if next(each, None) is None:
                del going[key]
            yield
