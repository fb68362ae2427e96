"""Which of Flower's nodes is which client."""

from __future__ import annotations

import time
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp.grid import Grid
from lightning.pytorch.utilities import rank_zero_warn

from edgebolt.flower.records import Facts, RecordError, read_facts, versions

__all__ = ["Nodes", "reason_of"]

_AWAY = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
_PATIENCE = 120.0


class Nodes:
    """Asks every node that appears who it is, and remembers who was who.

    A device that was started anew may come back as another node: the one that answers last is the client.

    Args:
        grid: Flower's.

    Attributes:
        facts: client -> what it said first; what it says later must be the same.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.facts: dict[int, Facts] = {}
        self.fixed = False  # the run has begun: nobody joins any more
        self.problems: dict[int, str] = {}  # node -> why it is no client
        self._node: dict[int, int] = {}  # client -> node
        self._online: set[int] = set()
        self._asked: dict[int, tuple[str, float]] = {}  # node -> question and when; while there is no answer
        self._met: set[int] = set()

    def look(self) -> None:
        """See who is there, ask the new ones, take what the others have answered."""
        self._online = set(self.grid.get_node_ids())
        self._met &= self._online  # who was away may come back as another client
        now = time.monotonic()
        lost = [node for node, (_, since) in self._asked.items() if now - since > _PATIENCE]
        for node in lost:
            del self._asked[node]
        for node in sorted(self._online - self._met - self._asked.keys()):
            question = Message(RecordDict(), node, "query", ttl=_PATIENCE)
            pushed = list(self.grid.push_messages([question]))
            if pushed and pushed[0]:
                self._asked[node] = pushed[0], now
        if not self._asked:
            return
        of = {question: node for node, (question, _) in self._asked.items()}
        for reply in self.grid.pull_messages(list(of)):
            node = of[reply.metadata.reply_to_message_id]
            del self._asked[node]
            self._take(node, reply)

    def _take(self, node: int, reply: Any) -> None:
        if reply.has_error():
            if reply.error.code not in _AWAY:  # who was away is asked again
                self._refuse(node, reason_of(reply))
            return
        try:
            facts = read_facts(reply.content)
        except RecordError as error:
            self._refuse(node, str(error))
            return
        known, here = self.facts.get(facts.client), versions()
        if facts.versions != here:
            self._refuse(node, f"it has {facts.versions}, the server {here}: install the same versions")
        elif known is None and self.fixed:
            self._refuse(node, f"it is client {facts.client}, who was not there when the run began")
        elif known is not None and known != facts:
            self._refuse(node, f"it is client {facts.client}, whose data or weights were others: {known}, now {facts}")
        else:
            if not self.fixed and self._node.get(facts.client) in self._online:
                raise ValueError(
                    f"Nodes {self._node[facts.client]} and {node} both say that they are client {facts.client}: give "
                    "each SuperNode an index of its own, --node-config 'partition-id=0', 'partition-id=1' ... (A "
                    "SuperNode that was started anew counts twice for a minute.)"
                )
            self.facts[facts.client], self._node[facts.client] = facts, node
            self._met.add(node)

    def _refuse(self, node: int, problem: str) -> None:
        self._met.add(node)
        self.problems[node] = problem
        rank_zero_warn(f"Node {node} is no client of this run: {problem}")

    def of(self, client: int) -> int | None:
        """The node that the client is at present, as :meth:`look` has seen it; ``None``: it is not there."""
        node = self._node.get(client)
        return node if node in self._online else None

    def wait(self, at_least: int, seconds: float, poll: float) -> list[Facts]:
        """Wait until so many clients are there, numbered from 0 without a gap; those who come later are refused.

        Returns:
            what they have said, by client.

        Raises:
            TimeoutError: after that time.
            ValueError: if two nodes say that they are the same client.
        """
        until = time.monotonic() + seconds
        while True:
            self.look()
            found = sorted(self.facts)
            enough, late = len(found) >= at_least and found == list(range(len(found))), time.monotonic() > until
            if enough and (late or not self._asked):
                if self._asked:
                    rank_zero_warn(f"The run begins without nodes {sorted(self._asked)}, which have not answered.")
                self.fixed = True
                return [self.facts[client] for client in found]
            if late:
                problems = "".join(f"\nNode {node}: {problem}" for node, problem in self.problems.items())
                raise TimeoutError(
                    f"After {seconds:g} s there are clients {found}, and the run needs at least {at_least}, numbered "
                    f"from 0 without a gap (--node-config 'partition-id=0' ...); {len(self._asked)} nodes have not "
                    f"answered. Start the missing ones, or wait longer.{problems}"
                )
            time.sleep(poll)


def reason_of(reply: Any) -> str:
    """What an error reply says, on one line."""
    return " ".join((reply.error.reason or f"error {reply.error.code} of Flower").split())
