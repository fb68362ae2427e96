import math

import numpy as np
import pytest
import torch

from edgebolt.common.federated import Deadline, Outcome, Server, Visit

PARTS = {
    "down_seconds": 1.0,
    "compute_seconds": 1.0,
    "up_seconds": 1.0,
    "down_bytes": 100,
    "up_bytes": 50,
    "energy": 0.0,
}


def server(step=1.0, down=800.0, up=400.0, received=100.0, sent=50.0, n=4):
    made = Server(np.full(n, 5), steps_of=lambda c, b: 3, online=lambda r: np.ones(n, bool), per_round=n, seed=0)
    made.models["global"] = {"w": torch.ones(25)}
    values = {"step_seconds": step, "down_bps": down, "up_bps": up, "received_bytes": received, "sent_bytes": sent}
    for name, value in values.items():
        made.reports[name] = torch.full((n,), value, dtype=torch.float64)
    return made


def outcome(client, finished, delivered=True, steps=3, start="global", started=0.0, **visit):
    return Outcome(
        Visit(client, steps, start=start, **visit), steps, delivered, "" if delivered else "failed",
        started, finished, **PARTS,
    )  # fmt: skip


def test_the_deadline_is_a_multiple_of_the_median_expectation():
    outcomes = [outcome(c, finished=10.0 + c, started=2.0) for c in range(4)]
    # 8 * 100 / 800 + 3 * 1 + 8 * 50 / 400
    assert Deadline.expected_seconds(server(), outcomes).tolist() == [5.0] * 4
    made = server()
    assert Deadline(2.0)(made, outcomes) == made.memory["deadline"] == 2.0 + 10.0
    assert Deadline(2.0, arrivals=0.5)(made, outcomes) == 11.0 and made.memory["deadline"] == 12.0
    assert Deadline(None)(server(), outcomes) == math.inf
    # who goes on is sent nothing; who only sends again trains nothing
    resumed = [
        outcome(0, 1.0, start=None, base=0, done=1, steps=2),
        outcome(1, 1.0, start=None, base=0, done=3, steps=0),
    ]
    assert Deadline.expected_seconds(server(), resumed).tolist() == [3.0, 1.0]


def test_devices_that_were_never_measured_set_no_deadline():
    partly = server()
    partly.reports["step_seconds"][:3] = float("nan")
    outcomes = [outcome(c, 10.0) for c in range(4)]
    assert Deadline(2.0)(partly, outcomes) == 10.0  # of the one that was
    assert Deadline(2.0)(server(step=float("nan")), outcomes) == math.inf


def test_a_round_closes_after_enough_arrivals_and_grace():
    outcomes = [outcome(0, 3.0), outcome(1, 1.0), outcome(2, 2.0, delivered=False), outcome(3, 9.0)]
    assert Deadline(None, arrivals=0.5)(server(), outcomes) == 3.0
    assert Deadline(None, arrivals=0.5, grace=2.0)(server(), outcomes) == 5.0
    assert Deadline(None, arrivals=1.0)(server(), outcomes) == math.inf  # only three arrived
    unsure = Deadline(None, arrivals=1.0, chance=lambda s: np.array([0.5, 0.5, 0.5, 0.5]))
    assert unsure(server(), outcomes) == 3.0  # two were expected
    assert Deadline(None, 0.1, chance=lambda s: np.zeros(4))(server(), outcomes) == 1.0  # one at least


def test_sizes_of_messages_are_remembered():
    made = server()
    Deadline().observe(made, [outcome(1, 1.0), outcome(2, 1.0, delivered=False)])
    assert made.reports["sent_bytes"].tolist() == [50.0] * 4 and made.reports["received_bytes"][1] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"slack": 0}, "slack=0"), ({"arrivals": 1.5}, "arrivals=1.5"), ({"grace": -1}, "grace=-1")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Deadline(**arguments)
