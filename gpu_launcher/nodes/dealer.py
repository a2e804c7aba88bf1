"""Decides which node gets which job. Pure: it neither reads a clock nor sends anything.

Nodes ask for jobs when they have room, and the head is asked for as many. A job that comes back, because its node is
lost or ends, is dealt again before new jobs are asked for. The caller says that a node is lost only when no process of
it can be left, so a job is never at two nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from gpu_launcher.jobs.job import Job

MAX_MOVES = 5
"""Number of lost nodes after which a job fails, because it may be what kills them."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the head for `count` jobs."""

    count: int


@dataclass(frozen=True, slots=True)
class Give:
    """Offer a job to a node."""

    node: str
    job: Job


@dataclass(frozen=True, slots=True)
class MovedTooOften:
    """Fail a job that has lost too many nodes."""

    job: Job


Deal = Ask | Give | MovedTooOften


class Dealer:
    """Where each job is, and which nodes have room for more."""

    def __init__(self, most: int | None = None) -> None:
        """Begin without nodes. At most `most` jobs are at nodes at the same time."""
        self._most = most
        self._room: dict[str, int] = {}
        """How many more jobs each node has asked for."""
        self._at: dict[int, tuple[str, Job]] = {}
        """The node of each job that is at one."""
        self._waiting: deque[Job] = deque()
        """Jobs that are at no node."""
        self._moves: dict[int, int] = {}
        """How many nodes each job has lost, if any."""
        self._asked = 0
        """How many jobs the head was asked for and has not offered."""
        self.exhausted = False
        """Whether the head has no more jobs."""

    @property
    def idle(self) -> bool:
        """Whether no job is at a node or waits for one."""
        return not self._at and not self._waiting

    def jobs_at(self, node: str) -> list[Job]:
        """Return the jobs at a node."""
        return [job for where, job in self._at.values() if where == node]

    def node_of(self, number: int) -> str | None:
        """Return the node of a job. None if it is at none."""
        return self._at[number][0] if number in self._at else None

    def wanted(self, node: str, count: int) -> list[Deal]:
        """Take note that a node has room for `count` more jobs."""
        self._room[node] = self._room.get(node, 0) + count
        return list(self._deal())

    def offered(self, job: Job) -> list[Deal]:
        """Take a job from the head."""
        self._asked = max(0, self._asked - 1)
        self._waiting.append(job)
        return list(self._deal())

    def exhaust(self) -> None:
        """Take note that the head offers no more jobs, even if it was asked for more."""
        self.exhausted, self._asked = True, 0

    def ended(self, number: int) -> list[Deal]:
        """Take note that a job has its result."""
        self._at.pop(number, None)
        self._moves.pop(number, None)
        return list(self._deal())

    def withdrawn(self, number: int) -> Job | None:
        """Remove a job that is at no node. None if there is no such job."""
        for job in self._waiting:
            if job.number == number:
                self._waiting.remove(job)
                return job
        return None

    def returned(self, number: int) -> list[Deal]:
        """Take a job back from a node that will not finish it."""
        _, job = self._at.pop(number)
        self._waiting.append(job)
        return list(self._deal())

    def leaves(self, node: str) -> None:
        """Give no more jobs to a node."""
        self._room.pop(node, None)

    def lost(self, node: str) -> list[Deal]:
        """Take back all jobs of a node of which nothing is left."""
        self.leaves(node)
        failed: list[Deal] = []
        for job in self.jobs_at(node):
            del self._at[job.number]
            moves = self._moves[job.number] = self._moves.get(job.number, 0) + 1
            if moves > MAX_MOVES:
                failed.append(MovedTooOften(job))
            else:
                self._waiting.append(job)
        return [*failed, *self._deal()]

    def _deal(self) -> Iterator[Deal]:
        while self._waiting and self._open() > 0:
            node = max(self._room, key=lambda name: self._room[name])
            self._room[node] -= 1
            job = self._waiting.popleft()
            self._at[job.number] = (node, job)
            yield Give(node, job)
        more = self._open() - self._asked
        if more > 0 and not self.exhausted:
            self._asked += more
            yield Ask(more)

    def _open(self) -> int:
        """How many more jobs nodes can take now."""
        room = sum(self._room.values())
        return room if self._most is None else min(room, self._most - len(self._at))
