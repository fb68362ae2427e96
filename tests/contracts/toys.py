"""Eight toy algorithms, one for each thing that a paper may ask of the core; written against its public names only."""

from dataclasses import replace

import torch

from edgebolt.common.communication import Codec, Message
from edgebolt.common.devices import Cut, Fleet
from edgebolt.common.federated import Algorithm, ClientCallback, Evaluation, Visit, WeightedMean


def decoded(algorithm, closed):
    return [(update.outcome, algorithm.up.decode(update.message)) for update in closed.updates]


# ------------------------------------------------------------------------- groups with frequencies of their own


class Groups(Algorithm):
    """Even clients train once a round, odd ones go through two cycles; the groups are merged at the round's end."""

    cycles = (1, 2)

    def plan(self, server):
        return [
            Visit(int(client), 1 + int(client) % 3, "global" if stage == 0 else f"group/{group}", f"{group}", stage)
            for group in (0, 1)
            for stage in range(self.cycles[group])
            for client in self.selector(server)
            if client % 2 == group
        ]

    def aggregate(self, server, closed):
        name = f"group/{closed.lane}"
        model = server.models["global" if closed.stage == 0 else name]
        updates = decoded(self, closed)
        server.models[name] = self.aggregator(server, model, updates) if updates else model

    def finish(self, server, outcomes):
        groups = [server.models[f"group/{lane}"] for lane in sorted({outcome.visit.lane for outcome in outcomes})]
        if groups:
            server.models["global"] = {name: sum(g[name] for g in groups) / len(groups) for name in groups[0]}
        super().finish(server, outcomes)


# --------------------------------------------------------------------------- interrupted visits, resumed later


class Cache(ClientCallback):
    """The device keeps its weights after every step, so that nothing is lost when it dies."""

    def install(self, device, visit, tensors):
        if visit.start is not None:
            device.memory["sent"] = device.memory["reached"] = dict(tensors)
        return device.memory["reached"]

    def on_client_start(self, trainer, module, device, visit):
        self.device = device

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        weights, memory = module.state_dict(), self.device.memory
        memory["reached"] = {name: weights[name].clone() for name in memory["sent"]}

    def upload(self, device, visit, update):
        sent, reached = device.memory["sent"], device.memory["reached"]
        return {name: reached[name] - sent[name] for name in update}


class Patience(Algorithm):
    """Devices that died go on where they stopped; who is chosen depends on a count of successes and failures."""

    def __init__(self):
        super().__init__(callbacks=[Cache()])

    def notes(self, server):
        nobody = torch.zeros(server.population, dtype=torch.int64)
        return server.memory.get("patience", {"left": nobody - 1, "good": nobody + 1, "bad": nobody + 1})

    def plan(self, server):
        notes, online = self.notes(server), server.online()
        chances = server.rng("patience").beta(notes["good"].numpy(), notes["bad"].numpy())
        first = sorted(online, key=lambda client: (notes["left"][client] < 0, -chances[client]))
        return [self.order(server, int(client), int(notes["left"][client])) for client in first[: server.per_round]]

    def order(self, server, client, left):
        return Visit(client, server.steps(client)) if left < 0 else Visit(client, left, start=None)

    def finish(self, server, outcomes):
        notes = {name: counts.clone() for name, counts in self.notes(server).items()}
        for outcome in outcomes:
            client, cut = outcome.visit.client, outcome.visit.cut
            if cut is None or cut.down == 1:  # else it is as it was before
                notes["left"][client] = -1 if outcome.delivered else outcome.visit.steps - outcome.steps
            notes["good" if outcome.delivered else "bad"][client] += 1
        server.memory["patience"] = notes


# ----------------------------------------------------------------- a codec that leans on the device's old model


class Sparse(Codec):
    """Sends the largest entries; the receiver fills the others in from the model that it holds."""

    name = "sparse"

    def __init__(self, keep):
        self.keep = keep

    def encode(self, tensors):
        sent = {}
        for name, tensor in tensors.items():
            count = max(1, int(self.keep * tensor.numel()))
            where = tensor.abs().flatten().topk(count).indices.sort().values
            sent |= {f"{name}@": where.to(torch.int32), name: tensor.flatten()[where]}
        return Message(sent, {"codec": self.name, "shapes": {name: list(t.shape) for name, t in tensors.items()}})

    def decode(self, message, memory=None):
        tensors = {}
        for name, shape in message.header["shapes"].items():
            values = message.tensors[name]
            base = memory["held"][name].clone() if memory and "held" in memory else torch.zeros(shape)
            tensors[name] = base.flatten().index_copy(0, message.tensors[f"{name}@"].long(), values).view(shape)
        return tensors


class Holds(ClientCallback):
    def on_client_end(self, trainer, module, device, visit):
        weights = module.state_dict()
        device.memory["held"] = {name: weights[name].clone() for name in weights if weights[name].is_floating_point()}


class StaleModel(Algorithm):
    """Newcomers get the whole model, the others a third of its entries."""

    def __init__(self):
        super().__init__(down=Sparse(1 / 3), callbacks=[Holds()])
        self.whole = Sparse(1.0)

    def download(self, server, visit):
        known = bool(server.reports["last_round"][visit.client] >= 0)
        codec = self.down if known else self.whole
        return server.once(("global", known), lambda: codec.encode(server.models["global"]))


# -------------------------------------------------------------------------------------------- changing shapes


class Truncate(ClientCallback):
    """The device trains the leading components and uploads the change of the whole product."""

    def install(self, device, visit, tensors):
        rank = visit.settings["rank"]
        return {**tensors, "down": tensors["down"][:rank].clone(), "up": tensors["up"][:, :rank].clone()}

    def on_client_start(self, trainer, module, device, visit):
        self.down, self.up = module.down.detach().clone(), module.up.detach().clone()

    def upload(self, device, visit, update):
        product = (self.up + update["up"]) @ (self.down + update["down"]) - self.up @ self.down
        return {"product": product, **{name: t for name, t in update.items() if name not in ("up", "down")}}


class Ranks(Algorithm):
    """A rank for each visit; the server takes the merged product apart again."""

    def __init__(self):
        super().__init__(callbacks=[Truncate()])

    def plan(self, server):
        ranks = (1, 2, 4)
        return [
            Visit(int(client), 2, settings={"rank": ranks[(int(client) + server.round) % 3]})
            for client in self.selector(server)
        ]

    def aggregate(self, server, closed):
        updates = decoded(self, closed)
        if updates:
            model = server.models["global"]
            merged = self.aggregator(server, {**model, "product": model["up"] @ model["down"]}, updates)
            u, s, v = torch.linalg.svd(merged.pop("product"), full_matrices=False)
            rank = len(model["down"])
            root = s[:rank].sqrt()
            server.models["global"] = {**merged, "up": u[:, :rank] * root, "down": root[:, None] * v[:rank]}


# ------------------------------------------------------ several models, private heads, evaluation by the client


class PrivateHead(ClientCallback):
    def install(self, device, visit, tensors):
        return {**tensors, **device.memory.get("head", {})}

    def upload(self, device, visit, update):
        return {name: change for name, change in update.items() if not name.startswith("head.")}

    def on_client_end(self, trainer, module, device, visit):
        device.memory["head"] = {f"head.{n}": p.detach().clone() for n, p in module.head.named_parameters()}
        return {"val_loss": device.evaluate(module)["val_loss"]}


class Clusters(Algorithm):
    """Two clusters with a body each; heads never leave the devices."""

    def __init__(self):
        super().__init__(callbacks=[PrivateHead()])

    def model_of(self, server, client):
        name = f"cluster/{client % 2}"
        return name if name in server.models else "global"

    def plan(self, server):
        return [
            Visit(int(c), server.steps(int(c)), start=self.model_of(server, int(c)), lane=f"{int(c) % 2}")
            for c in self.selector(server)
        ]

    def aggregate(self, server, closed):
        updates = decoded(self, closed)
        if updates:
            start = server.models[closed.outcomes[0].visit.start]
            server.models[f"cluster/{closed.lane}"] = self.aggregator(server, start, updates)

    def finish(self, server, outcomes):
        clusters = [model for name, model in sorted(server.models.items()) if name.startswith("cluster/")]
        if clusters:
            server.models["global"] = {n: sum(c[n] for c in clusters) / len(clusters) for n in clusters[0]}
        super().finish(server, outcomes)

    def evaluation(self, server):
        return [Evaluation(self.model_of(server, client), client) for client in range(server.population)]


# ------------------------------------------------------------------------------------- buffered asynchrony


class Buffered(Algorithm):
    """Three slots go through their own clients at their own pace; every second update that arrives is merged."""

    carries_over = True
    slots = 3

    def plan(self, server):
        first = 2 * server.round  # a slot's visits follow one another, across rounds too
        visits = []
        for slot in range(self.slots):
            own = range(slot, server.population, self.slots)
            order = server.rng("slot", slot).permutation(own)[:2]
            visits += [Visit(int(c), 1 + slot, lane=f"{slot}", stage=first + i) for i, c in enumerate(order)]
        return visits

    def aggregate(self, server, closed):
        buffer = server.memory.get("buffer", [])
        buffer = buffer + [(outcome.visit.client, update) for outcome, update in decoded(self, closed)]
        if len(buffer) >= 2:
            model = server.models["global"]
            merged = {name: t + sum(update[name] for _, update in buffer) / len(buffer) for name, t in model.items()}
            server.models["global"], buffer = merged, []
        server.memory["buffer"] = buffer


# ----------------------------------------------------------------------------- rounds in which nobody delivers


class Blackout(Fleet):
    """A fleet that loses everybody in round 1: at once (0), half-way (0.5), on the upload (1), or offline (None)."""

    at_share: float | None = 0.0

    def cut(self, client, steps, round, *args, **kwargs):
        if round != 1 or self.at_share is None:
            return None
        return Cut(int(self.at_share * steps), up=0.5 if self.at_share == 1 else None)

    def at(self, round):
        state = super().at(round)
        if round == 1 and self.at_share is None:
            state = type(state)(**{**vars(state), "online": state.online & False})
        return state


def blackout(clients, at_share):
    fleet = Blackout.uniform(clients)
    fleet.at_share = at_share
    return fleet


# --------------------------------------------------------------------------------------------------- enrolment


class Histogram(ClientCallback):
    def on_client_end(self, trainer, module, device, visit):
        if visit.settings.get("enrol"):
            labels = torch.cat([labels for _, labels in device.data()])
            return {"labels": torch.bincount(labels, minlength=3).tolist()}
        return None


class Enrolled(Algorithm):
    """Every device reports its labels before the first round; each round asks those with most of one label."""

    def __init__(self):
        super().__init__(callbacks=[Histogram()], aggregator=WeightedMean("uniform"))

    def enrol(self, server):
        return [Visit(client, 0, start=None, settings={"enrol": True}) for client in range(server.population)]

    def plan(self, server):
        share = server.reports["labels"][:, server.round % 3] / server.reports["samples"]
        richest = share.argsort(descending=True, stable=True)[: server.per_round]
        return [Visit(int(client), server.steps(int(client))) for client in richest.sort().values]


# --------------------------------------------------------------------- measured speeds, and a part of the model


class Pace:
    """Devices slower than the median train half their steps, on the head alone, and are timed once more.

    Its notes are means of the past and the last measurement of a step and of its forward pass, a row a device.
    """

    def __call__(self, server, visits):
        pace = server.memory["pace"][:, 0]
        slow = {client for client in range(server.population) if pace[client] > pace.median()}
        return [
            replace(visit, steps=-(-visit.steps // 2), probe=1, settings={"head only": True})
            if visit.client in slow
            else visit
            for visit in visits
        ]

    def observe(self, server, outcomes):
        last = torch.stack([server.reports[name] for name in ("step_seconds", "forward_seconds")], 1)
        server.memory["pace"] = (server.memory.get("pace", last) + last) / 2
        server.memory["told"] = [*server.memory.get("told", []), len(outcomes)]


class Head:
    """Submodel: the head, for whom that is all."""

    def key(self, visit):
        return visit.settings.get("head only", False)

    def __call__(self, tensors, visit):
        return {name: t for name, t in tensors.items() if name.startswith("head.") or not self.key(visit)}


class TrainsHead(ClientCallback):
    def on_client_start(self, trainer, module, device, visit):
        module.body.requires_grad_(not visit.settings.get("head only", False))

    def upload(self, device, visit, update):
        return Head()(update, visit)


class Probed(Algorithm):
    """All devices run two steps before the first round, so that the plan knows their speeds."""

    def __init__(self):
        super().__init__(configure=[Pace()], submodel=Head(), callbacks=[TrainsHead()])

    def enrol(self, server):
        return [Visit(client, 0, start=None, probe=2) for client in range(server.population)]
