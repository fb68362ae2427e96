"""Rounds of SmolLM2-135M and its Λ on prompts that nothing was chosen on: ``python hat_rounds.py --folder build/hat``.

First turns of Spec-Bench (eight of each of its six tasks) and questions of GSM8K's test split, in one process and in
float32. Prints accept lengths, what drafts came to, and in how many places a text is not what the whole model chooses
there, with the largest difference of the two scores: below ``MARGIN``, float32 cannot tell them apart. Budget: 72
texts of 64 tokens, twice, at about 25 tokens a second on a core, and as long again for ``generate``: 15 minutes.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
from hat_distill import HELD_OUT, prompt_ids, questions, read
from safetensors.torch import load_file

from edgebolt.common.decoding import TokenChoice
from edgebolt.common.tables import print_table
from edgebolt.common.text import load_pretrained, load_tokenizer
from edgebolt.hat import (
    CloudEngine,
    CloudModel,
    Conversation,
    Dialogue,
    Drafting,
    HatAdapter,
    InProcess,
    MedusaConversation,
    MedusaHeads,
    split,
)

MARGIN = 1e-3  # of logits: products of another number of rows differ in float32 by about 1e-4
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def test_prompts(tokenizer, each=8, gsm8k=24, longest=800):
    """Task -> prompts, of Spec-Bench and of GSM8K's test split."""
    tasks = defaultdict(list)
    for question in read("spec_bench/question.jsonl.gz"):
        task = "mt_bench" if question["category"] in MT_BENCH else question["category"]
        tasks[task].append(question["turns"][0])
    tasks["gsm8k test"] = [question["question"] for question in read("gsm8k/test.jsonl.gz")]
    found, draw = {}, random.Random(0)
    for task, texts in tasks.items():
        prompts = [prompt_ids(tokenizer, text) for text in draw.sample(texts, min(80, len(texts)))]
        prompts = [prompt for prompt in prompts if len(prompt) <= longest]
        found[task] = prompts[: gsm8k if task == "gsm8k test" else each]
    return found


def held_out_prompts(tokenizer, count):
    """Prompts that the options are chosen on."""
    return {"held out": [prompt_ids(tokenizer, text) for text in questions(1200)[:HELD_OUT][:count]]}


class Rounds:
    """What the rounds of several texts came to."""

    def __init__(self):
        self.tokens = self.rounds = self.drafted = self.accepted = self.whole = self.hits = self.ended = 0

    def add(self, conversation, link):
        """Generate a text."""
        before = (0, 0, 0)
        for new in Dialogue(conversation, link):
            now = (conversation.drafted, conversation.accepted, conversation.hits)
            if conversation.rounds:
                drafted, accepted = now[0] - before[0], now[1] - before[1]
                self.rounds, self.drafted, self.accepted = (
                    self.rounds + 1,
                    self.drafted + drafted,
                    self.accepted + accepted,
                )
                self.whole += drafted == accepted
                self.tokens += len(new)
            before = now
        self.hits += conversation.hits

    def values(self):
        """Accept length, drafted tokens, and the three numbers that ``DrawnRounds`` takes."""
        rejected = self.rounds - self.whole
        return {
            "accept length": self.tokens / self.rounds,
            "drafted": self.drafted / self.rounds,
            "right": self.accepted / max(self.accepted + rejected, 1),
            "hit": self.hits / max(self.whole, 1),
        }


@torch.no_grad()
def departures(model, text, prompt_length, choice, request):
    """Places where the whole model, given the text before, chooses another token; and by how much it prefers it."""
    logits = model(torch.tensor([text])).logits[0]
    found = []
    for place in range(prompt_length, len(text)):
        row, before = logits[place - 1], text[:place]
        chosen = choice(row, request, place, before)
        if chosen != text[place]:
            noise = choice.noise(request, place, len(row)) if choice.temperature else torch.zeros(len(row))
            scores = row.double() / (choice.temperature or 1) + noise
            found.append(float(scores[chosen] - scores[text[place]]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/hat"), help="of Λ, as hat_distill.py leaves it")
    parser.add_argument("--adapter", default="adapter.safetensors")
    parser.add_argument("--medusa", action="store_true", help="with Medusa's heads instead")
    parser.add_argument("--device-layers", type=int, default=2)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.6])
    parser.add_argument("--held-out", type=int, help="so many of the prompts that options are chosen on, instead")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.7])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--each", type=int, default=8, help="texts of each task of Spec-Bench; GSM8K: three times")
    parser.add_argument("--generate", action="store_true", help="compare greedy texts with model.generate too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer("smollm2")
    model = load_pretrained("AutoModelForCausalLM", "smollm2", dtype=torch.float32).eval()
    parts = split(model, args.device_layers)
    if args.medusa:
        heads = MedusaHeads(parts)
        heads.load_state_dict(load_file(args.folder / "medusa.safetensors"))
    else:
        adapter = HatAdapter.load(args.folder / args.adapter, model)
    tasks = (
        held_out_prompts(tokenizer, args.held_out)
        if args.held_out
        else test_prompts(tokenizer, args.each, 3 * args.each)
    )
    link, report = InProcess(CloudEngine(CloudModel(parts.middle))), []
    for temperature in args.temperatures:
        choice = TokenChoice(temperature)
        for threshold in args.thresholds:
            per_task, request = {}, 0
            differ, widest, same, texts, places = 0, 0.0, 0, 0, 0
            all_rounds = Rounds()
            for task, prompts in tasks.items():
                rounds = Rounds()
                for prompt in prompts:
                    request += 1
                    if args.medusa:
                        text = MedusaConversation(parts, heads, prompt, args.tokens, choice, request=request)
                    else:
                        drafting = Drafting(threshold)
                        text = Conversation(parts, adapter, prompt, args.tokens, choice, drafting, request)
                    rounds.add(text, link)
                    found = departures(model, text.text, len(prompt), choice, request)
                    differ, widest = differ + len(found), max([widest, *found])
                    texts, places = texts + 1, places + len(text.text) - len(prompt)
                    if args.generate and not temperature:
                        ids = torch.tensor([prompt])
                        whole = model.generate(ids, max_new_tokens=args.tokens, do_sample=False, pad_token_id=0)
                        same += whole[0].tolist() == text.text
                per_task[task] = rounds.values()
                for name in vars(all_rounds):
                    setattr(all_rounds, name, getattr(all_rounds, name) + getattr(rounds, name))
            per_task["all"] = all_rounds.values()
            columns = {task: {name: f"{value:.2f}" for name, value in row.items()} for task, row in per_task.items()}
            print_table(f"threshold {threshold}, temperature {temperature}", columns)
            print(
                f"{texts} texts, {places} tokens; {differ} are not what the whole model chooses there, by at most "
                f"{widest:.1e} of its score (margin {MARGIN}); mean over tasks "
                f"{fmean(row['accept length'] for task, row in per_task.items() if task != 'all'):.2f}"
                + (f"; {same} texts are generate's" if args.generate and not temperature else ""),
                flush=True,
            )  # fmt: skip
            assert widest <= MARGIN, "a text is not the whole model's"
            report.append({"threshold": threshold, "temperature": temperature, "differ": differ, "widest": widest,
                           "same": same, "texts": texts, "places": places, "tasks": per_task})  # fmt: skip
    name = "rounds_medusa" if args.medusa else f"rounds_{'held_out' if args.held_out else 'test'}"
    (args.folder / f"{name}.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
