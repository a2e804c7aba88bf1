"""Decides which node gets which job. Pure: it neither reads a clock nor sends anything.

Nodes ask for jobs when they have room, and the head is asked for as many. A job that comes back, because its node is
lost or ends, is dealt again before new jobs. It waits for a node that has not lost it, while there is one, so that a
node that loses every job does not get it again and again. The caller says that a node is lost only when no process of
it can be left, so a job is never at two nodes.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from gpu_launcher.jobs.job import Job

MAX_MOVES = 5
"""Number of times that a started job is dealt again. After that it fails: it may be what ends its nodes."""


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
    """Fail a job that was moved too often."""

    job: Job


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Take a job back from a node if it has not been started there."""

    node: str
    job: Job
    target: str
    """The node for which it is taken back."""


Deal = Ask | Give | MovedTooOften | TakeBack


def quotas(limit: int | None, devices: Sequence[int], held: Sequence[int]) -> list[int | None]:
    """Deal a limit on devices to nodes that have this many `devices`: each gets as many as it has, while there are any.

    So a job that needs several devices of one node finds them, if the limit allows it. But no node gets more than the
    others leave, which may be using up to `held` devices. It gets its part when they hold less.
    """
    if limit is None:
        return [None] * len(devices)
    found: list[int | None] = []
    total, rest = sum(held), limit
    for number, own in zip(devices, held, strict=True):
        part = min(rest, number)
        rest -= part
        quota = max(0, min(part, limit - (total - own)))
        total += max(0, quota - own)
        found.append(quota)
    return found


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
        self._started: set[int] = set()
        """Jobs that were started at the nodes where they are."""
        self._losses: dict[int, list[str]] = {}
        """The nodes that have lost each job after they had started it."""
        self._targets: dict[int, str] = {}
        """The node for which each job is taken back from the one where it is. Or the node where it is, if it was taken
        back for that one or has been started: then it is not taken back again."""
        self._refused: dict[int, set[str]] = {}
        """Nodes that can never run a job, for jobs that were refused."""
        self._too_late: dict[int, set[str]] = {}
        """Nodes that end too soon for a job, for jobs that were refused for that reason."""
        self._asked = 0
        """How many jobs the head was asked for and has not offered."""
        self.exhausted = False
        """Whether the head has no more jobs."""

    @property
    def idle(self) -> bool:
        """Whether no job is at a node or waits for one."""
        return not self._at and not self._waiting

    @property
    def waiting(self) -> list[Job]:
        """The jobs that are at no node."""
        return list(self._waiting)

    def jobs_at(self, node: str) -> list[Job]:
        """Return the jobs at a node."""
        return [job for where, job in self._at.values() if where == node]

    def has_work_for(self, node: str) -> bool:
        """Whether a node has jobs, or could get some of those that are at no node, or of the head's."""
        if any(where == node for where, _ in self._at.values()):
            return True
        if self._most is not None and len(self._at) >= self._most:
            return False
        return not self.exhausted or any(node not in self._refused_by(job) for job in self._waiting)

    def counts(self) -> Counter[str]:
        """Return how many jobs are at each node."""
        return Counter(node for node, _ in self._at.values())

    def node_of(self, number: int) -> str | None:
        """Return the node of a job. None if it is at none."""
        return self._at[number][0] if number in self._at else None

    def job(self, number: int) -> Job | None:
        """Return a job that is at a node. None if it is at none."""
        return self._at[number][1] if number in self._at else None

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
        self._started.discard(number)
        self._losses.pop(number, None)
        self._targets.pop(number, None)
        self._refused.pop(number, None)
        self._too_late.pop(number, None)
        return list(self._deal())

    def cancelled(self, number: int) -> Job | None:
        """Remove a job that waits for a node, and return it. Returns None if no such job waits."""
        for job in self._waiting:
            if job.number == number:
                self._waiting.remove(job)
                return job
        return None

    def returned(self, number: int) -> list[Deal]:
        """Take a job back from a node that will not finish it."""
        return [*self._take_back(self._at[number][1]), *self._deal()]

    def waiting_for(self, node: str, late: Collection[int], *, limited: bool = False) -> float:
        """Return how many jobs a node could get that is not there, infinitely many if the head may have more.

        `late` are jobs that have waited long, here or at a node, and have not been started. If the devices that are
        there are as many as may be used (`limited`), only jobs at no node count.
        """
        here = {job.number for job in self._waiting}
        movable = {number for number in late if number in self._at and number not in self._targets and not limited}
        able = sum(node not in self._refused.get(number, ()) for number in here | movable)
        may_come = not self.exhausted and not self._asked and not limited
        cap = math.inf if self._most is None else self._most - len(self._at) + len(movable)
        return min(cap, math.inf if may_come else able)

    def deal_late(self, late: Collection[int], at_once: Mapping[str, int]) -> list[Deal]:
        """Find nodes that are idle for jobs that have waited long.

        `late` are jobs that have waited long, here or at a node, and have not been started. `at_once` is how many jobs
        each node can run. A job that waits here goes to any node, even to one that has lost it. One that waits at a
        node is taken back for a node that has room, although what could be dealt was dealt.
        """
        deals: list[Deal] = list(self._deal_to(self._able, late))
        here = Counter(node for node, _ in self._at.values())
        coming = Counter(
            target for number, target in self._targets.items() if number in self._at and self._at[number][0] != target
        )
        for number in late:
            if number not in self._at or number in self._targets:
                continue
            node, job = self._at[number]
            idle = [
                other
                for other in self._able(job)
                if other != node and coming[other] < min(at_once.get(other, 0) - here[other], self._room[other])
            ]
            losses = self._losses.get(number, ())
            target = max(idle, key=lambda other: (other not in losses, self._room[other]), default=None)
            if target is not None:
                self._targets[number] = target
                coming[target] += 1
                deals.append(TakeBack(node, job, target))
        return deals

    def started(self, number: int) -> None:
        """Take note that a job runs at its node, even if it was to be taken back."""
        self._started.add(number)
        if number in self._targets:
            self._targets[number] = self._at[number][0]

    def taken(self, number: int) -> list[Deal]:
        """Take note that a node has given a job back without starting it. It goes to the node that it was taken for."""
        _, job = self._at.pop(number)
        target = self._targets[number]
        if self._room.get(target, 0) > 0 and target in self._able(job):
            return [self._give(target, job), *self._deal()]
        del self._targets[number]
        self._waiting.appendleft(job)
        return list(self._deal())

    def refused(self, number: int, *, too_late: bool = False) -> list[Deal]:
        """Take a job back from a node that can never run it, or ends too soon (`too_late`). It waits for another.

        A node that ends too soon may get it when it was lost and is there again.
        """
        node, job = self._at.pop(number)
        self._targets.pop(number, None)
        (self._too_late if too_late else self._refused).setdefault(number, set()).add(node)
        self._waiting.appendleft(job)
        return list(self._deal())

    def too_late_for(self, node: str) -> list[Job]:
        """Return the waiting jobs for which a node ends too soon."""
        return [job for job in self._waiting if node in self._too_late.get(job.number, ())]

    @property
    def has_refused(self) -> bool:
        """Whether there are jobs that a node can never run."""
        return bool(self._refused)

    def refused_by_all(self, nodes: Set[str]) -> list[Job]:
        """Remove the waiting jobs that all of these nodes have refused, and return them."""
        hopeless = [job for job in self._waiting if self._refused.get(job.number, set()) >= nodes]
        hopeless = [job for job in hopeless if job.number in self._refused]
        for job in hopeless:
            self._waiting.remove(job)
        return hopeless

    def leaves(self, node: str) -> list[Deal]:
        """Give no more jobs to a node."""
        self._room.pop(node, None)
        return list(self._deal())

    def stop(self) -> None:
        """Give no more jobs to any node that has asked for them."""
        self._room.clear()

    def lost(self, node: str) -> list[Deal]:
        """Take back all jobs of a node of which nothing is left."""
        self._room.pop(node, None)
        for nodes in self._too_late.values():
            nodes.discard(node)
        failed = [deal for job in self.jobs_at(node) for deal in self._take_back(job)]
        return [*failed, *self._deal()]

    def _take_back(self, job: Job) -> list[Deal]:
        node, _ = self._at.pop(job.number)
        self._targets.pop(job.number, None)
        if job.number in self._started:
            self._started.remove(job.number)
            losses = self._losses.setdefault(job.number, [])
            losses.append(node)
            if len(losses) > MAX_MOVES:
                return [MovedTooOften(job)]
        self._waiting.append(job)
        return []

    def _deal(self) -> Iterator[Deal]:
        yield from self._deal_to(self._suitable, [job.number for job in self._waiting])
        more = self._open() - self._asked
        if more > 0 and not self.exhausted:
            self._asked += more
            yield Ask(more)

    def _deal_to(self, nodes: Callable[[Job], list[str]], numbers: Collection[int]) -> Iterator[Deal]:
        """Give those of these jobs that wait to the nodes that are right for each."""
        for job in [job for job in self._waiting if job.number in numbers]:
            node = max(nodes(job), key=self._room.__getitem__, default=None)
            if self._open() > 0 and node is not None and self._room[node] > 0:
                self._waiting.remove(job)
                yield self._give(node, job)

    def _suitable(self, job: Job) -> list[str]:
        """Return the nodes that have not lost a job, or all if each has. Without those that can never run it."""
        losses, able = self._losses.get(job.number, ()), self._able(job)
        return [node for node in able if node not in losses] or able

    def _able(self, job: Job) -> list[str]:
        """Return the nodes that have not refused a job."""
        refused = self._refused_by(job)
        return [node for node in self._room if node not in refused]

    def _refused_by(self, job: Job) -> set[str]:
        return {*self._refused.get(job.number, ()), *self._too_late.get(job.number, ())}

    def _give(self, node: str, job: Job) -> Give:
        self._room[node] -= 1
        self._at[job.number] = (node, job)
        return Give(node, job)

    def _open(self) -> int:
        """How many more jobs nodes can take now."""
        room = sum(self._room.values())
        return room if self._most is None else min(room, self._most - len(self._at))
