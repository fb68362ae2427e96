import pytest
import torch
from tiny_models import rewrite, saved, tiny
from tiny_words import tokenizer

from edgebolt.comp import Report
from edgebolt.comp.__main__ import main
from edgebolt.comp.calibration_texts import read_texts


@pytest.fixture
def dense(tmp_path):
    saved(tiny("llama"), tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("\n\n".join(["the cat saw a dog"] * 40))
    return tmp_path / "dense"


def arguments(dense, *more):
    texts, small = dense.parent / "texts.txt", dense.parent / "small"
    return ["prune", str(dense), "--output", str(small), "--calibration", str(texts), "--length", "8",
            "--samples", "8", "--round-to", "1", "--no-perplexity", *more]  # fmt: skip


def test_a_model_is_pruned_and_the_table_says_what_it_came_to(dense, capsys):
    main(arguments(dense, "--ratio", "0.3", "--prune-attention"))
    out, report = capsys.readouterr().out, Report.load(dense.parent / "small" / "comp.json")
    for words in (f"{report.parameters[1]:,}", "peak memory", "seconds of pruning", "from_pretrained"):
        assert words in out
    assert report.ratio == pytest.approx(0.3, abs=0.05) and (dense.parent / "small" / "comp.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ratio", "2"], "ratio=2.0: use a number"),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--uniform", "--prune-attention"], "Leave one of them out"),
    ],
)
def test_what_is_wrong_is_one_line(dense, more, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments(dense, *more))
    assert not (dense.parent / "small").exists()


def test_activations_that_are_no_numbers_are_one_line(dense):
    rewrite(dense, lambda tensors: {name: tensor * torch.nan for name, tensor in tensors.items()})
    with pytest.raises(SystemExit, match=r"^edgebolt\.comp: .*nan"):
        main(arguments(dense))


@pytest.mark.parametrize(("kind", "positions", "window"), [("llama", 64, 64), ("gpt2", 32, 32), ("llama", 2048, 512)])
def test_the_window_of_the_perplexity_fits_the_model(kind, positions, window, tmp_path, capsys):
    name = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    folder = saved(tiny(kind, **{name: positions}), tmp_path / "dense")
    tokenizer().save_pretrained(folder)
    (tmp_path / "texts.txt").write_text("\n\n".join(["the cat saw a dog"] * 200))
    main([word for word in arguments(folder) if word != "--no-perplexity"])
    assert f"window {window}: " in capsys.readouterr().out


def test_texts(tmp_path):
    lines, single = tmp_path / "texts.jsonl", tmp_path / "one.txt"
    lines.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_texts(lines) == ["one", "two"]
    single.write_text("just one")
    with pytest.raises(ValueError, match="holds 1 texts: separate them by empty lines"):
        read_texts(single)


def test_the_picture_shows_what_is_left(dense, tmp_path):
    pytest.importorskip("matplotlib")
    from edgebolt.comp import Comp
    from edgebolt.comp.figure import draw

    report = Comp(ratio=0.4, round_to=1, prune_attention=True, samples=8, length=8).prune(
        str(dense), ["the cat saw a dog"] * 40, tmp_path / "out", progress=False
    )
    above, below = draw(report, tmp_path / "picture.png").axes
    neurons, heads = ([bar.get_height() for bar in bars] for bars in above.containers)
    left = {entry["layer"]: entry for entry in report.layers}
    for index in range(4):
        assert neurons[index] == (len(left[index]["neurons"]) / 48 if index in left else 0)
        assert heads[index] == (len(left[index]["groups"]) / report.units[1] if index in left else 0)
    assert [bar.get_height() for bar in below.containers[0]] == report.importance
