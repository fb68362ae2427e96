"""Λ and Medusa's heads for SmolLM2-135M, distilled from what the model itself writes: ``python hat_distill.py``.

Prompts are those of training splits: GSM8K, Code Alpaca, ARC-Easy, BoolQ and MedicalMeadow, and passages of
WikiText-2's validation split to be summarised. The model answers each, the likeliest token at a time, in bfloat16; its
hidden states over prompt and answer are kept in a file, and Λ learns from them. 60 prompts are held out, and options
are chosen on them. Neither Spec-Bench nor GSM8K's test split is read here.

Budget, on one core with bfloat16 in hardware: answers 190 tokens a second, hidden states 800, training 700 a pass.
"""

import argparse
import gzip
import json
import os
import random
import time
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from edgebolt.common.text import load_pretrained, load_tokenizer
from edgebolt.hat import Drafting, HatDistillation, MedusaHeads, accept_length, split

SHARED = Path(os.environ.get("EDGEBOLT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
HELD_OUT, LONGEST_PROMPT = 60, 200


def read(name):
    """The records of a packed file of lines, or of one list."""
    with gzip.open(SHARED / name, "rt") as file:
        text = file.read()
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


def questions(count):
    """Prompts of training splits, shuffled."""
    gsm8k = [each["question"] for each in read("gsm8k/train.jsonl.gz")]
    code = [f"{each['instruction']}\n{each['input']}".strip() for each in read("code_alpaca/code_alpaca_2k.json.gz")]
    arc = [
        each["instruction"].partition("question: ")[2].partition("\n")[0]
        for each in read("commonsense/ARC-Easy.train.json.gz")
    ]
    boolq = [
        each["instruction"].partition("question: ")[2].partition("\n")[0].capitalize()
        for each in read("commonsense/boolq.train.json.gz")
    ]
    medical = [each["input"] for each in read("medical_meadow/medical_meadow_small.json.gz")]
    with gzip.open(SHARED / "wikitext2/valid.txt.gz", "rt") as file:
        passages = [f"Summarize: {line.strip()[:600]}" for line in file if len(line) > 300]
    shares = ((gsm8k, 0.3), (code, 0.2), (arc, 0.15), (passages, 0.15), (boolq, 0.1), (medical, 0.1))
    draw = random.Random(0)
    found = [text for group, share in shares for text in draw.sample(group, round(share * count))]
    draw.shuffle(found)
    return found


def prompt_ids(tokenizer, text):
    """A question as the chat's first message, ready to be answered."""
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def answers(model, prompts, new_tokens, batch=64):
    """Prompts with what the model answers; the batch is padded on the left."""
    order, found = sorted(range(len(prompts)), key=lambda number: len(prompts[number])), {}
    stops = {model.generation_config.eos_token_id}
    for begin in range(0, len(order), batch):
        group = order[begin : begin + batch]
        longest = max(len(prompts[number]) for number in group)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, number in enumerate(group):
            ids[row, longest - len(prompts[number]) :] = torch.tensor(prompts[number])
            mask[row, longest - len(prompts[number]) :] = 1
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        for row, number in enumerate(group):
            new = out[row, longest:].tolist()
            end = next((place + 1 for place, token in enumerate(new) if token in stops), len(new))
            found[number] = [*prompts[number], *new[:end]]
        print(f"answered {begin + len(group)} of {len(order)}", flush=True)
    return [found[number] for number in range(len(prompts))]


def features(args):
    """Hidden states of all texts, from the file if it is there."""
    file = args.folder / "features.pt"
    if not file.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer("smollm2")
        model = load_pretrained("AutoModelForCausalLM", "smollm2", dtype=torch.bfloat16).eval()
        prompts = [prompt_ids(tokenizer, text) for text in questions(args.texts)]
        prompts = [prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT]
        started = time.perf_counter()
        texts = answers(model, prompts, args.new_tokens)
        answered = time.perf_counter()
        module = HatDistillation(model, args.device_layers)
        found = [{**module.features(torch.tensor([text])), "tokens": torch.tensor(text)} for text in texts]
        torch.save(found, file)
        tokens, written = sum(map(len, texts)), sum(map(len, texts)) - sum(map(len, prompts))
        print(f"{len(texts)} texts of {tokens} tokens, {written} of them written in {answered - started:.0f} s; "
              f"hidden states in {time.perf_counter() - answered:.0f} s", flush=True)  # fmt: skip
    return torch.load(file)


def packed(texts, each=4):
    """Batches of ``each`` texts, one behind the other."""
    names = ("rows", "deep", "lengths")
    groups = [texts[at : at + each] for at in range(0, len(texts), each)]
    return [{name: torch.cat([text[name] for text in group]) for name in names} for group in groups]


@torch.no_grad()
def by_threshold(module, texts, thresholds=(0.0, 0.2, 0.3, 0.4, 0.5, 0.6)):
    """Threshold -> tokens a round, on texts that the model wrote."""
    found = {threshold: [] for threshold in thresholds}
    for text in packed(texts, each=1):
        _, parts = module.losses(text)
        agrees = parts["logits"].argmax(-1) == parts["target"].argmax(-1)
        chance = parts["logits"].float().softmax(-1).amax(-1)
        for threshold, lengths in found.items():
            lengths.append(accept_length(agrees, chance >= threshold, module.drafting.longest))
    return {threshold: float(torch.cat(lengths).mean()) for threshold, lengths in found.items()}


class Curve(L.Callback):
    """Keeps what is logged, for the docs."""

    def __init__(self):
        self.rows = []

    def on_validation_end(self, trainer, pl_module):
        found = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
        self.rows.append({"step": trainer.global_step, **found})
        print(self.rows[-1], flush=True)


class MedusaTraining(L.LightningModule):
    """Medusa's heads on the frozen model's hidden states, as U-Medusa has them."""

    def __init__(self, model, device_layers, rate):
        super().__init__()
        self.heads, self.rate = MedusaHeads(split(model, device_layers)), rate

    def loss(self, batch):
        return torch.stack([self.heads.loss(text["deep"].float(), text["tokens"]) for text in batch]).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))
        for place in range(len(self.heads.heads)):
            said = [
                (self.heads(text["deep"].float())[place, : -place - 2].argmax(-1), text["tokens"]) for text in batch
            ]
            same = torch.cat([ours == tokens[place + 2 :] for ours, tokens in said])
            self.log(f"val/head{place + 1}", same.float().mean(), batch_size=len(same))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.rate, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/hat"), help="of hidden states, Λ and its curve")
    parser.add_argument("--texts", type=int, default=1200, help="prompts to answer")
    parser.add_argument("--new-tokens", type=int, default=96, help="of an answer at most")
    parser.add_argument("--device-layers", type=int, default=2)
    parser.add_argument("--train-on", type=int, help="texts to train on; default: all but those held out")
    parser.add_argument("--name", default="adapter", help="of the files that are written")
    parser.add_argument("--passes", type=int, default=3, help="over the texts")
    parser.add_argument("--batch", type=int, default=1, help="texts a step; for Medusa eight times as many")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--ce-weight", type=float, default=3.0)
    parser.add_argument("--medusa", action="store_true", help="train Medusa's heads instead of Λ")
    parser.add_argument("--raw", action="store_true", help="compare hidden states before the norm, as the digest says")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = features(args)
    held_out, train = found[:HELD_OUT], found[HELD_OUT:][: args.train_on]
    model = load_pretrained("AutoModelForCausalLM", "smollm2", dtype=torch.float32).eval()
    L.seed_everything(0, verbose=False)
    if args.medusa:
        module = MedusaTraining(model, args.device_layers, args.rate)
        batches, checks = (
            [group[at : at + 8 * args.batch] for at in range(0, len(group), 8 * args.batch)]
            for group in (train, held_out)
        )
    else:
        module = HatDistillation(
            model, args.device_layers, learning_rate=args.rate, ce_weight=args.ce_weight, normed=not args.raw,
            drafting=Drafting(0.0),
        )  # fmt: skip
        batches, checks = packed(train, args.batch), packed(held_out)
    curve = Curve()
    trainer = L.Trainer(
        max_epochs=args.passes, accelerator="cpu", precision="bf16-mixed", callbacks=[curve], logger=False,
        gradient_clip_val=0.5, val_check_interval=max(len(batches) // 2, 1), enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(module, DataLoader(batches, None, shuffle=True), DataLoader(checks, None))
    print(f"{len(train)} texts, {args.passes} passes: {time.perf_counter() - started:.0f} s")
    name = "medusa" if args.medusa else args.name
    (args.folder / f"{name}.json").write_text(json.dumps(curve.rows, indent=1))
    if args.medusa:
        save_file(
            {key: value.contiguous() for key, value in module.heads.state_dict().items()},
            args.folder / f"{name}.safetensors",
        )
        return
    module.adapter.save(args.folder / f"{name}.safetensors")
    for threshold, length in by_threshold(module, held_out).items():
        print(f"threshold {threshold}: {length:.3f} tokens a round", flush=True)


if __name__ == "__main__":
    main()
