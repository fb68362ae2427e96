"""Throughput of messages: the model of W1 and a set of tensors as large as a ResNet-18, 0.64 and 45 MB."""

import pytest
import torch
from safetensors.torch import load, save

from edgebolt.common.communication import Dense, Float16, Message

pytestmark = pytest.mark.benchmark(group="message")


def perceptron():
    return {"0.weight": (200, 784), "0.bias": (200,), "2.weight": (10, 200), "2.bias": (10,)}


def resnet():
    """The shapes of a ResNet-18 for 10 classes: convolutions, BatchNorm weights and biases, a linear layer."""
    shapes, width = {"stem": (64, 3, 3, 3), "stem.norm": (2, 64)}, 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for block in range(2):
            for conv in range(2):
                shapes[f"{stage}.{block}.{conv}"] = (out, width, 3, 3)
                shapes[f"{stage}.{block}.{conv}.norm"] = (2, out)
                width = out
            if block == 0 and stage:
                shapes[f"{stage}.short"] = (out, out // 2, 1, 1)
                shapes[f"{stage}.short.norm"] = (2, out)
    return {**shapes, "head.weight": (10, 512), "head.bias": (10,)}


SHAPES = {"W1 perceptron": perceptron(), "11 M weights": resnet()}


@pytest.fixture(params=SHAPES)
def tensors(request):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES[request.param].items()}


@pytest.fixture
def timed(benchmark, tensors):
    """Times a round trip of the tensors and notes how many bytes it moved."""
    # 0.1 to 40 ms a trip, 30 trips in each of 12 rows: 5 seconds.

    def run(trip, nbytes=None):
        returned = benchmark.pedantic(trip, rounds=30, warmup_rounds=3)
        payload = sum(tensor.nbytes for tensor in tensors.values())
        benchmark.extra_info.update(
            params_trained=sum(tensor.numel() for tensor in tensors.values()),
            payload_bytes=payload,
            bytes_up=payload if nbytes is None else nbytes,
        )
        return returned

    return run


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_memcpy(timed, tensors):
    """The baseline: every tensor copied once."""
    assert equal(timed(lambda: {name: tensor.clone() for name, tensor in tensors.items()}), tensors)


def test_safetensors(timed, tensors):
    """To bytes and back with safetensors alone."""
    assert equal(timed(lambda: load(save(tensors)), len(save(tensors))), tensors)


CODECS = {
    "dense": (Dense(), lambda tensor: tensor),
    "float16": (Float16(), lambda tensor: tensor.half().float()),
}


@pytest.mark.parametrize("name", CODECS)
def test_in_process(timed, tensors, name):
    """Encode and decode; the message itself is handed over, and its exact length is known."""
    codec, rounded = CODECS[name]
    message = codec.encode(tensors)
    returned = timed(lambda: codec.decode(codec.encode(tensors)), message.nbytes)
    assert equal(returned, {name: rounded(tensor) for name, tensor in tensors.items()})


@pytest.mark.parametrize("name", CODECS)
def test_over_a_wire(timed, tensors, name):
    """Encode, spell as bytes, read, decode."""
    codec, rounded = CODECS[name]
    message = codec.encode(tensors)
    returned = timed(lambda: codec.decode(Message.from_bytes(codec.encode(tensors).to_bytes())), message.nbytes)
    assert equal(returned, {name: rounded(tensor) for name, tensor in tensors.items()})
    assert len(message.to_bytes()) == message.nbytes
