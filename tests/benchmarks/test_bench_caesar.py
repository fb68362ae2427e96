"""Caesar beside dense FedAvg, five ways to compress, and its own parts taken out; see caesar_run.py.

Without the clock (``make test``) every method runs a few rounds, so that the code is run and nothing is compared.
"""

from statistics import fmean

import caesar_text_run
import legend_run
import pytest
import torch
from caesar_run import PER_ROUND, ROUNDS, STEPS, algorithms, available, images, train

from edgebolt.common.federated import common_target, time_to

SEEDS = (0, 1, 2)
MAIN = ("FedAvg", "FIC", "CAC", "FlexCom", "PyramidFL", "STC", "QSGD", "Caesar")
SWEEP = ("FedAvg", "STC", "Caesar")  # STC had sent the fewest bytes to the target at p = 5
FULL = [
    *[("5", seed, name) for seed in SEEDS for name in MAIN],
    *[("5", 0, name) for name in algorithms() if name not in MAIN],
    *[(skew, 0, name) for skew in ("IID", "1", "2", "10") for name in SWEEP],
]
SHORT = {
    "rounds": 3,
    "devices": 12,
    "per_round": 4,
    "steps": 2,
    "count": 100,
}  # devices come back, as in the long form
RUNS, ROWS = {}, {}  # (skew, seed, method) -> run, and -> extra_info


@pytest.fixture(scope="module", autouse=True)
def compared():
    """Once all have run: what each needed to the target that the methods of its group reach."""
    yield
    for skew, seed in {key[:2]: None for key in RUNS}:
        group = {name: run for (s, number, name), run in RUNS.items() if (s, number) == (skew, seed)}
        main = {name: run.rows for name, run in group.items() if name in MAIN}
        if len(main) > 1:
            fill(skew, seed, group, common_target(main))


def fill(skew, seed, group, target):
    """Everything about one skew and seed, FedAvg being 1."""
    reached = {name: time_to(run.rows, "val_acc", target) for name, run in group.items()}
    for name, run in group.items():
        rows, info = run.rows, ROWS[skew, seed, name]
        info.update(
            accuracy=fmean(row["val_acc"] for row in rows[-3:]),
            common_target=target,
            bytes_per_round=fmean(row["round/bytes_up"] + row["round/bytes_down"] for row in rows[1:]),
            bytes=rows[-1]["bytes_up_total"] + rows[-1]["bytes_down_total"],
            sim_seconds=rows[-1]["round/sim_time"],
            waiting_seconds=fmean(row["round/waiting_time"] for row in rows),
            energy_joules=sum(row["round/energy"] for row in rows),
            **{key.replace("/", "_"): fmean(row[key] for row in rows) for key in rows[0] if key.startswith("caesar/")},
        )
        sizes = [o.visit.batch_size for outcomes in run.outcomes for o in outcomes if o.visit.batch_size]
        if sizes:
            info["visits_at_smallest_batch"] = fmean(size == min(sizes) for size in sizes)
        if reached[name] is None:  # a variant; the methods themselves all reach it
            continue
        round_, seconds, sent = reached[name]
        info.update(rounds_to_target=round_ + 1, sim_seconds_to_target=seconds, bytes_to_target=sent)
        if "FedAvg" in group:
            base = reached["FedAvg"]
            info.update(speed_up=base[1] / seconds, traffic_saved=1 - sent / base[2])


@pytest.mark.skipif(not available(), reason="the digits are not installed: run `make data`")
@pytest.mark.benchmark(group="caesar")
@pytest.mark.parametrize(("skew", "seed", "method"), FULL, ids=lambda part: str(part).replace(" ", "-"))
def test_run(benchmark, tmp_path, skew, seed, method):
    short = benchmark.disabled
    if short and ((skew, seed) != ("5", 0) or method not in MAIN):
        pytest.skip("the short form has one skew and one seed, and no variants")
    run = benchmark.pedantic(
        train, (algorithms()[method](), skew, seed, tmp_path), kwargs=SHORT if short else {}, rounds=1, iterations=1
    )
    RUNS[skew, seed, method], ROWS[skew, seed, method] = run, benchmark.extra_info
    benchmark.extra_info.update(skew=skew, method=method, seed=seed, steps=run.steps)

    shape = SHORT if short else {"rounds": ROUNDS, "per_round": PER_ROUND, "steps": STEPS}
    assert run.steps == shape["rounds"] * shape["per_round"] * shape["steps"] <= 6000
    ledger = run.strategy.ledger
    sent = sum(outcome.down_bytes + outcome.up_bytes for outcomes in run.outcomes for outcome in outcomes)
    assert sent == ledger.total_bytes == ledger.up_bytes + ledger.down_bytes
    labels = images()[1].tensors[1]
    trivial = float(labels.bincount().max()) / len(labels)
    benchmark.extra_info["trivial"] = trivial
    if not short and method == "FedAvg":  # or the table does not count
        assert fmean(row["val_acc"] for row in run.rows[-3:]) > trivial + 0.2


SHORT_TEXT = {"rounds": 3, "devices": 4, "per_round": 2, "count": 16, "layers": 2, "texts": 1000}
TEXT = {}  # method -> rows, and its extra_info


@pytest.mark.skipif(not legend_run.available(), reason="MiniLM or 20 Newsgroups is not installed: run `make data`")
@pytest.mark.slow
@pytest.mark.benchmark(group="caesar")
@pytest.mark.parametrize("method", caesar_text_run.ALGORITHMS)
def test_language_model(benchmark, tmp_path, method):
    short = benchmark.disabled
    if short and method != "Caesar":
        pytest.skip("the short form has Caesar alone")
    threads = 1 if short else 2
    torch.set_num_threads(threads)
    shape = SHORT_TEXT if short else {}
    rows, steps, strategy = benchmark.pedantic(
        caesar_text_run.train, (method, tmp_path), kwargs=shape, rounds=1, iterations=1
    )
    TEXT[method] = rows, benchmark.extra_info
    rounds, per_round = (shape.get(name.lower(), getattr(caesar_text_run, name)) for name in ("ROUNDS", "PER_ROUND"))
    assert steps == rounds * per_round * caesar_text_run.STEPS
    assert rows[-1]["bytes_up_total"] + rows[-1]["bytes_down_total"] == strategy.ledger.total_bytes
    labels = legend_run.documents(shape.get("texts")).split("test").labels[: caesar_text_run.DOCUMENTS]
    trivial = float(labels.bincount().max()) / len(labels)
    benchmark.extra_info.update(method=method, seed=0, torch_threads=threads, steps=steps, trivial=trivial)
    if short:
        return
    if method == "FedLoRA":
        assert fmean(row["val_acc"] for row in rows[-3:]) > trivial + 0.2
    if len(TEXT) == len(caesar_text_run.ALGORITHMS):
        target = common_target({name: rows for name, (rows, _) in TEXT.items()})
        base = time_to(TEXT["FedLoRA"][0], "val_acc", target)
        for rows, info in TEXT.values():
            round_, seconds, sent = time_to(rows, "val_acc", target)
            info.update(
                accuracy=fmean(row["val_acc"] for row in rows[-3:]),
                common_target=target,
                rounds_to_target=round_ + 1,
                sim_seconds_to_target=seconds,
                bytes_to_target=sent,
                bytes_per_round=fmean(row["round/bytes_up"] + row["round/bytes_down"] for row in rows[1:]),
                bytes=rows[-1]["bytes_up_total"] + rows[-1]["bytes_down_total"],
                sim_seconds=rows[-1]["round/sim_time"],
                waiting_seconds=fmean(row["round/waiting_time"] for row in rows),
                speed_up=base[1] / seconds,
                traffic_saved=1 - sent / base[2],
            )
