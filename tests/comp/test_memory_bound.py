import ctypes

import pytest
import torch
from deep_llama import write_llama
from test_least_squares import problem as sums_of
from test_selection import problem as problem_of
from tiny_models import prune, saved, tiny

from edgebolt.comp import SCORES, Comp
from edgebolt.comp.evaluation import measured_memory
from edgebolt.comp.least_squares import MaskProblem, Sublayer
from edgebolt.comp.selection import SCORING_RIDGE, removal_order

pytestmark = pytest.mark.slow

SMALL = {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6, "vocab_size": 100}
M_MMAP_THRESHOLD = -3


@pytest.fixture
def given_back():
    """Freed tensors of these small layers go back to the system at once, as those of large layers always do."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        pytest.skip("another libc")
    mallopt(M_MMAP_THRESHOLD, 2**16)
    yield
    mallopt(M_MMAP_THRESHOLD, 2**25)  # where glibc's own moving threshold ends up


@pytest.mark.parametrize(
    ("inner", "heads", "options"),
    [
        (1056, 6, {}),
        (1536, 2, {}),  # four times the width of the stream: a square matrix is larger than a layer
        (1056, 6, {"prune_attention": True}),
        (1056, 6, {"recover": "mask"}),
        (1056, 6, {"variance_bound": 1e-4, "step": 0.2}),
        (1056, 6, {"allocation": "inverse_importance"}),
    ],
    ids=["narrow", "wide", "attention", "mask", "bounded", "importance"],
)
def test_four_layers_and_the_streams(inner, heads, options, tmp_path, monkeypatch, given_back):
    """With square matrices in float32 and small stripes, as layers of a large model have them."""
    monkeypatch.setattr("edgebolt.comp.least_squares.DOUBLE_UP_TO", 0)
    monkeypatch.setattr("edgebolt.comp.least_squares.ROWS", 64, raising=False)
    prune(str(saved(tiny("llama"), tmp_path / "tiny")), output=tmp_path / "other")  # what is loaded once
    layer = write_llama(tmp_path / "dense", **SMALL, intermediate_size=inner, num_key_value_heads=heads)
    ids = torch.randint(100, (8, 32), generator=torch.Generator().manual_seed(0))
    comp = Comp(ratio=0.2, depth_fraction=0, batch_size=2, **options)
    with measured_memory(0.0005) as memory:
        comp.prune(tmp_path / "dense", ids, tmp_path / "small", progress=False)
    if memory.peak is None:
        pytest.skip("memory is measured on Linux alone")
    branches = SMALL["num_hidden_layers"] * (1 + comp.prune_attention) * min(comp.effect_sequences, comp.batch_size)
    streams = 4 * (len(ids) + branches * (comp.allocation == "effect")) * ids.shape[1] * SMALL["hidden_size"]
    print(f"{(memory.peak - streams) / layer:.2f} layers of {layer / 2**20:.1f} MiB")
    assert memory.peak <= 4 * layer + streams


@pytest.mark.parametrize("rows", [1, 5, 12, 100])
def test_sums_and_problems_do_not_depend_on_the_stripes(rows, monkeypatch):
    whole, *_ = sums_of()
    monkeypatch.setattr("edgebolt.comp.least_squares.ROWS", rows)
    striped, *_ = sums_of()
    torch.testing.assert_close(striped.gram, whole.gram, rtol=1e-5, atol=1e-4)
    assert torch.equal(striped.gram, striped.gram.T) or rows > 1
    for unit in (1, 4):
        torch.testing.assert_close(striped.masks(unit).gram, whole.masks(unit).gram, rtol=1e-5, atol=1e-3)
    kept, other = torch.arange(1, 12, 2), torch.randn(7, 6, dtype=torch.float64)
    assert striped.error(kept, other) == pytest.approx(whole.error(kept, other), rel=1e-5)
    assert striped.masks().error(kept, torch.ones(6)) == pytest.approx(whole.masks().error(kept, torch.ones(6)))


@pytest.mark.parametrize("unit", [1, 4])
def test_a_problem_may_take_the_sums_memory(unit):
    (kept, *_), (taken, *_) = sums_of(), sums_of()
    expected = kept.masks(unit)
    place = taken.gram.data_ptr()
    got = taken.masks(unit, consume=True)
    assert torch.equal(got.gram, expected.gram) and torch.equal(got.linear, expected.linear)
    assert len(taken.gram) == 0 and len(kept.gram) == 12
    assert unit > 1 or got.gram.data_ptr() == place


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_the_inverse_shrinks_in_its_own_memory(rows, monkeypatch):
    """What a score sees in each round is the exact inverse of what is left; the problem itself stays as it is."""
    monkeypatch.setattr("edgebolt.comp.least_squares.ROWS", rows)
    made, places = problem_of(), []
    before = made.gram.clone()

    def noted(left):
        gram = made.gram[left.kept][:, left.kept]
        exact = torch.linalg.inv(gram + made.ridge(SCORING_RIDGE) * torch.eye(len(gram), dtype=torch.float64))
        torch.testing.assert_close(left.inverse, exact, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(left.mask, exact @ made.linear[left.kept], rtol=1e-9, atol=1e-12)
        if len(left.kept) < 12:
            assert torch.equal(left.inverse, left.inverse.T)
        places.append(left.inverse.data_ptr())
        return left.mask.square()

    monkeypatch.setitem(SCORES, "noted", noted)
    removal_order(made, 9, "noted", step=0.25, variance_bound=1e9)
    assert len(places) == 4 and len(set(places)) == 1
    assert torch.equal(made.gram, before)


def activations(seed, outlier, neurons=384, width=128, tokens=1500):
    """Gated neurons on hidden states of a steep spectrum, some neurons a thousand times as large, two the same."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    hidden = randn(tokens, width) / torch.arange(1, width + 1) @ torch.linalg.qr(randn(width, width))[0]
    hidden *= (width / hidden.square().sum(1, keepdim=True)).sqrt()
    gate, up, down = (randn(neurons, width) / width**0.5 for _ in range(3))
    inputs = torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
    inputs[:, :4] *= outlier
    inputs[0, 0] *= 10  # an attention sink's massive activation
    inputs[:, 8], down[8] = inputs[:, 9], down[9]
    return inputs, down.T.contiguous()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("outlier", [1.0, 1e3])
@pytest.mark.parametrize("step", [0.05, 0.005])
def test_float32_chooses_what_float64_does(seed, outlier, step, monkeypatch):
    """Nearly the same neurons, and an objective within a percent, after many rounds too."""
    inputs, weight = activations(seed, outlier)
    found, remove = [], 150
    for bound in (384, 0):
        monkeypatch.setattr("edgebolt.comp.least_squares.DOUBLE_UP_TO", bound)
        sums = Sublayer(weight)
        for some in inputs.split(500):
            sums.add(some)
        order = removal_order(sums.masks(), remove, step=step, variance_bound=float("inf"))
        found.append((sums.masks(), order.kept(remove)))
    (double, exact), (single, got) = found
    assert (double.gram.dtype, single.gram.dtype) == (torch.float64, torch.float32)
    other = len(set(exact.tolist()) - set(got.tolist()))
    errors = [double.error(kept, problem.tuned(kept, 1e-2)) for problem, kept in ((double, exact), (single, got))]
    print(f"{other} of {remove} differ, objectives {errors[0]:.6g} and {errors[1]:.6g}")
    assert other <= 0.03 * remove
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_a_singular_float32_problem_is_chosen_from(monkeypatch):
    """More neurons than calibration tokens and outputs can tell apart."""
    monkeypatch.setattr("edgebolt.comp.least_squares.DOUBLE_UP_TO", 0)
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(2, 200, generator=generator), torch.randn(10, 200, generator=generator)
    sums = Sublayer(weight)
    sums.add(inputs)
    problem: MaskProblem = sums.masks()
    kept = removal_order(problem, 100, variance_bound=float("inf")).kept(100)
    assert len(kept) == 100
    mask = problem.tuned(kept, 1e-2)
    assert mask.isfinite().all() and problem.error(kept, mask) < 0.05 * problem.constant


def test_what_comes_along_and_what_does_not(tmp_path):
    dense, small = saved(tiny("llama"), tmp_path / "dense"), tmp_path / "small"
    along = [
        *("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
        *("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "LICENSE.md"),
        *("additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "1_Pooling/config.json"),
    ]
    stay = [
        *("README.md", "pytorch_model.bin", "modeling_own.py", "consolidated.00.pth", "tf_model.h5", "notes.txt"),
        *("pytorch_model.bin.index.json", "adapter_config.json", "onnx/model.onnx", ".gitattributes", "q4.gguf"),
    ]
    for name in (*along, *stay):
        (dense / name).parent.mkdir(exist_ok=True)
        (dense / name).write_text(name)
    prune(str(dense), output=small)
    there = {str(path.relative_to(small)) for path in small.rglob("*") if path.is_file()}
    own = {"config.json", "model.safetensors", "comp.json", "generation_config.json"}
    assert there == {*along, *own}
    assert all((small / name).read_text() == name for name in along)
