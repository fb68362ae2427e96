"""The codecs on the tensors of a ResNet-18, 11 M weights, beside what bounds them: topk, memcpy, zlib, zstd."""

import ctypes
import gc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from mnist_run import peak_bytes
from mutations import survive
from racing import Lap, Race, Timer
from test_bench_common_message import SHAPES

from edgebolt.common.communication import QSGD, Float16, HybridSign, Int8, SignSGD, SparseTernary, TopK
from edgebolt.common.communication.positions import MAX_ENTRIES_PER_BYTE

pytestmark = pytest.mark.benchmark(group="codec")

RATIO, TURNS = 0.35, 5
CODECS = {
    "HybridSign": HybridSign(RATIO),
    "HybridSign, global": HybridSign(RATIO, scope="global"),
    "TopK": TopK(RATIO),
    "TopK, 0.99": TopK(0.99),
    "SparseTernary, 0.99": SparseTernary(0.99),
    "QSGD": QSGD(),
    "SignSGD": SignSGD(),
    "Int8": Int8(),
    "Float16": Float16(),
}


def model(short, seed=0):
    """The tensors; without the clock only those of the stem and the first stage."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES["11 M weights"]
    names = [name for name in shapes if not short or name.startswith(("stem", "0."))]
    return {name: 0.03 * torch.randn(shapes[name], generator=generator) for name in names}


def round_trips(short):
    """Name -> a lap of encode and decode, or of what it is compared with."""
    tensors, noise = model(short), model(short, seed=1)
    former = {name: tensor + 0.07 * noise[name] for name, tensor in tensors.items()}
    flat = torch.cat([tensor.view(-1) for tensor in tensors.values()])
    raw, kept = flat.numpy().tobytes(), flat.numel() - int(RATIO * flat.numel())

    def lap(run):
        timer = Timer()
        timer.start()
        nbytes = run()
        timer.stop()
        # racing.py compares weights, of which there are none here
        return Lap(
            timer.seconds, timer.cpu_seconds, 1, {"none": torch.zeros(1)}, {"share_of_dense": nbytes / len(raw)}
        )

    def codec(name):
        def run():
            message = CODECS[name].encode(tensors)
            CODECS[name].decode(message, {"model": former})
            return message.nbytes

        return run

    def topk():
        torch.topk(flat.abs(), kept, sorted=False)
        return len(raw)

    def memcpy():
        flat.clone()
        return len(raw)

    def zlib_1():
        packed = zlib.compress(raw, 1)
        zlib.decompress(packed)
        return len(packed)

    def zstd_1():
        packed = zstandard.ZstdCompressor(level=1).compress(raw)
        zstandard.ZstdDecompressor().decompress(packed)
        return len(packed)

    others = {"topk": topk, "memcpy": memcpy, "zlib": zlib_1, "zstd": zstd_1}
    runs = others | {name: codec(name) for name in CODECS}
    return {name: (lambda run=run: lap(run)) for name, run in runs.items()}


@pytest.fixture(scope="module")
def races():
    return {}


@pytest.mark.parametrize("name", [*CODECS, "topk", "memcpy", "zlib", "zstd"])
def test_round_trip(benchmark, races, name):
    short = benchmark.disabled
    if short not in races:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        runs = round_trips(short)
        for run in runs.values():
            run()  # once to warm up
        races[short] = Race(runs, 1 if short else TURNS)
        torch.set_num_threads(threads)
    target = {"ratio": 3.0} if name == "HybridSign" else None
    races[short].row(benchmark, name, "topk", target=target)
    if target and not short:
        assert benchmark.extra_info["ratio"] <= 3.0


@pytest.mark.parametrize("name", ["HybridSign", "HybridSign, global", "TopK", "QSGD"])
def test_peak_memory(benchmark, name):
    """How much more memory encode, and decode, take at most than before they begin."""
    short, codec = benchmark.disabled, CODECS[name]
    if not _reset_peak():
        pytest.skip("this system does not let a process reset its peak of memory")
    tensors = model(short)
    memory = {"model": model(short, seed=1)}
    size = sum(tensor.nbytes for tensor in tensors.values())

    def measure():
        message, encoding = _growth(lambda: codec.encode(tensors), short)
        _, decoding = _growth(lambda: codec.decode(message, memory), short)
        return encoding, decoding

    encoding, decoding = benchmark.pedantic(measure, rounds=1, iterations=1)
    benchmark.extra_info.update(
        peak_encode=encoding / size, peak_decode=decoding / size, target={"peak_encode": 3.0, "peak_decode": 3.0}
    )
    if not short and name.startswith(("HybridSign", "TopK")):  # QSGD's peak is reported as it is
        assert max(encoding, decoding) <= 3 * size


def _reset_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return hasattr(ctypes.CDLL(None), "mallopt")


def _growth(run, short):
    if not short:  # garbage that goes while this runs makes the growth less, never more
        gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back at once, or it would be counted still
    libc.malloc_trim(0)
    _reset_peak()
    before = peak_bytes()
    result = run()
    return result, peak_bytes() - before


@pytest.mark.parametrize("name", [name for name in CODECS if name != "Float16"])
def test_mutated_messages(benchmark, name):
    """100,000 damaged or forged messages in all: refused or decoded, never a crash, never more memory than allowed."""
    short, codec = benchmark.disabled, CODECS[name]
    count = 250 if short else 100_000 // (len(CODECS) - 1)
    rng = np.random.default_rng(0)
    sparse = torch.zeros(40, 50)
    sparse[3, 4] = 1.0
    states = [
        {"a": torch.randn(30, 20), "b": torch.randn(70), "n": torch.arange(3)},
        {"a": torch.randn(400).half(), "b": torch.randn(400), "s": sparse},
    ]
    messages = [codec.encode(state) for state in states]
    memory = {"model": {name: torch.randn(tensor.shape) for name, tensor in states[0].items()}}
    (refused, largest), growth = _growth(
        lambda: benchmark.pedantic(survive, (codec, messages, rng, count, memory), rounds=1, iterations=1), short
    )
    allowed = 8 * MAX_ENTRIES_PER_BYTE * max(message.nbytes for message in messages)
    benchmark.extra_info.update(messages=count, refused=refused, largest_result_bytes=largest, memory_growth=growth)
    assert count / 10 < refused < count and largest <= allowed
    assert growth < allowed + 2**26
