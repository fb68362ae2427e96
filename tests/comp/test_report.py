import json

from tiny_models import LAYERS, prune, tiny

from edgebolt.comp import Report
from edgebolt.comp.report import versions


def test_a_report_survives_its_file(tmp_path):
    report = prune(tiny("llama"), prune_attention=True)
    report.save(tmp_path / "comp.json")
    assert Report.load(tmp_path / "comp.json") == report
    assert Report.from_plain(json.loads(json.dumps(report.to_plain()))) == report


def test_what_a_report_tells():
    report = prune(tiny("llama"), prune_attention=True)
    assert report.ratio > 0.45 and len(report.importance) == len(report.effect) == LAYERS
    assert sorted(report.dropped + [entry["layer"] for entry in report.layers]) == list(range(LAYERS))
    assert report.options["ratio"] == 0.5 and report.options["score"] == "condition"
    stages = {"load", "forward", "sums", "selection", "effect", "recovery", "write"}
    assert len(report.calibration) == 64 and set(report.seconds) == stages
    assert set(report.versions) == {"edgebolt-comp", "torch", "transformers", "safetensors"}
    assert report.versions == versions()
    before, after = report.parameters
    assert f"layers {report.dropped} dropped" in report.summary() and before > after
    for entry in report.layers:
        assert 0 <= entry["error"][1] <= entry["error"][0] and entry["variance"] >= 0
