"""The table that is made of a benchmark run's JSON."""

from bench_table import tables


def row(name, param, median, **info):
    stats = {"median": median, "iqr": median / 10, "rounds": 5}
    return {"group": "loop", "name": name, "param": param, "stats": stats, "extra_info": {"seed": 0, **info}}


def test_targets_ratios_and_exact_figures():
    hand = row("test_mnist[by hand]", "by hand", 1.0, baseline="by hand", ratio=1.0, ratio_min=1.0, ratio_max=1.0)
    ours = row(
        *("test_mnist[ours]", "ours", 1.5),
        **{"baseline": "by hand", "ratio": 1.5, "ratio_min": 1.45, "ratio_max": 1.625, "bytes_up": 12728},
        target={"ratio": 1.4, "seconds": 2},
    )
    plan = {**row("test_plan", None, 0.0456), "group": "plan"}
    run = {
        "machine_info": {"cpu": {"brand_raw": "Some CPU", "count": 2}},
        "commit_info": {"id": "0123456789", "dirty": True},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [hand, plan, ours],
    }
    assert tables(run).splitlines() == [
        "2026-01-02: Some CPU, 2 cores; seed 0; commit 0123456 with changes.",
        "",
        "## loop",
        "",
        "| benchmark | median | spread | runs | ratio to baseline | target | bytes_up |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| mnist[by hand] | 1 s | 100 ms | 5 |  |  |  |",
        "| mnist[ours] | 1.5 s | 150 ms | 5 | 1.50 (1.45 to 1.62) | ratio ≤ 1.4: missed, seconds ≤ 2: met | 12,728 |",
        "",
        "## plan",
        "",
        "| benchmark | median | spread | runs |",
        "| --- | ---: | ---: | ---: |",
        "| plan | 45.6 ms | 4.56 ms | 5 |",
    ]
