"""What a manager and the program that it runs jobs for tell each other, apart from what is in `jobs.source`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.jobs.job import JobResult
from gpu_launcher.model import Device


@dataclass(frozen=True, slots=True)
class Opened:
    """Jobs can be run. The first thing it says."""

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
    """All jobs have ended, and so does the manager. The last thing it says."""

    error: GpuLauncherError | None = None
    """Why, if that is not what it was asked to do."""


Message = Opened | Wanted | Started | Heard | Ended | Remarked | Closed


@dataclass(frozen=True, slots=True)
class Begin:
    """The first thing it is told."""

    unsafe: str | None
    """Why jobs must not be forked from the program."""


@dataclass(frozen=True, slots=True)
class End:
    """The last thing it is told, unless the program ends without a word."""
