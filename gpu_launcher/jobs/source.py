"""Where jobs come from that are not known from the beginning, and what a head tells its node about jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.model import Device

# What a source says.


@dataclass(frozen=True, slots=True)
class Offer:
    """One of the jobs that were asked for."""

    job: Job


@dataclass(frozen=True, slots=True)
class Exhausted:
    """There are no more jobs, however many were asked for."""

    reason: str | None = None
    """A line for the user, if there is something to say."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The user wants it all to end: jobs that run are interrupted, and killed after their grace, or if asked twice."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """A job is not wanted any more."""

    number: int
    why: str
    """A sentence without its subject, which is the job."""
    pruned: bool = False
    """Because others are better, which is how it then counts."""


@dataclass(frozen=True, slots=True)
class Reply:
    """To be passed on to a job. It is dropped if the job does not listen."""

    number: int
    what: Any


@dataclass(frozen=True, slots=True)
class Remark:
    """A line for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """How the search goes, as `events.SearchStatus` shows it."""

    facts: tuple[tuple[str, str], ...]


Statement = Offer | Exhausted | Stop | Withdrawn | Reply | Remark | Facts


class JobSource(Protocol):
    """Decides on jobs one by one, in the head, which starts no job and draws nothing while a method blocks."""

    def fileno(self) -> int:
        """Readable when it has something to say."""

    def receive(self) -> list[Statement]:
        """What it has to say. Raises GpuLauncherError if it is broken, which ends the sweep."""

    def request_jobs(self, count: int) -> None:
        """Want so many jobs more."""

    def started(self, job: Job, devices: tuple[Device, ...], log: str | None) -> None:
        """The job runs now."""

    def on_message(self, number: int, what: Any) -> None:
        """A job that runs said something. What was said before this is not older than what is said after."""

    def ended(self, result: JobResult) -> None:
        """The job, started or not, ended, and will not run again."""

    def tick(self) -> None:
        """Called at least a few times a second."""
