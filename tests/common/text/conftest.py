import pytest


class File:
    """A file of a package, as importlib.metadata lists it."""

    def __init__(self, path):
        self.path = path

    def __str__(self):
        return self.path.as_posix()

    def locate(self):
        return self.path


class Distribution:
    def __init__(self, folder):
        self.files = [File(path) for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.fixture
def installed(monkeypatch):
    """The data packages that are installed: name to folder; none at first."""
    from edgebolt.common.text import sources

    packages = {}

    def distribution(name):
        if name not in packages:
            raise sources.PackageNotFoundError(name)
        return Distribution(packages[name])

    monkeypatch.setattr(sources, "distribution", distribution)
    return packages


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """The folder of a tokenizer whose tokens are words: w0 ... w99, [PAD], [UNK], </s>."""
    pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "</s>", *(f"w{number}" for number in range(100))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    ).save_pretrained(folder)
    return str(folder)
