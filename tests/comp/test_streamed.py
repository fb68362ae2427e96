import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, LAYERS, edit_config, logits, prune, reload, rewrite, same_state, saved, tiny
from tiny_words import tokenizer
from transformers import AutoTokenizer, GenerationConfig

from edgebolt.comp import Report, comp, report, sweep
from edgebolt.comp.streamed import LayersInFiles


def same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name == "comp.json":
            a, b = (Report.load(folder / name).to_plain() for folder in (one, other))
            assert {**a, "seconds": 0} == {**b, "seconds": 0}
        else:
            assert filecmp.cmp(one / name, other / name, shallow=False), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_streaming_equals_in_memory_bit_for_bit(kind, pair):
    made = pair(kind)
    small = reload(made.small, kind)
    assert same_state(small, made.model)
    assert torch.equal(logits(small), logits(made.model))
    plain, streamed = made.report.to_plain(), made.streamed.to_plain()
    for key in ("parameters", "ratio", "importance", "effect", "dropped", "layers", "calibration", "options"):
        assert plain[key] == streamed[key], key
    assert any(len(entry["groups"]) < made.report.units[1] for entry in plain["layers"])


@pytest.mark.parametrize(
    ("kind", "recover"), [*((kind, "mask") for kind in FAMILIES), ("llama", "none"), ("bert", "none")]
)
def test_other_options_stream_alike(kind, recover, pair, tmp_path):
    options = {"recover": recover, "skip_first": True, "variance_bound": 0.02, "round_to": 4, "prune_attention": True}
    prune(str(pair(kind).dense), output=tmp_path / "small", **options)
    model = tiny(kind)
    prune(model, **options)
    assert same_state(reload(tmp_path / "small", kind), model)


def test_sharded_sources_and_targets(pair, tmp_path, monkeypatch):
    model = tiny("qwen2")
    saved(model, tmp_path / "dense", max_shard_size="4KB")
    monkeypatch.setattr("edgebolt.comp.streamed.ONE_FILE_UP_TO", 0)
    report = prune(str(tmp_path / "dense"), output=tmp_path / "small", prune_attention=True)
    shards = sorted(path.name for path in (tmp_path / "small").glob("*.safetensors"))
    assert shards == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert report.files[1] == sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    assert same_state(reload(tmp_path / "small", "qwen2"), pair("qwen2").model)
    again = prune(str(tmp_path / "small"), output=tmp_path / "again", ratio=0.2, depth_fraction=0.0)
    assert again.ratio == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_to_remove_is_the_identity(kind, pair, tmp_path):
    made = pair(kind)
    report = prune(str(made.dense), output=tmp_path / "same", ratio=0.0)
    assert report.ratio == 0 and report.parameters == (made.dense_parameters,) * 2
    assert torch.equal(logits(tiny(kind)), logits(reload(tmp_path / "same", kind)))


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    dense = saved(tiny("llama"), tmp_path / "dense")
    tokenizer().save_pretrained(dense)
    GenerationConfig(max_new_tokens=3, repetition_penalty=1.5).save_pretrained(dense)
    (dense / "README.md").write_text("a card")
    (dense / "pytorch_model.bin").write_text("other weights")
    texts = [" ".join(f"w{(start * step) % 56 + 4}" for step in range(40)) for start in range(1, 20)]
    prune(str(dense), texts, tmp_path / "small", length=16)  # with the tokenizer that lies there
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert small("w7 w9")["input_ids"] == [7, 9]
    assert small.apply_chat_template([{"content": "w9"}], tokenize=False) == "w4 w9 w5"
    settings = GenerationConfig.from_pretrained(tmp_path / "small")
    assert settings.max_new_tokens == 3 and settings.repetition_penalty == 1.5
    assert reload(tmp_path / "small", "llama").generation_config.repetition_penalty == 1.5
    assert not any((tmp_path / "small" / name).exists() for name in ("README.md", "pytorch_model.bin"))


class Crash(RuntimeError):
    pass


def crash_at(monkeypatch, index):
    """Let the store of a layer fail, once."""
    store = LayersInFiles.store

    def failing(self, number, layer, slimmed):
        if number == index:
            monkeypatch.setattr(LayersInFiles, "store", store)
            raise Crash
        return store(self, number, layer, slimmed)

    monkeypatch.setattr(LayersInFiles, "store", failing)


def crash(*args):
    raise Crash


def crash_in_the_survey(monkeypatch, index):
    """Let a layer of the dense run fail, when it has been run."""
    run_dense = sweep._run_dense

    def failing(layers, calibration, number, *rest):
        found = run_dense(layers, calibration, number, *rest)
        return crash() if number == index else found

    monkeypatch.setattr(sweep, "_run_dense", failing)


def crash_behind_the_survey(monkeypatch, index):
    """Let the second pass fail at once."""
    monkeypatch.setattr(comp, "prune_layers", crash)


def counted(monkeypatch):
    """Lists that get the layers that the dense run runs and that are stored."""
    run, stored = [], []
    run_dense, store = sweep._run_dense, LayersInFiles.store
    monkeypatch.setattr(sweep, "_run_dense", lambda *args: run.append(args[2]) or run_dense(*args))
    monkeypatch.setattr(LayersInFiles, "store", lambda self, i, *rest: stored.append(i) or store(self, i, *rest))
    return run, stored


CRASHES = [
    *((crash_in_the_survey, index, list(range(index, LAYERS))) for index in range(LAYERS)),
    (crash_behind_the_survey, 0, []),
    *((crash_at, index, []) for index in range(LAYERS - 1)),  # the last goes as a whole
]


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(("breaks", "index", "rest"), CRASHES)
def test_a_crashed_run_goes_on_to_the_same_files(kind, breaks, index, rest, pair, tmp_path, monkeypatch):
    """Wherever it was broken off; what it had finished is not done again."""
    made, small = pair(kind), tmp_path / "small"
    left = [entry["layer"] for entry in made.streamed.layers]
    with monkeypatch.context() as patch:
        breaks(patch, index)
        with pytest.raises(Crash):
            prune(str(made.dense), output=small, prune_attention=True)
    assert not (small / "config.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (small / ".pruning").glob("layer-*")}
    run, stored = counted(monkeypatch)
    prune(str(made.dense), output=small, prune_attention=True)
    assert run == rest
    assert stored == [layer for layer in left if breaks is not crash_at or layer >= index]
    assert len(done) + len(stored) == len(left)
    same_files(made.small, small)


@pytest.mark.parametrize("allocation", ["inverse_importance", "effect"])
def test_a_run_that_crashes_again_and_again_ends_alike(allocation, pair, tmp_path, monkeypatch):
    """With mapped files, and what a killed run leaves of them."""
    monkeypatch.setattr(comp, "MAPPED_ABOVE", 0)
    dense, small, options = str(pair("qwen2").dense), tmp_path / "small", {"allocation": allocation}
    prune(dense, output=tmp_path / "whole", **options)
    for index in range(LAYERS):
        with monkeypatch.context() as patch:
            crash_in_the_survey(patch, index)
            with pytest.raises(Crash):
                prune(dense, output=small, **options)
        (small / ".pruning" / "hidden-killed").mkdir()
        (small / ".pruning" / "hidden-killed" / "0.bin").write_bytes(b"left")
    with monkeypatch.context() as patch:
        crash_behind_the_survey(patch, 0)
        with pytest.raises(Crash):
            prune(dense, output=small, **options)
    assert not list((small / ".pruning").glob("hidden-*"))
    prune(dense, output=small, **options)
    same_files(tmp_path / "whole", small)


def test_a_crash_while_the_files_are_put_together(pair, tmp_path, monkeypatch):
    made = pair("llama")

    with monkeypatch.context() as patch:
        patch.setattr(LayersInFiles, "_copy_beside", crash)
        with pytest.raises(Crash):
            prune(str(made.dense), output=tmp_path / "small", prune_attention=True)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        reload(tmp_path / "small", "llama")
    prune(str(made.dense), output=tmp_path / "small", prune_attention=True)
    same_files(made.small, tmp_path / "small")


@pytest.mark.parametrize("removed", [0, 1, 3, "all but the job"])
def test_a_run_that_is_killed_while_it_tidies_up_is_complete(removed, pair, tmp_path, monkeypatch):
    made, small, remove, gone = pair("llama"), tmp_path / "small", comp._remove, []

    def killed(path):
        if len(gone) == removed:
            crash()
        gone.append(path)
        remove(path)

    with monkeypatch.context() as patch:
        if removed == "all but the job":
            patch.setattr(shutil, "rmtree", crash)
        else:
            patch.setattr(comp, "_remove", killed)
        with pytest.raises(Crash):
            prune(str(made.dense), output=small, prune_attention=True)
    assert (small / ".pruning" / "job.json").exists()
    first = Report.load(small / "comp.json")
    run, stored = counted(monkeypatch)
    assert prune(str(made.dense), output=small, prune_attention=True) == first
    assert run == stored == []
    same_files(made.small, small)


def test_files_that_a_killed_run_was_writing_go(pair, tmp_path, monkeypatch):
    made, small = pair("llama"), tmp_path / "small"
    left = [
        small / ".model.safetensors.123.partial",
        small / ".pruning" / ".job.json.123.partial",
        small / ".pruning" / ".layer-00002.safetensors.123.partial",
    ]
    left[1].parent.mkdir(parents=True)
    left[1].write_text("half")  # killed before there was a job
    for index in (1, 2):
        with monkeypatch.context() as patch:
            crash_at(patch, index)
            with pytest.raises(Crash):
                prune(str(made.dense), output=small, prune_attention=True)
        assert not any(path.exists() for path in left)
        for path in left:
            path.write_text("half")
    prune(str(made.dense), output=small, prune_attention=True)
    same_files(made.small, small)


def test_a_run_is_not_continued_with_other_libraries(pair, tmp_path, monkeypatch):
    dense, small = str(pair("llama").dense), tmp_path / "small"
    with monkeypatch.context() as patch:
        patch.setattr(comp, "versions", lambda: {**report.versions(), "torch": "0.1", "edgebolt-comp": "0.0"})
        crash_at(patch, 1)
        with pytest.raises(Crash):
            prune(dense, output=small)
    with pytest.raises(FileExistsError, match=r"other \['version of edgebolt-comp', 'version of torch'\]"):
        prune(dense, output=small)


def test_a_job_of_another_release_is_refused_and_says_what_differs(pair, tmp_path, monkeypatch):
    dense, small = str(pair("llama").dense), tmp_path / "small"
    crash_at(monkeypatch, 1)
    with pytest.raises(Crash):
        prune(dense, output=small)
    note = small / ".pruning" / "job.json"
    job = json.loads(note.read_text())
    note.write_text(json.dumps({**job, "comp": {**job["comp"], "former": None}, "machine": "other"}))
    with pytest.raises(FileExistsError, match=r"interrupted run with other \['former', 'machine'\]"):
        prune(dense, output=small)
    del job["config"], job["weights"], job["comp"]["step"]
    note.write_text(json.dumps(job))
    with pytest.raises(FileExistsError, match=r"interrupted run with other \['config', 'step', 'weights'\]"):
        prune(dense, output=small)


def test_a_config_that_has_changed_is_refused(tmp_path, monkeypatch):
    dense = saved(tiny("llama"), tmp_path / "dense")
    crash_at(monkeypatch, 1)
    with pytest.raises(Crash):
        prune(str(dense), output=tmp_path / "small")
    edit_config(dense, rms_norm_eps=1e-3)
    with pytest.raises(FileExistsError, match=r"interrupted run with other \['config'\]"):
        prune(str(dense), output=tmp_path / "small")


def test_an_interrupted_run_with_other_options_is_refused_and_says_which(pair, tmp_path, monkeypatch):
    dense = str(pair("llama").dense)
    crash_at(monkeypatch, 1)
    with pytest.raises(Crash):
        prune(dense, output=tmp_path / "small")
    with pytest.raises(FileExistsError, match=r"interrupted run with other \['ratio', 'seed'\]"):
        prune(dense, output=tmp_path / "small", ratio=0.4, seed=5)
    with pytest.raises(FileExistsError, match=r"interrupted run with other \['calibration'\]"):
        prune(dense, torch.ones(4, 8, dtype=torch.long), tmp_path / "small")
    other = saved(tiny("llama"), tmp_path / "other")
    with pytest.raises(FileExistsError, match=r"interrupted run with other \['model', 'weights'\]"):
        prune(str(other), output=tmp_path / "small")
    prune(dense, output=tmp_path / "small")


def test_a_dense_model_that_has_changed_is_refused(tmp_path, monkeypatch):
    dense = saved(tiny("llama"), tmp_path / "dense")
    crash_at(monkeypatch, 1)
    with pytest.raises(Crash):
        prune(str(dense), output=tmp_path / "small")
    rewrite(dense, lambda tensors: {name: 3 * tensor for name, tensor in tensors.items()})
    with pytest.raises(FileExistsError, match=r"interrupted run with other \['weights'\]"):
        prune(str(dense), output=tmp_path / "small")


def test_a_folder_that_a_run_had_only_made_is_taken(pair, tmp_path):
    (tmp_path / "small" / ".pruning").mkdir(parents=True)
    prune(str(pair("llama").dense), output=tmp_path / "small")


def test_streams_in_mapped_files_change_nothing(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(comp, "MAPPED_ABOVE", 0)
    made, whole, files = pair("llama"), comp.capture, []

    def watched(model, runs, folder):
        captured = whole(model, runs, folder)
        files.append([path.stat().st_size for path in sorted(folder.iterdir())])
        return captured

    monkeypatch.setattr(comp, "capture", watched)
    prune(str(made.dense), output=tmp_path / "small", prune_attention=True)
    same_files(made.small, tmp_path / "small")
    assert len(files) == 1 and files[0] and min(files[0]) > 0  # as they came, not once all of them were there


def test_a_full_folder_is_refused(pair, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="is not empty: choose a new folder"):
        prune(str(pair("llama").dense), output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(FileExistsError, match="is not empty"):  # a finished run too
        prune(str(pair("llama").dense), output=pair("llama").small)


def test_no_output(pair):
    with pytest.raises(ValueError, match="name the folder of the pruned model"):
        prune(str(pair("llama").dense))


def test_the_manifest(pair):
    made = pair("llama")
    report = Report.load(made.small / "comp.json")
    assert report == made.streamed
    assert report.base == str(made.dense) and not Path(made.small / ".pruning").exists()
    config = json.loads((made.small / "config.json").read_text())
    assert config["pruned"]["layers"] == [entry["layer"] for entry in report.layers]
    assert config["pruned"]["neurons"] == [len(entry["neurons"]) for entry in report.layers]
    assert config["pruned"]["groups"] == [len(entry["groups"]) for entry in report.layers]


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_and_file_size_are_what_the_report_says(kind, pair):
    made = pair(kind)
    small = reload(made.small, kind)
    count = sum(parameter.numel() for parameter in small.parameters())  # tied ones once
    assert made.streamed.parameters == (made.dense_parameters, count)
    before, after = made.streamed.files
    assert (before, after) == tuple(
        (folder / "model.safetensors").stat().st_size for folder in (made.dense, made.small)
    )
    names = 6000  # names of tensors and padding
    assert abs((before - after) - 4 * (made.dense_parameters - count)) < names < before - after


def test_memory_of_one_layer_at_a_time(pair, tmp_path, monkeypatch):
    """Of the layers that were read, none but the present one is alive."""
    import weakref

    from edgebolt.comp.checkpoint import Skeleton

    alive, most, read = weakref.WeakSet(), [], Skeleton.layer

    def counted(self, index):
        most.append(len(alive))
        layer = read(self, index)
        alive.add(layer)
        return layer

    monkeypatch.setattr(Skeleton, "layer", counted)
    prune(str(pair("llama").dense), output=tmp_path / "small", prune_attention=True)
    assert max(most) <= 1 and len(most) == 2 * LAYERS + 3  # the run, the branches, and what is left is cut
