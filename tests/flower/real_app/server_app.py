from pathlib import Path

import lightning as L
import torch
from small_run import SAMPLES, fit, remembering, server_loader

from edgebolt.flower import server_app


class Rounds(L.Callback):
    """Leaves a file after each round, so that the test knows when to pull a plug; says who delivered."""

    def __init__(self, folder):
        self.folder, self.failed = Path(folder), []

    def on_train_epoch_end(self, trainer, module):
        strategy = trainer.strategy
        round = trainer.current_epoch
        self.failed += [(round, o.visit.client) for o in strategy.outcomes if not o.delivered]
        (self.folder / f"round-{round}").touch()


def run(engine, context):
    folder = Path(context.run_config["folder"])
    torch.set_num_threads(1)
    rounds = Rounds(folder)
    clients = engine.clients(server_loader(), min_clients=len(SAMPLES), wait=180)
    strategy, module = fit(clients, engine, algorithm=remembering(), callbacks=[rounds])
    came_to = {"weights": module.state_dict(), "failed": rounds.failed, "history": strategy.history}
    torch.save(came_to, folder / "partial.pt")
    (folder / "partial.pt").rename(folder / "result.pt")


app = server_app(run, timeout=75)
