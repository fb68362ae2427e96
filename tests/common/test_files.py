import os

import pytest

from edgebolt.common.files import replaced


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_appears_whole_or_the_former_one_stays(tmp_path, durable):
    target = tmp_path / "notes.txt"
    for text in ("first", "second"):
        with replaced(target, durable) as partial:
            partial.write_text(text)
            assert not target.exists() or target.read_text() == "first"
        assert target.read_text() == text
    with pytest.raises(OSError, match="disk full"), replaced(target, durable) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert target.read_text() == "second" and list(tmp_path.iterdir()) == [target]


def test_a_durable_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (order.append(name), real(*args))[1])
    with replaced(tmp_path / "notes.txt", durable=True) as partial:
        partial.write_text("all")
    assert order == ["fsync", "replace", "fsync"]
