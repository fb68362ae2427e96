"""LEGEND in 30 lines: a text classifier learns on 20 simulated Jetsons, or (``--plain``) in an ordinary fit."""

import argparse

import lightning as L

from edgebolt.common.devices import Fleet
from edgebolt.common.federated import Dirichlet, FederatedStrategy
from edgebolt.common.text import TextClassificationData, TextClassifier
from edgebolt.legend import Legend, LoraDepth

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--plain", action="store_true", help="an ordinary fit with the callback LoraDepth")
parser.add_argument("--epochs", type=int, default=3, help="federated: rounds")
parser.add_argument("--tokens", type=int, default=64, help="of a text")
args = parser.parse_args()

L.seed_everything(0)
sizes = {"train_samples": 2000, "val_samples": 64, "test_samples": 128}
data = TextClassificationData("20newsgroups", model="minilm", max_tokens=args.tokens, batch_size=8, **sizes)
module = TextClassifier("minilm", num_classes=data.num_classes, learning_rate=1e-2)

fleet = Fleet.jetson(20, speed=0.0552)
federated = FederatedStrategy(Legend(), Dirichlet(20, alpha=0.5), per_round=5, local_steps=3, fleet=fleet)
strategy, callbacks = ("auto", [LoraDepth(depth=2)]) if args.plain else (federated, [])
limit = 15 if args.plain else 1.0
options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "limit_train_batches": limit}
trainer = L.Trainer(max_epochs=args.epochs, strategy=strategy, callbacks=callbacks, **options)
trainer.fit(module, datamodule=data)

accuracy = trainer.test(module, data, verbose=False)[0]["test_acc"]
print(f"accuracy {accuracy:.3f} after {trainer.current_epoch} epochs; LoRA ranks {module.ranks}")
if not args.plain:
    depths = {outcome.visit.client: outcome.visit.settings["depth"] for outcome in federated.outcomes}
    print(f"{federated.clock.now:.1f} simulated seconds; layers trained by device in the last round: {depths}")
