"""What the codecs make of tensors: the reference vector, exact bytes, errors, and what all of them share."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from edgebolt.common.communication import (
    QSGD,
    Dense,
    Float16,
    HybridSign,
    Int8,
    Message,
    SignSGD,
    SparseTernary,
    TopK,
)
from edgebolt.common.communication.top_k import find_largest

PACKED = [
    TopK(0.6),
    TopK(0.95),
    TopK(0.6, scope="global"),
    TopK(0.6, fill="memory"),
    HybridSign(0.6),
    HybridSign(0.6, scope="global"),
    SparseTernary(0.9),
    SparseTernary(0.9, scope="global"),
    QSGD(),
    QSGD(bits=3, bucket=7, norm="max"),
    SignSGD(),
    Int8(),
    Int8(scope="global"),
]
LOSSLESS_KINDS = [torch.int64, torch.int8, torch.bool]


def over_the_wire(message):
    return Message.from_bytes(message.to_bytes())


def state(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv": torch.randn(8, 3, 5, 5, generator=generator).to(dtype),
        "linear": torch.randn(40, 30, generator=generator).to(dtype),
        "bias": torch.randn(40, generator=generator).to(dtype),
        "scalar": torch.tensor(1.5, dtype=dtype),
    }


def laplace(n=100_000, drift=0.002):
    """A new and an old model."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.laplace(scale=0.03, size=n)).float()
    return x + torch.from_numpy(rng.normal(scale=drift, size=n)).float(), x


def error(decoded, x):
    return float((decoded - x).square().sum() / x.square().sum())


# ------------------------------------------------------------------------------------ the page's reference vector

X = torch.tensor([0.9, -0.05, 0.02, -0.6, 0.01, -0.03, 0.4, -0.08, 0.04, -0.02])
V = torch.tensor([0.7, -0.02, -0.03, -0.5, 0.015, -0.3, 0.1, -0.07, 0.0, -0.01])


def test_reference_vector():
    message = over_the_wire(HybridSign(0.6).encode({"x": X}))
    assert message.tensors["#values.float32"].tolist() == X[[0, 3, 6, 7]].tolist()
    assert message.tensors["#scalars"] == pytest.approx([0.0283333, 0.05], abs=1e-6)
    decoded = HybridSign().decode(message, {"model": {"x": V}})["x"]
    expected = [0.9, -0.02, 0.0283333, -0.6, 0.015, -0.0283333, 0.4, -0.08, 0.0, -0.01]
    assert decoded == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("memory", [None, {}, {"model": {}}, {"model": {"x": torch.zeros(3)}}])
def test_without_a_model_of_its_own_a_device_has_signs_times_the_mean(memory):
    decoded = HybridSign().decode(HybridSign(0.6).encode({"x": X}), memory)["x"]
    mean = X[[1, 2, 4, 5, 8, 9]].abs().mean()
    signs = torch.tensor([1, -1, 1, 1, 1, -1, 1, 1, 1, -1]) * mean
    assert torch.allclose(decoded, torch.where(X.abs() > 0.05, X, signs))


def test_global_scope_with_half_a_model():
    tensors = {"a": X, "b": V + 0.001}
    decoded = HybridSign().decode(HybridSign(0.6, scope="global").encode(tensors), {"model": {"b": V}})
    alone = HybridSign().decode(HybridSign(0.6, scope="global").encode(tensors))
    assert torch.equal(decoded["a"], alone["a"]) and not torch.equal(decoded["b"], alone["b"])
    assert error(decoded["b"], tensors["b"]) < error(alone["b"], tensors["b"])


@pytest.mark.parametrize("ratio", [0.1, 0.35, 0.6])
@pytest.mark.parametrize("drift", [0.002, 0.01, 0.03])
def test_recovery_always_beats_top_k(ratio, drift):
    x, old = laplace(drift=drift)
    memory = {"model": {"x": old}}
    recovered = HybridSign().decode(HybridSign(ratio).encode({"x": x}), memory)["x"]
    assert error(recovered, x) < error(TopK().decode(TopK(ratio).encode({"x": x}))["x"], x)


# (drift, ratio) -> relative squared error of recovery, of signs alone, of zeros, of the old value: from the page
PAGE = {
    (0.002, 0.60): (4.0e-3, 2.0e-2, 6.6e-2, 1.3e-3),
    (0.002, 0.10): (6.2e-5, 4.8e-5, 1.9e-4, 2.1e-4),
    (0.010, 0.35): (4.3e-3, 3.2e-3, 1.2e-2, 1.5e-2),
    (0.030, 0.60): (4.0e-2, 2.8e-2, 1.0e-1, 1.3e-1),
}


@pytest.mark.parametrize(("drift", "ratio"), PAGE)
def test_errors_of_the_page_s_simulation(drift, ratio):
    x, old = laplace(400_000, drift)
    memory = {"model": {"x": old}}
    message = HybridSign(ratio).encode({"x": x})
    kept = TopK(ratio).encode({"x": x})
    got = [
        error(codec.decode(encoded, own)["x"], x)
        for codec, encoded, own in [
            (HybridSign(), message, memory),
            (HybridSign(), message, None),
            (TopK(), kept, None),
            (TopK(fill="memory"), kept, memory),
        ]
    ]
    assert got == pytest.approx(PAGE[drift, ratio], rel=0.12)


# ------------------------------------------------------------------------------------------------- exact bytes


@pytest.mark.parametrize(
    ("codec", "share"),
    [
        *((HybridSign(ratio), share) for ratio, share in [(0.10, 0.934), (0.35, 0.692), (0.60, 0.450)]),
        *((TopK(ratio), share) for ratio, share in [(0.10, 0.931), (0.35, 0.681), (0.60, 0.431)]),
        *((TopK(ratio), share) for ratio, share in [(0.90, 0.115), (0.99, 0.0125)]),
        (SignSGD(), 1 / 32),
        (Int8(), 1 / 4),
        (QSGD(4, 512), 1 / 8 + 1 / 512),
        (Float16(), 1 / 2),
    ],
    ids=lambda part: part.name if isinstance(part, Float16) else repr(part)[:60],
)
def test_byte_table(codec, share):
    x = {"w": laplace(1_117_000)[0]}
    message = codec.encode(x)
    assert message.nbytes == len(message.to_bytes())
    assert message.nbytes / x["w"].nbytes == pytest.approx(share, abs=1e-3)


def test_nothing_is_ever_longer_than_dense_but_for_the_header():
    for ratio in (0.0, 0.01, 0.02, 0.03, 0.05):
        for codec in (TopK(ratio), HybridSign(ratio)):
            x = {"w": laplace(100_000)[0]}
            assert codec.encode(x).nbytes <= Dense().encode(x).nbytes + 200
    assert torch.equal(TopK().decode(TopK(0.01).encode(x))["w"], x["w"])  # then all of it is sent


def test_zeros_are_not_sent():
    x = torch.zeros(10_000)
    x[17] = 3.0
    message = TopK(0.35).encode({"x": x})
    assert message.nbytes < 300 and torch.equal(TopK().decode(over_the_wire(message))["x"], x)


# ---------------------------------------------------------------------------------------------------- selection


def test_ties_go_to_the_lowest_index():
    assert find_largest(torch.ones(6), 2).mask.tolist() == [True, True, False, False, False, False]
    assert find_largest(torch.tensor([1.0, 2, -1, 2, 1]), 3).mask.tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_are_torch_s(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for count in (1, 10, 500, 999):
        found = find_largest(x, count)
        assert int(found.mask.sum()) == count
        assert x[found.mask].abs().min() >= found.rest_max == x[~found.mask].abs().max()
        assert float(found.rest_mean) == pytest.approx(float(x[~found.mask].abs().double().mean()))


def test_quota_is_floor_but_for_rounding():
    assert [TopK(ratio).kept(10) for ratio in (0.0, 0.3, 0.35, 0.6, 0.7, 0.99)] == [10, 7, 7, 4, 3, 1]
    assert TopK(0.999).kept(3) == 1


# ------------------------------------------------------------------------------------- ternary, signs and levels


def test_sparse_ternary():
    x = laplace(10_000)[0]
    decoded = SparseTernary().decode(over_the_wire(SparseTernary(0.99).encode({"x": x})))["x"]
    largest = find_largest(x, 100).mask
    assert torch.equal(decoded != 0, largest)
    assert torch.equal(decoded.sign(), x.sign() * largest)
    assert decoded.abs().max() == pytest.approx(float(x[largest].abs().mean()))
    assert len(decoded.abs().unique()) == 2
    zero = {"x": torch.zeros(50)}
    assert torch.equal(SparseTernary().decode(SparseTernary(0.5).encode(zero))["x"], zero["x"])


@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_is_right_in_the_mean_and_never_off_by_more_than_a_level(norm, bits):
    x = torch.randn(600, generator=torch.Generator().manual_seed(0))
    decoded = [QSGD().decode(QSGD(bits, 200, norm, seed).encode({"x": x}))["x"] for seed in range(400)]
    rows = x.view(3, 200)
    scale = rows.norm(dim=1) if norm == "l2" else rows.abs().amax(1)
    step = (scale / (2 ** (bits - 1) - 1)).repeat_interleave(200)
    assert all(((one - x).abs() <= step * 1.00001).all() for one in decoded)
    mean = torch.stack(decoded).mean(0)
    assert ((mean - x).abs() <= 5 * step / 2 / math.sqrt(400) + 1e-6).all()  # a deviation is at most half a level


def test_qsgd_rounds_the_same_tensors_the_same_way():
    a, b = (QSGD(seed=seed).encode(state()).to_bytes() for seed in (0, 0))
    assert a == b != QSGD(seed=1).encode(state()).to_bytes()


def test_int8_is_off_by_half_a_step_at_most():
    for scale in (1e-30, 1e-3, 1.0, 1e30):
        x = torch.randn(1000) * scale
        decoded = Int8().decode(Int8().encode({"x": x}))["x"]
        assert (decoded - x).abs().max() <= x.abs().max() / 254 * 1.001


def test_signs():
    x = torch.tensor([0.5, -0.1, 0.0, 0.3])
    assert SignSGD().decode(SignSGD().encode({"x": x}))["x"].tolist() == pytest.approx([0.225, -0.225, 0.225, 0.225])
    assert SignSGD().decode(SignSGD(scale=1.0).encode({"x": x}))["x"].tolist() == [1, -1, 1, 1]


# ---------------------------------------------------------------------------------------- what all have in common


@pytest.mark.parametrize("codec", PACKED, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
class TestEveryPackedCodec:
    def test_the_wire_changes_nothing(self, codec, dtype):
        tensors = state(dtype)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        message = codec.encode(tensors)
        assert message.nbytes == len(message.to_bytes())
        here, there = codec.decode(message), codec.decode(over_the_wire(message))
        assert here.keys() == there.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(here[name], there[name])
            assert here[name].dtype is tensor.dtype and here[name].shape == tensor.shape
            assert torch.equal(tensor, copies[name])  # the input is left alone
            assert here[name].isfinite().all()

    def test_a_former_model_is_never_written_to(self, codec, dtype):
        memory = {"model": state(dtype, seed=1)}
        copies = {name: tensor.clone() for name, tensor in memory["model"].items()}
        for tensor in codec.decode(codec.encode(state(dtype)), memory).values():
            tensor.zero_()
        assert all(torch.equal(tensor, copies[name]) for name, tensor in memory["model"].items())

    def test_an_equal_tensor_in_another_order_or_layout_is_the_same_message(self, codec, dtype):
        tensors = state(dtype)
        other = dict(reversed(tensors.items())) | {"linear": tensors["linear"].t().contiguous().t()}
        assert codec.encode(other).to_bytes() == codec.encode(tensors).to_bytes()


@pytest.mark.parametrize("codec", PACKED, ids=repr)
class TestEveryPackedCodecOnce:
    def test_what_is_not_floating_or_too_small_or_not_finite_travels_as_it_is(self, codec):
        tensors = {
            **{str(dtype): torch.arange(6).to(dtype) for dtype in LOSSLESS_KINDS},
            "empty": torch.zeros(0, 3),
            "nan": torch.tensor([1.0, float("nan")] * 50),
            "w": torch.randn(50, 4),
        }
        message = codec.encode(tensors)
        assert not message.is_finite()  # the receiver sees it
        decoded = codec.decode(over_the_wire(message))
        for name in tensors.keys() - {"w"}:
            assert torch.equal(decoded[name].nan_to_num(9.0), tensors[name].nan_to_num(9.0)), name
        assert codec.decode(over_the_wire(codec.encode({}))) == {}

    def test_small_tensors_travel_whole(self, codec):
        whole = type(codec)(min_numel=2000, scope=codec.scope)
        message = whole.encode(state())
        assert all(torch.equal(tensor, whole.decode(message)[name]) for name, tensor in state().items())
        assert not any(name.startswith("#") for name in message.tensors)

    def test_mixed_dtypes(self, codec):
        tensors = {**state(), **{f"half.{name}": t for name, t in state(torch.bfloat16).items()}}
        decoded = codec.decode(over_the_wire(codec.encode(tensors)))
        assert {n: (t.dtype, t.shape) for n, t in decoded.items()} == {
            n: (t.dtype, t.shape) for n, t in tensors.items()
        }

    def test_codecs_are_values(self, codec):
        twin = type(codec)(**asdict(codec))
        assert twin == codec and hash(twin) == hash(codec) and codec.with_settings({"other": 1}) == codec

    def test_names_of_its_own(self, codec):
        with pytest.raises(ValueError, match="rename"):
            codec.encode({"#bytes": torch.ones(3)})
        with pytest.raises(TypeError, match=r"'w' has dtype .* convert it with \.to"):
            codec.encode({"w": torch.ones(3).to(torch.float8_e4m3fn)})


def test_a_visit_s_settings_tune_the_ratio():
    codec = TopK(0.1, setting="up_ratio")
    assert codec.with_settings({"up_ratio": 0.4}) == TopK(0.4, setting="up_ratio")
    assert codec.with_settings({}) is codec and TopK(0.1).with_settings({"up_ratio": 0.4}) == TopK(0.1)
    with pytest.raises(ValueError, match="ratio=1"):
        codec.with_settings({"up_ratio": 1})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TopK(1.0), "ratio=1.0"),
        (lambda: HybridSign(-0.1), "ratio=-0.1"),
        (lambda: TopK(float("nan")), "ratio=nan"),
        (lambda: TopK(fill="old"), "fill='old'"),
        (lambda: TopK(scope="layer"), "scope='layer'"),
        (lambda: Int8(min_numel=0), "min_numel=0"),
        (lambda: QSGD(bits=1), "bits=1"),
        (lambda: QSGD(bucket=0), "bucket=0"),
        (lambda: QSGD(norm="l1"), "norm='l1'"),
        (lambda: SignSGD(scale=0), "scale=0"),
    ],
)
def test_arguments(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("codec", PACKED, ids=repr)
def test_cuda(codec):
    tensors = {name: tensor.cuda() for name, tensor in state().items()}
    memory = {"model": state(seed=1)}
    there = codec.decode(codec.encode(tensors), {"model": {n: t.cuda() for n, t in memory["model"].items()}})
    assert all(tensor.is_cuda for tensor in there.values())
    if not isinstance(codec, QSGD):  # whose random numbers are the device's own
        here = codec.decode(codec.encode(state()), memory)
        assert all(torch.allclose(there[name].cpu(), here[name], atol=1e-6) for name in here)
