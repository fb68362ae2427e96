"""Three papers in one run: FLUDE chooses devices and keeps their work, LEGEND sets depths, Caesar packs it all."""

import argparse

import lightning as L

from edgebolt.caesar import Caesar
from edgebolt.common.devices import Fleet, Undependability
from edgebolt.common.federated import Algorithm, Dirichlet, FederatedStrategy, Visit
from edgebolt.common.text import TextClassificationData, TextClassifier
from edgebolt.flude import Flude
from edgebolt.legend import Legend


class Composed(Algorithm):
    """A preset is a set of parts, and parts of several presets make another algorithm.

    The order matters in two places: FLUDE's ``configure`` comes last, for it puts the order of an interrupted visit,
    with its depth and ratios, in the place of a new one; and so does its cache, which keeps what the others installed.
    """

    def __init__(self):
        self.presets = legend, caesar, flude = Legend(), Caesar(level_batches=False, min_numel=256), Flude()
        super().__init__(
            selector=flude.selector,
            configure=[*legend.configure, *caesar.configure, *flude.configure],
            aggregator=flude.aggregator,
            submodel=legend.submodel,
            down=caesar.down,
            up=caesar.up,
            callbacks=[*legend.callbacks, *caesar.callbacks, *flude.callbacks],
            closing=flude.closing,
        )

    def enrol(self, server):
        """Every device says how fast it is, for LEGEND, and how its labels are distributed, for Caesar."""
        probes, introductions = (preset.enrol(server) for preset in self.presets[:2])
        return [
            Visit(a.client, 0, start=None, probe=a.probe, settings={**a.settings, **b.settings})
            for a, b in zip(probes, introductions, strict=True)
        ]

    def figures(self, server, outcomes):
        """Of all three."""
        return {name: value for p in self.presets for name, value in p.figures(server, outcomes).items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--model", default="minilm", help="or a folder, or a name on the hub")
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    args = parser.parse_args()
    L.seed_everything(0)
    sizes = {"train_samples": 2000, "val_samples": 64, "test_samples": 128}
    data = TextClassificationData("20newsgroups", args.model, max_tokens=args.tokens, batch_size=8, **sizes)
    module = TextClassifier(args.model, num_classes=data.num_classes, learning_rate=1e-2)

    fleet = Fleet.jetson(20, speed=0.0552).undependable(Undependability(rates=(0.2, 0.4, 0.6), online=(0.5, 0.9)))
    strategy = FederatedStrategy(Composed(), Dirichlet(20, alpha=0.5), per_round=5, local_steps=3, fleet=fleet)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=args.rounds, strategy=strategy, **options)
    trainer.fit(module, datamodule=data)

    rows, ledger = strategy.history, strategy.ledger
    visits, delivered, resumed = (
        sum(row[name] for row in rows) for name in ("round/visits", "round/delivered", "flude/resumed")
    )
    dense = visits * sum(p.nbytes for p in module.parameters() if p.requires_grad)
    accuracy = trainer.test(module, data, verbose=False)[0]["test_acc"]
    print(f"accuracy {accuracy:.3f} after {trainer.current_epoch} rounds, {strategy.clock.now:.0f} simulated seconds")
    print(f"FLUDE:  {delivered} of {visits} visits delivered, {resumed} went on where one was interrupted")
    print(f"LEGEND: {rows[-1]['legend/depth']:.1f} of {len(module.ranks)} layers trained in the last round")
    print(f"Caesar: {ledger.down_bytes / dense:.2f} of the dense models sent down, {ledger.up_bytes / dense:.2f} up")


if __name__ == "__main__":
    main()
