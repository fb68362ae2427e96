"""Frozen bases in 4 and 8 bit on the CPU: what stays float, what trains, what it saves."""

import copy

import pytest
import torch
from tiny_text import bert, fit, loader

from edgebolt.common.federated import FederatedStrategy, Sizes
from edgebolt.common.lora import FedLoRA, pairs, quantization, set_depth

pytest.importorskip("bitsandbytes", reason="needs edgebolt-common[quantized]")
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 60}


@pytest.fixture
def folder(tmp_path):
    bert(**WIDE).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def classifier(folder):
    from edgebolt.common.text import TextClassifier

    def make(bits, **kwargs):
        torch.manual_seed(0)
        options = {"num_classes": 4, "ranks": 4, "dropout": 0.0, "learning_rate": 1e-2, "schedule": "constant"}
        return TextClassifier(folder, bits=bits, **{**options, **kwargs})

    return make


def resident_bytes(module):
    return sum(parameter.nbytes for parameter in module.parameters())


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_and_head_stay_float_and_trainable(classifier, bits):
    net = classifier(bits)
    kinds = {type(part).__name__ for part in net.modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    for name, parameter in net.named_parameters():
        ours = "lora_" in name or "classifier" in name or "pooler" in name
        assert parameter.requires_grad == ours
        assert parameter.dtype == torch.float32 or not ours
    packed = [p for p in net.parameters() if not p.is_floating_point()]
    assert len(packed) >= 18  # six projections a layer
    assert net.trained == {name for name, p in net.named_parameters() if p.requires_grad}


def test_memory_beside_float32(classifier):
    full, eight, four = (resident_bytes(classifier(bits)) for bits in (None, 8, 4))
    layers = 3 * 4 * (4 * 64 * 64 + 2 * 64 * 128)  # bytes of the projections in float32
    assert 0.95 * layers * 3 / 4 < full - eight <= layers * 3 / 4
    assert 0.95 * layers * 7 / 8 < full - four <= layers * 7 / 8


@pytest.mark.parametrize("bits", [4, 8])
def test_a_step_changes_lora_and_head_and_nothing_below_the_depth(classifier, batch, bits):
    net = classifier(bits)
    set_depth(net, 2)
    before = copy.deepcopy(dict(net.named_parameters()))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):  # B is zero at first: A moves in the second step
        optimizer.zero_grad()
        net.training_step(batch, 0).backward()
        optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    lora = {name for pair in pairs(before) for name in pair if "layer.0." not in name}
    assert moved == lora | {name for name in before if "classifier" in name or "pooler" in name}


@pytest.mark.parametrize("bits", [4, 8])
def test_a_federated_fit(classifier, bits):
    net = classifier(bits)
    strategy = FederatedStrategy(FedLoRA(), clients=Sizes([24] * 4), per_round=2)
    before = net.training_step(unseen(), 0).item()
    fit(net, strategy, rounds=4)
    after = net.training_step(unseen(), 0).item()
    assert after < before
    assert all(
        "lora_" in name or "classifier" in name or "pooler" in name for name in strategy.server.models["global"]
    )


def unseen():
    return next(iter(loader(batch_size=96, seed=5)))


def test_refusals():
    from edgebolt.common.text import TextClassifier

    with pytest.raises(ValueError, match="bits=3: use 4, 8, or None"):
        quantization(3)
    with pytest.raises(ValueError, match="give its name or folder instead"):
        TextClassifier(bert(), num_classes=4, bits=4)
