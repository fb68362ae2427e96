"""Work that is interrupted is kept, gone on with, and ends as it would have ended."""

import pytest
import torch
from scripted_run import CLIENTS, run, same, scripted

from edgebolt.common.devices import Cut
from edgebolt.common.federated import Algorithm, Deadline, FedAvg, Uniform
from edgebolt.flude import Fixed, Flude, ResumeSessions, SessionCache, StaleMean

ALWAYS = Fixed(float("inf"))


class Only:
    """Asks one device and no other."""

    def __init__(self, client):
        self.client = client

    def __call__(self, server):
        return torch.tensor([self.client]).numpy()


def patient(threshold=ALWAYS, every=1, selector=None, closing=None, **kwargs):
    return Flude(
        selector=Uniform() if selector is None else selector,
        threshold=threshold,
        cache_every=every,
        closing=Deadline(slack=None) if closing is None else closing,
        **kwargs,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "cuts",
    [[Cut(0)], [Cut(2)], [Cut(4)], [Cut(5, up=0.5)], [Cut(1), Cut(2)], [Cut(3), Cut(0, down=0.5), Cut(2, up=0.1)]],
    ids=["before the first step", "after 2 steps", "before the last", "in the upload", "twice", "thrice"],
)
def test_interrupted_and_resumed_equals_uninterrupted(cuts, optimizer):
    """In later rounds, under another learning rate of the schedule, with dropout, BatchNorm, moments, shuffling."""
    whole, _ = run(patient(selector=Only(3)), rounds=1, optimizer=optimizer)
    fleet = scripted({(round, 3): cut for round, cut in enumerate(cuts)})
    parts, strategy = run(
        patient(selector=Only(3), exponent=0.0), rounds=len(cuts) + 1, optimizer=optimizer, fleet=fleet
    )
    assert all(same(model, parts.models[0]) for model in parts.models[:-1])  # nobody has delivered yet
    assert same(parts.models[-1], whole.models[0])
    visits = [outcomes[0].visit for outcomes in parts.outcomes]
    assert [visit.start for visit in visits] == ["global", *[None] * len(cuts)]
    assert sum(outcomes[0].steps for outcomes in parts.outcomes) == 5  # no step is trained twice
    assert "session" not in strategy.loop.devices.memories[3]


@pytest.mark.parametrize("every", [2, 3, 7])
def test_work_since_the_last_write_is_lost_and_done_again(every):
    whole, _ = run(patient(selector=Only(3)), rounds=1)
    parts, _ = run(patient(selector=Only(3), every=every), rounds=2, fleet=scripted({(0, 3): Cut(4)}))
    assert same(parts.models[-1], whole.models[0])
    resumed = parts.outcomes[1][0]
    assert resumed.visit.done == 4 // every * every and resumed.steps == 5 - resumed.visit.done


def test_a_repeated_upload_trains_nothing_and_is_whole():
    parts, strategy = run(patient(selector=Only(3)), rounds=2, fleet=scripted({(0, 3): Cut(5, up=0.25)}))
    first, second = parts.outcomes[0][0], parts.outcomes[1][0]
    assert not first.delivered and first.steps == 5
    assert abs(first.up_bytes - 0.25 * second.up_bytes) < 10  # the first one also has the training loss
    assert second.delivered and second.steps == 0 and second.down_bytes < 300 and second.samples == 0
    kinds, entries = strategy.ledger.kinds, strategy.ledger.entries()
    told = entries["nbytes"][entries["kind"] == kinds.index("check-in")]
    assert len(told) == 1 and 0 < told[0] < 300


def test_w_0_without_failures_is_fedavg():
    for rounds in (1, 3):
        ours, _ = run(patient(Fixed(0)), rounds, per_round=4)
        theirs, _ = run(FedAvg(), rounds, per_round=4)
        assert all(same(a, b) for a, b in zip(ours.models, theirs.models, strict=True))
    others, _ = run(FedAvg(weights="uniform"), 3, per_round=3)
    assert not same(others.models[-1], theirs.models[-1])


def test_w_0_is_the_same_as_no_cache():
    cuts = {(0, 1): Cut(2), (0, 2): Cut(5, up=0.5), (1, 3): Cut(0), (2, 1): Cut(4)}
    ours, strategy = run(patient(Fixed(0)), 4, fleet=scripted(cuts))
    plain, reference = run(Algorithm(selector=Uniform(), aggregator=StaleMean()), 4, fleet=scripted(cuts))
    assert all(same(a, b) for a, b in zip(ours.models, plain.models, strict=True))
    assert strategy.ledger.down_bytes == reference.ledger.down_bytes


def test_an_old_enough_visit_is_begun_anew():
    """Fixed(1): a round later it goes on, two rounds later it is sent the model."""

    class Pause:
        def __init__(self, rounds):
            self.rounds = rounds

        def __call__(self, server):
            return torch.tensor([3 if server.round in (0, self.rounds) else 4]).numpy()

    for rounds, start in ((1, None), (2, "global")):
        look, _ = run(patient(Fixed(1), selector=Pause(rounds)), 3, fleet=scripted({(0, 3): Cut(2)}))
        assert look.outcomes[rounds][0].visit.start == start
        assert look.outcomes[rounds][0].steps == (3 if start is None else 5)


def test_a_round_in_which_everybody_fails_keeps_the_model():
    cuts = {(1, client): Cut(client % 5) for client in range(CLIENTS)}
    look, strategy = run(Flude(), 3, fleet=scripted(cuts))
    assert same(look.models[1], look.models[0]) and not same(look.models[2], look.models[1])
    assert strategy.server.round == 3 and strategy.history[1]["round/delivered"] == 0
    assert strategy.history[1]["round/sim_time"] > strategy.history[0]["round/sim_time"]
    learned = strategy.server.memory["dependability"]
    assert learned["beta"].sum() == 2 * CLIENTS + CLIENTS and learned["alpha"].sum() == 2 * CLIENTS + 2 * CLIENTS


def test_a_broken_download_leaves_the_device_as_it_was():
    cuts = {(0, 3): Cut(2), (1, 3): Cut(0, down=0.5)}
    look, _ = run(patient(selector=Only(3)), 3, fleet=scripted(cuts))
    assert [o[0].visit.done for o in look.outcomes] == [0, 2, 2]
    fresh = {(0, 3): Cut(0, down=0.5)}
    look, _ = run(patient(selector=Only(3)), 2, fleet=scripted(fresh))
    assert [o[0].visit.start for o in look.outcomes] == ["global", "global"]
    assert look.outcomes[0][0].down_bytes == int(0.5 * look.outcomes[1][0].down_bytes)


def test_the_weight_of_an_update_falls_with_its_age():
    cuts = {(0, 3): Cut(5, up=0.5)}
    whole, _ = run(patient(selector=Only(3)), 1)
    start = run(patient(selector=Only(3)), 1, fleet=scripted(cuts))[0].models[0]
    # with one other device of as many samples: shares 2^-½ and 1 of their sum
    both, _ = run(patient(selector=lambda server: torch.tensor([3] if server.round == 0 else [3, 4]).numpy()), 2,
                  fleet=scripted(cuts))  # fmt: skip
    other, _ = run(patient(selector=lambda server: torch.tensor([3] if server.round == 0 else [4]).numpy()), 2,
                   fleet=scripted(cuts))  # fmt: skip
    for name, tensor in both.models[1].items():
        old, new = whole.models[0][name] - start[name], other.models[1][name] - start[name]
        weight = 2**-0.5 / (1 + 2**-0.5)
        assert torch.allclose(tensor, start[name] + weight * old + (1 - weight) * new, atol=1e-6), name


def test_models_merged_instead_of_differences_pull_back():
    cuts = {(0, 3): Cut(5, up=0.5)}

    def chosen(server):
        return torch.tensor({0: [3, 4], 1: [5], 2: [3]}[server.round]).numpy()

    looks = {m: run(patient(selector=chosen, merged=m), 3, fleet=scripted(cuts))[0] for m in ("differences", "models")}
    end = looks["models"].models[2]
    alone, _ = run(patient(selector=Only(3)), 1)
    assert all(
        torch.allclose(end[name], alone.models[0][name], atol=1e-6) for name in end
    )  # 3's own model, of round 0
    assert not same(looks["differences"].models[2], end)


def test_updates_that_come_late_are_sent_again():
    """The slow device misses the deadline each time it trains, and is heard when it only has to send."""
    look, _ = run(
        Flude(selector=Uniform(), threshold=ALWAYS, closing=LateFor(3)), 3, fleet=scripted({}), per_round=CLIENTS
    )
    fates = [{o.visit.client: o for o in outcomes}[3] for outcomes in look.outcomes]
    assert [fate.reason for fate in fates] == ["late", "", "late"]
    assert [fate.steps for fate in fates] == [5, 0, 5]


def test_what_is_not_done_yet_cannot_be_sent():
    """A device that is still training when it is chosen again sends no sooner than it has finished."""

    def impatient(server, outcomes):  # the first round does not wait for device 3
        return min(o.finished for o in outcomes) / 4 if server.round == 0 else float("inf")

    chosen = patient(selector=Only(3), closing=impatient)
    look, _ = run(chosen, 2, fleet=scripted({}))
    (first,), (second,) = look.outcomes
    assert (first.reason, second.reason, second.visit.done, second.steps) == ("late", "", 5, 0)
    assert second.started == pytest.approx(first.finished / 4)
    assert second.finished == pytest.approx(first.finished + second.down_seconds + second.up_seconds)
    # sent a new model, it drops what it is at and begins at once
    look, _ = run(patient(selector=Only(3), threshold=Fixed(0), closing=impatient), 2, fleet=scripted({}))
    (first,), (second,) = look.outcomes
    took = second.down_seconds + second.compute_seconds + second.up_seconds
    assert second.finished == pytest.approx(second.started + took)


class LateFor:
    """A round ends just before one client's update comes, if it has trained."""

    def __init__(self, client):
        self.client = client

    def __call__(self, server, outcomes):
        late = [o.finished for o in outcomes if o.visit.client == self.client and o.steps]
        return min(late) - 1e-6 if late else float("inf")


def test_a_cache_that_is_not_there_is_an_error_that_says_so():
    algorithm = Algorithm(selector=Only(3), configure=[ResumeSessions(ALWAYS)], callbacks=[Forgetful()])
    with pytest.raises(RuntimeError, match=r"Device 3 .* round 0 .* nothing .*24 samples"):
        run(algorithm, 2, fleet=scripted({(0, 3): Cut(2)}))


class Forgetful(SessionCache):
    def on_train_batch_end(self, *args):
        self._device.memory.clear()


def test_bad_arguments():
    for make, message in [
        (lambda: SessionCache(0), "every=0.*1 or more"),
        (lambda: ResumeSessions(5), "threshold=5.*Fixed"),
        (lambda: StaleMean(-1), "exponent=-1"),
        (lambda: StaleMean(merged="both"), "'differences' or 'models'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
