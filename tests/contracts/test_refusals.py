"""What cannot be federated is refused before it starts, and the message says what to do instead."""

import lightning as L
import pytest
import torch
from runs import CLIENTS, TRAIN, Net, fit, make_strategy, make_trainer, train_loader, val_loader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler

from edgebolt.common.devices import Fleet
from edgebolt.common.federated import (
    IID,
    Algorithm,
    ClientCallback,
    Dirichlet,
    FedAvg,
    FedAvgStrategy,
    FederatedStrategy,
    FedProx,
    Proximal,
    Sizes,
    Visit,
    WeightedMean,
)


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ({"accumulate_grad_batches": 2}, "use 1 and a larger batch_size"),
        ({"val_check_interval": 0.5}, "leave it at 1.0"),
        ({"val_check_interval": 5, "check_val_every_n_epoch": None}, "leave it at 1.0"),
        ({"devices": 2}, "use devices=1"),
        ({"overfit_batches": 2}, "use limit_train_batches"),
        ({"overfit_batches": 0.5}, "use limit_train_batches"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_trainer_arguments(argument, remedy):
    with pytest.raises(ValueError, match=remedy):
        fit(**argument)


class SeveralOptimizers(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.body.parameters(), 0.1), torch.optim.SGD(self.head.parameters(), 0.1)


class Manual(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class ManualWithSeveral(SeveralOptimizers, Manual):
    pass


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        (SeveralOptimizers, "use parameter groups of one optimizer"),
        (Manual, "return the loss from training_step"),
        (ManualWithSeveral, "return the loss from training_step"),
        (Frozen, "unfreeze some"),
    ],
)
def test_modules(module, remedy):
    with pytest.raises(ValueError, match=remedy):
        fit(module=module())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TRAIN)


class Unsized:
    def __getitem__(self, index):
        return TRAIN[index]


class Batches:
    """Any iterable of batches."""

    def __iter__(self):
        return iter(DataLoader(TRAIN, 4))


UNSIZED = "give every client its own"
ONE = "(?i)one (training )?(data)?loader"
CUT = "use batch_size=|use shuffle=True"


@pytest.mark.parametrize(
    ("loader", "error", "remedy"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), TypeError, UNSIZED),
        (lambda: DataLoader(Unsized(), batch_size=4, sampler=range(8)), TypeError, UNSIZED),
        (Batches, TypeError, "DataLoader"),
        (lambda: DataLoader(TRAIN, batch_sampler=BatchSampler(range(56), 4, True)), ValueError, CUT),
        (lambda: DataLoader(TRAIN, batch_sampler=[[0, 1], [2, 3, 4]]), ValueError, CUT),
        (lambda: DataLoader(TRAIN, batch_size=None), ValueError, CUT),
        (lambda: DataLoader(TRAIN, 4, sampler=WeightedRandomSampler(torch.ones(56), 56)), ValueError, CUT),
        (lambda: DataLoader(TRAIN, 4, sampler=torch.utils.data.SubsetRandomSampler(range(9))), ValueError, CUT),
        (lambda: {"a": train_loader(), "b": train_loader()}, (TypeError, ValueError), ONE),
        (lambda: [train_loader(), train_loader()], (TypeError, ValueError), ONE),
    ],
    ids=["iterable", "unsized", "no DataLoader", "batch_sampler", "list of batches", "no batches", "sampler",
         "subset sampler", "dict of loaders", "list of loaders"],
)  # fmt: skip
def test_loaders(loader, error, remedy):
    with pytest.raises(error, match=remedy):
        fit(train=loader())


class Partial(SequentialSampler):
    """A subclass of a sampler that is understood, which draws something else."""

    def __iter__(self):
        return iter(range(8))

    def __len__(self):
        return 8


def test_a_subclass_of_a_known_sampler_is_a_custom_sampler():
    with pytest.raises(ValueError, match=CUT):
        fit(train=DataLoader(TRAIN, 4, sampler=Partial(TRAIN)))


def test_a_random_sampler_that_draws_with_replacement_is_not_silently_replaced():
    sampler = torch.utils.data.RandomSampler(TRAIN, replacement=True, num_samples=20)
    with pytest.raises(ValueError, match=CUT):
        fit(train=DataLoader(TRAIN, 4, sampler=sampler))


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"clients": Sizes([0, 28, 28], min_samples=0), "per_round": 2}, "min_samples=1 or more"),
        ({"clients": [TRAIN, torch.utils.data.Subset(TRAIN, [])], "per_round": 1}, "min_samples=1 or more"),
        ({"per_round": CLIENTS + 1}, "more than the 6 clients"),
        ({"fleet": Fleet.uniform(CLIENTS + 1)}, "one device each"),
        ({"clients": lambda client: TRAIN}, r"fleet=Fleet\.uniform"),
        ({"clients": Dirichlet(90, alpha=0.5)}, "at most 56 clients"),
        ({"clients": 7}, r"(?i)partition|IID\(7\)"),
        ({"clients": []}, "(?i)client"),
        ({"clients": [TRAIN, 3], "per_round": 1}, "(?i)dataset"),
    ],
    ids=[
        "empty client",
        "empty dataset",
        "cohort",
        "fleet",
        "callable",
        "too many",
        "a number",
        "nobody",
        "no dataset",
    ],
)
def test_populations(arguments, remedy):
    with pytest.raises((ValueError, TypeError), match=remedy):
        fit(make_strategy(**arguments))


def test_a_client_smaller_than_a_batch_that_is_dropped():
    with pytest.raises(ValueError, match="fewer samples than a batch"):
        fit(make_strategy(clients=Sizes([3, 53]), per_round=2, local_steps=2), train=train_loader(drop_last=True))


@pytest.mark.parametrize("name", ["per_round", "local_epochs", "local_steps"])
@pytest.mark.parametrize("value", [0, -1, 0.5, "3", True])
def test_counts(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*1 or more"):
        FederatedStrategy(FedAvg(), **{name: value})


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: FederatedStrategy(FedAvg), r"FedAvg\(\)"),
        (lambda: FederatedStrategy("fedavg"), r"FedAvg\(\)"),
        (lambda: FederatedStrategy(FedAvg(), local_epochs=1, local_steps=3), "give one of them"),
        (lambda: FedAvg(weights="equal"), "'samples' or 'uniform'"),
        (lambda: FedAvg(moments="drop"), "'reset' or 'keep'"),
        (lambda: FedAvgStrategy(weights="equal"), "'samples' or 'uniform'"),
        (lambda: WeightedMean("equal"), "'samples' or 'uniform'"),
        (lambda: FedProx(mu=-1), "use 0"),
        (lambda: Proximal(mu=float("nan")), "use 0"),
        (lambda: Visit(-1, 1), "0 or more"),
        (lambda: Visit(0, -1), "0 or more"),
        (lambda: Visit(0, 1, batch_size=0), "1 or more"),
        (lambda: IID(0), "at least 1"),
    ],
)
def test_constructors(make, remedy):
    with pytest.raises((ValueError, TypeError), match=remedy):
        make()


def planning(*visits):
    class Plans(Algorithm):
        def plan(self, server):
            return list(visits)

    return Plans()


@pytest.mark.parametrize(
    ("algorithm", "remedy"),
    [
        (planning(Visit(CLIENTS, 1)), "the population has 6 clients"),
        (planning(Visit(0, 1, start="group/1")), r"the server has \['global'\]"),
    ],
    ids=["no such client", "no such model"],
)
def test_plans(algorithm, remedy):
    with pytest.raises((ValueError, KeyError), match=remedy):
        fit(make_strategy(algorithm))


def test_an_enrolment_that_trains():
    class Trains(Algorithm):
        def enrol(self, server):
            return [Visit(0, 3)]

    with pytest.raises(ValueError, match="time a step with probe=1"):
        fit(make_strategy(Trains()))


def test_the_server_exists_once_fit_has_begun():
    with pytest.raises(RuntimeError, match=r"once Trainer\.fit has begun"):
        make_strategy().server  # noqa: B018


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_that_was_not_asked_for(split):
    class Asks(ClientCallback):
        def on_client_end(self, trainer, module, device, visit):
            device.data(split)

    with pytest.raises(ValueError, match=r"Dirichlet\(100, alpha=0.5, val=0.2, test=0.1\)"):
        fit(make_strategy(Algorithm(callbacks=[Asks()])))


def test_a_checkpoint_of_a_plain_run(tmp_path):
    plain = make_trainer("auto", rounds=1)
    plain.fit(Net(), train_loader(), val_loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match=r"load_from_checkpoint\(path\) and start fit\(\) without ckpt_path"):
        fit(ckpt_path=tmp_path / "plain.ckpt")
    module = Net.load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True)  # the remedy works
    assert len(fit(module=module, rounds=1).strategy.history) == 1


def test_a_checkpoint_of_another_population(tmp_path):
    run = fit(make_strategy(clients=IID(5)), rounds=1)
    run.trainer.save_checkpoint(tmp_path / "five.ckpt")
    with pytest.raises(ValueError, match=r"(?i)clients"):
        fit(rounds=3, ckpt_path=tmp_path / "five.ckpt")


def test_a_foreign_trainer():
    foreign = pytest.importorskip("pytorch_lightning")
    with pytest.raises(ValueError, match="import lightning as L"):
        foreign.Trainer(strategy=make_strategy(), accelerator="cpu", logger=False)


def test_a_foreign_trainer_and_a_callback_of_ours():
    foreign = pytest.importorskip("pytorch_lightning")
    with pytest.raises(TypeError, match="import lightning as L"):
        Proximal().setup(foreign.Trainer(accelerator="cpu", logger=False), Net(), "fit")


def test_a_second_fit_of_the_same_trainer(tmp_path):
    run = fit(rounds=3)
    run.trainer.save_checkpoint(tmp_path / "three.ckpt")
    with pytest.raises(ValueError, match="make a new Trainer, or pass ckpt_path"):
        run.trainer.fit(run.module, train_loader(), val_loader())
    run.trainer.fit_loop.max_epochs = 4  # the remedy works
    run.trainer.fit(run.module, train_loader(), val_loader(), ckpt_path=tmp_path / "three.ckpt")
    assert [figures["round"] for figures in run.strategy.history] == [0, 1, 2, 3]


def test_parameters_unfrozen_later():
    class Unfreeze(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            module.head.weight.requires_grad_(True)

    module = Net()
    module.head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="let all that is ever trained require gradients at the beginning"):
        fit(module=module, callbacks=[Unfreeze()])


def test_accumulation_that_a_callback_turns_on():
    with pytest.raises(ValueError, match="larger batch_size"):
        fit(callbacks=[L.pytorch.callbacks.GradientAccumulationScheduler({1: 4})])


def test_weight_averaging():
    with pytest.raises(ValueError, match="in an aggregator instead"):
        fit(callbacks=[L.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01)])


def test_two_visits_of_a_client_in_one_stage():
    class Twice(Algorithm):
        def plan(self, server):
            return [Visit(1, 2), Visit(1, 3)]

    with pytest.raises(ValueError, match="visited twice in stage 0"):
        fit(make_strategy(Twice()))
