"""The events of a sweep, as values. The node and the head emit them; displays and the manifest consume them.

`time` is in seconds on the system's monotonic clock, never wall time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from gpu_launcher.jobs.figures import Figures
from gpu_launcher.model import Device


class Outcome(str, Enum):
    """How a job ended. Every job ends in exactly one."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """Ended or never started, because the sweep was stopped or the job was cancelled."""
    PRUNED = "pruned"
    """A trial that ended early because others are better."""


@dataclass(frozen=True, slots=True)
class SweepStarted:
    """The first event. `total` jobs will run on `devices`, at most `parallel` at a time if that is not None."""

    time: float
    total: int | None
    """Number of jobs. None if it is not known yet."""
    devices: tuple[Device, ...]
    parallel: int | None
    is_search: bool = False
    """Whether the jobs are trials of a search. A user cannot retry those, because a trial ends once."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One line the user should read, such as `no NVIDIA driver found (...); using 2 CPU slots instead`."""

    time: float
    text: str


@dataclass(frozen=True, slots=True)
class SearchStatus:
    """The state of the search to which the jobs belong. It replaces the previous one."""

    time: float
    facts: tuple[tuple[str, str], ...]
    """Names and values such as `("best", "0.12 (lr=0.1)")`, in order of importance."""


@dataclass(frozen=True, slots=True)
class Throttled:
    """The user changed how much may run from now on. Running jobs continue."""

    time: float
    paused: bool
    """Whether no job is started."""
    devices: int | None
    """Maximum number of devices in use. None for no limit."""
    text: str
    """A line for the user."""


@dataclass(frozen=True, slots=True)
class JobWaiting:
    """The job that is next waits, because others (other sweeps, other users) hold its devices."""

    time: float
    number: int
    label: str
    """The job's overrides, such as `lr=0.1 hidden=32`."""
    reason: str
    """Who holds the devices. Empty if no other holds them any more, but the job still waits."""
    held_by_others: tuple[Device, ...] = ()
    """The devices of this sweep that others hold. Empty if that is not known."""
    wanted: str = ""
    """The devices that the job waits for, such as `2 GPUs`."""


@dataclass(frozen=True, slots=True)
class JobStarted:
    """The job has its devices (none for `gpus: 0`) and its code runs."""

    time: float
    number: int
    label: str
    devices: tuple[Device, ...]
    log: str | None
    """Path of its log."""
    pid: int | None = None
    """Process id of its main process."""


@dataclass(frozen=True, slots=True)
class JobEnded:
    """The job and all its processes have ended. A job that never started (cancelled or failed early) has no devices."""

    time: float
    number: int
    label: str
    devices: tuple[Device, ...]
    outcome: Outcome
    duration: float | None
    """Seconds since JobStarted; None if it never started."""
    message: str | None
    """For FAILED: the cause in one line."""
    log: str | None
    origin: str = ""
    """For FAILED: where it failed. Jobs with the same message and origin failed in the same way; see `Report`."""
    left_behind: tuple[str, ...] = ()
    """Processes that outlived the job and had to be ended."""
    figures: Figures = Figures()  # noqa: RUF009  (frozen)


@dataclass(frozen=True, slots=True)
class JobRetried:
    """The job failed and is retried. A JobStarted follows if it starts."""

    time: float
    number: int
    label: str
    duration: float | None
    """Seconds since JobStarted; None if it never started."""
    message: str
    """Why it failed, in one line."""
    log: str | None
    """Path of the log of the attempt that failed, which was renamed."""
    attempt: int
    """The next attempt, counted from 1."""
    attempts: int
    """How many attempts the job may have."""
    failed: int
    """How many of its attempts in this launch count as failed."""


@dataclass(frozen=True, slots=True)
class JobsRequeued:
    """The user runs jobs again that had failed or were cancelled. They wait again; how they ended no longer counts."""

    time: float
    numbers: frozenset[int]
    failed: int
    """How many of them had failed."""
    not_run: int
    """How many were cancelled before they started."""
    text: str
    """A line for the user."""


@dataclass(frozen=True, slots=True)
class JobReturned:
    """The job's node was lost, or ends, before the job had a result. The job waits again, for any node."""

    time: float
    number: int
    label: str


@dataclass(frozen=True, slots=True)
class NodesChanged:
    """A node has joined the sweep, or is lost to it."""

    time: float
    devices: tuple[Device, ...]
    """All devices that the sweep has now."""
    text: str
    """A line for the user."""


@dataclass(frozen=True, slots=True)
class OutOfContact:
    """Nodes that have not been heard for a while, and the jobs that may still run there. It replaces the previous one.

    Both come back if the node is heard again. Otherwise, JobReturned follows for each job when none can be left there.
    """

    time: float
    nodes: frozenset[str]
    jobs: frozenset[int]


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The sweep is to stop. `forced` after the second request: jobs are killed instead of waited for."""

    time: float
    running: int
    """Number of running jobs."""
    grace: float
    """Seconds that jobs get before they are killed."""
    forced: bool
    signal: str
    """What stopped the sweep: the name of a signal such as `SIGINT`, or text such as `3 failures`."""


@dataclass(frozen=True, slots=True)
class GaveUp:
    """No more jobs can be started. Running jobs continue."""

    time: float
    problem: str
    """The reason, as a sentence without its subject, which is a job."""

    @property
    def text(self) -> str:
        """A line for the user."""
        return f"no more jobs are started; each {self.problem}"


@dataclass(frozen=True, slots=True)
class SweepEnded:
    """The last event: nothing runs any more."""

    time: float
    closing: tuple[str, ...] = ()
    """Lines to show below the summary, such as where the results are."""


Event = (
    SweepStarted
    | Notice
    | SearchStatus
    | Throttled
    | JobWaiting
    | JobStarted
    | JobEnded
    | JobRetried
    | JobsRequeued
    | JobReturned
    | NodesChanged
    | OutOfContact
    | StopRequested
    | SweepEnded
)
"""What displays get. They get `GaveUp` as a Notice."""


class Progress(Protocol):
    """Shows a sweep to a person, or passes its events on. All methods are called from one thread and must not block."""

    def handle(self, event: Event) -> None:
        """Take note of an event, and show it."""

    def tick(self, now: float) -> None:
        """Show that time has passed. Called a few times a second."""

    def close(self) -> None:
        """Restore the terminal. Called at least once, also after an error."""
