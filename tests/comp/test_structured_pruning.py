import hashlib

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from tiny_models import WORDS, ids, logits, reload, same_state, saved, tiny
from torch.utils.data import DataLoader

from edgebolt.common.anatomy import Anatomy
from edgebolt.comp import Comp, StructuredPruning
from edgebolt.comp.structured_pruning import _feed

OPTIONS = Comp(depth_fraction=0.5, round_to=1, variance_bound=10.0)
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Module(L.LightningModule):
    """Somebody's own module around a transformer."""

    def __init__(self, kind="llama", seen=None, **config):
        super().__init__()
        self.transformer = tiny(kind, **config)
        self.seen = [] if seen is None else seen
        if kind == "bert":
            self.transformer.train()

    def loss(self, batch):
        return self.transformer(**batch, labels=batch["input_ids"]).loss

    def training_step(self, batch, batch_idx):
        self.seen.append(sum(parameter.numel() for parameter in self.parameters()))
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test", self.loss(batch))

    def predict_step(self, batch):
        return self.transformer(**batch).logits.mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def loader():
    rows = ids(32, 12)
    return DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows], batch_size=8)


def pruning(**options):
    return StructuredPruning(**{"ratio": 0.5, "calibration_batches": 3, "comp": OPTIONS, "progress": False, **options})


def trainer(callback, epochs=1, **options):
    return L.Trainer(max_epochs=epochs, callbacks=[callback], **{**QUIET, "enable_checkpointing": False, **options})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mpnet"])
def test_fit_prunes_before_the_first_step_and_goes_on(kind, tmp_path):
    module, callback = Module(kind), pruning()
    dense = {name: parameter for name, parameter in module.named_parameters()}
    size = sum(parameter.numel() for parameter in dense.values())
    run = trainer(callback)
    run.fit(module, loader())
    small = sum(parameter.numel() for parameter in module.parameters())
    assert callback.report.parameters == (size, small) and set(module.seen) == {small} and small < size
    assert 0.45 < callback.report.ratio < 0.55 and callback.report.dropped
    assert all(any(parameter is old for old in dense.values()) for parameter in module.parameters())
    # The optimizer holds what is left, no more, and has moved it.
    held = [parameter for group in run.optimizers[0].param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in module.parameters()}
    for parameter in held:
        state = run.optimizers[0].state.get(parameter)
        assert state is None or state["exp_avg"].shape == parameter.shape
    assert len(run.optimizers[0].state) > 0.9 * len(held)
    assert torch.isfinite(run.callback_metrics["loss"])
    before = Comp(**{**vars(OPTIONS), "ratio": 0.5})
    untrained = tiny(kind)
    before.prune(untrained, ids(24, 12), progress=False)
    moved = [
        not torch.equal(a, b) for a, b in zip(module.transformer.parameters(), untrained.parameters(), strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)
    small_again = reload(saved(module.transformer.eval(), tmp_path), kind)
    assert same_state(small_again, module.transformer)
    assert torch.equal(logits(small_again), logits(module.transformer))


def test_what_it_prunes_is_what_comp_prunes():
    module, callback = Module(), pruning()
    run = trainer(callback)
    run.test(module, loader(), verbose=False)
    model = tiny("llama")
    Comp(**{**vars(OPTIONS), "ratio": 0.5, "batch_size": 8}).prune(model, ids(24, 12), progress=False)
    assert same_state(model, module.transformer)


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_other_stages_alone_prune_too_and_leave_a_model_that_trains(stage):
    module, callback = Module(), pruning()
    size = sum(parameter.numel() for parameter in module.parameters())
    run = trainer(callback)
    getattr(run, stage)(module, loader())
    small = sum(parameter.numel() for parameter in module.parameters())
    assert callback.report.parameters == (size, small) and small < size
    getattr(run, stage)(module, loader())  # once
    assert sum(parameter.numel() for parameter in module.parameters()) == small
    run.fit(module, loader())
    assert set(module.seen) == {small}


def test_the_sanity_check_before_a_fit_sees_the_dense_model():
    module, callback = Module(), pruning()
    run = trainer(callback, num_sanity_val_steps=2)
    run.fit(module, loader(), loader())
    assert torch.isfinite(run.callback_metrics["val"]) and len(Anatomy(module.transformer).layers) == 3
    size = sum(parameter.numel() for parameter in module.parameters())
    run.validate(module, loader(), verbose=False)
    assert sum(parameter.numel() for parameter in module.parameters()) == size


@pytest.mark.parametrize("kind", ["llama", "mpnet"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(kind, tmp_path):
    whole = Module(kind)
    L.seed_everything(0, verbose=False)
    trainer(pruning(comp=attention()), 2).fit(whole, loader())
    first = Module(kind)
    L.seed_everything(0, verbose=False)
    run = trainer(pruning(comp=attention()), 1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    second, callback = Module(kind), pruning(comp=attention())
    trainer(callback, 2).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same_state(whole, second) and not same_state(whole, first)
    assert len(second.seen) == 4 and callback.report == run.callbacks[0].report
    # And tested on a checkpoint, with a new module or the old one.
    results = []
    for module, same in ((Module(kind), pruning(comp=attention())), (second, callback)):
        out = trainer(same).test(module, loader(), ckpt_path=tmp_path / "half.ckpt", verbose=False)
        results.append(out[0]["test"])
        assert same_state(module, first)
    assert results[0] == results[1]
    assert torch.equal(
        logits(reload(saved(second.transformer.eval(), tmp_path / "m"), kind)), logits(second.transformer)
    )


def attention():
    return Comp(depth_fraction=0.5, round_to=1, variance_bound=10.0, prune_attention=True)


def test_a_checkpoint_of_a_run_without_the_callback_is_pruned_when_it_is_taken_up(tmp_path):
    module = Module()
    run = L.Trainer(max_epochs=1, **QUIET, enable_checkpointing=False)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "dense.ckpt")
    second, callback = Module(), pruning()
    resumed = trainer(callback, 2)
    resumed.fit(second, loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert callback.report is not None and len(set(second.seen)) == 1 and second.seen[0] < module.seen[0]
    for parameter, state in resumed.optimizers[0].state.items():
        assert state["exp_avg"].shape == parameter.shape


def test_another_module_is_pruned_too():
    callback = pruning()
    one, other = Module(), Module()
    trainer(callback).test(one, loader(), verbose=False)
    trainer(callback).test(other, loader(), verbose=False)
    assert same_state(one, other) and len(Anatomy(other.transformer).layers) == 3


def test_uniform_layers_stay_of_the_stock_class(tmp_path):
    comp = Comp(depth_fraction=0.5, round_to=4, uniform=True)
    module = Module()
    run = trainer(pruning(comp=comp))
    run.fit(module, loader())
    assert type(module.transformer).__name__ == "LlamaForCausalLM"
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = Module()
    trainer(pruning(comp=comp)).test(second, loader(), ckpt_path=tmp_path / "half.ckpt", verbose=False)
    assert (
        same_state(second, module)
        and len({layer.mlp.intermediate_size for layer in second.transformer.model.layers}) == 1
    )


def test_calibration_leaves_no_trace_of_its_steps():
    module, callback, states = Module(), pruning(), []
    for callbacks in ([], [callback]):
        L.seed_everything(3, verbose=False)
        run = L.Trainer(callbacks=callbacks, **QUIET)
        run.test(module, loader(), verbose=False)
        states.append(torch.get_rng_state())
    assert torch.equal(*states) and set(run.callback_metrics) == {"test"}
    assert module.transformer.training is False and "on_load_checkpoint" not in vars(module)


class Several(Module):
    """A module whose batches hold one of each of two loaders."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def loss(self, batch):
        one, other = batch.values() if isinstance(batch, dict) else batch
        self.batches.append((one["input_ids"].clone(), other["input_ids"].clone()))
        return super().loss(one) + super().loss(other)


def two(container, **options):
    data = [loader().dataset, loader().dataset[::-1][:20]]
    loaders = [DataLoader(rows, batch_size=8, **options) for rows in data]
    return dict(zip("ab", loaders, strict=True)) if container is dict else loaders


def reference():
    model = tiny("llama")
    Comp(**{**vars(OPTIONS), "ratio": 0.5, "batch_size": 8}).prune(model, ids(24, 12), progress=False)
    return model


@pytest.mark.parametrize("container", [dict, list])
def test_several_training_loaders_calibrate_with_the_batches_that_the_step_gets(container):
    module, callback = Several(), pruning(calibration_batches=4)
    trainer(callback).fit(module, two(container))
    assert len(module.batches) == 4
    options = {**vars(OPTIONS), "ratio": 0.5, "batch_size": 8}
    expected = Comp(**options).prune(tiny("llama"), ids(32, 12), progress=False)
    # The first transformer call of a step is what calibrates; the other loader's rows are in the digest.
    assert callback.report.layers == expected.layers
    digest = hashlib.sha256()
    for batch in CombinedLoader(two(container), "max_size_cycle"):
        _feed(digest, batch[0])
    assert callback.report.calibration == digest.hexdigest()


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
@pytest.mark.parametrize("container", [dict, list])
def test_the_first_of_several_other_loaders_calibrates(stage, container):
    class Sequential(Module):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            return super().validation_step(batch, batch_idx)

        def test_step(self, batch, batch_idx, dataloader_idx):
            return super().test_step(batch, batch_idx)

        def predict_step(self, batch, batch_idx, dataloader_idx):
            return super().predict_step(batch)

    module = Sequential()
    getattr(trainer(pruning()), stage)(module, two(container))
    assert same_state(module.transformer, reference())


@pytest.mark.parametrize("workers", [0, 1])
def test_the_fit_goes_on_with_its_own_iteration(workers):
    seen = []
    for callbacks in ([], [pruning()]):
        module = Several()
        L.seed_everything(0, verbose=False)
        options = {"shuffle": True, "num_workers": workers, "persistent_workers": workers > 0}
        run = L.Trainer(max_epochs=2, callbacks=callbacks, **QUIET, enable_checkpointing=False)
        run.fit(module, two(dict, **options))
        seen.append(torch.stack([one for one, _ in module.batches]))
    assert len(seen[0]) == 8 and torch.equal(*seen)


class Holds(Module):
    def __init__(self, *models):
        super().__init__()
        del self.transformer
        self.models = torch.nn.ModuleList(models)

    def configure_optimizers(self):
        return None


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (lambda: [torch.nn.Linear(2, 2)], r"Holds holds 0 transformers models \[\].*make it an attribute"),
        (
            lambda: [tiny("bert"), tiny("llama")],
            r"holds 2 transformers models \['BertForMaskedLM', 'LlamaForCausalLM'\]",
        ),
    ],
)
def test_none_or_two_transformers_are_refused(models, message):
    with pytest.raises(ValueError, match=message):
        trainer(pruning()).fit(Holds(*models()), loader())


def test_lora_inside_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has LoRA in its layers: prune it first"):
        trainer(pruning()).fit(Holds(model), loader())


def test_wrong_arguments():
    for count in (0, 1.5, True):
        with pytest.raises(ValueError, match="calibration_batches="):
            StructuredPruning(calibration_batches=count)
    with pytest.raises(ValueError, match=r"ratio=2: use a number"):
        StructuredPruning(ratio=2)
    assert StructuredPruning(ratio=0.3, comp=Comp(ratio=0.1, step=0.2)).comp == Comp(ratio=0.3, step=0.2)


def test_mixed_precision_calibrates_in_float32():
    module, callback = Module(), pruning()
    trainer(callback, precision="bf16-mixed").fit(module, loader())
    assert callback.report.ratio > 0.45
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_padding_of_a_batch_does_not_count():
    rows = ids(16, 12)
    mask = torch.ones_like(rows)
    mask[:, 8:] = 0
    noisy = rows.clone()
    noisy[:, 8:] = (noisy[:, 8:] + 7) % (WORDS - 4) + 4
    found = []
    for batch in (rows, noisy):
        data = [{"input_ids": row, "attention_mask": m} for row, m in zip(batch, mask, strict=True)]
        module, callback = Module("bert"), pruning()
        trainer(callback).test(module, DataLoader(data, batch_size=8), verbose=False)
        found.append(callback.report.layers)
    assert [entry["neurons"] for entry in found[0]] == [entry["neurons"] for entry in found[1]]
