"""The state of a sweep, computed from its events. Pure, and shared by all displays."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from gpu_launcher.jobs.events import (
    Event,
    JobEnded,
    JobRetried,
    JobReturned,
    JobsRequeued,
    JobStarted,
    JobWaiting,
    NodesChanged,
    Outcome,
    OutOfContact,
    SearchStatus,
    StopRequested,
    SweepEnded,
    SweepStarted,
    Throttled,
)
from gpu_launcher.jobs.progress.alike import Failures, Group, ranges
from gpu_launcher.jobs.progress.estimate import time_left
from gpu_launcher.model import Device
from gpu_launcher.text import one_line
from gpu_launcher.wording import count, duration, job_name

FAILURES_NAMED = 20
"""Maximum number of distinct failures that the closing summary names. More are only counted."""
FIRST_JOBS = 4
"""Number of jobs after which a hint tells the user if all of them failed in the same way."""


@dataclass
class SweepTally:
    """The state of a sweep. Times are on the job loop's clock."""

    total: int = 0
    is_search: bool = False
    """Whether the jobs are trials of a search, which a user cannot retry."""
    devices: tuple[Device, ...] = ()
    started_at: float | None = None
    now: float = 0.0
    running: dict[int, JobStarted] = field(default_factory=dict)
    silent_nodes: frozenset[str] = frozenset()
    """Nodes that have not been heard for a while."""
    silent_jobs: frozenset[int] = frozenset()
    """Jobs that may still run there."""
    waits: JobWaiting | None = None
    stopping: StopRequested | None = None
    throttled: Throttled | None = None
    """How much may run, if the user has changed that."""
    over: bool = False
    closing: tuple[str, ...] = ()
    completed: int = 0
    cancelled: int = 0
    """Jobs that were cancelled while they ran."""
    not_run: int = 0
    """Jobs that were cancelled before they started."""
    pruned: int = 0
    retries: int = 0
    facts: tuple[tuple[str, str], ...] = ()
    """The state of the search, from the last `SearchStatus`."""
    failed: int = 0
    failures: Failures = field(default_factory=Failures)
    same: Group | None = None
    """The jobs that failed in the same way as the latest failed job. None if it is the first of its kind."""
    highest_number: int = 0
    # Only the latest jobs are kept, because they predict the next ones best.
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=256))
    ran_together: deque[int] = field(default_factory=lambda: deque(maxlen=8))

    @property
    def ended(self) -> dict[Outcome, int]:
        """How many jobs have ended, by outcome."""
        return {
            Outcome.COMPLETED: self.completed,
            Outcome.FAILED: self.failed,
            Outcome.CANCELLED: self.cancelled + self.not_run,
            Outcome.PRUNED: self.pruned,
        }

    @property
    def done(self) -> int:
        return sum(self.ended.values())

    @property
    def waiting(self) -> int:
        return max(0, self.total - self.done - len(self.running))

    @property
    def elapsed(self) -> float:
        return 0.0 if self.started_at is None else max(0.0, self.now - self.started_at)

    def advance(self, now: float) -> None:
        self.now = max(self.now, now)

    def take(self, event: Event) -> None:
        self.advance(event.time)
        match event:
            case SweepStarted():
                self.started_at = event.time
                self.total = event.total or 0
                self.is_search = event.is_search
                self.devices = event.devices
                self.highest_number = max(0, self.total - 1)
            case SearchStatus():
                self.facts = event.facts
            case Throttled():
                self.throttled = event
                if event.paused:
                    self.waits = None
            case JobWaiting():
                self.waits = event if event.reason else None
            case JobStarted():
                self.running[event.number] = event
                self._settle(event.number)
            case JobEnded():
                self.ran_together.append(len(self.running))
                self.running.pop(event.number, None)
                self._settle(event.number)
                self._count(event)
            case JobRetried():
                self.retries += 1
                self.running.pop(event.number, None)
                self._settle(event.number)
            case JobsRequeued():
                self.failed -= event.failed
                self.not_run -= event.not_run
                self.cancelled -= len(event.numbers) - event.failed - event.not_run
                self.failures.discard(event.numbers)
            case JobReturned():
                self.running.pop(event.number, None)
                self._settle(event.number)
            case NodesChanged():
                self.devices = event.devices
            case OutOfContact():
                self.silent_nodes, self.silent_jobs = event.nodes, event.jobs
            case StopRequested():
                self.stopping = event
                self.waits = None
            case SweepEnded():
                self.over = True
                self.closing = event.closing

    def _settle(self, number: int) -> None:
        if self.waits is not None and self.waits.number == number:
            self.waits = None
        self.highest_number = max(self.highest_number, number)
        # A source may not know the number of its jobs in advance.
        self.total = max(self.total, self.done + len(self.running))

    def _count(self, ended: JobEnded) -> None:
        if ended.outcome is Outcome.COMPLETED:
            self.completed += 1
            if ended.duration is not None:
                self.durations.append(ended.duration)
        elif ended.outcome is Outcome.PRUNED:
            self.pruned += 1
        elif ended.outcome is Outcome.FAILED:
            # The duration is not counted, because a job that fails at once says nothing about the others' durations.
            self.failed += 1
            self.same = self.failures.add(ended)
        elif ended.duration is None:
            self.not_run += 1
        else:
            self.cancelled += 1
        self.total = max(self.total, self.done + len(self.running))

    def time_left(self) -> float | None:
        """Estimate the seconds until the sweep ends. Returns None while there is too little data."""
        together = max([*self.ran_together, len(self.running), 1])
        running = [max(0.0, self.now - job.time) for job in self.running.values()]
        return time_left(self.durations, running, self.waiting, together)

    def summary(self) -> list[str]:
        """Return the closing lines: one line of counts, then each distinct failure with its cause and log."""
        left = self.total - self.done
        counts = [
            f"{number} {word}"
            for number, word in (
                (self.completed, "completed"),
                (self.pruned, "pruned"),
                (self.failed, "failed"),
                (self.cancelled, "cancelled"),
                (self.not_run + (left if self.over else 0), "not run"),
                (0 if self.over else left, "unfinished"),
            )
            if number
        ]
        head = f"{count(self.total, 'job')}: {', '.join(counts) or 'nothing to do'} in {duration(self.elapsed)}"
        if self.stopping is not None:
            finished = self.completed + self.pruned + self.failed
            head += f" (stopped by {self.stopping.signal}: {finished} of {self.total} finished)"
        if self.retries:
            head += f", {count(self.retries, 'attempt')} repeated"
        lines = [head]
        named = 0
        for group in list(self.failures.groups.values())[:FAILURES_NAMED]:
            named += 1 + len(group.others)
            lines.append(f"  {failure(group.first)}")
            if group.others:
                some = len(group.others) > 1
                jobs = f"{len(group.others)} jobs" if some else f"job {group.others[0]}"
                which = f": {ranges(group.others)}" if some else ""
                lines.append(f"  {jobs} FAILED as job {group.first.number} did{which}")
        if self.failed > named:
            lines.append(f"  ... and {self.failed - named} more")
        lines += [f"  {one_line(text)}" for text in self.closing]
        return lines

    def all_alike(self) -> str | None:
        """Return a hint for the user if the first jobs all failed in the same way and more jobs follow."""
        if self.done != FIRST_JOBS or self.failed != FIRST_JOBS or not self.failures.in_one_place():
            return None
        if self.stopping is not None or self.total == self.done:
            return None
        first = next(iter(self.failures.groups.values())).first.number
        return f"the first {FIRST_JOBS} jobs all failed, in the same way as job {first}; Ctrl-C stops the sweep"


def retry(event: JobRetried) -> str:
    """Format a retry: `job 3 (lr=0.1) failed: <cause>; attempt 2 of 3 follows; log: <path>`."""
    log = f"; log: {one_line(event.log)}" if event.log else ""
    follows = f"attempt {event.attempt} of {event.attempts} follows"
    return f"{job_name(event.number, event.label)} failed: {one_line(event.message)}; {follows}{log}"


def failure(ended: JobEnded, counts: str = "", same: Group | None = None) -> str:
    """Format a failure: `job 3 (lr=0.1) FAILED after 0.8 s: <cause>; log: <path>`.

    Duration and log are omitted if the cause contains them. `same` are jobs that failed in the same way before, whose
    cause was already shown.
    """
    cause = one_line(ended.message or "no cause is known") if same is None else f"same as job {same.first.number}"
    after = "" if ended.duration is None else f" after {duration(ended.duration)}"
    if after in cause:
        after = ""
    log = f"; log: {one_line(ended.log)}" if ended.log and ended.log not in cause else ""
    return f"{job_name(ended.number, ended.label)} FAILED{after}{counts}: {cause}{log}"
