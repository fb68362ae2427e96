"""A tiny BERT, texts that it can learn, and a module around it: what the text papers' tests share."""

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

LAYERS, CLASSES, WORDS, TOKENS = 3, 4, 60, 8


def bert(**config):
    """A new BERT for classification, always of the same weights; needs transformers."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    ends = {"vocab_size": WORDS, "num_labels": CLASSES, "max_position_embeddings": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**{**sizes, **ends, **config}))


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


class Module(L.LightningModule):
    """Somebody's own module around a PEFT model."""

    def __init__(self, model, lr=1e-2):
        super().__init__()
        self.model, self.lr = model.train(), lr

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], self.lr)


def adapted(ranks=4, lr=1e-2, **config):
    """The module with LoRA of the given ranks, always of the same weights."""
    from edgebolt.common.lora import add_lora

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Module(add_lora(bert(**config), ranks, dropout=0.0), lr)


def loader(samples=96, batch_size=4, seed=0):
    return DataLoader(Texts(samples, seed), batch_size=batch_size, shuffle=True)


def accuracy(module, samples=200):
    """Share of unseen texts that a module's ``model`` classifies rightly."""
    batch = next(iter(DataLoader(Texts(samples, seed=1), batch_size=samples)))
    with torch.no_grad():
        return (module.model.eval()(**batch).logits.argmax(1) == batch["labels"]).float().mean().item()


def fit(module, strategy="auto", rounds=3, train=None, **kwargs):
    """A quiet fit; returns the Trainer."""
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=rounds, strategy=strategy, **{**options, **quiet, **kwargs})
    trainer.fit(module, loader() if train is None else train)
    return trainer
