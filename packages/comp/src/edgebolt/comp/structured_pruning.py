"""Pruning as a callback: the Trainer's own batches calibrate it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgebolt.common.anatomy import Anatomy
from edgebolt.common.quiet import quiet
from edgebolt.comp.calls import capture
from edgebolt.comp.comp import Comp
from edgebolt.comp.in_memory import cut
from edgebolt.comp.report import Report
from edgebolt.comp.sweep import Slimmed

__all__ = ["StructuredPruning"]

Mode = Literal["max_size_cycle", "sequential"]


class StructuredPruning(pl.Callback):
    """Prunes the transformer that a module holds, once, before the first batch of a fit, test, validation, prediction.

    The first batches of that stage's loaders run through the module's own step up to the transformer's last layer: so
    it does not matter what a batch looks like, and labels are not looked at. Parameters stay the objects that they
    were, with new sizes: the optimizer goes on with them. A checkpoint of the Trainer holds the pruned weights and
    what is left of each layer, so that with this callback a run is resumed from it or tested on it; without it the
    sizes do not fit. ``save_pretrained`` of the transformer writes a model that loads by itself after
    ``import edgebolt.comp``.

    Args:
        ratio: share of the layers' parameters that goes.
        calibration_batches: how many of the loader's first batches calibrate.
        comp: all other options; its ``ratio`` is replaced by ``ratio``.
        progress: show a bar.

    Attributes:
        report: what was removed, once it was.

    Raises:
        ValueError: for arguments that are out of range; in ``setup``, if the module holds no transformer, or several.
        NotImplementedError: on several devices.

    Example::

        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[StructuredPruning(ratio=0.2, calibration_batches=8)], accelerator="cpu",
        ...                     logger=False)
    """

    def __init__(
        self, ratio: float = 0.2, calibration_batches: int = 8, comp: Comp | None = None, progress: bool = True
    ) -> None:
        if type(calibration_batches) is not int or calibration_batches < 1:
            raise ValueError(f"calibration_batches={calibration_batches!r}: use a whole number, 1 or more.")
        self.comp = Comp(**{**vars(Comp() if comp is None else comp), "ratio": ratio})
        self.calibration_batches, self.progress = calibration_batches, progress
        self.report: Report | None = None
        self._cut: nn.Module | None = None  # the transformer that was pruned, here or by a checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the module, and give it the sizes of the checkpoint that is going to be loaded."""
        model = transformer_of(pl_module)
        if trainer.world_size > 1:
            raise NotImplementedError(
                f"StructuredPruning runs on one device, and this Trainer has {trainer.world_size}: prune before with "
                "Comp(...).prune(model, texts), or in a Trainer of one device, and go on with what it saves."
            )
        if self._cut is not model:
            self._await_checkpoint(pl_module, model)

    def _await_checkpoint(self, module: pl.LightningModule, model: Any) -> None:
        """Have the model cut before a checkpoint's weights are loaded, when modules hear of it; callbacks do later."""
        own = module.on_load_checkpoint

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is not None and state["report"] is not None:
                report = Report.from_plain(state["report"])
                left = {entry["layer"]: Slimmed(entry["neurons"], entry["groups"]) for entry in report.layers}
                cut(model, left, report.options["uniform"])
                self.report, self._cut = report, model
            own(checkpoint)

        vars(module)["on_load_checkpoint"] = on_load_checkpoint

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was, but for what was pruned."""
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune on training batches, and let the optimizers go of what is no more."""
        if self._prune(pl_module, pl_module.training_step, trainer.train_dataloader, "max_size_cycle"):
            alive = {id(parameter) for parameter in pl_module.parameters()}
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) in alive]
                for parameter in [p for p in optimizer.state if isinstance(p, Tensor)]:
                    moments = optimizer.state[parameter].values()
                    fits = all(m.dim() == 0 or m.shape == parameter.shape for m in moments if isinstance(m, Tensor))
                    if id(parameter) not in alive or not fits:
                        del optimizer.state[parameter]

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune on validation batches, where nothing is trained."""
        if not trainer.training and not trainer.sanity_checking:
            self._prune(pl_module, pl_module.validation_step, trainer.val_dataloaders)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune on test batches."""
        self._prune(pl_module, pl_module.test_step, trainer.test_dataloaders)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prune on what is to be predicted."""
        self._prune(pl_module, pl_module.predict_step, trainer.predict_dataloaders)

    def state_dict(self) -> dict[str, Any]:
        """What is left of each layer."""
        return {"report": None if self.report is None else self.report.to_plain()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""
        if state_dict["report"] is not None:
            self.report = Report.from_plain(state_dict["report"])

    def _prune(
        self, module: pl.LightningModule, step: Callable[..., object], loaders: Any, mode: Mode = "sequential"
    ) -> bool:
        model = transformer_of(module)
        if self._cut is model:
            return False
        digest = hashlib.sha256()
        runs: list[Callable[[], object]] = []
        with quiet(module), _anew(loaders, mode) as batches:
            module.eval()
            for batch, number, source in islice(batches, self.calibration_batches):
                _feed(digest, batch)
                given = {"batch_idx": number, "dataloader_idx": source}
                takes = inspect.signature(step).parameters
                arguments = {name: value for name, value in given.items() if name in takes}
                runs.append(partial(step, move_data_to_device(batch, module.device), **arguments))
            with module.trainer.precision_plugin.forward_context():
                calibration = capture(model, runs)
        # Weights that are made in inference mode, in which tests run, could not be trained afterwards.
        with torch.inference_mode(False):
            calibration.hidden = [hidden.clone() for hidden in calibration.hidden]
            self.report = self.comp.prune_captured(model, calibration, digest.hexdigest(), self.progress)
        self._cut = model
        rank_zero_info(self.report.summary())
        return True


def transformer_of(module: nn.Module) -> Any:
    """The one transformers model that a module holds.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found: list[PreTrainedModel] = []
    for part in module.modules():
        inside = any(part in set(model.modules()) for model in found)
        if isinstance(part, PreTrainedModel) and not inside:
            found.append(part)
    if len(found) != 1:
        raise ValueError(
            f"{type(module).__name__} holds {len(found)} transformers models {[type(m).__name__ for m in found]}, and "
            "StructuredPruning prunes one: make it an attribute of the module, or call Comp(...).prune(model, texts)."
        )
    if any("lora" in name for name, _ in found[0].named_modules()):
        raise ValueError("The transformer has LoRA in its layers: prune it first, then put the adapter on.")
    Anatomy(found[0])
    return found[0]


@contextmanager
def _anew(loaders: Any, mode: Mode) -> Iterator[CombinedLoader]:
    """The batches of one or more loaders, put together as the Trainer does, while its own iteration is under way."""
    again = CombinedLoader(loaders, mode)
    # Loaders with persistent workers have one iterator, that of the other iteration.
    held = [(loader, loader._iterator) for loader in again.flattened if hasattr(loader, "_iterator")]
    for loader, _ in held:
        loader._iterator = None
    try:
        yield again
    finally:
        again.reset()
        for loader, iterator in held:
            loader._iterator = iterator


def _feed(digest: Any, batch: Any) -> None:
    """The tensors of a nested batch."""
    if isinstance(batch, Tensor):
        digest.update(f"{batch.dtype} {tuple(batch.shape)}".encode())
        digest.update(batch.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if batch.numel() else b"")
    elif isinstance(batch, Mapping):
        for key in sorted(batch, key=str):
            _feed(digest, batch[key])
    elif isinstance(batch, list | tuple):
        for item in batch:
            _feed(digest, item)
