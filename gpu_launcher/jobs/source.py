"""Sources of jobs that are not known from the beginning, and what a head tells its node about jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.model import Device

# What a source says.


@dataclass(frozen=True, slots=True)
class Offer:
    """One of the jobs that were requested."""

    job: Job


@dataclass(frozen=True, slots=True)
class Exhausted:
    """There are no more jobs, even if more were requested."""

    reason: str | None = None
    """A line for the user, or None."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run: interrupt the running jobs, and kill them after their grace or at a second Stop."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """A job is no longer wanted. Ignored if it has ended."""

    number: int
    problem: str
    """The reason: a sentence without its subject, which is the job."""
    pruned: bool = False
    """Whether the job counts as pruned because others are better."""
    unstarted: bool = False
    """Whether to leave the job alone if it runs: another node has free devices, and can start it instead."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A message for a job. It is dropped if the job does not listen."""

    number: int
    what: Any


@dataclass(frozen=True, slots=True)
class Remark:
    """A line for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """The state of the search, as `events.SearchStatus` shows it."""

    facts: tuple[tuple[str, str], ...]


Statement = Offer | Exhausted | Stop | Cancel | Reply | Remark | Facts


class JobSource(Protocol):
    """Decides on jobs one by one, in the head, which starts no job and draws nothing while a method blocks."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when `receive` has something to return."""

    def receive(self) -> list[Statement]:
        """Return the decisions since the last call. Raising GpuLauncherError ends the sweep."""

    def request_jobs(self, count: int) -> None:
        """Ask for `count` more jobs."""

    def started(self, job: Job, devices: tuple[Device, ...], log: str | None) -> None:
        """Take note that the job runs."""

    def on_message(self, number: int, what: Any) -> None:
        """Take note of a message from a running job. Messages arrive in the order in which they were sent."""

    def ended(self, result: JobResult) -> None:
        """Take note that the job has ended, whether it was started or not. It will not run again."""

    def tick(self) -> None:
        """Called at least a few times a second."""
