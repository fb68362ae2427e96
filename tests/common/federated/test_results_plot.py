import sys

import pytest

from edgebolt.common.federated import compare


def rows(values, seconds=10.0, bytes_up=1_000_000):
    return [
        {
            "round": number,
            "round/sim_time": seconds * (number + 1),
            "bytes_up_total": bytes_up * (number + 1),
            "bytes_down_total": 2 * bytes_up * (number + 1),
            "val_acc": value,
        }
        for number, value in enumerate(values)
    ]


def curves(axes):
    """{label: (x, y)} of what has a label."""
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


@pytest.fixture(autouse=True)
def matplotlib():
    return pytest.importorskip("matplotlib")


def test_both_panels_show_each_run(tmp_path):
    (tmp_path / "rounds.csv").write_text(
        "round,round/sim_time,bytes_up_total,bytes_down_total,val_acc\n"
        "0,5.0,1000000,500000,0.1\n1,8.0,2000000,1000000,\n2,9.0,3000000,1500000,0.2\n3,12.0,4000000,2000000,0.6\n"
    )
    runs = {"FedAvg": rows([0.2, 0.4, 0.6, 0.8]), "FedProx": tmp_path}
    figure = compare(runs, tmp_path / "new" / "runs.png", title="two", lines={"guessing": 0.1})
    time, traffic = figure.axes
    assert curves(time)["FedAvg"] == ([30.0, 40.0], pytest.approx([0.4, 0.6]))
    assert curves(traffic)["FedAvg"] == ([9.0, 12.0], pytest.approx([0.4, 0.6]))
    assert curves(time)["FedProx"] == ([12.0], pytest.approx([0.3]))
    assert curves(traffic)["FedProx"] == ([6.0], pytest.approx([0.3]))
    assert curves(time)["guessing"][1] == [0.1, 0.1]
    assert time.get_ylabel() == "val acc" and figure.get_suptitle() == "two"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["FedAvg", "FedProx", "guessing"]
    assert (tmp_path / "new" / "runs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("seconds", "unit", "last"), [(10.0, "s", 40.0), (60.0, "min", 4.0), (3600.0, "h", 4.0)])
def test_time_has_a_readable_unit(tmp_path, seconds, unit, last):
    time = compare({"run": rows([0.1] * 4, seconds)}, tmp_path / "run.png").axes[0]
    assert time.get_xlabel() == f"simulated time ({unit})"
    assert curves(time)["run"][0][-1] == last


def test_a_run_too_short_to_average_is_drawn_as_points(tmp_path):
    figure = compare({"run": rows([0.1, 0.2])}, tmp_path / "run.svg", label="accuracy")
    assert curves(figure.axes[0])["run"] == ([10.0, 20.0], [0.1, 0.2])
    assert figure.axes[0].get_ylabel() == "accuracy" and not figure.legends
    assert (tmp_path / "run.svg").read_text().lstrip().startswith("<?xml")


def test_what_cannot_be_drawn_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no run"):
        compare({}, tmp_path / "run.png")
    with pytest.raises(ValueError, match="'val_f1' is in no round"):
        compare({"run": rows([0.1])}, tmp_path / "run.png", metric="val_f1")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'edgebolt-common\[plot\]'"):
        compare({"run": rows([0.1])}, tmp_path / "run.png")
    assert not list(tmp_path.iterdir())
