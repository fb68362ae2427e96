"""LEGEND beside FedLoRA, HetLoRA and its own ablations: accuracy, simulated time and exact traffic; see legend_run.py.

Without the clock (``make test``) every method runs in a short form, so that the code is run and nothing is compared.
"""

from statistics import fmean

import pytest
import torch
from legend_run import (
    DOCUMENTS,
    PER_ROUND,
    REGIMES,
    ROUNDS,
    STEPS,
    adapter_bytes,
    algorithms,
    available,
    documents,
    make_fleet,
    replay,
    train,
)

from edgebolt.common.federated import common_target, time_to

SEEDS = (0, 1, 2)
FULL = [
    *[("balanced", seed, name) for seed in SEEDS for name in algorithms() if name != "LEGEND, quantile"],
    ("balanced", 0, "LEGEND, quantile"),
    *[(regime, 0, name) for regime in REGIMES if regime != "balanced" for name in ("LEGEND", "LEGEND, quantile")],
]
SHORT = {"rounds": 3, "devices": 4, "per_round": 2, "count": 16, "layers": 2, "texts": 1000}  # every device is probed
RUNS, ROWS = {}, {}  # (regime, seed, method) -> run, and -> extra_info


@pytest.fixture(scope="module", autouse=True)
def compared():
    """Once all have run: what each needed to the target that all of its group reach."""
    yield
    for regime in REGIMES:
        for seed in SEEDS:
            group = {name: run for (r, s, name), run in RUNS.items() if (r, s) == (regime, seed)}
            rows = {name: run.rows for name, run in group.items()}
            if regime != "balanced" and group:
                for name in ("FedLoRA", "HetLoRA", "uniform depth"):  # their plans do not depend on the fleet
                    if ("balanced", seed, name) in RUNS:
                        group[name] = RUNS["balanced", seed, name]
                        rows[name] = replay(group[name], make_fleet(regime, seed))
            if len(rows) > 1:
                fill(regime, seed, group, rows)


def fill(regime, seed, group, rows):
    """Everything about one regime and seed, FedLoRA being 1; put into the row of LEGEND where it was replayed."""
    target = common_target(rows)
    reached = {name: time_to(rows[name], "val_acc", target) for name in rows}
    for name, run in group.items():
        round_, seconds, sent = reached[name]
        info = {
            "accuracy": fmean(row["val_acc"] for row in rows[name][-3:]),
            "target": None,
            "common_target": target,
            "rounds_to_target": round_ + 1,
            "sim_seconds_to_target": seconds,
            "bytes_to_target": sent,
            "bytes_to_target_without_head": adapter_bytes(run, round_),
            "sim_seconds": rows[name][-1]["round/sim_time"],
            "bytes": rows[name][-1]["bytes_up_total"] + rows[name][-1]["bytes_down_total"],
            "bytes_without_head": adapter_bytes(run, len(rows[name]) - 1),
            "waiting_seconds": fmean(row["round/waiting_time"] for row in rows[name]),
            "energy_joules": sum(row["round/energy"] for row in rows[name]),
        }
        if "FedLoRA" in rows:
            base = reached["FedLoRA"]
            info["speed_up"] = base[1] / seconds
            info["traffic_saved"] = 1 - sent / base[2]
            info["traffic_saved_without_head"] = 1 - info["bytes_to_target_without_head"] / adapter_bytes(
                group["FedLoRA"], base[0]
            )
        del info["target"]
        if (regime, seed, name) in ROWS:
            ROWS[regime, seed, name].update(info)
        else:
            ROWS[regime, seed, "LEGEND"][f"{name}, replayed"] = {
                key: info[key] for key in ("sim_seconds_to_target", "sim_seconds", "waiting_seconds", "energy_joules")
            }


@pytest.mark.skipif(not available(), reason="MiniLM or 20 Newsgroups is not installed: run `make data`")
@pytest.mark.slow
@pytest.mark.benchmark(group="legend")
@pytest.mark.parametrize(("regime", "seed", "method"), FULL, ids=lambda part: str(part).replace(" ", "-"))
def test_run(benchmark, request, tmp_path, regime, seed, method):
    short = benchmark.disabled
    if short and ((regime, seed) != ("balanced", 0) or method not in ("FedLoRA", "LEGEND")):
        pytest.skip("the short form has one regime, one seed and no ablations")
    threads = 1 if short else 2  # beside another worker two would wait for each other
    torch.set_num_threads(threads)
    make, _ = algorithms()[method]
    run = benchmark.pedantic(
        train, (make(), regime, seed, tmp_path), kwargs=SHORT if short else {}, rounds=1, iterations=1
    )
    RUNS[regime, seed, method], ROWS[regime, seed, method] = run, benchmark.extra_info
    benchmark.extra_info.update(regime=regime, method=method, seed=seed, torch_threads=threads, steps=run.steps)

    shape = SHORT if short else {"rounds": ROUNDS, "per_round": PER_ROUND, "count": DOCUMENTS}
    assert run.steps == shape["rounds"] * shape["per_round"] * STEPS <= 600
    again = replay(run, run.fleet)  # replayed over its own fleet a run is itself
    for mine, theirs in zip(again, run.rows, strict=True):
        for name in ("round/sim_time", "round/waiting_time", "round/energy"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-9)
    labels = documents(shape.get("texts")).split("test").labels[: shape["count"]]
    trivial = float(labels.bincount().max()) / len(labels)
    benchmark.extra_info["trivial"] = trivial
    if not short and method == "FedLoRA":  # or the table does not count
        assert fmean(row["val_acc"] for row in run.rows[-3:]) > trivial + 0.2
