"""What a node and the program that it runs jobs for tell each other, apart from what is in `jobs.source`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.jobs.events import GaveUp, JobEnded, JobRetried, JobStarted, JobWaiting, Notice, StopRequested
from gpu_launcher.jobs.job import JobResult
from gpu_launcher.jobs.reports import ReportFiles
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.model import Device


@dataclass(frozen=True, slots=True)
class NodeReady:
    """The fork server runs. The first message."""

    method: str
    """How jobs are started: fork or spawn."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The pool is open, and jobs can be run: the answer to BeginRun, unless it is Closed."""

    devices: tuple[Device, ...]
    at_once: int
    """How many jobs could run at the same time, as far as that is known."""
    method: str
    """How they are started: fork or spawn."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """So many jobs more could be prepared now."""

    count: int


@dataclass(frozen=True, slots=True)
class Started:
    """A job has its devices, and runs."""

    number: int
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class Heard:
    """What a job said with `JobContext.say`."""

    number: int
    what: Any


@dataclass(frozen=True, slots=True)
class Ended:
    """A job will not run any more, or never did."""

    result: JobResult
    event: JobEnded | None = None
    """For a head that shows events: the same, as it is shown."""


@dataclass(frozen=True, slots=True)
class Remarked:
    """A line for the user."""

    text: str
    passing: bool = False
    """Whether it says how things are at the moment, and may be said again."""
    about: str = ""
    """For one that is passing: what it is about; it is repeated with the same as long as things are so."""


@dataclass(frozen=True, slots=True)
class Closed:
    """All jobs of a run have ended. The last message about it."""

    error: GpuLauncherError | None = None
    """What ended the run, if something went wrong."""
    stopped: bool = False
    """Whether the run was stopped, by the user or by failures."""


ShownEvent = Notice | JobWaiting | JobStarted | JobRetried | StopRequested | GaveUp
"""Events that a node sends as they are to a head that shows them."""

Message = NodeReady | Opened | Wanted | Started | Heard | Ended | Remarked | Closed | ShownEvent


@dataclass(frozen=True, slots=True)
class Begin:
    """The first thing it is told."""

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
    """Whether the head shows events. Otherwise it gets lines for a log."""
    last: bool = False
    """Whether no other run follows, so that the fork server is not needed any more."""
    listed: bool = False
    """Whether the next jobs do not depend on results, so that it is free to ask for many ahead."""


@dataclass(frozen=True, slots=True)
class End:
    """The last thing it is told, unless the program ends without a word."""
