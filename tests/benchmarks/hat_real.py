"""HAT and its baselines over gRPC, with SmolLM2-135M on this machine's own time: ``python hat_real.py``.

A cloud and a device are a process each, of one thread, on the loopback interface; the link is shaped to the bytes a
second of ``LINKS``, without latency. Prompts are of Spec-Bench, spread over its six tasks, and of GSM8K's test split.
All methods and links take a text in turn before the next one begins, so that whatever else the machine does hits all
of them. The baselines' cloud runs whole prompts (U-shape, U-Medusa) or has a budget of 512 tokens a batch.

Every text is compared with that of the whole model, or, for rows coarser than float32, of the model whose hidden
states pass the format at both cuts. A text may leave it only at a tie: its token is one of the two likeliest there,
whose logits differ by less than ``MARGINS``. Anything else ends the run with an error.

Budget: a text of 48 tokens takes 3 s with each method and link where both cores are idle, and 6 s where they are not:
16 prompts and six methods are 5 to 9 minutes a link.
"""

import argparse
import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
from hat_distill import prompt_ids, read
from safetensors.torch import load_file

from edgebolt.common.decoding import LayerStack, Link, Segment, new_cache
from edgebolt.common.tables import print_table
from edgebolt.common.text import load_pretrained, load_tokenizer
from edgebolt.hat import FORMATS, Chunking, Drafting, HatAdapter, HatClient, MedusaHeads, split
from edgebolt.hat.local_cloud import local_cloud

LINKS = {
    "middle": Link(up=7.5e6, down=12.5e6),
    "slow": Link(up=0.5e6, down=1.0e6),
}  # bytes a second; the paper's, ours
CLOUDS = {"whole": 0, "budget": 512}  # tokens of a batch; 0: no limit
WHOLE = Chunking(tokens=1 << 20)
# Of logits: float32's differ by some 1e-4 with the number of rows in a product, and float16 rounds that up or down.
MARGINS = {"float32": 1e-3, "float16": 5e-2}
TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")  # all others are the sixth: several turns


@dataclass
class Text:
    """A prompt, and what it must give."""

    task: str
    prompt: list[int]
    wanted: list[int] | None = None


def drawn(draw, tokenizer, task, prompts, longest):
    """Prompts of a task in a random order, those that are too long left out."""
    for prompt in draw.sample(prompts, len(prompts)):
        ids = prompt_ids(tokenizer, prompt)
        if len(ids) <= longest:
            yield Text(task, ids)


def texts(tokenizer, count, longest, seed):
    """``count`` prompts of each set, one of Spec-Bench and one of GSM8K in turn."""
    tasks = {"gsm8k": [row["question"] for row in read("gsm8k/test.jsonl.gz")]}
    for row in read("spec_bench/question.jsonl.gz"):
        task = row["category"] if row["category"] in TASKS else "turns"
        tasks.setdefault(task, []).append(row["turns"][0])
    draw = random.Random(seed)
    streams = {task: drawn(draw, tokenizer, task, prompts, longest) for task, prompts in tasks.items()}
    names = draw.sample(["turns", *TASKS], 6)
    return [next(streams[task]) for number in range(count) for task in (names[number % 6], "gsm8k")]


def methods(adapter, threshold, heads):
    """Name -> which cloud, and options of the client."""
    drafts, ahead = Drafting(threshold, branches=0), Drafting(threshold)
    found = {
        "U-shape": ("whole", {"chunking": WHOLE}),
        "U-Sarathi": ("budget", {"chunking": WHOLE}),
        "drafts": ("budget", {"chunking": WHOLE, "adapter": adapter, "drafting": drafts}),
        "chunks": ("budget", {}),
        "drafts, chunks": ("budget", {"adapter": adapter, "drafting": drafts}),
        "HAT": ("budget", {"adapter": adapter, "drafting": ahead}),
    }
    return found if heads is None else found | {"U-Medusa": ("whole", {"chunking": WHOLE, "heads": heads})}


def medusa(file, parts):
    """Heads from the tensors of ``MedusaHeads.state_dict``."""
    tensors = load_file(file)
    heads = MedusaHeads(parts, sum(name.startswith("heads.") for name in tensors))
    heads.load_state_dict(tensors)
    return heads


class Clock:
    """A streamer for ``generate``: when each token came."""

    def __init__(self):
        self.seconds = []

    def put(self, _):
        self.seconds.append(time.perf_counter())

    def end(self):
        pass


def whole_model(model, prompt, tokens):
    """The model's own text, with the timings of a row."""
    clock, started = Clock(), time.perf_counter()
    given = torch.tensor([prompt])
    out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False,
                         pad_token_id=0, streamer=clock)[0, len(prompt) :].tolist()  # fmt: skip
    first, last = clock.seconds[1], clock.seconds[-1]  # the prompt itself is streamed too
    return out, {"ttft": first - started, "tbt": (last - first) / max(len(out) - 1, 1)}


@torch.no_grad()
def last_logits(parts, tokens, rows):
    """Of the next token, with hidden states that pass the format of ``rows``."""
    passed = FORMATS[rows].passed
    shallow = passed(parts.input(torch.tensor(tokens), new_cache()))
    deep = passed(parts.middle(shallow, [Segment(new_cache(), len(tokens))])[-1:])
    return parts.output(deep)[0]


def verdict(parts, text, found, rows):
    """``equal``, ``tie`` (see above) or ``differs``, with the gap at the place where they part."""
    if found == text.wanted:
        return "equal", None
    pairs = enumerate(zip(found, text.wanted, strict=False))
    place = next((at for at, (ours, theirs) in pairs if ours != theirs), None)
    if place is None:
        return "differs", None  # one of them is cut short
    logits = last_logits(parts, [*text.prompt, *found[:place]], rows)
    best = logits.topk(2)
    gap = float(best.values[0] - best.values[1])
    likeliest = {found[place], text.wanted[place]} == set(best.indices.tolist())
    return "tie" if likeliest and gap < MARGINS[rows] else "differs", gap


def measured(client, text, tokens):
    """A row of the results, and the tokens."""
    found = client.generate(text.prompt, tokens)
    row = {"ttft": found.timings.first, "tbt": found.timings.between, "tokens": len(found.tokens)}
    for name in ("rounds", "drafted", "accepted", "hits", "sent", "received"):
        row[name] = getattr(found, name)
    spans = [span for span in found.timings.spans if span.lane == "device"]
    row["chunks"] = [span.tokens for span in spans if span.work == "prompt"]
    for work in ("draft", "ahead", "verify"):
        row[f"{work} s"] = sum(span.seconds for span in spans if span.work == work)
    return found.tokens, row


def ratio(rows, base, name):
    """Geometric mean of the texts' ratios, with its standard error."""
    logs = [float(np.log(row[name] / other[name])) for row, other in zip(rows, base, strict=True) if other[name] > 0]
    error = stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else float("nan")
    return f"{np.exp(fmean(logs)):.2f} ± {np.exp(fmean(logs)) * error:.2f}"


def cells(rows, base):
    """A method's line of the table."""
    found = {
        "TTFT, s": f"{fmean(row['ttft'] for row in rows):.3f}",
        "to U-shape's": ratio(rows, base, "ttft"),
        "TBT, ms": f"{fmean(row['tbt'] for row in rows) * 1e3:.1f}",
        "to U-shape's ": ratio(rows, base, "tbt"),
    }
    if "rounds" not in rows[0]:
        return found
    rounds = max(sum(row["rounds"] for row in rows), 1)
    equal, ties = (sum(row["verdict"] == word for row in rows) for word in ("equal", "tie"))
    return found | {
        "a round": f"{sum(row['tokens'] - 1 for row in rows) / rounds:.2f}",
        "drafted": f"{sum(row['drafted'] for row in rows) / rounds:.2f}",
        "ahead": f"{sum(row['hits'] for row in rows) / rounds:.0%}",
        "kB up": f"{fmean(row['sent'] for row in rows) / 1e3:.0f}",
        "down": f"{fmean(row['received'] for row in rows) / 1e3:.0f}",
        "equal": f"{equal} of {len(rows)}" + (f", {ties} ties" if ties else ""),
    }


def show(title, lines):
    """A line a method."""
    names = list(next(iter(lines.values())))
    print_table(title, {name: {method: line.get(name, "–") for method, line in lines.items()} for name in names})


def together(addresses, parts, options, work, args):
    """The texts of ``work`` by several devices at once, each with a link of its own: their verdicts."""

    def device(number):
        cloud, rest = options
        with HatClient(addresses[cloud], parts, rows=args.rows, shape=LINKS["middle"], **rest) as client:
            return [(text, client.generate(text.prompt, args.tokens).tokens) for text in work[number :: args.devices]]

    with ThreadPoolExecutor(args.devices) as pool:
        return [pair for pairs in pool.map(device, range(args.devices)) for pair in pairs]


def options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapter", type=Path, help="Λ of HatAdapter.save; without, one that has not been trained")
    parser.add_argument("--medusa", type=Path, help="safetensors of MedusaHeads.state_dict: U-Medusa is run too")
    parser.add_argument("--threshold", type=float, default=Drafting().threshold, help="below which a draft ends")
    parser.add_argument("--rows", choices=MARGINS, default="float32", help="of hidden states on the link")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--texts", type=int, default=8, help="of each of the two sets")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most")
    parser.add_argument("--longest", type=int, default=1024, help="prompts of more tokens are not drawn")
    parser.add_argument("--devices", type=int, default=4, help="that generate at once in the end; 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--json", type=Path, help="for the raw rows")
    return parser.parse_args()


def main():
    args, started = options(), time.perf_counter()
    os.environ.setdefault("COLUMNS", "140")  # of the tables, in a file too
    torch.set_num_threads(1)
    tokenizer = load_tokenizer("smollm2")
    model = load_pretrained("AutoModelForCausalLM", "smollm2", dtype=torch.float32).eval()
    parts = split(model)
    adapter = HatAdapter(model) if args.adapter is None else HatAdapter.load(args.adapter, model)
    heads = None if args.medusa is None else medusa(args.medusa, parts)
    ways = methods(adapter, args.threshold, heads)
    work, rows, wrong = texts(tokenizer, args.texts, args.longest, args.seed), [], 0
    device = replace(parts, middle=LayerStack([]))  # nothing of the cloud's can be run by mistake
    with ExitStack() as stack:
        addresses = {
            name: stack.enter_context(local_cloud("smollm2", "--threads", "1", "--batch-tokens", str(budget)))
            for name, budget in CLOUDS.items()
        }
        clients = {
            (link, name): stack.enter_context(
                HatClient(addresses[cloud], device, rows=args.rows, shape=LINKS[link], **rest)
            )
            for link in args.links
            for name, (cloud, rest) in ways.items()
        }
        passing = stack.enter_context(HatClient(None, parts, rows=args.rows))
        for client in clients.values():  # what runs for the first time takes longer, and the uplink becomes known
            client.generate(work[1].prompt, 2)  # of GSM8K: some hundred tokens
        whole_model(model, work[1].prompt, 2)
        print(f"{len(work)} prompts; ready after {time.perf_counter() - started:.0f} s", flush=True)
        for number, text in enumerate(work):
            own, row = whole_model(model, text.prompt, args.tokens)
            text.wanted = own if args.rows == "float32" else passing.generate(text.prompt, args.tokens).tokens
            named = {"text": number, "task": text.task, "prompt": len(text.prompt)}
            rows.append(named | row | {"link": None, "method": "whole model", "tokens": len(own)})
            order = list(clients)
            for link, name in order[number % len(order) :] + order[: number % len(order)]:
                tokens, row = measured(clients[link, name], text, args.tokens)
                said, gap = verdict(parts, text, tokens, args.rows)
                wrong += said == "differs"
                rows.append(named | row | {"link": link, "method": name, "verdict": said, "gap": gap})
            print(f"{number + 1}: {text.task}, {len(text.prompt)} tokens and {len(own)}; "
                  f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
        at_once = together(addresses, device, ways["HAT"], work, args) if args.devices else []
    said = [verdict(parts, text, tokens, args.rows)[0] for text, tokens in at_once]
    wrong += said.count("differs")

    whole = [row for row in rows if row["method"] == "whole model"]
    for link in args.links:
        mine = {name: [r for r in rows if (r["link"], r["method"]) == (link, name)] for name in ways}
        lines = {name: cells(found, mine["U-shape"]) for name, found in mine.items()}
        lines["whole model, no link"] = cells(whole, mine["U-shape"])
        up, down = LINKS[link].up / 1e6, LINKS[link].down / 1e6
        show(f"{link} link, {up} MB/s up, {down} down; {args.rows}; threshold {args.threshold}", lines)
    speed = sum(row["tokens"] for row in whole) / sum(row["ttft"] + row["tbt"] * (row["tokens"] - 1) for row in whole)
    print(f"The whole model alone: {speed:.1f} tokens a second, prompts included.")
    if at_once:
        print(f"{args.devices} devices at once: {said.count('equal')} of {len(said)} texts equal, "
              f"{said.count('tie')} at a tie.")  # fmt: skip
    print(f"{time.perf_counter() - started:.0f} s in all")
    if args.json:
        kept = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"options": kept, "rows": rows, "at once": said}, indent=1))
    if wrong:
        raise SystemExit(f"{wrong} texts are not the model's.")


if __name__ == "__main__":
    main()
