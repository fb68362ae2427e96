"""Large device memories lie beside the checkpoint, named by content, and nothing is lost or left over."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from edgebolt.common.federated import IID, FedAvg, FederatedStrategy
from edgebolt.common.federated.device_files import DeviceFiles, remove_unlisted

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")


def memories():
    shared = torch.arange(6.0)
    return {
        0: {"moments": {"w": {"step": torch.tensor(3.0), "buffer": shared}}, "seen": (1, [shared[:2], "text"])},
        4: {"rounds": 2},
    }


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and all(map(equal, a, b))
    return a == b


def test_round_trip_and_weights_only(tmp_path):
    plain = DeviceFiles(inline_bytes=0).put(memories(), [0, 4], tmp_path / "a.ckpt")
    torch.save(plain, tmp_path / "a.ckpt")
    assert len(list((tmp_path / "devices").iterdir())) == 1  # the other memory has no tensor
    loaded = DeviceFiles().get(torch.load(tmp_path / "a.ckpt", weights_only=True), tmp_path / "a.ckpt")
    assert equal(loaded, memories())


def test_small_memories_stay_inside(tmp_path):
    assert DeviceFiles().put(memories(), [0], tmp_path / "a.ckpt").keys() == memories().keys()
    assert not (tmp_path / "devices").exists()


def test_unchanged_memory_is_not_written_again_and_old_files_go(tmp_path):
    files, held, folder = DeviceFiles(inline_bytes=0), memories(), tmp_path / "devices"
    files.put(held, [0], tmp_path / "a.ckpt")
    first = set(folder.iterdir())
    files.put(held, [], tmp_path / "b.ckpt")
    assert set(folder.iterdir()) == first
    held[0]["moments"] = {"w": {"step": torch.tensor(4.0)}}
    files.put(held, [0], tmp_path / "b.ckpt")
    files.sweep()
    assert len(set(folder.iterdir()) - first) == 1 and first <= set(folder.iterdir())  # a.ckpt still lists the first
    files.forget(tmp_path / "a.ckpt")
    assert not first & set(folder.iterdir())
    files.put(memories(), [0], tmp_path / "c.ckpt")  # content that was deleted is written again
    assert first <= set(folder.iterdir())


def test_files_of_an_earlier_process_are_never_deleted(tmp_path):
    DeviceFiles(inline_bytes=0).put(memories(), [0], tmp_path / "old.ckpt")
    later = DeviceFiles(inline_bytes=0)
    later.put(memories(), [0], tmp_path / "new.ckpt")
    later.forget(tmp_path / "new.ckpt")
    assert len(list((tmp_path / "devices").iterdir())) == 1


def test_what_a_killed_process_has_left_goes_if_the_folder_is_the_checkpoints_own(tmp_path):
    path, folder, held = tmp_path / "a.ckpt", tmp_path / "devices", memories()
    DeviceFiles(inline_bytes=0).put(held, [0], path)  # and it was killed
    (killed,) = folder.iterdir()
    partial = folder / f".{killed.name}.123.partial"
    partial.touch()
    (folder / "notes.txt").touch()
    files = DeviceFiles(inline_bytes=0)
    plain = files.put(held, [0], path)
    torch.save(plain, path)
    (tmp_path / "b.ckpt").touch()
    remove_unlisted(path, {"nested": [plain]})
    assert killed.exists()  # b.ckpt may list it
    (tmp_path / "b.ckpt").unlink()
    remove_unlisted(path, {"nested": [plain]})
    assert not killed.exists() and not partial.exists() and (folder / "notes.txt").exists()
    assert equal(DeviceFiles().get(plain, path), memories())
    remove_unlisted(path, {})  # a checkpoint so small that it needs no files
    assert equal(DeviceFiles().get(files.put(held, [], path), path), memories())  # written again


def test_missing_and_damaged_files_are_named(tmp_path):
    plain = DeviceFiles(inline_bytes=0).put(memories(), [0], tmp_path / "a.ckpt")
    (file,) = (tmp_path / "devices").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=file.name):
        DeviceFiles().get(plain, tmp_path / "a.ckpt")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="move both together"):
        DeviceFiles().get(plain, tmp_path / "a.ckpt")


class Linear(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def fit(folder, ckpt_path=None, keep=-1, strategy=None):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(40, 4, generator=generator), torch.randint(2, (40,), generator=generator))
    accelerator = "cpu" if strategy is None else "auto"
    strategy = strategy or FederatedStrategy(FedAvg(moments="keep"), clients=IID(5), per_round=2)
    strategy._files.inline_bytes = 0
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=keep, every_n_train_steps=1, monitor=None)
    trainer = L.Trainer(
        max_epochs=4,
        strategy=strategy,
        accelerator=accelerator,
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Linear(), DataLoader(data, batch_size=4, shuffle=True), ckpt_path=ckpt_path)
    return strategy


def test_run_resumes_from_every_checkpoint_with_files(tmp_path):
    whole = fit(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    assert len(checkpoints) == 16
    for number, checkpoint in enumerate(checkpoints):
        resumed = fit(tmp_path / f"resumed{number}", ckpt_path=checkpoint)
        assert equal(resumed.server.models, whole.server.models)
        assert equal(resumed.loop.devices.memories, whole.loop.devices.memories)


def test_only_what_the_last_checkpoint_lists_is_left(tmp_path):
    strategy = fit(tmp_path, keep=1)
    assert len(list(tmp_path.glob("*.ckpt"))) == 1
    with_moments = [memory for memory in strategy.loop.devices.memories.values() if memory]
    assert len(list((tmp_path / "devices").iterdir())) == len(with_moments)


def test_a_path_may_be_spelled_in_several_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files, held = DeviceFiles(inline_bytes=0), memories()
    plain = files.put(held, [0], "mine.ckpt")
    files.put(held, [], tmp_path / "other.ckpt")
    files.forget(tmp_path / "other.ckpt")
    assert equal(DeviceFiles().get(plain, "mine.ckpt"), memories())


def test_two_runs_in_one_folder_keep_off_each_others_files(tmp_path):
    first, second = DeviceFiles(inline_bytes=0), DeviceFiles(inline_bytes=0)
    first.put(memories(), [0], tmp_path / "first.ckpt")
    plain = second.put(memories(), [0], tmp_path / "second.ckpt")
    first.forget(tmp_path / "first.ckpt")
    assert equal(DeviceFiles().get(plain, tmp_path / "second.ckpt"), memories())


def test_a_strategy_that_goes_back_writes_the_older_memories(tmp_path):
    strategy = fit(tmp_path / "whole")
    early = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))[3]
    again = fit(tmp_path / "again", ckpt_path=early, strategy=strategy)
    files = sorted((tmp_path / "again").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    resumed = fit(tmp_path / "resumed", ckpt_path=files[0])
    assert equal(resumed.loop.devices.memories, again.loop.devices.memories)
