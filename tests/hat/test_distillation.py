import copy

import lightning as L
import pytest
import torch
from tiny_hat import llama
from torch.utils.data import DataLoader

from edgebolt.hat import Drafting, HatDistillation, accept_length

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture
def texts():
    return torch.randint(6, 40, (96, 24), generator=torch.Generator().manual_seed(0))


def distillation(**options):
    return HatDistillation(
        copy.deepcopy(llama()).float(), 2, learning_rate=3e-3, warmup=5, drafting=Drafting(0.0), **options
    )


@pytest.mark.parametrize("longest", [1, 3, 8])
def test_accept_length_counts_what_is_right_in_a_row(longest):
    generator = torch.Generator().manual_seed(longest)
    agrees, sure = (torch.rand(40, generator=generator) < share for share in (0.7, 0.8))
    found = accept_length(agrees, sure, longest)
    for place in range(40):
        expected = 1
        while expected <= longest and place + expected - 1 < 40 and (agrees & sure)[place + expected - 1]:
            expected += 1
        assert found[place] == expected


@pytest.mark.parametrize("normed", [False, True])
def test_the_loss_falls_and_the_draft_agrees_more(normed, texts):
    L.seed_everything(0, verbose=False)
    module = distillation(normed=normed)
    trainer = L.Trainer(max_epochs=12, enable_model_summary=False, **QUIET)
    held_out = DataLoader(texts[:16], 8)
    before = trainer.validate(module, held_out, verbose=False)[0]  # before a fit too: in inference mode
    trainer.fit(module, DataLoader(texts[16:], 8, shuffle=True), held_out)
    after = trainer.validate(module, held_out, verbose=False)[0]
    assert after["val/loss"] < 0.9 * before["val/loss"] and after["val/loss_ce"] < before["val/loss_ce"]
    # Without training Λ is the identity: what the head says of the device's own layers, the logit lens
    assert after["val/top1_agree"] > before["val/top1_agree"] + 0.02
    assert after["val/expected_accept_len"] > before["val/expected_accept_len"] >= 1


def test_only_the_adapter_learns_and_is_saved(texts):
    module = distillation()
    frozen = {name: weight.clone() for name, weight in module.whole[0].state_dict().items()}
    L.Trainer(max_steps=3, enable_model_summary=False, **QUIET).fit(module, DataLoader(texts, 8))
    assert all(torch.equal(weight, frozen[name]) for name, weight in module.whole[0].state_dict().items())
    assert {name.split(".")[0] for name in module.state_dict()} == {"adapter"}


def test_padding_counts_for_nothing(texts):
    module = distillation()
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[1, 10:] = 0
    padded = module.features({"input_ids": texts[:4], "attention_mask": mask})
    assert padded["lengths"].tolist() == [24, 10, 24, 24]
    alone = module.features(texts[1:2, :10])
    assert torch.allclose(padded["deep"][24:34], alone["deep"], atol=1e-5)


def test_features_that_are_kept_give_the_same_loss(texts):
    module = distillation()
    assert torch.equal(module.losses(texts[:3])[0], module.losses(module.features(texts[:3]))[0])


@pytest.mark.parametrize("options", [{"ce_weight": -1.0}, {"noise": -0.1}, {"warmup": -1}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="not negative"):
        HatDistillation(llama(), 2, **options)
