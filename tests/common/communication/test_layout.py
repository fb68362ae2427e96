import pytest
import torch
from safetensors.torch import save

from edgebolt.common.communication.layout import DTYPES, layout_of


def signature(tensors):
    return tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())


def test_head_is_the_one_the_library_writes():
    names = ["b", "a", "", 'é\x7f\x01"\n/', "\U0001f642", "\uffff"]
    tensors = {f"{name}{dtype}": torch.zeros(3, 2, dtype=dtype) for dtype in DTYPES.values() for name in names}
    tensors |= {"": torch.zeros(()), "empty": torch.zeros(0, 5)}
    layout = layout_of(signature(tensors))
    blob = save(tensors)
    assert blob.startswith(layout.head)
    assert layout.size == len(blob)
    assert layout.size - len(layout.head) == sum(tensor.nbytes for tensor in tensors.values())


def test_no_tensors():
    assert layout_of(()).head == save({})


def test_layout_is_remembered():
    key = signature({"remembered": torch.zeros(17)})
    layout_of(key)
    assert layout_of(key) is layout_of(key)


@pytest.mark.parametrize(
    ("entry", "error", "words"),
    [
        (("w", torch.complex64, (1,)), TypeError, r"'w' has dtype torch.complex64: convert it with .to"),
        (("__metadata__", torch.float32, (1,)), TypeError, "reserved"),
        (("\ud800", torch.float32, (1,)), TypeError, "surrogate"),
        ((3, torch.float32, (1,)), TypeError, r"3 is of type int: convert it with str"),
        (("w", torch.int8, (1,) * 65), ValueError, "65 dimensions"),
        (("w", torch.int8, (0, 2**62, 2)), ValueError, "overflows"),
        (("w", torch.int8, (2**21, *[1] * 60, 2**42)), ValueError, "overflows"),
        (("n" * 2**24, torch.int8, (1,)), ValueError, "index of 1 tensors"),
    ],
)
def test_what_cannot_travel_is_refused(entry, error, words):
    with pytest.raises(error, match=words):
        layout_of((entry,))
