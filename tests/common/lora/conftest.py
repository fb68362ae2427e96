"""A tiny BERT for classification, and a module around it under LoRA; nothing is downloaded."""

import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent))  # families.py: importlib mode puts no folder on the path

LAYERS, CLASSES, WORDS, TOKENS = 3, 4, 60, 8


def bert_config(**kwargs):
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return BertConfig(**{**sizes, "vocab_size": WORDS, "num_labels": CLASSES, "max_position_embeddings": 16, **kwargs})


@pytest.fixture
def bert():
    """``make(**config)``: a new tiny BERT, always of the same weights."""
    transformers = pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")
    pytest.importorskip("peft", reason="needs edgebolt-common[llm]")

    def make(**config):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return transformers.BertForSequenceClassification(bert_config(**config))

    return make


class Texts(Dataset):
    """Four classes, each with words of its own among words of all."""

    def __init__(self, samples=96, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (samples,), generator=generator)
        own = 4 + 6 * self.labels[:, None] + torch.randint(6, (samples, TOKENS), generator=generator)
        common = torch.randint(30, WORDS, (samples, TOKENS), generator=generator)
        self.input_ids = torch.where(torch.rand(samples, TOKENS, generator=generator) < 0.5, own, common)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        mask = torch.ones(TOKENS, dtype=torch.int64)
        return {"input_ids": self.input_ids[index], "attention_mask": mask, "labels": self.labels[index]}


@pytest.fixture
def loader():
    return DataLoader(Texts(), batch_size=4, shuffle=True)


@pytest.fixture
def batch():
    return next(iter(DataLoader(Texts(), batch_size=4)))


class Module(L.LightningModule):
    """Somebody's own module around a PEFT model."""

    def __init__(self, model, lr=1e-2):
        super().__init__()
        self.model, self.lr = model.train(), lr

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


@pytest.fixture
def module(bert):
    """``make(ranks=4, **config)``."""
    from edgebolt.common.lora import add_lora

    def make(ranks=4, **config):
        torch.manual_seed(0)
        return Module(add_lora(bert(**config), ranks, dropout=0.0))

    return make


@pytest.fixture
def fit(loader):
    """``fit(module, strategy, rounds=3)`` -> Trainer."""

    def run(module, strategy="auto", rounds=3, **kwargs):
        options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(max_epochs=rounds, strategy=strategy, **{**options, **quiet, **kwargs})
        trainer.fit(module, loader)
        return trainer

    return run
