"""HAT, its ablation and its baselines on simulated fleets: 30 devices, a cloud of four stages, texts of 128 tokens.

Simulated seconds do not depend on this machine; the constants are in ``edgebolt.hat.simulation.settings``. Accept
lengths are the paper's, through its digest. Budget: 14 runs of 660 texts, 20 to 60 s each, 10 minutes; the short form
has 24 texts.
"""

import pytest

from edgebolt.hat.simulation import CNN_13B, METHODS, SPECBENCH_7B, simulate

SETTINGS = {"7B": SPECBENCH_7B, "13B": CNN_13B}


@pytest.mark.benchmark(group="hat")
@pytest.mark.parametrize("method", METHODS, ids=lambda name: name.replace(" ", "-"))
@pytest.mark.parametrize("setting", SETTINGS)
def test_simulated(benchmark, setting, method):
    texts, warm_up = (24, 6) if benchmark.disabled else (600, 60)
    arguments = (SETTINGS[setting], METHODS[method], texts, warm_up)
    found = benchmark.pedantic(simulate, arguments, rounds=1, iterations=1)
    assert len(found.first) == texts and (found.first > 0).all() and (found.between > 0).all()
    benchmark.extra_info.update(
        setting=setting,
        method=method,
        ttft=found.first.mean(),
        tbt=found.between.mean(),
        accept=found.accept,
        stage=(found.stages.mean(), found.stages.std()),
        up=found.up,
        down=found.down,
        waited=found.waited.mean(),
        tenth=found.tenth.mean(),
        within=found.share_within(0.5),
    )
