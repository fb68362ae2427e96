"""COMP in 50 lines: a small GPT-2 learns torch's docstrings, is pruned by 30 %, and loads like any other model."""

import argparse
import inspect

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from edgebolt.comp import StructuredPruning

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=150, help="of training before the pruning")
parser.add_argument("--ratio", type=float, default=0.3, help="share of the layers' parameters that goes")
parser.add_argument("--folder", default="runs/comp", help="of the pruned model")
args = parser.parse_args()

TOKENS, BATCH = 64, 16  # a token is a byte


class Reader(L.LightningModule):
    """Somebody's own module around a transformer."""

    def __init__(self):
        super().__init__()
        config = GPT2Config(vocab_size=256, n_positions=TOKENS, n_embd=96, n_layer=6, n_head=4, bos_token_id=0)
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch, batch_idx):
        return self.model(batch, labels=batch).loss

    def test_step(self, batch, batch_idx):
        self.log("loss", self.model(batch, labels=batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 2e-3)


L.seed_everything(0, verbose=False)
docs = [inspect.getdoc(getattr(torch, name)) or "" for name in sorted(dir(torch)) if name.isidentifier()]
text = torch.tensor(list("\n\n".join(docs).encode()))
pieces = text[: len(text) // TOKENS * TOKENS].view(-1, TOKENS)
pieces = pieces[torch.randperm(len(pieces))]
train, test = DataLoader(pieces[300:], BATCH, shuffle=True), DataLoader(pieces[:300], 100)

options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
module, losses = Reader(), {}


def measure(name):
    losses[name] = L.Trainer(enable_progress_bar=False, **options).test(module, test, verbose=False)[0]["loss"]


L.Trainer(max_steps=args.steps, **options).fit(module, train)
measure("dense")
pruning = StructuredPruning(ratio=args.ratio, calibration_batches=16)  # the first batches calibrate it
trainer = L.Trainer(max_steps=args.steps // 5, callbacks=[pruning], **options)
trainer.fit(module, train)
measure(f"pruned and trained for {args.steps // 5} steps")
module.model.save_pretrained(args.folder)

print(pruning.report.summary())
print("; ".join(f"{name}: {loss:.3f}" for name, loss in losses.items()))
small = AutoModelForCausalLM.from_pretrained(args.folder)  # `import edgebolt.comp` has registered its class
print(f"{args.folder}: {type(small).__name__}, {sum(p.numel() for p in small.parameters()):,} parameters")
