import lightning as L
import pytest
import torch
from tiny_text import LAYERS, Module, adapted, bert, fit, loader

from edgebolt.common.devices import DeviceProfile, Fleet
from edgebolt.common.federated import FedAvg, FederatedStrategy, Sizes, Visit
from edgebolt.common.lora import adapter_layers, ranks_of
from edgebolt.legend import LoraDepth


def trained_layers(module, before):
    after = dict(module.named_parameters())
    layers = adapter_layers(after)
    return {layers[name] for name in layers if not torch.equal(after[name], before[name])}


def copy_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


class AfterSetup(L.Callback):
    """The weights once all callbacks have set up."""

    def on_fit_start(self, trainer, module):
        self.weights = copy_of(module)


@pytest.mark.parametrize("depth", [1, 2, LAYERS, None])
def test_a_plain_fit_trains_the_top_layers_at_increasing_ranks(depth):
    net, after = adapted(ranks=8), AfterSetup()
    trainer = fit(net, rounds=2, callbacks=[LoraDepth(depth=depth, budget=18), after])
    assert ranks_of(net) == [5, 6, 7]
    assert trained_layers(net, after.weights) == set(range(LAYERS - (depth or LAYERS), LAYERS))
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    lora = {id(p) for name, p in net.named_parameters() if "lora_" in name}
    assert len(optimized & lora) == 4 * (depth or LAYERS)  # A and B of two projections


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        ({}, [7, 8, 9]),
        ({"ranks": "decreasing"}, [9, 8, 7]),
        ({"ranks": "uniform"}, [8, 8, 8]),
        ({"ranks": None}, [8, 8, 8]),
        ({"ranks": [1, 2, 4]}, [1, 2, 4]),
        ({"step": 3.0}, [5, 8, 11]),
        ({"ranks": "uniform", "budget": 6}, [2, 2, 2]),
    ],
)
def test_ranks(arguments, ranks):
    net = adapted(ranks=8)
    fit(net, rounds=1, callbacks=[LoraDepth(**arguments)], limit_train_batches=1)
    assert ranks_of(net) == ranks
    scales = {part.scaling["default"] for part in net.modules() if hasattr(part, "lora_A")}
    assert scales == {2.0}


def test_a_plain_fit_resumes_with_its_ranks(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    every = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    torch.manual_seed(0)
    whole = fit(adapted(), rounds=2, callbacks=[LoraDepth(2), every], enable_checkpointing=True,
                train=loader(24)).lightning_module  # fmt: skip
    net = adapted()
    trainer = L.Trainer(max_epochs=2, callbacks=[LoraDepth(2)], accelerator="cpu", logger=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(net, loader(24), ckpt_path=tmp_path / "epoch=1.ckpt")  # nothing is left to do
    assert ranks_of(net) == ranks_of(whole) == [3, 4, 5]
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in net.named_parameters())


def test_federated_visits_train_and_send_what_their_settings_say():
    sent = {}

    class Seen(LoraDepth):
        def upload(self, device, visit, update):
            left = super().upload(device, visit, update)
            sent[visit.client] = left
            return left

    def depths(server, visits):
        return [Visit(v.client, v.steps, settings={"depth": 1 + v.client % LAYERS}) for v in visits]

    algorithm = FedAvg()
    algorithm.configure, algorithm.callbacks = [depths], [Seen(ranks="uniform")]
    net = adapted()
    fit(net, FederatedStrategy(algorithm, clients=Sizes([12] * 6), local_steps=2), rounds=1)
    for client, update in sent.items():
        depth = 1 + client % LAYERS
        layers = adapter_layers(net.state_dict())
        assert {layers[name] for name in update if name in layers} == set(range(LAYERS - depth, LAYERS))
        assert {name for name in update if name not in layers} == {n for n, p in net.named_parameters()
                                                                    if "classifier" in n or "pooler" in n}  # fmt: skip
    assert all(p.requires_grad for name, p in net.named_parameters() if "lora_" in name)  # as before the fit


def profile(memory_bytes):
    return DeviceProfile("d", 1e9, int(memory_bytes), 5.0, 1.0, up_bps=1e6, down_bps=1e6)


def test_a_probed_device_says_how_deep_its_memory_reaches():
    class Ask(FedAvg):
        def enrol(self, server):
            return [Visit(c, 0, start=None, probe=1, settings={"depth": LAYERS}) for c in range(server.population)]

    from edgebolt.common.devices import count_step
    from edgebolt.common.lora import set_depth

    net = adapted()
    batch = next(iter(loader(shuffle_free := 12)))
    saved = []
    for depth in range(1, LAYERS + 1):
        set_depth(net, depth)
        saved.append(count_step(net, batch).saved_bytes)
    weights = sum(p.nbytes for p in net.parameters()) + sum(b.nbytes for b in net.buffers())
    weights += 3 * sum(p.nbytes for p in net.parameters() if p.requires_grad)
    sizes = [weights, *(weights + needed + 2000 for needed in saved), 10 * weights]
    algorithm = Ask()
    algorithm.callbacks = [LoraDepth(ranks=None)]
    strategy = FederatedStrategy(algorithm, clients=Sizes([shuffle_free] * len(sizes)), local_steps=1,
                                 fleet=Fleet.from_profiles([profile(size) for size in sizes]))  # fmt: skip
    fit(net, strategy, rounds=1, train=loader(12 * len(sizes)))
    assert strategy.server.reports["max_depth"].tolist() == [0, 1, 2, 3, 3]


def test_refusals():
    for wrong in (
        {"depth": 0},
        {"depth": 2.0},
        {"ranks": "rising"},
        {"ranks": [1, 0]},
        {"budget": 0},
        {"step": -1.0},
        {"step": float("nan")},
    ):
        with pytest.raises(ValueError, match="use "):
            LoraDepth(**wrong)
    with pytest.raises(ValueError, match="train 1 to 3 of them"):
        fit(adapted(), callbacks=[LoraDepth(depth=4)])
    with pytest.raises(ValueError, match="LoraDepth finds no LoRA in Module: add it"):
        fit(Module(bert()), callbacks=[LoraDepth()])
    with pytest.raises(ValueError, match="budget=2 is less than 3 layers"):
        fit(adapted(), callbacks=[LoraDepth(budget=2)])


def test_a_foreign_trainer_is_refused():
    foreign = pytest.importorskip("pytorch_lightning")
    net = adapted()
    with pytest.raises(TypeError, match="LoraDepth needs a lightning Trainer"):
        LoraDepth().setup(foreign.Trainer(logger=False, accelerator="cpu"), net, "fit")
