"""Caesar on a language model: LoRA of MiniLM on 20 Newsgroups, 20 Jetsons, five of them a round.

Budget: 24 rounds x 5 devices x 3 steps of 8x64 tokens = 360 steps a run, 128 test documents after each round; some
0.4 s a step with all that belongs to it, 150 s a run on two threads, three runs. Devices come back after four rounds,
as Caesar needs. Learning rate and speed of the boards are those of the benchmark of LEGEND.
"""

from copy import deepcopy

import legend_run
from mnist_run import quiet_trainer
from torch.utils.data import DataLoader, Subset

from edgebolt.caesar import Caesar
from edgebolt.caesar.baselines import STC
from edgebolt.common.devices import Fleet
from edgebolt.common.federated import Dirichlet, FederatedStrategy, FederatedSummary
from edgebolt.common.lora import FedLoRA

DEVICES, PER_ROUND, STEPS, ROUNDS, DOCUMENTS, SPEED = 20, 5, 3, 24, 128, 0.0552
ALGORITHMS = {"FedLoRA": lambda: FedLoRA(rank=legend_run.RANK), "STC": STC, "Caesar": Caesar}


def train(
    method,
    folder,
    rounds=ROUNDS,
    count=DOCUMENTS,
    seed=0,
    layers=legend_run.LAYERS,
    texts=None,
    devices=DEVICES,
    per_round=PER_ROUND,
):
    """One run: rows of ``rounds.csv``, steps, strategy."""
    data = legend_run.documents(texts)
    strategy = FederatedStrategy(
        ALGORITHMS[method](),
        clients=Dirichlet(devices, alpha=legend_run.ALPHA, seed=seed),
        per_round=per_round,
        local_steps=STEPS,
        fleet=Fleet.jetson(devices, seed=seed, speed=SPEED),
        seed=seed,
    )
    summary = FederatedSummary(folder, figure=False)
    trainer = quiet_trainer(max_epochs=rounds, strategy=strategy, callbacks=[summary])
    tests = DataLoader(Subset(data.split("test"), range(count)), batch_size=data.eval_batch_size)
    trainer.fit(deepcopy(legend_run.fresh(seed, layers)), data.train_dataloader(), tests)
    return summary.rows, trainer.global_step, strategy
