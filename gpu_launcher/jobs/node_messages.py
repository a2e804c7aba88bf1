"""Messages between a node and its head. What a head says about single jobs is in `jobs.source`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.jobs.events import (
    GaveUp,
    JobRetried,
    JobReturned,
    JobStarted,
    JobWaiting,
    NodesChanged,
    Notice,
    OutOfContact,
    StopRequested,
)
from gpu_launcher.jobs.job import JobResult
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.jobs.term import Term
from gpu_launcher.model import Device


@dataclass(frozen=True, slots=True)
class NodeReady:
    """The fork server runs. The node's first message."""

    method: str
    """How jobs are started: fork or spawn."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The pool is open, and jobs can run. The answer to BeginRun, unless that is Closed."""

    devices: tuple[Device, ...]
    at_once: int
    """How many jobs could run at the same time, as far as that is known."""
    method: str
    """How jobs are started: fork or spawn."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The node has room for `count` more jobs."""

    count: int


@dataclass(frozen=True, slots=True)
class ThrottleConfirmed:
    """The node has taken note of the next `Throttle`. It has reported the jobs that it started before."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A job sent a message with `JobContext.say`."""

    number: int
    what: Any


@dataclass(frozen=True, slots=True)
class Ended:
    """A job has ended, or will not be started."""

    result: JobResult


@dataclass(frozen=True, slots=True)
class Closed:
    """All jobs of a run have ended. The last message about the run."""

    error: GpuLauncherError | None = None
    """What ended the run, if something went wrong."""
    stopped: bool = False
    """Whether the run was stopped, by the user or by failures."""


Message = (
    NodeReady
    | Opened
    | Wanted
    | ThrottleConfirmed
    | Heard
    | Ended
    | Closed
    | Notice
    | JobWaiting
    | JobStarted
    | JobRetried
    | JobReturned
    | NodesChanged
    | OutOfContact
    | StopRequested
    | GaveUp
)


@dataclass(frozen=True, slots=True)
class Begin:
    """The first message to a node."""

    unsafe: str | None
    """Why jobs must not be forked from the program."""


@dataclass(frozen=True, slots=True)
class BeginRun:
    """Open the pool, and run the jobs that the head offers. One run at a time."""

    options: Options
    reports: ReportFiles
    command: str
    """The name of the head's program, for others who wait for devices."""
    shown: bool = False
    """Whether the head shows events. Otherwise it logs them, waits are repeated, and offers may bring channels."""
    last: bool = False
    """Whether no other run follows, so that the fork server ends with this one."""
    listed: bool = False
    """Whether the next jobs are known in advance, so that the node may ask for many ahead of need."""
    node: str = ""
    """The node's name in messages, if there are several nodes."""
    silence: float | None = None
    """Seconds without HeadLives after which the node ends everything. None if it can see that the head lives."""
    term: Term | None = None
    """How long jobs can run on the node. None if that is not limited, or unknown."""


@dataclass(frozen=True, slots=True)
class HeadLives:
    """A sign of life of a head on another machine, which has arrived at `time` on this machine's monotonic clock."""

    time: float


@dataclass(frozen=True, slots=True)
class End:
    """The node is to end. A node also ends when its program does."""
