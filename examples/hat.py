"""HAT in 70 lines: a small GPT-2 learns torch's docstrings, Λ learns from it, and its texts stay the whole model's."""

import argparse
import inspect

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from edgebolt.hat import Drafting, GenerationMetrics, HatDistillation, HatModule

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300, help="of training the model, and of training Λ")
parser.add_argument("--prompts", type=int, default=8, help="texts to generate")
args = parser.parse_args()

TOKENS, BATCH = 128, 16  # a token is a byte


class Writer(L.LightningModule):
    """Somebody's own module around a transformer."""

    def __init__(self):
        super().__init__()
        config = GPT2Config(vocab_size=256, n_positions=TOKENS, n_embd=96, n_layer=6, n_head=4, bos_token_id=0)
        self.model = GPT2LMHeadModel(config)
        self.model.generation_config.eos_token_id = None  # a text of bytes has no end

    def training_step(self, batch, batch_idx):
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 2e-3)


L.seed_everything(0, verbose=False)
docs = [inspect.getdoc(getattr(torch, name)) or "" for name in sorted(dir(torch)) if name.isidentifier()]
text = torch.tensor(list("\n\n".join(docs).encode()))
pieces = text[: len(text) // TOKENS * TOKENS].view(-1, TOKENS)
pieces = pieces[torch.randperm(len(pieces))]
train, held_out = DataLoader(pieces[100:], BATCH, shuffle=True), DataLoader(pieces[:100], 50)

options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
writer = Writer()
L.Trainer(max_steps=args.steps, **options).fit(writer, train)

drafting = Drafting(threshold=0.4)  # a draft ends where the device is less sure than that
distillation = HatDistillation(writer.model, device_layers=2, learning_rate=3e-3, drafting=drafting)
trainer = L.Trainer(max_steps=args.steps, **options)
trainer.fit(distillation, train)
found = trainer.validate(distillation, held_out, verbose=False)[0]
print(f"Λ says what the model says in {found['val/top1_agree']:.0%} of all places;"
      f" {found['val/expected_accept_len']:.2f} tokens a round are expected")  # fmt: skip

# The cloud's layers run in this process too; give address="host:port" for a cloud of its own.
prompts = [piece[:40].tolist() for piece in pieces[: args.prompts]]
module = HatModule(writer.model, distillation.adapter, new_tokens=64, device_layers=2, drafting=drafting)
trainer = L.Trainer(callbacks=[GenerationMetrics()], **options)
texts = [text for batch in trainer.predict(module, DataLoader(prompts, 4, collate_fn=list)) for text in batch]

whole = [
    writer.model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0)[0, 40:].tolist()
    for prompt in prompts
]
same = sum(text.tokens == right for text, right in zip(texts, whole, strict=True))
print(f"{same} of {len(prompts)} texts are the model's")
print(repr(bytes([*prompts[0], *texts[0].tokens]).decode(errors="replace")))
