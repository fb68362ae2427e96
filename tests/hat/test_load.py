"""Many conversations for a while, with everything going wrong that can: no wrong token, no hang, nothing left behind.

EDGEBOLT_LOAD_SECONDS=60 EDGEBOLT_LOAD_CONVERSATIONS=64 is the full form.
"""

import asyncio
import faulthandler
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import grpc
import pytest
from adversary import Flood, RoughStream, Wire, fuzzed
from tiny_hat import (
    ALWAYS,
    CHOICE,
    MIXED,
    POSITION_BYTES,
    ROWS,
    WIDTH,
    Middle,
    Served,
    Stub,
    autoregressive,
    engine,
    free_port,
    parts,
    prompt,
    rows,
    until,
)

from edgebolt.common.decoding import TokenChoice, cache_bytes
from edgebolt.hat import (
    Chunking,
    Conversation,
    Dialogue,
    GrpcLink,
    Limits,
    LinkLostError,
    Upload,
    UploadRefusedError,
    fingerprint,
)
from edgebolt.hat.wire import SERVICE, hat_pb2, written_upload

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("EDGEBOLT_LOAD_SECONDS", 5))
CONVERSATIONS = int(os.environ.get("EDGEBOLT_LOAD_CONVERSATIONS", 16))
HANG = 240.0  # seconds after which whatever has not ended never will

TEXTS = [(length, choice, 8 + length % 9) for length in range(3, 51, 4) for choice in (CHOICE, TokenChoice())]
RETRIES = 10_000  # the adversary does not tire either


@cache
def adapters():
    plain = (Middle(0.1), replace(MIXED, branches=0))  # looking ahead takes all the processor that there is
    return [(Middle(0.02), ALWAYS), plain, plain, (None, None)]


class Load:
    """Conversations that run until they are told that it is enough, and what they have met.

    Args:
        ports: that lead to the cloud.
        conversations: at a time: half of them on links of their own, the others in fours on one.
    """

    def __init__(self, ports, conversations) -> None:
        self.met, self.failed, self.links = Counter(), [], {}
        self.lock, self.enough = threading.Lock(), threading.Event()
        self.ports = ports
        shared = [self.opened(number, self.ports[number % len(ports)]) for number in range(conversations // 8)]
        self.threads = [
            threading.Thread(
                target=self.device, args=(seed, shared[seed // 8] if seed % 8 < 4 and shared else None), daemon=True
            )
            for seed in range(conversations)
        ]
        self.shared = shared

    def count(self, **met) -> None:
        with self.lock:
            self.met.update(met)

    def opened(self, number, port):
        """A link, as soon as there is a cloud."""
        while True:
            with suppress(LinkLostError):
                options = {"fingerprint": fingerprint(parts()), "rows": "float64", "timeout": 30.0, "backoff": 0.02}
                link = self.links[number] = GrpcLink(f"127.0.0.1:{port}", WIDTH, **options)
                return link
            time.sleep(0.05)

    def device(self, seed, shared) -> None:
        draw = random.Random(seed)
        try:
            link = self.opened(1000 + seed, draw.choice(self.ports)) if shared is None else shared
            while not self.enough.is_set():
                if shared is None and draw.random() < 0.2:
                    link.close()
                    link = self.opened(1000 + seed, draw.choice(self.ports))
                self.text(draw, link, shared is None)
            if shared is None:
                link.close()
        except BaseException as error:
            self.failed.append(error)

    def text(self, draw, link, mine) -> None:
        length, choice, new_tokens = draw.choice(TEXTS)
        adapter, drafting = draw.choice(adapters())
        talk = Conversation(parts(), adapter, prompt(length), new_tokens, choice, drafting, stops=())
        dialogue = Dialogue(talk, link, Chunking(draw.choice([3, 8, 160])), RETRIES)
        vanishes = draw.randrange(3) if mine and draw.random() < 0.1 else -1
        self.count(begun=1)
        try:
            for number, _ in enumerate(dialogue):
                if number == vanishes:
                    cut(link)
                    self.count(vanished=1)
                    return
            wanted = autoregressive(prompt(length), new_tokens, choice=choice)
            assert talk.text == wanted, f"{talk.text} is not {wanted}"
            self.count(texts=1, tokens=new_tokens, rounds=talk.rounds, recovered=dialogue.recovered)
        except (LinkLostError, UploadRefusedError) as error:
            self.count(**{f"given up: {error}": 1})

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self.enough.set()
        late = time.monotonic() + HANG
        for thread in self.threads:
            thread.join(max(late - time.monotonic(), 0.0))
        if any(thread.is_alive() for thread in self.threads):
            faulthandler.dump_traceback(all_threads=True)
            pytest.fail(f"conversations hang: {dict(self.met)}")
        for link in self.shared:
            link.close()
        if self.failed and kind is None:
            raise self.failed[0]


def cut(link) -> None:
    """The network's doing."""
    link._stream._channel.close()


def watched(limits, met):
    """An engine that counts what it lets go, and how many bytes it holds."""
    found = engine(limits)
    evict, finish, sweep = found._evict, found.finish, found.sweep

    def noted(*arguments, **options):
        gone = evict(*arguments, **options)
        met["evictions"] += gone
        return gone

    def measured(batch, results):
        met["batches"] += 1
        held = sum(cache_bytes(each.cache) for each in found._held.values() if each.cache.layers)
        met["most bytes"] = max(met["most bytes"], held)
        finish(batch, results)

    def swept():
        gone = sweep()
        met["swept"] += gone
        return gone

    found._evict, found.finish, found.sweep = noted, measured, swept
    return found


class Cloud:
    """A server that is killed and comes back with an empty engine at the same port."""

    def __init__(self, limits, met) -> None:
        self.port, self.limits, self.met = free_port(), limits, met
        self.start()

    def start(self) -> None:
        cloud = watched(self.limits, self.met)
        self.served = Served(self.port, cloud=cloud, idle=1.0, waiting_bytes=1 << 20).__enter__()
        self.tasks = len(asyncio.all_tasks(self.served.loop))

    def kill(self) -> None:
        self.served.__exit__()
        assert not asyncio.all_tasks(self.served.loop)

    def restart(self) -> None:
        self.kill()
        self.start()


class Adversary:
    """Does something wrong whenever it is asked to."""

    def __init__(self, seed, load, cloud, wire) -> None:
        self.draw, self.load, self.cloud, self.wire = random.Random(seed), load, cloud, wire
        self.stalled = []
        self.tricks = [self.cut_link] * 4 + [self.cut_wire] * 4 + [self.bent, self.oversize, self.stall]

    def act(self) -> None:
        with suppress(grpc.RpcError, OSError):
            self.draw.choice(self.tricks)()

    def cut_link(self) -> None:
        cut(self.draw.choice(list(self.load.links.values())))
        self.load.count(**{"links cut": 1})

    def cut_wire(self) -> None:
        self.load.count(**{"wires cut": self.wire.cut(self.draw)})

    def bent(self) -> None:
        self.load.count(**{"bent streams": 1})
        with grpc.insecure_channel(self.cloud.served.address) as channel:
            call = channel.stream_stream(f"/{SERVICE}/Converse", bytes, hat_pb2.FromCloud.FromString)
            for _ in call(fuzzed(self.draw.random(), fingerprint(parts())), timeout=20):
                pass

    def oversize(self) -> None:
        self.load.count(oversize=1)
        stub = Stub(self.cloud.served)
        stub.outgoing.put(self.draw.randbytes(1 << 20))
        with suppress(grpc.RpcError):
            while True:
                stub.hear()
        stub.close()

    def stall(self) -> None:
        self.load.count(stalled=1)
        kind = self.draw.randrange(3)
        if kind == 0:  # uploads, and never reads
            messages = (
                {"upload": written_upload(self.draw.randbytes(16), 1, Upload(0, rows(20), 20), ROWS)}
                for _ in range(60)
            )
            found = Flood(self.cloud.served, messages)
            self.stalled.append(lambda: (found.stream.cancel(), found.channel.close()))
        elif kind == 1:  # begins a text, and says no more
            stub = Stub(self.cloud.served)
            stub.upload(self.draw.randbytes(16), 1, 0, rows(5), 0)
            self.stalled.append(stub.close)
        else:  # does not even greet
            self.stalled.append(socket.create_connection(("127.0.0.1", self.cloud.port), 5).close)
        if len(self.stalled) > 3:
            self.stalled.pop(0)()

    def rest(self) -> None:
        while self.stalled:
            self.stalled.pop()()


@pytest.fixture
def quick_switches():
    """Between threads, so that the cloud's gets its turn among those of all the devices."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 10)
    yield
    sys.setswitchinterval(before)


def test_conversations_under_faults_of_every_kind(monkeypatch, quick_switches):
    for length, choice, new_tokens in TEXTS:
        autoregressive(prompt(length), new_tokens, choice=choice)
    met, before = Counter(), threading.enumerate()
    monkeypatch.setattr("edgebolt.hat.grpc_link.Stream", RoughStream)
    monkeypatch.setattr(RoughStream, "met", met)
    opened, original = Counter(), GrpcLink._open
    monkeypatch.setattr(GrpcLink, "_open", lambda self: (opened.update(["streams"]), original(self)))
    # half of what as many conversations hold
    limits = Limits(batch_tokens=64, cache_bytes=max(20 * CONVERSATIONS, 120) * POSITION_BYTES)
    cloud = Cloud(limits, met)
    with Wire(cloud.port) as wire:
        with Load([cloud.port, wire.port], CONVERSATIONS) as load:
            adversary = Adversary(0, load, cloud, wire)
            began, restarts = time.monotonic(), max(2, round(SECONDS / 10))
            while (past := time.monotonic() - began) < SECONDS:
                adversary.act()
                time.sleep(adversary.draw.uniform(0, 0.1))
                if past > SECONDS * (load.met["restarts"] + 1) / (restarts + 1):
                    cloud.restart()
                    load.count(restarts=1)
            adversary.rest()
        served = cloud.served
        until(lambda: not served.server._streams)
        held = served.engine.conversations
        until(lambda: served.engine.conversations == served.engine.cached == 0)  # those that were abandoned are swept
        # a few requests that were cut before their first message may be gRPC's own for longer; dozens would be a leak
        until(lambda: len(asyncio.all_tasks(served.loop)) <= cloud.tasks + 3)
    cloud.kill()
    # _poll_wrapper is gRPC's own, one a process
    until(lambda: not [each for each in threading.enumerate() if each not in before and "_poll" not in each.name])
    total = load.met + met + opened
    total["abandoned at the end"] = held
    print(f"\n{CONVERSATIONS} conversations at a time for {SECONDS:g} s: {dict(sorted(total.items()))}")
    assert 0 < total.pop("most bytes") <= limits.cache_bytes
    assert total["texts"] + total["vanished"] == total["begun"], "each has been finished, or its device has gone"
    wanted = ("links cut", "wires cut", "bent streams", "oversize", "stalled", "vanished", "restarts", "doubled")
    assert total["texts"] >= CONVERSATIONS and all(total[name] for name in (*wanted, "reordered", "evictions"))
    assert total["recovered"] and not total["silences"], "an answer has been waited for that nobody was to give"


class CloudProcess:
    """A server in a process of its own, that is killed."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()

    def start(self) -> None:
        script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from tiny_hat import Served\n"
        script += f"with Served({self.port}):\n    print('ready', flush=True)\n    sys.stdin.read()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", script], **pipes)
        assert self.process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=30)
        assert self.process.returncode == -signal.SIGKILL


@pytest.mark.skipif(
    "EDGEBOLT_LOAD_SECONDS" not in os.environ, reason="the full form, see above: starts three processes"
)
def test_a_process_that_is_killed_and_started_again(quick_switches):
    cloud = CloudProcess()
    try:
        with Load([cloud.port], 8) as load:
            for _ in range(2):
                already = load.met["texts"]
                until(lambda already=already: load.met["texts"] >= already + 4, HANG)
                cloud.kill()
                cloud.start()
    finally:
        cloud.kill()
    print(f"\n{dict(sorted(load.met.items()))}")
    assert load.met["texts"] + load.met["vanished"] == load.met["begun"] and load.met["recovered"] > 0
