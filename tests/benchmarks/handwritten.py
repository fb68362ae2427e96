"""Federated averaging and a single fit as one would write them by hand, with the cohorts and batches of our runs."""

import itertools
from dataclasses import dataclass

import torch
from racing import Lap, Timer

from edgebolt.common.random import derive


@dataclass(frozen=True)
class Visit:
    """A client in a round: its share of the round's samples, its steps, and the seeds of our run."""

    client: int
    share: float
    steps: int
    data_seed: int
    step_seed: int


def schedule_of(strategy, samples, steps_of, seed=0):
    """The visits of each round, from the cohorts in the ledger of a run."""
    entries = strategy.ledger.entries()
    rounds = []
    for number in range(strategy.server.round):
        cohort = entries["client"][(entries["round"] == number) & ~entries["up"]].tolist()
        total = sum(int(samples[client]) for client in cohort)
        rounds.append(
            [
                Visit(
                    client,
                    int(samples[client]) / total,
                    steps_of(client),
                    derive(seed, "data", number, 0, client),
                    derive(seed, "visit", number, 0, client),
                )
                for client in cohort
            ]
        )
    return rounds


def endless(loader):
    """Pass after pass over a loader."""
    while True:
        yield from loader


def federated(module, schedule, batches_of, dropout=False):
    """Federated averaging in one process.

    Args:
        module: has ``loss(batch)`` and ``configure_optimizers()``.
        schedule: see :func:`schedule_of`.
        batches_of: visit -> its batches, at least as many as its steps.
        dropout: seed the global generator before each step as our run does; of no use to a model that draws nothing.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = module.configure_optimizers()
    timer, steps = Timer(), 0
    timer.start()
    shared = {name: p.detach().clone() for name, p in trained.items()}
    for cohort in schedule:
        change = {name: torch.zeros_like(tensor) for name, tensor in shared.items()}
        for visit in cohort:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(shared[name])
            optimizer.state.clear()
            for step, batch in enumerate(itertools.islice(batches_of(visit), visit.steps)):
                if dropout:
                    torch.manual_seed((visit.step_seed + step) % 2**63)
                optimizer.zero_grad()
                module.loss(batch).backward()
                optimizer.step()
                steps += 1
            with torch.no_grad():
                for name, parameter in trained.items():
                    change[name].add_(parameter - shared[name], alpha=visit.share)
        shared = {name: tensor + change[name] for name, tensor in shared.items()}
    timer.stop()
    figures = {"rounds": len(schedule), "visits": sum(map(len, schedule))}
    return Lap(timer.seconds, timer.cpu_seconds, steps, shared, figures)


def single(module, loader):
    """One pass of an ordinary training loop."""
    optimizer = module.configure_optimizers()
    timer = Timer()
    timer.start()
    for batch in loader:
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()
    timer.stop()
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    return Lap(timer.seconds, timer.cpu_seconds, len(loader), weights)
