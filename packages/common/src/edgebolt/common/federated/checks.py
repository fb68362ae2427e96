"""What a federated run cannot do, said before it starts, with the way out."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

__all__ = ["check_automatic", "check_trainable", "check_trainer", "require_lightning_trainer", "several_optimizers"]


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
    overfit = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit:
        raise ValueError(f"overfit_batches={overfit} cannot be cut by client: use limit_train_batches.")


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
