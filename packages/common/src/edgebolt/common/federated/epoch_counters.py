"""Lightning's progress counters in a checkpoint, made to agree with the round's.

They are a file format rather than an interface; the tests resume from every step and so would notice a change.
"""

from __future__ import annotations

from typing import Any

__all__ = ["align_counters"]


def align_counters(fit_loop: dict[str, Any], running: bool, by_steps: bool) -> bool:
    """Make Lightning's epoch end where the round ends.

    * The round has been planned and the epoch is about to start: the last round's batches are not counted as its own.
    * The round runs and the epoch is over (``max_steps``, ``max_time`` or an exception ended it): open it again.
    * The round is over and its epoch is over, or was left between the round's last step and the end of its
      validation: the next epoch starts from its beginning. Otherwise Lightning would compare this round's length with
      the next one's, or, under ``max_steps``, go on in an epoch that has ended.
    * The round is over and validated, and its epoch has still to be closed: as it is.

    Args:
        fit_loop: the checkpoint's ``loops["fit_loop"]``, changed in place.
        running: whether the round was running.
        by_steps: whether the Trainer has ``max_steps``; then Lightning counts each checkpoint as one in mid-epoch.

    Returns:
        Whether a finished round's epoch has still to be closed.
    """
    epoch, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    unfinished = epoch["current"]["processed"] < epoch["current"]["ready"]
    stepped = batches["current"]["completed"] == batches["current"]["ready"]
    validated = fit_loop["epoch_loop.val_loop.batch_progress"]["is_last_batch"]
    if running and epoch["current"]["started"] < epoch["current"]["ready"]:  # written in on_train_epoch_start
        _begin_epoch(batches)
        return False
    if running:
        if not unfinished:
            for tracker in (epoch["current"], epoch["total"]):
                tracker["processed"] = tracker["completed"] = tracker["ready"] - 1
        return False
    if unfinished and stepped and validated:
        return True
    for tracker in (epoch["current"], epoch["total"]):
        tracker.update(dict.fromkeys(tracker, tracker["ready"]))
    _begin_epoch(batches)
    # Lightning adds one for a step whose end it has not seen, and, under max_steps, at every restart.
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] += (not stepped) - by_steps
    for tracker in ("current", "total"):
        validation = fit_loop["epoch_loop.val_loop.batch_progress"][tracker]
        validation.update(dict.fromkeys(validation, validation["ready"]))
    return False


def _begin_epoch(batches: dict[str, Any]) -> None:
    """No batch of the epoch has been drawn, and none of an earlier one is in doubt."""
    batches["total"].update(dict.fromkeys(batches["total"], batches["total"]["ready"]))
    batches["current"] = dict.fromkeys(batches["current"], 0)
    batches["is_last_batch"] = False
