"""Decides which nodes are given back, and which are asked for again. Pure: the time is an argument.

A node of Slurm is an allocation, which others wait for. So a node that has nothing to do for a while is given back, and
a request that waits in the queue although no job needs it is withdrawn. Either is asked for again when jobs wait. One
node is always kept, because the next one could wait in the queue for hours.

An allocation ends at a time that is known. If a job may run longer than that, the node is renewed: it gets no more
jobs, is given back when it has none, and is asked for again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

IDLE_SECONDS = 60.0
"""Seconds after which a node that is not needed is given back."""
WANTED_SECONDS = 5.0
"""Seconds for which jobs must wait before another node is asked for. Nodes that finish jobs ask for more meanwhile."""
RENEW_SECONDS = 2.0
"""Seconds for which a node must be idle before it is renewed for few jobs. The next job may not need that."""


class Presence(Enum):
    """Whether a node is there."""

    RESTING = auto()
    """It was given back."""
    STARTING = auto()
    """It was asked for. It may wait in a queue, or import the program."""
    OPEN = auto()
    """It runs jobs."""


@dataclass(frozen=True, slots=True)
class NodeState:
    """A node that runs jobs, or could."""

    name: str
    presence: Presence
    elastic: bool = True
    """Whether it is worth giving back."""
    jobs: int = 0
    """How many jobs it has."""
    at_once: int = 0
    """How many jobs it can run at the same time. 0 if that is not known yet."""
    waiting: float = 0
    """How many jobs it could run that are at no node, or wait for too long at another. Maybe infinitely many."""
    too_late: int = 0
    """How many jobs wait for which it ends too soon."""
    draining: bool = False
    """Whether it gets no more jobs."""


@dataclass(frozen=True, slots=True)
class Acquire:
    """Ask for a node that rests."""

    name: str


@dataclass(frozen=True, slots=True)
class Rest:
    """Give a node back that has no job, or withdraw the request for it."""

    name: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Give a node no more jobs: as many jobs as it can run at the same time wait until it is renewed."""

    name: str


@dataclass(frozen=True, slots=True)
class Renew:
    """Give a node back that has no job, and ask for it again."""

    name: str


Step = Acquire | Rest | Drain | Renew


class Scaler:
    """What has been true of nodes, and since when."""

    def __init__(self) -> None:
        """Begin without nodes."""
        self._since: dict[tuple[str, str], float] = {}

    def decide(self, nodes: Sequence[NodeState], now: float) -> list[Step]:
        """Return what to do. Expects that it is done, and to be called often."""
        names = {node.name for node in nodes}
        self._since = {(what, name): since for (what, name), since in self._since.items() if name in names}
        renewals = list(self._renewals(nodes, now))
        touched = {step.name for step in renewals}
        others = [node for node in nodes if node.name not in touched]
        return [*renewals, *self._rests(others, now), *self._requests(others, now)]

    def _lasts(self, what: str, node: NodeState, holds: bool, now: float) -> float:
        """Return for how many seconds something has been true of a node. Negative if it is not."""
        if not holds:
            self._since.pop((what, node.name), None)
            return -1.0
        return now - self._since.setdefault((what, node.name), now)

    def _renewals(self, nodes: Iterable[NodeState], now: float) -> Iterable[Step]:
        for node in nodes:
            idle = self._lasts("idle", node, node.presence is Presence.OPEN and node.jobs == 0, now)
            if node.presence is not Presence.OPEN:
                continue
            full = node.too_late >= max(1, node.at_once)
            if node.jobs == 0 and (node.draining or full or (node.too_late and idle >= RENEW_SECONDS)):
                yield Renew(node.name)
            elif full and not node.draining:
                yield Drain(node.name)

    def _rests(self, nodes: Sequence[NodeState], now: float) -> Iterable[Step]:
        """Give back what has not been needed for a while, but not the last node."""
        needed, expected = 0, 0
        candidates = []
        guess = _guess(nodes)
        for node in nodes:
            if node.presence is Presence.RESTING:
                continue
            surplus = node.presence is Presence.STARTING and node.waiting <= expected
            unneeded = self._lasts("surplus", node, surplus, now)
            if node.presence is Presence.OPEN:
                unneeded = now - self._since[("idle", node.name)] if node.jobs == 0 else -1.0
            elif not surplus:
                expected += node.at_once or guess
            if node.elastic and unneeded >= IDLE_SECONDS:
                candidates.append(node)
            else:
                needed += 1
        if not needed and candidates:
            # One that runs is worth more than one in the queue.
            candidates.remove(next((node for node in candidates if node.presence is Presence.OPEN), candidates[0]))
        for node in candidates:
            yield Rest(node.name)

    def _requests(self, nodes: Sequence[NodeState], now: float) -> Iterable[Step]:
        """Ask for as many nodes as the jobs that wait can use."""
        guess = _guess(nodes)
        expected = sum(node.at_once or guess for node in nodes if node.presence is Presence.STARTING)
        for node in nodes:
            wanted = node.presence is Presence.RESTING and node.waiting > expected
            if self._lasts("wanted", node, wanted, now) >= WANTED_SECONDS:
                expected += node.at_once or guess
                yield Acquire(node.name)


def _guess(nodes: Iterable[NodeState]) -> int:
    """Guess how many jobs a node can run that has not said so yet: as many as another one."""
    return max([1, *(node.at_once for node in nodes if node.elastic)])
