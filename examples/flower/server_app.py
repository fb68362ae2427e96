"""The server's side: an ordinary Trainer."""

import lightning as L
from task import Net, loader

from edgebolt.common.federated import FedAvg, FederatedStrategy
from edgebolt.flower import server_app


def fit(engine, context):
    held_out = loader(400, seed=1000, shuffle=False)
    strategy = FederatedStrategy(
        FedAvg(),
        clients=engine.clients(held_out, min_clients=context.run_config["clients"], wait=context.run_config["wait"]),
        local_epochs=2,
        engine=engine,
    )
    trainer = L.Trainer(
        max_epochs=context.run_config["rounds"], strategy=strategy, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Net()
    trainer.fit(module, held_out, held_out)
    for row in strategy.history:
        print(f"round {row['round']}: {row['round/delivered']} of {row['round/visits']} delivered", flush=True)
    print(f"accuracy {trainer.callback_metrics['accuracy']:.3f}, {strategy.ledger.total_bytes} bytes", flush=True)


app = server_app(fit, timeout=120)
