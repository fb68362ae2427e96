import pytest
import torch
from tiny_models import SOME, ids, logits, prune, saved, tiny
from tiny_words import tokenizer

from edgebolt.comp import Comp
from edgebolt.comp.calls import Calibration, capture
from edgebolt.comp.in_memory import LayersInMemory
from edgebolt.comp.sweep import Seconds, survey_layers


def test_the_defaults():
    """No whole layers go, rates are measured, and all of the projection's weight is solved for."""
    comp = Comp()
    assert (comp.depth_fraction, comp.allocation, comp.recover) == (0.0, "effect", "lstsq")
    assert not comp.prune_attention and not comp.uniform and not comp.skip_first
    report = Comp(ratio=0.4).prune(tiny("llama"), ids(24, 16), progress=False)
    assert report.ratio == pytest.approx(0.4, abs=0.08) and report.dropped == []  # 8 of 48 neurons at a time
    assert len(report.effect) == 4 and all(entry["variance"] == 0 for entry in report.layers)
    assert all(entry["error"][1] < entry["error"][0] for entry in report.layers if len(entry["neurons"]) < 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.99}, r"ratio=0.99: use a number from 0 to 0.95"),
        ({"ratio": -0.1}, r"ratio=-0.1: use a number"),
        ({"ratio": "0.2"}, r"ratio='0.2': use a number"),
        ({"ratio": True}, r"ratio=True: use a number"),
        ({"ratio": float("nan")}, r"ratio=nan: use a number"),
        ({"depth_fraction": 1.1}, r"depth_fraction=1.1: use a number from 0 to 1"),
        ({"largest_rate": 1.0}, r"largest_rate=1.0: use a number from 0.01 to 0.99"),
        ({"step": 0}, r"step=0: use a number"),
        ({"variance_bound": -1}, r"variance_bound=-1: use a number"),
        ({"ridge": 0}, r"ridge=0: use a number"),
        ({"round_to": 0}, r"round_to=0: use a number"),
        ({"round_to": 8.5}, r"round_to=8.5: use a whole number"),
        ({"samples": 0}, r"samples=0: use a number"),
        ({"samples": 1.5}, r"samples=1.5: use a whole number"),
        ({"length": 1}, r"length=1: use a number"),
        ({"batch_size": 0}, r"batch_size=0: use a number"),
        ({"allocation": "best"}, r"allocation='best': use one of \('effect', 'inverse_importance', 'uniform'\)"),
        ({"recover": "sgd"}, r"recover='sgd': use one of"),
        ({"effect_sequences": 0}, r"effect_sequences=0: use a number"),
        ({"effect_sequences": 2.5}, r"effect_sequences=2.5: use a whole number"),
        ({"score": "magnitude"}, r"score='magnitude': use one of \('condition', 'collinearity', 'relative'\)"),
        (
            {"uniform": True, "prune_attention": True},
            r"uniform=True with prune_attention=True: .*Leave one of them out",
        ),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Comp(**options)


def test_a_protected_layer_that_there_is_not():
    with pytest.raises(ValueError, match=r"protect=\(0, 4\): the model has 4 layers; use indices from -4 to 3"):
        prune(tiny("llama"), protect=(0, 4))


def test_a_module_without_a_config():
    with pytest.raises(TypeError, match="has no config: pass a transformers model"):
        prune(torch.nn.Linear(2, 2))


def test_more_than_can_go_is_refused_and_nothing_is_changed():
    model = tiny("llama")
    before = logits(model)
    with pytest.raises(ValueError, match=r"lower the ratio, raise depth_fraction .*, or set prune_attention=True"):
        prune(model, ratio=0.9, depth_fraction=0.1)
    assert torch.equal(before, logits(model))


def test_the_calibration_seed_draws():
    texts = [[int(token) for token in row] for row in ids(40, 9)]
    reports = [prune(tiny("llama"), texts, samples=6, length=12, seed=seed).calibration for seed in (0, 0, 1)]
    assert reports[0] == reports[1] != reports[2]


def test_the_batch_size_changes_next_to_nothing():
    one, other = (prune(tiny("llama"), batch_size=size) for size in (4, 24))
    assert one.importance == pytest.approx(other.importance, abs=1e-5)
    assert [e["neurons"] for e in one.layers] == [e["neurons"] for e in other.layers]


def test_the_first_token_can_be_left_out():
    with_it, without = (prune(tiny("llama"), skip_first=skip) for skip in (False, True))
    assert with_it.importance != without.importance
    batch = ids(24, 16)
    other = batch.clone()  # what a first token itself does to a sink is gone, what others see of it is not
    other[:, 0] = 4
    assert prune(tiny("llama"), other, skip_first=True).importance != without.importance


def test_only_the_first_token_is_left_out(tmp_path):
    """Tokens that see nothing but themselves: with the first gone, all that is found out is that of the others."""
    model = tiny("gpt2")
    for layer in model.transformer.h:
        torch.nn.init.zeros_(layer.attn.c_proj.weight)
    made = capture(model, [lambda: model(ids(5, 8))])
    short = Calibration([made.hidden[0][:, 1:].clone()], made.calls, [made.real[0][:, 1:]], made.ids)
    one, other = (
        survey_layers(LayersInMemory(model), calibration, tmp_path, Comp(skip_first=skip), Seconds())
        for calibration, skip in ((made, True), (short, False))
    )
    assert len(one.importance) == 4 and one.importance == pytest.approx(other.importance, abs=1e-6)
    assert one.effect() == pytest.approx(other.effect(), rel=1e-3)
    assert [own["ffn"].units for own in one.orders] == [own["ffn"].units for own in other.orders]


def test_padding_is_left_out():
    """A batch of a long and a short text gives what the two give alone."""
    texts = ["w5 w6 w7 w8 w9 w10 w11 w12 w13", "w20 w30 w40 w41"] * 8
    values = []
    for size in (16, 1):
        comp = Comp(**{**SOME, "allocation": "uniform"}, batch_size=size, length=16)
        report = comp.prune(tiny("bert"), texts, tokenizer=tokenizer(), progress=False)
        values.append((report.importance, [entry["neurons"] for entry in report.layers]))
    assert values[0][0] == pytest.approx(values[1][0], abs=1e-5) and values[0][1] == values[1][1]


@pytest.mark.parametrize("recover", ["none", "mask", "lstsq"])
def test_a_bound_of_zero_takes_no_less_away(recover):
    """A mask that may not vary is none."""
    report = prune(tiny("llama"), ratio=0.3, depth_fraction=0.0, variance_bound=0.0, recover=recover)
    assert report.ratio == pytest.approx(0.3, abs=0.01)
    for entry in report.layers:
        before, after = entry["error"]
        assert entry["variance"] == 0 and (before > after if recover == "lstsq" else before == after)


@pytest.mark.parametrize("round_to", [1, 4, 16])
def test_what_is_left_is_a_multiple_and_the_mask_keeps_to_its_bound(round_to):
    report = prune(tiny("gpt2"), ratio=0.3, round_to=round_to, variance_bound=0.02, recover="mask")
    widths = [len(entry["neurons"]) for entry in report.layers]
    assert all(width % round_to == 0 for width in widths) and min(widths) < 48
    assert all(entry["variance"] <= 0.02 for entry in report.layers)
    assert max(entry["variance"] for entry in report.layers) > 0


@pytest.mark.parametrize("score", ["condition", "relative", "collinearity"])
@pytest.mark.parametrize("recover", ["none", "mask", "lstsq"])
def test_scores_and_recoveries_meet_the_same_size(score, recover):
    report = prune(tiny("mistral"), score=score, recover=recover)
    assert report.ratio == pytest.approx(0.5, abs=0.01)
    for entry in report.layers:
        before, after = entry["error"]
        assert after == before if recover == "none" else after < before


@pytest.mark.parametrize("kind", ["mistral", "gpt2", "bert"])
def test_recovery_helps_the_whole_model(kind):
    batch, distance = ids(24, 16), {}
    for recover in ("none", "mask", "lstsq"):
        model = tiny(kind)
        prune(model, batch, recover=recover, ratio=0.3, depth_fraction=0.0)
        distance[recover] = float((logits(model, batch) - logits(tiny(kind), batch)).square().mean())
    assert distance["lstsq"] < distance["mask"] < distance["none"]


def test_of_twins_one_goes_for_nothing():
    """Every neuron of the first layer is there twice: the others make up for it, which norms do not see."""
    error = {}
    for score in ("condition", "relative"):
        model = tiny("llama")
        mlp = model.model.layers[0].mlp
        with torch.no_grad():
            for module in (mlp.gate_proj, mlp.up_proj):
                module.weight[24:] = module.weight[:24]
            mlp.down_proj.weight[:, 24:] = mlp.down_proj.weight[:, :24] * torch.linspace(0.5, 1.5, 24)
        options = {"ratio": 0.35, "depth_fraction": 0.0, "allocation": "uniform", "step": 0.01}
        first = prune(model, score=score, ridge=1e-9, **options).layers[0]
        error[score] = first["error"][1]
        assert 24 <= len(first["neurons"]) < 32
    assert error["condition"] < 1e-6 < 1e-3 < error["relative"]


def test_a_checkpoint_without_a_tokenizer_takes_ids(tmp_path):
    dense = saved(tiny("llama"), tmp_path / "dense")
    report = prune(str(dense), [list(range(4, 40))] * 4, tmp_path / "small", length=12)
    assert report.ratio > 0.4


def test_what_cannot_be_done_is_known_before_anything_is_run(tmp_path, monkeypatch):
    dense = saved(tiny("llama"), tmp_path / "dense")
    monkeypatch.setattr("edgebolt.comp.comp.capture", lambda *args: 1 / 0)
    for options in ({"ratio": 0.9, "depth_fraction": 0.1}, {"round_to": 64, "depth_fraction": 0.0}):
        with pytest.raises(ValueError, match="lower"):
            prune(str(dense), output=tmp_path / "small", **options)
    assert not (tmp_path / "small").exists()
