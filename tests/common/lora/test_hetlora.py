import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_text import adapted, fit, loader

from edgebolt.common.devices import DeviceProfile, Fleet
from edgebolt.common.federated import ClientCallback, FederatedStrategy, Outcome, Server, Sizes, Visit
from edgebolt.common.lora import FedLoRA, HetLoRA, pairs
from edgebolt.common.lora.hetlora import PaddedRank, ZeroPadded, pad, truncate

CLIENTS = 4


def fleet():
    """Device 0 is the slowest, 3 the fastest."""
    profiles = [DeviceProfile(f"d{c}", 1e9 * 2**c, 2**30, 5.0, 1.0, up_bps=8e6, down_bps=8e6) for c in range(CLIENTS)]
    return Fleet.from_profiles(profiles)


def federated(algorithm, rounds=2, callbacks=(), **trainer):
    net = adapted()
    strategy = FederatedStrategy(algorithm, clients=Sizes([12] * CLIENTS), local_steps=2, fleet=fleet())
    fit(net, strategy, rounds=rounds, train=loader(12 * CLIENTS), callbacks=list(callbacks), **trainer)
    return net, strategy


def test_equal_ranks_and_weights_by_samples_are_fedlora_bit_for_bit():
    _, plain = federated(FedLoRA())
    _, equal = federated(HetLoRA(min_rank=4, max_rank=4, prune=1.0, penalty=0.0, weights="samples"))
    for name, tensor in plain.server.models["global"].items():
        assert torch.equal(tensor, equal.server.models["global"][name]), name


def test_ranks_follow_speed_and_bytes_follow_ranks():
    _, strategy = federated(HetLoRA(min_rank=1, max_rank=4, prune=1.0))
    ranks = {outcome.visit.client: outcome.visit.settings["rank"] for outcome in strategy.outcomes}
    assert ranks == {0: 1, 1: 2, 2: 3, 3: 4}
    model = strategy.server.models["global"]
    for outcome in strategy.outcomes:
        held = truncate(model, ranks[outcome.visit.client])
        tensors = sum(tensor.nbytes for tensor in held.values())
        assert 0 < outcome.down_bytes - tensors < 4000 and 0 < outcome.up_bytes - tensors < 4000
    sent = [outcome.up_bytes for outcome in strategy.outcomes]
    assert sent == sorted(sent) and len(set(sent)) == CLIENTS


def test_padding_stays_zero_through_adamw():
    seen = []

    class Watch(ClientCallback):
        def on_client_end(self, trainer, module, device, visit):
            parameters, rank = dict(module.named_parameters()), visit.settings.get("rank")
            for a, b in pairs(parameters) if rank else []:
                moved = parameters[a][:rank].abs().min() > 0 and parameters[b][:, :rank].abs().min() > 0
                padded = parameters[a][rank:].abs().sum() + parameters[b][:, rank:].abs().sum()
                seen.append((rank, bool(moved), float(padded)))

    algorithm = HetLoRA(min_rank=1, max_rank=4, prune=1.0)
    algorithm.callbacks.append(Watch())
    federated(algorithm)
    assert {rank for rank, *_ in seen} == {1, 2, 3, 4}
    assert all(moved and padded == 0.0 for _, moved, padded in seen)


def test_padding_is_undone_by_truncating():
    generator = torch.Generator().manual_seed(0)
    tensors = {"q.lora_A.weight": torch.randn(2, 5, generator=generator), "head": torch.ones(3)}
    tensors["q.lora_B.weight"] = torch.randn(6, 2, generator=generator)
    wide = pad(tensors, {"q.lora_A.weight": torch.Size([4, 5]), "q.lora_B.weight": torch.Size([6, 4])})
    assert wide["q.lora_A.weight"].shape == (4, 5) and not wide["q.lora_B.weight"][:, 2:].any()
    again = truncate(wide, 2)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def merged(updates, weights, samples=(1, 3)):
    everybody = np.ones(2, bool)
    server = Server(np.array(samples), steps_of=lambda c, s: 1, online=lambda r: everybody, per_round=2, seed=0)
    model = {"q.lora_A.weight": torch.full((3, 2), 1.0), "q.lora_B.weight": torch.full((2, 3), 2.0),
             "head": torch.zeros(2)}  # fmt: skip
    outcomes = [(Outcome(Visit(c, 1), 1, True, "", 0.0, 1.0, 0.0, 0.0, 0.0, 0, 0, 0.0), u) for c, u in updates]
    return model, ZeroPadded(weights)(server, model, outcomes)


def update(rank, change):
    return {"q.lora_A.weight": torch.full((rank, 2), change), "q.lora_B.weight": torch.full((2, rank), -change),
            "head": torch.full((2,), change)}  # fmt: skip


def test_zero_padded_mean_by_norm_by_hand():
    model, found = merged([(0, update(1, 0.5)), (1, update(3, 1.0))], "norm")
    locals_ = []
    for rank, change in ((1, 0.5), (3, 1.0)):
        a, b = torch.zeros(3, 2), torch.zeros(2, 3)
        a[:rank], b[:, :rank] = 1.0 + change, 2.0 - change
        locals_.append((a, b, (b @ a).norm()))
    total = sum(norm for *_, norm in locals_)
    torch.testing.assert_close(found["q.lora_A.weight"], sum(a * norm / total for a, _, norm in locals_))
    torch.testing.assert_close(found["q.lora_B.weight"], sum(b * norm / total for _, b, norm in locals_))
    assert found["head"].tolist() == pytest.approx([(0.5 * 1 + 1.0 * 3) / 4] * 2)  # what is not LoRA: by samples
    assert list(found) == list(model)


def test_adapters_that_are_zero_weigh_the_same():
    erased = [(c, {**update(3, 0.0), "q.lora_B.weight": torch.full((2, 3), -2.0)}) for c in (0, 1)]
    _, found = merged(erased, "norm")
    assert torch.equal(found["q.lora_B.weight"], torch.zeros(2, 3))
    assert torch.equal(found["q.lora_A.weight"], torch.ones(3, 2))


def test_the_penalty_s_gradient_is_autograd_s():
    callback = PaddedRank(None, low=1, prune=0.5, penalty=0.3)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 5, generator=generator, requires_grad=True)
    b = torch.randn(6, 4, generator=generator, requires_grad=True)
    a.grad, b.grad = torch.zeros_like(a), torch.zeros_like(b)
    callback._pairs, callback._rank, callback._kept = [(a, b)], 4, 2
    callback.on_before_optimizer_step(None, None, None)
    found = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    (0.3 * b[:, 2:4].norm() * a[2:4].norm()).backward()
    torch.testing.assert_close(found, (a.grad, b.grad))


def test_a_tail_that_shrinks_is_pruned_and_stays_so():
    class Shrink(ClientCallback):
        """From the second round on, the last rank ends smaller than it came."""

        def on_client_start(self, trainer, module, device, visit):
            self.on = device.round >= 1

        def on_train_batch_end(self, trainer, module, *args):
            with torch.no_grad():
                for _, b in pairs(dict(module.named_parameters())) if self.on else []:
                    module.get_parameter(b)[:, 3] *= 0.0

    found = []
    for rounds in (1, 2, 3, 4):
        algorithm = HetLoRA(min_rank=3, max_rank=4, prune=0.99, penalty=0.0)
        algorithm.callbacks.insert(0, Shrink())
        _, strategy = federated(algorithm, rounds=rounds)
        found.append([outcome.visit.settings["rank"] for outcome in strategy.outcomes])
    assert found == [[3, 3, 4, 4], [3, 3, 4, 4], [3, 3, 3, 3], [3, 3, 3, 3]]  # never below the smallest
    assert strategy.server.reports["rank"].tolist()[2:] == [3, 3]


def test_resumes_exactly(tmp_path):
    options = {"enable_checkpointing": True}
    every = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    _, whole = federated(HetLoRA(min_rank=1, max_rank=4), rounds=3, callbacks=[every], **options)
    net = adapted()
    strategy = FederatedStrategy(
        HetLoRA(min_rank=1, max_rank=4), clients=Sizes([12] * CLIENTS), local_steps=2, fleet=fleet()
    )
    import lightning as L

    trainer = L.Trainer(max_epochs=3, strategy=strategy, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(net, loader(12 * CLIENTS), ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, tensor in whole.server.models["global"].items():
        assert torch.equal(tensor, strategy.server.models["global"][name]), name
    assert strategy.history == whole.history


def test_refusals():
    for wrong in ({"min_rank": 0}, {"min_rank": 9}, {"prune": 0.0}, {"prune": 1.5}, {"penalty": -1.0},
                  {"weights": "median"}):  # fmt: skip
        with pytest.raises(ValueError, match="use "):
            HetLoRA(**wrong)
