"""What a federated run cannot do, said before it starts, with the way out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from edgebolt.common.federated.partition import Partition

__all__ = [
    "check_automatic",
    "check_batches",
    "check_beginning",
    "check_clients",
    "check_dataset",
    "check_engine",
    "check_same_loader",
    "check_trainable",
    "check_trainer",
    "ignore_warnings",
    "require_lightning_trainer",
    "several_optimizers",
]


def require_lightning_trainer(trainer: Any, who: str) -> None:
    """Refuse a Trainer of another namespace: its classes are not ours, so callbacks and hooks would not match.

    Raises:
        TypeError: for anything but a ``lightning.pytorch.Trainer``.
    """
    if not isinstance(trainer, pl.Trainer):
        raise TypeError(
            f"{who} needs a lightning Trainer, not {type(trainer).__module__}.{type(trainer).__qualname__}: "
            "write `import lightning as L` and `L.Trainer(...)`."
        )


def check_trainer(trainer: pl.Trainer, devices: int) -> None:
    """Refuse Trainer arguments that cut across clients.

    Raises:
        ValueError: with the remedy.
    """
    if devices > 1 or trainer.num_nodes > 1:
        raise ValueError(
            f"devices={devices}, num_nodes={trainer.num_nodes}: visits run one after the other in one "
            "process; use devices=1."
        )
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} would mix the gradients of several clients: "
            "use 1 and a larger batch_size in the loader."
        )
    if trainer.check_val_every_n_epoch is None or trainer.val_check_interval != 1.0:
        raise ValueError(
            f"val_check_interval={trainer.val_check_interval} would validate one client's weights in mid-round: "
            "leave it at 1.0; validation runs once a round (check_val_every_n_epoch=k: every k rounds)."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise ValueError(
                f"{type(callback).__name__} would average the weights of different clients step by step: average "
                "global models in an aggregator instead."
            )
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit:
        raise ValueError(f"overfit_batches={overfit} cannot be cut by client: use limit_train_batches.")


def check_beginning(trainer: pl.Trainer) -> None:
    """Refuse a second ``fit`` of a Trainer that does not say where to go on.

    Raises:
        ValueError: with the remedy.
    """
    if trainer.global_step and trainer.ckpt_path is None:
        raise ValueError(
            f"This Trainer has trained {trainer.global_step} steps already; its counters go on while the federated "
            "state would begin afresh: make a new Trainer, or pass ckpt_path to go on."
        )


def ignore_warnings(workers: bool) -> None:
    """Silence what Lightning and torch say of rounds that is of no use, or untrue where workers train."""
    # Said anew for each round's length; what is logged of a round does not depend on steps.
    warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", "`training_step` returned `None`")  # the idle batch
    if workers:  # it is they who step optimizers
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")


def check_engine(trainer: pl.Trainer) -> None:
    """Refuse what engines with workers cannot do: schedules of single steps.

    Raises:
        ValueError: with the remedy.
    """
    if any(config.interval == "step" for config in trainer.strategy.lr_scheduler_configs):
        raise ValueError(
            "The learning rate's schedule has interval='step': it counts the steps of all clients, one client after "
            "the other, and with this engine they train side by side. Use interval='epoch', which is a round, or "
            "engine='serial'."
        )


def check_same_loader(first: Any, loader: Any) -> None:
    """Refuse a training loader that changes by round where workers keep the first one.

    Raises:
        ValueError: with the remedy.
    """
    before, now = (
        {name: getattr(each, name, None) for name in ("batch_size", "drop_last")}
        | {"sampler": type(getattr(each, "sampler", None)).__name__}
        for each in (first, loader)
    )
    if before != now:
        raise ValueError(
            f"The training loader has changed, from {before} to {now}, and workers keep the first: make it in the "
            "train_dataloader() of a LightningDataModule, which workers ask every round, or use engine='serial'."
        )


def check_automatic(module: pl.LightningModule) -> None:
    """Refuse manual optimization: a local step is one step of one optimizer.

    Raises:
        ValueError: with the remedy.
    """
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__}.automatic_optimization is False: local steps are counted by Lightning's "
            "automatic optimization; return the loss from training_step instead of stepping by hand."
        )


def several_optimizers(module: pl.LightningModule) -> str:
    """What to say where there is not exactly one optimizer."""
    return (
        f"{type(module).__name__}.configure_optimizers() does not give exactly one optimizer, and a client "
        "trains with one: use parameter groups of one optimizer."
    )


def check_trainable(module: pl.LightningModule) -> None:
    """Refuse a module in which nothing is trained.

    Raises:
        ValueError: with the remedy.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} has no parameter with requires_grad=True, so there is nothing to federate: "
            "unfreeze some, or create them before fit (in __init__, setup or configure_model)."
        )


def check_clients(clients: Any) -> None:
    """Refuse what says nothing about clients.

    Raises:
        TypeError, ValueError: with the way out.
    """
    if isinstance(clients, Partition) or callable(clients):
        return
    if not isinstance(clients, Sequence) or isinstance(clients, str):
        raise TypeError(
            f"clients={clients!r}: pass a partition such as IID(100), a list of datasets, or a callable "
            "client -> dataset."
        )
    if not clients:
        raise ValueError("clients is empty: there must be at least one client.")


def check_dataset(loader: Any) -> None:
    """Refuse a loader whose samples cannot be dealt out to clients.

    Raises:
        TypeError: with the remedy.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"The training loader is a {type(loader).__name__}: clients are cut from a DataLoader.")
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise TypeError(
            "The training dataset has no length and cannot be cut by client: use a map-style dataset, "
            "or give every client its own with clients=[dataset, dataset, ...]."
        )


def check_batches(loader: Any, of_clients: bool = False) -> None:
    """Refuse a loader that makes its batches in a way that cannot be repeated for one client with one seed.

    Args:
        loader: the training loader, or a client's own.
        of_clients: its batch size and collate function alone are used, on the clients' own datasets.

    Raises:
        TypeError, ValueError: with the remedy.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"The training loader is a {type(loader).__name__}: clients are cut from a DataLoader.")
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        raise ValueError(
            "The training loader has a custom batch_sampler (or none), which cannot be cut by client and repeated "
            "from a seed: use batch_size=... and shuffle=True or False."
        )
    sampler = loader.sampler
    whole = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if not whole and not of_clients:
        raise ValueError(
            f"The training loader's sampler, a {type(sampler).__name__}, does not visit every sample once an epoch: "
            "use shuffle=True or shuffle=False, and leave out or repeat samples in the dataset."
        )
    if loader.num_workers:
        warnings.warn(
            f"num_workers={loader.num_workers}: workers start anew at every visit; 0 is faster with cheap samples.",
            stacklevel=2,
        )
