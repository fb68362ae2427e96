"""What each toy algorithm is there to show, beside resuming: times, memories, models, in closed form."""

from dataclasses import replace
from itertools import cycle, islice, pairwise

import lightning as L
import pytest
import torch
from algorithms import ALGORITHMS, counted, failing, lost
from runs import BATCH, CLIENTS, SAMPLES, TRAIN, WITH_VAL, LowRankNet, Net, fit, holds, make_strategy
from toys import Buffered, Clusters, Enrolled, Groups, Patience, Probed, Ranks, StaleModel

from edgebolt.common.devices import CostModel, Fleet
from edgebolt.common.federated import Algorithm, Evaluation, FedAvg, Sizes


def outcomes_of(strategy, module=None, **trainer):
    """A run and the outcomes of each of its rounds."""
    rounds, finish = [], strategy.algorithm.finish

    def noted(server, outcomes):
        rounds.append(list(outcomes))
        finish(server, outcomes)

    strategy.algorithm.finish = noted
    return fit(strategy, module, **trainer), rounds


def trained(outcome):
    """Samples in the visit's steps: pass after pass, each with its smaller last batch."""
    held = SAMPLES[outcome.visit.client]
    a_pass = [min(BATCH, held - first) for first in range(0, held, BATCH)]
    return sum(islice(cycle(a_pass), outcome.steps))


def seconds(outcome, profile):
    """Down, training and up of a visit on a device, from bytes and samples alone; 1e9 FLOPs for each sample."""
    flops = trained(outcome) * 1e9
    return (
        profile.download_seconds(outcome.down_bytes),
        profile.compute_seconds(flops),
        profile.upload_seconds(outcome.up_bytes),
    )


def test_groups_run_side_by_side_in_simulated_time():
    """A round takes as long as its slowest lane; a lane as long as the slowest visits of its stages together."""
    fleet = Fleet.uniform(CLIENTS)
    run, rounds = outcomes_of(make_strategy(Groups(), fleet=fleet, per_round=4))
    now, barrier = 0.0, 0.0
    for number, outcomes in enumerate(rounds):
        ends = {}
        for lane in ("0", "1"):
            lane_now = now
            for stage in range(Groups.cycles[int(lane)]):
                visits = [o for o in outcomes if (o.visit.lane, o.visit.stage) == (lane, stage)]
                assert visits and all(o.started == lane_now for o in visits)
                finished = []
                for outcome in visits:
                    down, compute, up = seconds(outcome, fleet.profile(outcome.visit.client, number))
                    finished.append(lane_now + down + compute + up)
                    assert outcome.finished == finished[-1] and outcome.delivered
                lane_now = max(finished)
                assert all(o.waited == lane_now - o.finished for o in visits)
            ends[lane] = lane_now
        barrier += sum(max(o.finished - o.started for o in outcomes if o.visit.stage == s) for s in (0, 1))
        now = max(ends.values())
        assert run.strategy.history[number]["round/sim_time"] == now
    assert run.strategy.clock.now == now < barrier - 1e-3  # what barriers over all groups would cost
    energy = sum(o.energy for outcomes in rounds for o in outcomes)
    assert run.strategy.clock.energy_joules == pytest.approx(energy)


def test_plain_rounds_take_as_long_as_their_slowest_visit():
    fleet = Fleet.jetson(CLIENTS, seed=3)
    run, rounds = outcomes_of(make_strategy(FedAvg(), fleet=fleet))
    now = 0.0
    for number, outcomes in enumerate(rounds):
        spans = [seconds(o, fleet.profile(o.visit.client, number)) for o in outcomes]
        now = max(now + down + compute + up for down, compute, up in spans)
        assert run.strategy.history[number]["round/sim_time"] == now


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_parts_of_a_visits_time_are_its_time(name):
    row = ALGORITHMS[name]
    _, rounds = outcomes_of(*row.make(), rounds=row.rounds)
    for outcome in (outcome for outcomes in rounds for outcome in outcomes):
        parts = outcome.down_seconds + outcome.compute_seconds + outcome.up_seconds
        took = outcome.finished - outcome.started
        assert took == pytest.approx(parts, rel=1e-9) or (outcome.visit.start is None and took > parts)  # was busy
        assert 0 <= outcome.forward_seconds <= outcome.compute_seconds
        assert bool(outcome.forward_seconds) == bool(outcome.timed_steps)
        assert outcome.timed_steps <= outcome.samples <= outcome.timed_steps * (outcome.visit.batch_size or BATCH)


def test_a_visit_costs_what_its_own_batch_size_costs():
    def halved(server, visits):
        return [replace(visit, batch_size=2, steps=4) for visit in visits]

    sizes = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            sizes.append(len(batch[0]))

    fleet = Fleet.uniform(CLIENTS)
    _, rounds = outcomes_of(make_strategy(Algorithm(configure=[halved]), fleet=fleet), callbacks=[Look()], rounds=1)
    assert set(sizes) <= {1, 2} and len(sizes) == 12
    assert {o.compute_seconds for o in rounds[0]} == {fleet.profile(0, 0).compute_seconds(4 * 2 * 1e9)}


def test_interrupted_visits_are_finished_later():
    strategy = make_strategy(Patience(), fleet=failing(0.5))
    run, rounds = outcomes_of(strategy, rounds=8)
    owed, resumed, repeated = {}, 0, 0
    for outcomes in rounds:
        for outcome in outcomes:
            visit = outcome.visit
            if visit.client in owed:
                assert visit.start is None and visit.steps == owed.pop(visit.client)
                assert outcome.down_bytes < 300  # an order, no model
                resumed += 1
                if visit.steps == 0 and outcome.delivered:  # an upload is repeated, whole, from the device's memory
                    repeated += 1
                    assert outcome.up_bytes > sum(tensor.nbytes for tensor in run.model.values())
            else:
                assert visit.start == "global"
            if visit.cut is not None and visit.cut.down < 1:  # neither model nor order arrived: as it was before
                if visit.start is None:
                    owed[visit.client] = visit.steps
            elif not outcome.delivered:
                owed[visit.client] = visit.steps - outcome.steps
    assert resumed > 3 and repeated > 0
    notes = run.strategy.server.memory["patience"]
    everything = [o for outcomes in rounds for o in outcomes]
    for client in range(CLIENTS):
        fates = [o.delivered for o in everything if o.visit.client == client]
        assert notes["good"][client] == 1 + sum(fates) and notes["bad"][client] == 1 + len(fates) - sum(fates)
        assert notes["left"][client] == owed.get(client, -1)


def test_an_interrupted_visit_loses_no_step():
    """What a device had reached when it died is where its next visit starts."""
    reached, started = {}, []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, *args):
            loop = trainer.strategy.loop
            if loop.visit.start is None and loop.done == 0:
                started.append(holds(module.state_dict(), reached[loop.visit.client]))

        def on_train_batch_end(self, trainer, module, *args):
            for client, memory in trainer.strategy.loop.devices.memories.items():
                reached[client] = memory.get("reached")

    fit(make_strategy(Patience(), fleet=failing(0.5)), rounds=8, callbacks=[Look()])
    assert len(started) > 2 and all(started)


def test_stale_models_are_completed_from_memory():
    sent = []
    strategy = make_strategy(StaleModel())
    download, put = strategy.algorithm.download, {}

    def noted(server, visit):
        message = download(server, visit)
        sent.append((visit.client, message, {n: t.clone() for n, t in server.models["global"].items()}))
        return message

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            devices = trainer.strategy.loop.devices
            put.setdefault(len(sent), ({n: t.clone() for n, t in devices.start.items()}, dict(devices.device.memory)))

    strategy.algorithm.download = noted
    fit(strategy, rounds=4, callbacks=[Look()])
    known = set()
    for number, (client, message, model) in enumerate(sent, 1):
        installed, memory = put[number]
        if client not in known:
            assert all(torch.equal(installed[name], model[name]) for name in model)
        else:
            where = message.tensors["head.weight@"].long()
            expected = memory["held"]["head.weight"].clone().flatten()
            expected[where] = model["head.weight"].flatten()[where]
            assert torch.equal(installed["head.weight"].flatten(), expected)
            assert not torch.equal(installed["head.weight"], model["head.weight"])
        known.add(client)
    assert len(known) < len(sent)


def test_ranks_change_shapes_bytes_and_cost():
    shapes = {}

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rank = trainer.strategy.loop.visit.settings["rank"]
            shapes.setdefault(rank, set()).add((tuple(module.down.shape), tuple(module.up.shape)))

    strategy = make_strategy(Ranks(), per_round=6, cost=CostModel(), fleet=Fleet.uniform(CLIENTS))
    run, rounds = outcomes_of(strategy, LowRankNet("adamw"), callbacks=[Look()])
    assert shapes == {rank: {((rank, 8), (12, rank))} for rank in (1, 2, 4)}
    by_rank = {}
    for outcome in rounds[0]:
        by_rank.setdefault(outcome.visit.settings["rank"], []).append(outcome.compute_seconds / trained(outcome))
    assert all(times == pytest.approx(times[:1] * len(times)) for times in by_rank.values())
    assert min(by_rank[1]) < min(by_rank[2]) < min(by_rank[4])
    assert {tuple(run.module.down.shape), tuple(run.module.up.shape)} == {(4, 8), (12, 4)}
    assert holds(run.module.state_dict(), run.model)


def test_private_heads_stay_and_validation_is_per_client():
    losses, expected = [], []

    class Look(L.Callback):
        def on_validation_batch_end(self, trainer, module, outputs, batch, *args):
            losses.append((outputs, len(batch[0])))

        def on_validation_start(self, trainer, module):
            losses.clear()

    strategy = make_strategy(Clusters(), clients=Sizes(WITH_VAL, seed=0, val=0.3))
    run = fit(strategy, callbacks=[Look()])
    server, memories = strategy.server, strategy.loop.devices.memories
    index = Sizes(WITH_VAL, seed=0, val=0.3).split(TRAIN)
    module = type(run.module)().eval()
    for client in range(CLIENTS):
        model = server.models[strategy.algorithm.model_of(server, client)]
        module.load_state_dict({**module.state_dict(), **model, **memories.get(client, {}).get("head", {})})
        rows = index.indices(client, "val")
        with torch.no_grad():
            for first in range(0, len(rows), BATCH):
                x, y = (column[rows[first : first + BATCH]] for column in TRAIN.tensors)
                expected.append((module.loss((x, y)), len(y)))
    assert [(loss.item(), size) for loss, size in losses] == [(loss.item(), size) for loss, size in expected]
    mean = sum(loss.item() * size for loss, size in expected) / sum(size for _, size in expected)
    assert run.trainer.callback_metrics["val_loss"].item() == pytest.approx(mean, rel=1e-6)
    assert torch.equal(server.models["cluster/0"]["head.weight"], type(run.module)().head.weight)  # never sent
    assert not torch.equal(server.models["cluster/0"]["body.0.weight"], server.models["cluster/1"]["body.0.weight"])
    assert holds(run.module.state_dict(), run.model)
    reported = server.reports["val_loss"]
    assert bool(torch.isfinite(reported[[c in memories for c in range(CLIENTS)]]).all())


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_clients_are_validated_from_the_first_round_on(sanity_steps):
    batches = []

    class Look(L.Callback):
        def on_validation_start(self, trainer, module):
            batches.append(0)

        def on_validation_batch_end(self, *args):
            batches[-1] += 1

    strategy = make_strategy(Clusters(), clients=Sizes(WITH_VAL, seed=0, val=0.3))
    fit(strategy, callbacks=[Look()], num_sanity_val_steps=sanity_steps)
    held = Sizes(WITH_VAL, seed=0, val=0.3).split(TRAIN).sizes("val")
    assert batches == [sum(-(-int(n) // BATCH) for n in held)] * 3


def test_clients_without_validation_samples_are_passed_over():
    class Everybody(Algorithm):
        def evaluation(self, server):
            return [Evaluation("global", client) for client in range(CLIENTS)]

    sizes = [2, *WITH_VAL[1:]]  # the first has too few to hold one out
    run = fit(make_strategy(Everybody(), clients=Sizes(sizes, seed=0, val=0.3, min_samples=2)))
    assert "val_loss" in run.trainer.callback_metrics


def test_updates_stay_in_flight_past_the_round():
    fleet = Fleet.uniform(CLIENTS)
    run, rounds = outcomes_of(make_strategy(Buffered(), fleet=fleet), rounds=5)
    lanes = {}
    for outcome in (o for outcomes in rounds for o in outcomes):
        lanes.setdefault(outcome.visit.lane, []).append(outcome)
    for outcomes in lanes.values():  # a slot does one visit after the other, and never two at once
        assert [o.visit.stage for o in outcomes] == list(range(len(outcomes)))
        assert all(before.finished <= after.started for before, after in pairwise(outcomes))
    finished = [o.finished for outcomes in rounds for o in outcomes]
    assert finished == sorted(finished)  # delivered in the order of simulated time
    planned = 5 * 3 * 2
    assert 0 < planned - len(finished) <= Buffered.slots  # what the last round left in flight
    assert any(o.visit.stage < 2 * number for number, outcomes in enumerate(rounds) for o in outcomes)  # carried over
    assert len(run.strategy.server.memory["buffer"]) == len(finished) % 2


class NaiveBuffered(Buffered):
    """One visit for each slot and round, always in stage 0."""

    def plan(self, server):
        return [replace(visit, stage=0) for visit in super().plan(server) if visit.stage == 2 * server.round]


def test_a_new_rounds_visits_do_not_join_a_flight_of_the_last_round():
    _, rounds = outcomes_of(make_strategy(NaiveBuffered(), fleet=Fleet.uniform(CLIENTS)), rounds=6)
    lanes = {}
    assert sum(len(outcomes) for outcomes in rounds) > 6
    for outcome in (o for outcomes in rounds for o in outcomes):
        lanes.setdefault(outcome.visit.lane, []).append(outcome)
    for outcomes in lanes.values():
        assert all(before.finished <= after.started for before, after in pairwise(outcomes))


@pytest.mark.parametrize("name", ["all die at once", "all die half-way", "all uploads lost", "all offline"])
def test_a_round_in_which_nobody_delivers(name):
    models, values = [], []

    class Look(L.Callback):
        def on_validation_end(self, trainer, module):
            models.append({n: t.clone() for n, t in trainer.strategy.server.models["global"].items()})
            values.append(trainer.callback_metrics["val_loss"].item())

    row = ALGORITHMS[name]
    strategy, module = row.make()
    run, rounds = outcomes_of(strategy, module, callbacks=[Look()])
    assert run.trainer.current_epoch == len(rounds) == len(models) == 3
    assert holds(models[1], models[0]) and not holds(models[2], models[1])
    assert values[1] == values[0] != values[2]
    history = run.strategy.history
    assert [f["round/delivered"] for f in history] == [3, 0, 3]
    parts = [outcome.up_bytes for outcome in rounds[1]]
    assert history[1]["round/bytes_up"] == sum(parts) and bool(sum(parts)) == (name == "all uploads lost")
    if name == "all offline":
        assert rounds[1] == [] and history[1]["round/bytes_down"] == 0
        assert history[1]["round/sim_time"] == history[0]["round/sim_time"]
    else:
        assert history[1]["round/failed"] == 3 and history[1]["round/bytes_down"] > 0
        assert history[0]["round/sim_time"] < history[1]["round/sim_time"] < history[2]["round/sim_time"]


def test_the_first_round_may_be_the_one_in_which_nobody_trains():
    strategy = make_strategy(**lost(None)())
    plain = strategy.fleet.at
    strategy.fleet.at = lambda round: plain({0: 1, 1: 0}.get(round, round))
    run = fit(strategy)
    assert [f["round/visits"] for f in run.strategy.history] == [0, 3, 3]


def test_enrolment_reports_before_the_first_round():
    run = fit(make_strategy(Enrolled(), fleet=Fleet.jetson(CLIENTS, failure_rate=1.0)), rounds=1)
    expected = Sizes(SAMPLES, seed=0).split(TRAIN).label_counts(TRAIN.tensors[1].numpy())
    assert torch.equal(run.strategy.server.reports["labels"], torch.tensor(expected, dtype=torch.float64))
    entries = run.strategy.ledger.entries()
    assert bool((run.strategy.server.reports["last_round"] == -1).all())  # nobody has had the model
    assert run.strategy.server.reports["visits"].sum() == 3
    arrived = entries["up"] & entries["delivered"]
    assert arrived.sum() == CLIENTS  # enrolment never fails; then everybody dies
    assert entries["client"][: 2 * CLIENTS].tolist() == [c for c in range(CLIENTS) for _ in (0, 1)]
    assert run.strategy.history[0]["round/failed"] == 3


def test_slow_devices_get_less_as_measured():
    run, rounds = outcomes_of(make_strategy(Probed(), per_round=CLIENTS, **counted()), Net("adamw"))
    fleet, told = run.strategy.fleet, run.strategy.server.memory["told"]
    assert told == [CLIENTS] * 4  # the enrolment, and three rounds
    speeds = [fleet.profile(client, 0).flops for client in range(CLIENTS)]
    slowest, fastest = speeds.index(min(speeds)), speeds.index(max(speeds))
    first = {outcome.visit.client: outcome for outcome in rounds[0]}
    assert first[slowest].visit.settings == {"head only": True} and first[slowest].visit.probe == 1
    assert first[fastest].visit.settings == {} and first[fastest].visit.probe == 0
    assert first[slowest].down_bytes < first[fastest].down_bytes
    for outcome in rounds[0]:  # forward of both layers; gradients of the weights, and of the head's input
        slow, forward = bool(outcome.visit.settings), 2 * (8 * 12 + 12 * 3)
        flops = forward + 2 * 12 * 3 if slow else 2 * forward + 2 * 12 * 3
        assert outcome.forward_seconds / outcome.compute_seconds == pytest.approx(forward / flops)
