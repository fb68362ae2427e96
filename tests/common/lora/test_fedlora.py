import lightning as L
import pytest
import torch
from tiny_text import Module, adapted, bert, fit, loader

from edgebolt.common.federated import FedAvg, FederatedStrategy, Sizes
from edgebolt.common.lora import FedLoRA, FedLoRAStrategy, HetLoRAStrategy, LoraRanks, ranks_of


def federated(algorithm, rounds=2, module=None, **kwargs):
    net = adapted() if module is None else module
    options = {"clients": Sizes([12, 16, 20, 24]), "per_round": 3, "local_steps": 2, **kwargs}
    strategy = FederatedStrategy(algorithm, **options)
    fit(net, strategy, rounds=rounds, train=loader(72))
    return net, strategy


def test_it_is_federated_averaging_of_what_is_trained():
    _, plain = federated(FedAvg())
    net, strategy = federated(FedLoRA())
    model = strategy.server.models["global"]
    assert model.keys() == {name for name, p in net.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in model) and any("classifier" in name for name in model)
    assert all(torch.equal(tensor, plain.server.models["global"][name]) for name, tensor in model.items())
    frozen = {name: p for name, p in net.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, dict(adapted().named_parameters())[name]) for name, p in frozen.items())


def test_only_lora_and_head_travel():
    _, strategy = federated(FedLoRA(), rounds=1)
    tensors = sum(tensor.nbytes for tensor in strategy.server.models["global"].values())
    for outcome in strategy.outcomes:
        assert 0 < outcome.up_bytes - tensors < 4000 and 0 < outcome.down_bytes - tensors < 4000  # names


@pytest.mark.parametrize(("ranks", "found"), [(2, [2, 2, 2]), ([1, 2, 6], [1, 2, 6]), (None, [4, 4, 4])])
def test_ranks_are_set_at_the_same_scale(ranks, found):
    net = adapted()
    fit(net, rounds=1, callbacks=[LoraRanks(ranks)], limit_train_batches=2)
    assert ranks_of(net) == found
    assert {part.scaling["default"] for part in net.modules() if hasattr(part, "lora_A")} == {2.0}
    net, _ = federated(FedLoRA(rank=3), rounds=1)
    assert ranks_of(net) == [3, 3, 3]


def test_strategies_by_name():
    for name, kind in {"fedlora": FedLoRAStrategy, "hetlora": HetLoRAStrategy}.items():
        trainer = L.Trainer(strategy=name, accelerator="cpu", logger=False)
        assert isinstance(trainer.strategy, kind)


def test_refusals():
    for ranks in (0, [], [1, 0], 2.5):
        with pytest.raises((ValueError, TypeError)):
            LoraRanks(ranks)
    with pytest.raises(ValueError, match="LoraRanks finds no LoRA in Module"):
        federated(FedLoRA(), module=Module(bert()))
    with pytest.raises(ValueError, match="are 2, and 3 layers carry LoRA"):
        fit(adapted(), rounds=1, callbacks=[LoraRanks([1, 2])])
