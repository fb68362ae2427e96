import math

import lightning as L
import pytest
import torch
from tiny_text import CLASSES, Texts, bert, fit, loader
from torch.utils.data import DataLoader

pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")
pytest.importorskip("peft", reason="needs edgebolt-common[llm]")

from edgebolt.common.federated import FedAvg, FederatedStrategy, Sizes
from edgebolt.common.lora import LoraRanks, ranks_of
from edgebolt.common.text import CausalLM, TextClassifier


@pytest.fixture
def folder(tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@pytest.fixture
def classifier(folder):
    def make(**kwargs):
        torch.manual_seed(0)
        return TextClassifier(folder, **{"num_classes": CLASSES, "ranks": 4, "learning_rate": 1e-2, **kwargs})

    return make


@pytest.fixture
def causal(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=40
    )
    return CausalLM(LlamaForCausalLM(config), ranks=2, learning_rate=1e-2, dropout=0.0)


def instructions(samples=24):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 40, (samples, 8), generator=generator)
    tokens[:, 4:] = tokens[:, :4]  # the answer repeats the prompt
    labels = tokens.clone()
    labels[:, :4] = -100
    mask = torch.ones(8, dtype=torch.int64)
    return [{"input_ids": t, "attention_mask": mask, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def logits(net):
    batch = next(iter(DataLoader(Texts(seed=3), batch_size=32)))
    with torch.no_grad():
        return net.eval()(**batch).logits, batch["labels"]


def test_a_classifier_learns_and_logs_its_own_accuracy(classifier):
    net = classifier(dropout=0.0)
    validation = DataLoader(Texts(samples=64, seed=3), batch_size=20)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    before = L.Trainer(**options, enable_checkpointing=False).validate(net, validation, verbose=False)[0]
    trainer = fit(net, rounds=8)
    after = trainer.validate(net, validation, verbose=False)[0]
    assert set(after) == {"val_loss", "val_acc"} and after["val_loss"] < before["val_loss"]
    texts = Texts(samples=64, seed=3)
    with torch.no_grad():
        found = net.eval()(input_ids=texts.input_ids).logits
    assert after["val_acc"] == pytest.approx((found.argmax(1) == texts.labels).float().mean().item())
    assert set(trainer.test(net, validation, verbose=False)[0]) == {"test_loss", "test_acc"}


def test_a_language_model_learns_and_logs_what_answers_are_worth(causal):
    data = instructions()
    trainer = fit(causal, rounds=6, train=DataLoader(data, batch_size=4))
    logged = trainer.validate(causal, DataLoader(data, batch_size=5), verbose=False)[0]
    assert set(logged) == {"val_loss", "val_acc", "val_perplexity"}
    batch = next(iter(DataLoader(data, batch_size=len(data))))
    with torch.no_grad():
        found = causal.eval()(input_ids=batch["input_ids"]).logits[:, 3:-1]  # those that predict the answer
    answers = batch["labels"][:, 4:]
    loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), answers.flatten()).item()
    assert logged["val_loss"] == pytest.approx(loss, rel=1e-4)
    assert logged["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert logged["val_acc"] == pytest.approx((found.argmax(2) == answers).float().mean().item())
    assert logged["val_perplexity"] < 40  # better than guessing among 40 words


def test_two_rates_and_a_schedule_over_epochs(classifier):
    rates = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    net = classifier(head_learning_rate=4e-2)
    trainer = fit(net, rounds=4, callbacks=[Watch()], limit_train_batches=1)
    assert rates == [pytest.approx([1e-2 * left, 4e-2 * left]) for left in (1.0, 0.75, 0.5, 0.25)]
    names = {id(p): name for name, p in net.named_parameters()}
    lora, head = ([names[id(p)] for p in group["params"]] for group in trainer.optimizers[0].param_groups)
    assert all("lora_" in name for name in lora) and len(lora) == 12
    assert head and not any("lora_" in name for name in head)
    rates.clear()
    fit(classifier(schedule="constant"), rounds=2, callbacks=[Watch()], limit_train_batches=1)
    assert rates == [[1e-2, 1e-2]] * 2


def test_dropout_is_on_while_training(classifier):
    net = classifier(dropout=0.5)
    modes = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            modes.append(all(part.training for part in module.model.modules()))

    fit(net, rounds=1, callbacks=[Watch()], limit_train_batches=2)
    assert modes == [True, True]


@pytest.mark.parametrize("ranks", [None, [1, 2, 6]])
def test_checkpoints_are_small_and_load_with_the_same_logits(classifier, tmp_path, ranks):
    net = classifier()
    trainer = fit(net, rounds=1, callbacks=[LoraRanks(ranks)])
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    state = torch.load(tmp_path / "small.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == net.trained and not any("embedding" in name for name in state)
    again = TextClassifier.load_from_checkpoint(tmp_path / "small.ckpt")
    assert ranks_of(again) == (ranks or [4, 4, 4])
    assert torch.equal(logits(again)[0], logits(net)[0])


def test_a_checkpoint_of_another_model_is_refused(classifier, tmp_path):
    trainer = fit(classifier(targets=["query"]), rounds=1, limit_train_batches=1)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="lacks 6 tensors that this module trains"):
        TextClassifier.load_from_checkpoint(tmp_path / "other.ckpt", targets=["query", "value"])


def test_a_federated_run_resumes_exactly(classifier, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def strategy():
        return FederatedStrategy(FedAvg(), clients=Sizes([24] * 4), per_round=2, local_steps=2)

    every = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    whole, resumed = strategy(), strategy()
    fit(classifier(), whole, rounds=3, callbacks=[every], enable_checkpointing=True)
    trainer = L.Trainer(max_epochs=3, strategy=resumed, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(classifier(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    for name, tensor in whole.server.models["global"].items():
        assert torch.equal(tensor, resumed.server.models["global"][name]), name


def test_an_export_is_what_peft_loads(classifier, folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    net = classifier()
    fit(net, rounds=1)
    net.export_adapter(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = next(iter(DataLoader(Texts(seed=3), batch_size=32)))
    assert torch.equal(loaded(**batch).logits, logits(net)[0])


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"head_learning_rate": -1.0}, {"weight_decay": -0.1},
                                   {"schedule": "cosine"}])  # fmt: skip
def test_refusals(classifier, wrong):
    with pytest.raises(ValueError, match="use "):
        classifier(**wrong)
