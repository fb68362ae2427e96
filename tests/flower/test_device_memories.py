import os

import pytest

from edgebolt.flower.device_memories import DeviceMemories


def test_the_last_few_versions_are_kept(tmp_path):
    memories = DeviceMemories(tmp_path / "device", keep=2)
    names = [memories.put(bytes([number])) for number in range(4)]
    assert [memories.get(name) for name in names[2:]] == [b"\2", b"\3"]
    with pytest.raises(FileNotFoundError, match="keeps the last 2"):
        memories.get(names[0])


def test_a_version_that_is_asked_for_stays(tmp_path):
    memories = DeviceMemories(tmp_path, keep=2)
    names = [memories.put(bytes([number])) for number in range(2)]
    for age, name in enumerate(names):
        os.utime(tmp_path / f"{name}.memory", (age, age))
    memories.get(names[0])
    memories.put(b"new")
    assert memories.get(names[0]) == b"\0"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_memory_is_one_file(tmp_path):
    memories = DeviceMemories(tmp_path)
    assert memories.put(b"same") == memories.put(b"same")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["", "../secret", "0" * 63, "0" * 64 + "\n"])
def test_names_that_are_none(tmp_path, name):
    with pytest.raises(ValueError, match="is not the name of a memory"):
        DeviceMemories(tmp_path).get(name)


def test_a_damaged_version_is_refused(tmp_path):
    memories = DeviceMemories(tmp_path)
    name = memories.put(b"whole")
    (tmp_path / f"{name}.memory").write_bytes(b"half")
    with pytest.raises(ValueError, match="is damaged"):
        memories.get(name)


@pytest.mark.parametrize("keep", [0, True, 1.5])
def test_to_keep_nothing_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match="keep 1 version or more"):
        DeviceMemories(tmp_path, keep)
