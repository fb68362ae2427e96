"""Flower's Grid in memory: nodes whose ClientApp runs at once, on a thread, and every message goes over the wire."""

import itertools
import threading

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class FakeGrid(Grid):
    """Nodes 100, 101 ... are clients 0, 1 ...

    Args:
        apps: of the nodes, in turn.
        folder: each node keeps its state in a folder of its own under it.
    """

    def __init__(self, apps, folder):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.nodes = {}
        self.folder = folder
        for client, app in enumerate(apps):
            self.add(100 + client, app, client)
        self.replies, self.numbers, self.pushed = {}, itertools.count(), []
        self.meddle = lambda message, reply: reply  # what becomes of a reply: changed, None (lost), or an Error

    def add(self, node, app, client, **config):
        config = {"partition-id": client, "state-dir": str(self.folder / str(node)), **config}
        config = {name: value for name, value in config.items() if value is not None}
        self.nodes[node] = app, Context(1, node, config, RecordDict(), {})

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def send_and_receive(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        found = []
        for message in messages:
            name = f"message {next(self.numbers)}"
            message.metadata.__dict__["_message_id"] = name
            message.content = over_the_wire(message.content)
            self.pushed.append(message)
            reply = self.meddle(message, self.handle(message))
            if isinstance(reply, Error):
                reply = Message(reply, reply_to=message)
            if reply is not None:
                self.replies[name] = reply
            found.append(name)
        return found

    def handle(self, message):
        app, context = self.nodes[message.metadata.dst_node_id]
        replies = []

        def run():  # as Flower's own process does it
            try:
                reply = app(message, context)
                reply.content = over_the_wire(reply.content)
            except Exception as error:
                reply = Message(Error(code=2, reason=f"{type(error)}:<'{error}'>"), reply_to=message)
            replies.append(reply)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return replies[0]

    def pull_messages(self, message_ids):
        return [self.replies.pop(name) for name in list(message_ids) if name in self.replies]


def over_the_wire(records):
    proto = recorddict_to_proto(records)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))
