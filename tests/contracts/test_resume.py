"""A run that is resumed, from wherever, ends as if it had never stopped."""

import pytest
from algorithms import ALGORITHMS
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import assert_same, fit


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)


def by_step(folder):
    return sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_from_every_step(name, tmp_path):
    row = ALGORITHMS[name]
    whole = fit(*row.make(), rounds=row.rounds, callbacks=[every_step(tmp_path)])
    checkpoints = by_step(tmp_path)
    assert len(checkpoints) == whole.trainer.global_step > 5
    assert whole.trainer.current_epoch == row.rounds
    for checkpoint in checkpoints:
        assert_same(fit(*row.make(), rounds=row.rounds, ckpt_path=checkpoint), whole, checkpoint.stem)
