import lightning as L
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.devices import Fleet
from edgebolt.common.federated import Dirichlet, FedAvg, FedAvgStrategy, FederatedStrategy, FedProx, read_rounds

pytest.importorskip("jsonargparse")
from lightning.pytorch.cli import LightningCLI

TRAINER = """
seed_everything: 1
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  strategy:
"""
FEDERATED = """
    class_path: edgebolt.common.federated.FederatedStrategy
    init_args:
      algorithm:
        class_path: edgebolt.common.federated.FedProx
        init_args: {mu: 0.5, moments: keep}
      clients:
        class_path: edgebolt.common.federated.Dirichlet
        init_args: {clients: 6, alpha: 0.5, seed: 3, min_samples: 2}
      per_round: 2
      local_epochs: 2
      fleet:
        class_path: edgebolt.common.devices.Fleet.jetson
        init_args: {n: 6, seed: 4, failure_rate: 0.1}
      cost:
        class_path: edgebolt.common.devices.CostModel
        init_args: {flops_per_sample: 1.0e+9}
      seed: 5
"""
FEDAVG = """
    class_path: edgebolt.common.federated.FedAvgStrategy
    init_args:
      weights: uniform
      moments: keep
      clients:
        class_path: edgebolt.common.federated.Shards
        init_args: {clients: 5}
      local_steps: 3
      fleet:
        class_path: edgebolt.common.devices.Fleet.uniform
        init_args: {n: 5}
"""


class Net(L.LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        self.dataset, self.batch_size = TensorDataset(x, x[:, :3].argmax(1)), batch_size

    def train_dataloader(self):
        return DataLoader(self.dataset, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.dataset, batch_size=60)


def fit(folder, text, *options, **kwargs):
    path = folder / "run.yaml"
    path.write_text(text.replace("{folder}", str(folder)), encoding="utf-8")
    arguments = ["fit", "--config", str(path), *options]
    return LightningCLI(Net, Data, args=arguments, **{"save_config_callback": None, **kwargs})


def test_yaml_is_the_same_run_as_python(tmp_path):
    cli = fit(tmp_path, TRAINER + FEDERATED, "--trainer.strategy.init_args.per_round=3")
    strategy = cli.trainer.strategy
    assert type(strategy) is FederatedStrategy and type(strategy.algorithm) is FedProx

    L.seed_everything(1)
    same = FederatedStrategy(
        FedProx(mu=0.5, moments="keep"),
        clients=Dirichlet(6, alpha=0.5, seed=3, min_samples=2),
        per_round=3,
        local_epochs=2,
        fleet=Fleet.jetson(6, seed=4, failure_rate=0.1),
        cost=strategy.cost,
        seed=5,
    )
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module = Net()
    L.Trainer(max_epochs=2, strategy=same, accelerator="cpu", **options).fit(module, Data())
    assert strategy.history == same.history and len(same.history) == 2
    assert strategy.ledger == same.ledger
    assert all(torch.equal(a, b) for a, b in zip(cli.model.parameters(), module.parameters(), strict=True))


def test_a_preset_takes_its_own_arguments_and_all_others(tmp_path):
    strategy = fit(tmp_path, TRAINER + FEDAVG).trainer.strategy
    assert type(strategy) is FedAvgStrategy and type(strategy.algorithm) is FedAvg
    assert strategy.algorithm.callbacks, "moments: keep is a callback"
    assert (len(strategy.clients), len(strategy.fleet), strategy.local_steps) == (5, 5, 3)
    assert [row["round/visits"] for row in strategy.history] == [5, 5]


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_a_registered_name_will_do(tmp_path, name):
    strategy = fit(tmp_path, TRAINER.replace("strategy:", f"strategy: {name}")).trainer.strategy
    assert strategy.strategy_name == name and len(strategy.history) == 2


def test_a_fleet_may_come_from_a_table(tmp_path):
    (tmp_path / "fleet.csv").write_text(
        "name,flops,memory_bytes,power_w,radio_w,up_bps,down_bps,count\n"
        "fast,1e12,8000000000,10,1,1e7,1e7,2\nslow,1e10,8000000000,5,1,1e6,1e6,3\n"
    )
    table = (
        f"class_path: edgebolt.common.devices.Fleet.from_csv\n        init_args: {{path: {tmp_path / 'fleet.csv'}}}\n"
    )
    strategy = fit(
        tmp_path, TRAINER + FEDAVG[: FEDAVG.index("class_path: edgebolt.common.devices")] + table
    ).trainer.strategy
    assert [strategy.fleet.profile(client, 0).name for client in range(5)] == ["fast"] * 2 + ["slow"] * 3
    assert len(strategy.history) == 2


def test_the_saved_config_runs_again(tmp_path):
    from lightning.pytorch.cli import SaveConfigCallback

    first = fit(tmp_path, TRAINER + FEDERATED, save_config_callback=SaveConfigCallback)
    saved = tmp_path / "config.yaml"
    assert "edgebolt.common.devices.Fleet.jetson" in saved.read_text()
    again = LightningCLI(Net, Data, args=["fit", "--config", str(saved)], save_config_callback=None)
    assert again.trainer.strategy.history == first.trainer.strategy.history


def test_the_summary_is_a_callback_of_the_yaml(tmp_path):
    callback = "--trainer.callbacks+=edgebolt.common.federated.FederatedSummary"
    where = [f"--trainer.callbacks.folder={tmp_path / 'run'}", "--trainer.callbacks.figure=false"]
    cli = fit(tmp_path, TRAINER + FEDERATED, callback, *where)
    assert len(read_rounds(tmp_path / "run")) == 2 == len(cli.trainer.strategy.history)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FederatedStrategy", [r"algorithm ALGORITHM", "FedProx"]),
        ("FedAvgStrategy", ["weights {samples,uniform}", "moments {reset,keep}"]),
        ("FedProxStrategy", ["mu MU", "(type: float, default: 0.01)"]),
    ],
)
def test_help_lists_typed_arguments(capsys, monkeypatch, name, expected):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as leaving:
        LightningCLI(Net, Data, args=["fit", "--trainer.strategy.help", f"edgebolt.common.federated.{name}"])
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    always = [
        "per_round PER_ROUND",
        "(type: int | null, default: null)",
        "fleet FLEET",
        "type: Fleet | null",
        "Dirichlet",
    ]
    assert not [words for words in [*always, *expected] if words not in text]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trainer.strategy.init_args.per_round=many", "per_round"),
        ("--trainer.strategy.init_args.algorithm=edgebolt.common.devices.CostModel", "algorithm"),
        ("--trainer.strategy.init_args.fleet.init_args.boards=3", "boards"),
        ("--trainer.strategy.init_args.clients.init_args.alpha=-1", "alpha must be positive"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, capsys, option, message):
    with pytest.raises((SystemExit, ValueError)) as refused:
        fit(tmp_path, TRAINER + FEDERATED, option)
    assert message in capsys.readouterr().err + str(refused.value)
