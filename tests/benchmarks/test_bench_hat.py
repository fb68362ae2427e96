"""HAT, its ablation and its baselines on simulated fleets: 30 devices, a cloud of four stages, texts of 128 tokens.

Simulated seconds do not depend on this machine; the constants are in ``edgebolt.hat.simulation.settings``. Accept
lengths are the paper's, through its digest, but in the runs "measured", which have those of SmolLM2 and its Λ
(``hat_rounds.py``). Each is run with a pipeline that is overlapped and with one that is not: our sources do not say.
Budget: 44 runs of 360 texts, 15 to 40 s each, 20 minutes; the short form has 24 texts and the overlapped pipeline.
"""

from dataclasses import replace
from statistics import median

import pytest

from edgebolt.common.tables import print_table
from edgebolt.hat.simulation import CNN_13B, METHODS, SPECBENCH_7B, DrawnRounds, simulate

# model -> setting and requests a second
SETTINGS = {"7B at 6/s": (SPECBENCH_7B, 6.0), "7B at 4/s": (SPECBENCH_7B, 4.0), "13B at 4/s": (CNN_13B, 4.0)}
# Of SmolLM2 with the Λ of hat_distill.py on prompts of Spec-Bench and GSM8K, threshold 0.3 (hat_rounds.py).
MEASURED = DrawnRounds(1.31, right=0.62, hit=0.30)
ROWS = {}  # (setting, overlapped) -> method -> what came of it


@pytest.fixture(scope="module", autouse=True)
def tables(request):
    """One for each setting and pipeline, at the end, past pytest's capture."""
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        for (setting, overlapped), columns in ROWS.items():
            pipeline = "overlapped" if overlapped else "one batch at a time"
            print_table(f"\n{setting}, {pipeline}", {name: rows(found) for name, found in columns.items()})


def rows(found):
    texts = len(found.first)
    return {
        "TTFT, ms": f"{found.first.mean() * 1e3:.0f}",
        "TBT, ms": f"{found.between.mean() * 1e3:.1f}",
        "first token within 0.5 s": f"{found.share_within(0.5):.0%}",
        "half have ten tokens after, ms": f"{median(found.tenth) * 1e3:.0f}",
        "s that a text waited for its device": f"{found.waited.mean():.1f}",
        "tokens a round": f"{found.accept:.2f}",
        "ms of a batch in a stage": f"{found.stages.mean() * 1e3:.1f} ± {found.stages.std() * 1e3:.1f}",
        "MB up, MB down, a text": f"{found.up / texts / 1e6:.1f}, {found.down / texts / 1e6:.1f}",
    }


def run(benchmark, setting, method, overlapped, name="", rounds=None):
    texts, warm_up = (24, 6) if benchmark.disabled else (300, 60)
    where, requests = SETTINGS[setting]
    where = replace(where, cloud=replace(where.cloud, overlapped=overlapped))
    arguments = (where, METHODS[method], texts, warm_up, 0, requests, rounds)
    found = benchmark.pedantic(simulate, arguments, rounds=1, iterations=1)
    if not benchmark.disabled:
        ROWS.setdefault((setting, overlapped), {})[f"{method}, {name}" if name else method] = found
    assert len(found.first) == texts and (found.first > 0).all() and (found.between > 0).all()
    benchmark.extra_info.update(
        setting=setting,
        method=method,
        overlapped=overlapped,
        rounds=name,
        ttft=found.first.mean(),
        tbt=found.between.mean(),
        accept=found.accept,
        stage=(found.stages.mean(), found.stages.std()),
        up=found.up,
        down=found.down,
        waited=found.waited.mean(),
        tenth=median(found.tenth),
        within=found.share_within(0.5),
    )


@pytest.mark.benchmark(group="hat")
@pytest.mark.parametrize("method", METHODS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("overlapped", [True, False], ids=["overlapped", "one-by-one"])
def test_simulated(benchmark, setting, method, overlapped):
    if benchmark.disabled and not overlapped and method != "HAT":
        pytest.skip("The short form has the overlapped pipeline.")
    run(benchmark, setting, method, overlapped)


@pytest.mark.benchmark(group="hat")
@pytest.mark.parametrize("setting", ["7B at 6/s", "13B at 4/s"])
def test_simulated_with_measured_rounds(benchmark, setting):
    run(benchmark, setting, "HAT", True, "measured", MEASURED)


@pytest.mark.benchmark(group="hat")
@pytest.mark.parametrize("method", ["HAT: drafts, chunks", "HAT"], ids=["without", "ahead"])
@pytest.mark.parametrize("setting", ["7B at 6/s", "13B at 4/s"])
def test_simulated_with_drafts_that_are_as_often_right_as_measured(benchmark, setting, method):
    rounds = DrawnRounds(SETTINGS[setting][0].accept, right=MEASURED.right, hit=MEASURED.hit)
    run(benchmark, setting, method, True, "right as measured", rounds)
