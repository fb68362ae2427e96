"""Interrupted visits: what the device keeps of one, and when it goes on with it."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgebolt.common.communication import Message, Tensors
from edgebolt.common.federated import ClientCallback, Device, Outcome, Server, Visit
from edgebolt.common.federated.client import copy_of
from edgebolt.flude.dependability import is_session
from edgebolt.flude.thresholds import AIMD, Threshold

if TYPE_CHECKING:
    import lightning.pytorch as pl

__all__ = ["ResumeSessions", "SessionCache"]

_KEY = "sessions"


class SessionCache(ClientCallback):
    """The device keeps how far its visit has come, so that the work is not lost if it dies, or its upload is.

    Source: FLUDE (arXiv 2412.19991): a rolling cache of the latest training state. One slot, written every few steps:
    weights and buffers, moments, the values of the optimizer's groups, a gradient scaler's state, and the model that
    it started from. Batches and random numbers follow from the round in which it began and its steps, so that a visit
    in two parts ends bit for bit as it would have in one. The slot is emptied when the server has taken the update; a
    device that heard nothing keeps it, at the end of its training, and can send it once more.

    In ``device.memory``: ``"session"`` (weights twice, moments) and ``"session_steps"``.

    Args:
        every: steps between two writes; work since the last one is lost. The beginning and the end are always written.

    Raises:
        ValueError: if ``every`` is below 1.

    Example::

        >>> from edgebolt.common.federated import Algorithm
        >>> algorithm = Algorithm(configure=[ResumeSessions()], callbacks=[SessionCache(every=10)])
    """

    def __init__(self, every: int = 1) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"every={every!r}: use a whole number of steps, 1 or more.")
        self.every = every
        self._device: Device | None = None
        self._visit: Visit

    def install(self, device: Device, visit: Visit, tensors: Tensors) -> Tensors:
        """A new model empties the slot; without one, the difference that will be sent is to the old start."""
        if visit.base is None:
            if is_session(visit) and visit.stage == 0:
                about: dict[str, Any] = {"base": device.round, "samples": device.samples, "groups": device.groups}
                device.memory["session"] = {"start": dict(tensors), **about}
                device.memory["session_steps"] = 0
            return tensors
        session = device.memory.get("session")
        if session is None or (session["base"], session["samples"]) != (visit.base, device.samples):
            kept = "nothing" if session is None else {name: session[name] for name in ("base", "samples")}
            raise RuntimeError(
                f"Device {device.id} is to go on with its visit of round {visit.base} and has kept {kept} (it has "
                f"{device.samples} samples now): put SessionCache among the algorithm's callbacks, and do not deal "
                "the data out anew in mid-run."
            )
        device.memory["session_steps"] = visit.done
        return dict(session["start"])

    def on_client_start(self, trainer: pl.Trainer, module: pl.LightningModule, device: Device, visit: Visit) -> None:
        """Put back what was reached."""
        self._device, self._visit = device, visit
        session = device.memory.get("session")
        if visit.base is None or session is None:
            return
        device.optimizer = session["groups"]
        if "weights" not in session:  # it died before the first write: the weights are those of the start
            return
        named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        with torch.no_grad():
            for name, tensor in session["weights"].items():
                named[name].copy_(tensor)
        state = trainer.optimizers[0].state
        for name, moments in session["moments"].items():
            state[named[name]] = {key: copy_of(value) for key, value in moments.items()}
        if session["precision"]:
            trainer.precision_plugin.load_state_dict(session["precision"])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the slot, if it is time."""
        if self._device is None or not self._device.visiting or self._visit.stage:
            return
        memory = self._device.memory
        if "session" not in memory:
            return
        memory["session_steps"] += 1
        if (
            memory["session_steps"] % self.every == 0
            or memory["session_steps"] == self._visit.done + self._visit.steps
        ):
            self._write(trainer, pl_module, memory)

    @staticmethod
    def _write(trainer: pl.Trainer, module: pl.LightningModule, memory: dict[str, Any]) -> None:
        state = trainer.optimizers[0].state
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        memory["session"] = {
            **memory["session"],
            "weights": {name: t.detach().clone() for name, t in {**trained, **dict(module.named_buffers())}.items()},
            "moments": {
                name: {key: copy_of(value) for key, value in state[p].items()}
                for name, p in trained.items()
                if p in state
            },
            "precision": dict(trainer.precision_plugin.state_dict()),
        }

    def on_client_delivered(self, device: Device, visit: Visit) -> None:
        """Empty the slot."""
        if is_session(visit) and visit.stage == 0:
            device.memory.pop("session", None)
            device.memory.pop("session_steps", None)


class ResumeSessions:
    """A chosen device with a recent enough interrupted visit goes on with it instead of being sent the model.

    A part for ``Algorithm(configure=[..., ResumeSessions()], callbacks=[SessionCache()])``; the last one, for it puts
    the old order, with its settings, in the place of the new one. Source: FLUDE (arXiv 2412.19991), staleness-aware
    distribution: the model goes only to devices whose state is no longer useful, by a threshold ``W``.

    A device that is still at its visit, for which the round did not wait, ends that first: the loop lets the new one
    begin then. How far a device came is what it says when it checks in again; for each visit that goes on the bytes of
    such a message are in the ledger, of kind ``"check-in"``. One visit a device and a round; later stages are left
    alone.

    Args:
        threshold: how ``W`` moves; default :class:`~edgebolt.flude.AIMD`.
        every: that of the device's :class:`SessionCache`.

    Raises:
        ValueError: for arguments that are out of range.
    """

    def __init__(self, threshold: Threshold | None = None, every: int = 1) -> None:
        self.threshold = AIMD() if threshold is None else threshold
        if not isinstance(self.threshold, Threshold):
            raise ValueError(f"threshold={threshold!r}: use Fixed(5), Quantile(), AIMD() or another Threshold.")
        self.every = SessionCache(every).every

    def current(self, server: Server) -> float:
        """``W_t``."""
        threshold: float = server.memory.get(_KEY, {}).get("threshold", float(self.threshold.first))
        return threshold

    def __call__(self, server: Server, visits: list[Visit]) -> list[Visit]:
        """The visits, some of them replaced."""
        kept, current = interrupted(server), self.current(server)
        changed = []
        for visit in visits:
            session = kept.get(visit.client)
            if session is not None and visit.stage == 0 and server.round - session["base"] <= current:
                order = Visit.from_plain(session["order"])
                left, done = order.steps - session["done"], session["done"]
                visit = replace(
                    order, start=None, lane=visit.lane, steps=left, base=session["base"], done=done, probe=0
                )
            changed.append(visit)
        return changed

    def observe(self, server: Server, outcomes: list[Outcome]) -> None:
        """Remember what was interrupted, forget what was delivered, move the threshold."""
        kept = dict(interrupted(server))
        sessions = [o for o in outcomes if is_session(o.visit) and o.visit.stage == 0]
        had = [server.round - kept[o.visit.client]["base"] for o in sessions if o.visit.client in kept]
        for outcome in sessions:
            visit, client = outcome.visit, outcome.visit.client
            if visit.base is not None:
                told = Message({}, {"check-in": {"client": client, "base": visit.base, "done": visit.done}})
                server.ledger.add(
                    round=server.round,
                    client=client,
                    direction="up",
                    nbytes=told.nbytes,
                    time=outcome.started,
                    kind="check-in",
                )
            if outcome.delivered or outcome.reason == "non-finite":
                kept.pop(client, None)
            elif visit.cut is None or visit.cut.down == 1:  # else the device never had the order and keeps what it had
                order = kept[client]["order"] if visit.base is not None else replace(visit, cut=None).to_plain()
                kept[client] = {"order": order, "base": visit.origin(server.round), "done": self._reached(outcome)}
        notes = dict(server.memory.get(_KEY, {}).get("notes", {}))
        losses = [o.report["loss"] for o in sessions if o.delivered and "loss" in o.report]
        loss = fmean(sorted(losses)) if losses else None
        current = self.current(server)
        if sessions:
            current = float(self.threshold.next(current, np.array(had, dtype=np.float64), loss, notes))
        server.memory[_KEY] = {"threshold": current, "notes": notes, "kept": kept}

    def _reached(self, outcome: Outcome) -> int:
        """Steps of the whole visit that the device has in its cache."""
        visit, cut = outcome.visit, outcome.visit.cut
        if cut is None or cut.up is not None:  # its training is done: it came late, or the upload broke
            return visit.done + visit.steps
        return max(visit.done, (visit.done + outcome.steps) // self.every * self.every)


def interrupted(server: Server) -> dict[int, dict[str, Any]]:
    """Client -> the order of its interrupted visit, the round of its ``base``, and the steps that were ``done``."""
    kept: dict[int, dict[str, Any]] = server.memory.get(_KEY, {}).get("kept", {})
    return kept
