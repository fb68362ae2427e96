import filecmp
import json
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, logits, prune, reload, rewrite, same_state, saved, tiny, weights
from tiny_words import tokenizer
from transformers import AutoTokenizer, GenerationConfig

from edgebolt.comp import Report
from edgebolt.comp.plan import Plan
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
    for key in ("parameters", "ratio", "importance", "dropped", "layers", "unmet", "calibration", "options"):
        assert plain[key] == streamed[key], key
    assert any(len(entry["groups"]) < 2 or kind in FAMILIES[3:] for entry in plain["layers"])


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("recover", ["none", "lstsq"])
def test_other_options_stream_alike(kind, recover, pair, tmp_path):
    options = {"recover": recover, "skip_first": True, "variance_bound": 0.02, "at_bound": "hand_on", "round_to": 4}
    prune(str(pair(kind).dense), output=tmp_path / "small", **options)
    model = tiny(kind)
    prune(model, **options)
    assert same_state(reload(tmp_path / "small", kind), model)


def test_the_residual_target_streams_alike_and_differs(pair, tmp_path):
    dense = str(pair("llama").dense)
    for target in ("residual", "sublayer"):
        prune(dense, output=tmp_path / target, target=target, prune_attention=True)
    model = tiny("llama")
    prune(model, target="residual", prune_attention=True)
    assert same_state(reload(tmp_path / "residual", "llama"), model)
    assert not torch.equal(logits(model), logits(reload(tmp_path / "sublayer", "llama")))


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


def test_large_streams_are_mapped_to_files(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("edgebolt.comp.comp.MAPPED_ABOVE", 0)
    made = pair("llama")
    prune(str(made.dense), output=tmp_path / "small", prune_attention=True)
    assert weights(tmp_path / "small").keys() == weights(made.small).keys()
    assert all(torch.equal(value, weights(made.small)[name]) for name, value in weights(tmp_path / "small").items())


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
    assert (tmp_path / "small" / "README.md").exists() and not (tmp_path / "small" / "pytorch_model.bin").exists()


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


# The bound is met in some layer, which hands its quota on: that has to come about again.
@pytest.mark.parametrize(("kind", "index", "bound"), [("llama", 2, 0.006), ("bert", 2, 0.03), ("mpnet", 3, 0.03)])
def test_a_crashed_run_goes_on_to_the_same_files(kind, index, bound, pair, tmp_path, monkeypatch):
    dense, options = str(pair(kind).dense), {"variance_bound": bound, "at_bound": "hand_on", "prune_attention": True}
    handed, hand_on = [], Plan.hand_on
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "hand_on", lambda self, layer, *rest: handed.append(layer) or hand_on(self, layer, *rest))
        prune(dense, output=tmp_path / "whole", **options)
    assert handed[0] < index
    crash_at(monkeypatch, index)
    with pytest.raises(Crash):
        prune(dense, output=tmp_path / "small", **options)
    assert not (tmp_path / "small" / "config.json").exists()
    done = sorted((tmp_path / "small" / ".pruning").glob("layer-*"))
    assert 0 < len(done) < 4
    times = [path.stat().st_mtime_ns for path in done]
    monkeypatch.setattr("edgebolt.comp.comp.layer_importance", None)  # of which the plan is there
    stored = []
    store = LayersInFiles.store
    monkeypatch.setattr(LayersInFiles, "store", lambda self, i, *rest: stored.append(i) or store(self, i, *rest))
    monkeypatch.setattr("edgebolt.comp.comp.shutil.rmtree", lambda path: None)
    prune(dense, output=tmp_path / "small", **options)
    assert times == [path.stat().st_mtime_ns for path in done] and min(stored) == index
    monkeypatch.undo()
    for path in sorted((tmp_path / "small" / ".pruning").iterdir()):
        path.unlink()
    (tmp_path / "small" / ".pruning").rmdir()
    same_files(tmp_path / "whole", tmp_path / "small")


def test_a_crash_while_the_files_are_put_together(pair, tmp_path, monkeypatch):
    made = pair("llama")

    def crash(self):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(LayersInFiles, "_copy_beside", crash)
        with pytest.raises(Crash):
            prune(str(made.dense), output=tmp_path / "small", prune_attention=True)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        reload(tmp_path / "small", "llama")
    prune(str(made.dense), output=tmp_path / "small", prune_attention=True)
    same_files(made.small, tmp_path / "small")


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
    from edgebolt.comp import comp

    monkeypatch.setattr(comp, "MAPPED_ABOVE", 0)
    made = pair("llama")
    prune(str(made.dense), output=tmp_path / "small", prune_attention=True)
    same_files(made.small, tmp_path / "small")


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
    assert max(most) <= 2  # a layer whose heads went, beside itself as it was; and the last one
