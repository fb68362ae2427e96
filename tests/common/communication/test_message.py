import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from edgebolt.common.communication import Dense, Float16, Message
from edgebolt.common.communication import message as module

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
headers = st.dictionaries(st.text(max_size=6), values, max_size=5)


def random_bits(shape, dtype, seed):
    """Any bit pattern at all: NaNs with payloads, infinities, subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).to(torch.bool)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    tensor = random_bits(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    if layout == "transposed":
        return tensor.permute(list(reversed(range(tensor.ndim))))
    if layout == "strided" and tensor.ndim:
        return tensor[..., ::2]
    return tensor.expand(2, *tensor.shape) if layout == "expanded" else tensor


state_dicts = st.dictionaries(st.text(max_size=6).filter(lambda name: name != "__metadata__"), tensors(), max_size=5)


def raw(tensor):
    flat = tensor.detach().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
    return torch.cat([flat, flat[:0]]).view(torch.uint8).tolist()  # cat: single elements of odd stride, too


def assert_indistinguishable(one, other):
    assert list(one.tensors) == list(other.tensors)
    for a, b in zip(one.tensors.values(), other.tensors.values(), strict=True):
        assert (type(a), a.dtype, a.shape, a.requires_grad) == (type(b), b.dtype, b.shape, b.requires_grad)
        assert a.is_contiguous() == b.is_contiguous()
        assert raw(a) == raw(b)
    assert type(one.tensors) is type(other.tensors)
    assert type(one.header) is type(other.header)
    assert repr(one.header) == repr(other.header)  # order, types and NaN count
    assert one.nbytes == other.nbytes
    assert one.to_bytes() == other.to_bytes()
    assert one.is_finite() == other.is_finite()


@given(state_dicts, headers)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_any_message_round_trips(state, header):
    message = Message(state, header)
    data = message.to_bytes()
    assert message.nbytes == len(data)
    received = Message.from_bytes(data)
    assert {name: raw(tensor) for name, tensor in received.tensors.items()} == {n: raw(t) for n, t in state.items()}
    assert {n: (t.dtype, t.shape) for n, t in received.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in state.items()
    }
    assert_indistinguishable(message, received)


@given(state_dicts, headers, st.sampled_from([Dense(), Float16()]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_wire_and_process_decode_alike(state, header, codec):
    message = codec.encode(state).with_header(report=header)
    near, far = codec.decode(message), codec.decode(Message.from_bytes(message.to_bytes()))
    assert list(near) == list(far)
    for name in near:
        assert near[name].dtype == far[name].dtype == state[name].dtype
        assert raw(near[name]) == raw(far[name])


@given(state_dicts)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_blob_is_what_the_safetensors_library_writes(state):
    separate = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    assert Message(state, {}).to_bytes().endswith(save(separate))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (4, 5), (1, 1, 2)])
def test_every_dtype_and_shape(dtype, shape):
    tensor = random_bits(shape, dtype, seed=1)
    message = Message({"t": tensor}, {})
    received = Message.from_bytes(message.to_bytes()).tensors["t"]
    assert (received.dtype, received.shape, raw(received)) == (dtype, tensor.shape, raw(tensor))
    assert message.nbytes == len(message.to_bytes())


def test_nan_payloads_survive():
    bits = torch.tensor([0x7FC0BEEF, 0x7F800001, -1, -(2**31)], dtype=torch.int32)
    received = Message.from_bytes(Message({"t": bits.view(torch.float32)}, {}).to_bytes()).tensors["t"]
    assert torch.equal(received.view(torch.int32), bits)


def test_tied_tensors_and_overlapping_views():
    weight = torch.arange(12.0).reshape(3, 4)
    state = {"embedding": weight, "head": weight, "row": weight[1], "transposed": weight.T}
    received = Message.from_bytes(Message(state, {}).to_bytes()).tensors
    assert all(torch.equal(received[name], tensor) for name, tensor in state.items())
    assert received["head"].data_ptr() != received["embedding"].data_ptr()


def test_parameters_graphs_and_lazy_negations_become_plain():
    source = torch.ones(3, requires_grad=True)
    negated = torch.complex(torch.ones(2), torch.tensor([1.0, -2.0])).conj().imag
    assert negated.is_neg()
    state = {"parameter": torch.nn.Parameter(torch.ones(2)), "graph": source * 2, "negated": negated}
    state["frozen"] = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    message = Message(state, {})
    assert message.tensors["negated"].tolist() == [-1.0, 2.0]
    assert_indistinguishable(message, Message.from_bytes(message.to_bytes()))


def test_order_of_insertion_does_not_matter():
    a, b = torch.ones(1), torch.zeros(2)
    one, other = Message({"a": a, "b": b}, {"x": 1, "y": 2}), Message({"b": b, "a": a}, {"y": 2, "x": 1})
    assert_indistinguishable(one, other)


def test_contiguous_tensors_are_shared():
    tensor = torch.ones(4)
    message = Message({"t": tensor}, {})
    assert message.tensors["t"] is tensor
    assert message.with_header(a=1).tensors["t"] is tensor


def test_received_tensors_own_writable_memory():
    data = bytearray(Message({"t": torch.ones(4)}, {}).to_bytes())
    tensor = Message.from_bytes(data).tensors["t"]
    tensor += 1
    assert data == Message({"t": torch.ones(4)}, {}).to_bytes()
    data[-16:] = bytes(16)
    assert tensor.tolist() == [2.0] * 4


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(b"xx" + data)[2:]])
def test_any_bytes_like_input(kind):
    data = Message({"t": torch.ones(4)}, {"a": 1}).to_bytes()
    assert Message.from_bytes(kind(data)).to_bytes() == data


def test_text_is_not_bytes():
    with pytest.raises(TypeError):
        Message.from_bytes("EBLT")


def test_nbytes_needs_no_tensor_data(monkeypatch):
    def refuse(tensor):
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(module, "_data", refuse)
    message = Message({"t": torch.ones(100)}, {"a": 1})
    assert message.nbytes > 400
    with pytest.raises(AssertionError):
        message.to_bytes()


def test_with_header_adds_and_replaces():
    message = Message({}, {"codec": "dense", "visit": 1})
    other = message.with_header(visit=2, self=3)
    assert dict(other.header) == {"codec": "dense", "self": 3, "visit": 2}
    assert dict(message.header) == {"codec": "dense", "visit": 1}
    assert other.nbytes == len(other.to_bytes()) == message.nbytes + len(',"self":3')
    with pytest.raises(TypeError, match="'visit'"):
        message.with_header(visit=(1, 2))


def test_mappings_are_read_only_and_private():
    state, header = {"t": torch.ones(1)}, {"report": [1]}
    message = Message(state, header)
    state["u"] = torch.ones(1)
    header["report"].append(2)
    assert list(message.tensors) == ["t"]
    assert message.header["report"] == [1]
    with pytest.raises(TypeError):
        message.tensors["t"] = torch.zeros(1)
    with pytest.raises(TypeError):
        message.header["a"] = 1


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone):
    message = Message({"t": torch.arange(3), "u": torch.zeros(())}, {"loss": float("nan")})
    assert_indistinguishable(clone(message), message)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"w": [1.0]}, r"'w' is of type list: convert it with torch.as_tensor"),
        ({"w": torch.ones(2).to_sparse()}, r"'w' has layout torch.sparse_coo: convert it with .to_dense"),
        ({"w": torch.ones(2, device="meta")}, r"'w' is on the meta device"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, r"'w' has dtype torch.complex64"),
        ({1: torch.ones(2)}, r"name 1 is of type int"),
    ],
)
def test_what_cannot_travel_is_refused(state, words):
    with pytest.raises(TypeError, match=words):
        Message(state, {})


def test_repr_shows_no_data():
    assert repr(Message({"t": torch.ones(10)}, {"codec": "dense"})) == (
        "Message(1 tensors, header={'codec': 'dense'}, nbytes=141)"
    )


class TestIsFinite:
    def test_empty(self):
        assert Message({}, {}).is_finite()
        assert Message({"t": torch.ones(0)}, {}).is_finite()

    def test_header_does_not_count(self):
        assert Message({}, {"loss": float("nan")}).is_finite()

    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("place", [0, 777, 1999])
    def test_one_bad_value(self, dtype, bad, place):
        tensor = torch.ones(2000, dtype=dtype)
        tensor[place] = bad
        assert not Message({"a": torch.ones(3), "b": tensor}, {}).is_finite()

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_sums_that_overflow_are_finite(self, dtype):
        largest = torch.finfo(dtype).max
        assert Message({"t": torch.full((1000,), largest, dtype=dtype)}, {}).is_finite()
        mixed = torch.cat([torch.full((500,), largest, dtype=dtype), torch.full((500,), -largest, dtype=dtype)])
        assert Message({"t": mixed}, {}).is_finite()

    def test_opposite_infinities(self):
        assert not Message({"t": torch.tensor([float("inf"), -float("inf")])}, {}).is_finite()

    @given(st.integers(0, 10_000), st.sampled_from(FLOATS))
    @settings(max_examples=100, deadline=None, derandomize=True)
    def test_agrees_with_torch(self, seed, dtype):
        tensor = random_bits((5,), dtype, seed)
        assert Message({"t": tensor}, {}).is_finite() == bool(torch.isfinite(tensor).all())


@pytest.mark.gpu
def test_accelerator_tensors_arrive_on_the_cpu():
    tensor = torch.arange(6.0).reshape(2, 3)
    message = Message({"t": tensor.cuda().T}, {})
    received = Message.from_bytes(message.to_bytes()).tensors["t"]
    assert received.device.type == "cpu"
    assert torch.equal(received, tensor.T)
    assert message.is_finite()
