"""Sources of jobs that are not known from the beginning, and what a head tells its node about jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.model import Device

# What a source says.


@dataclass(frozen=True, slots=True)
class Offer:
    """One of the jobs that were requested, or one that the user runs again."""

    job: Job
    forgiven: bool = False
    """Whether the job failed before in this run, and that failure no longer counts."""


@dataclass(frozen=True, slots=True)
class AllOffered:
    """All jobs were offered. Others follow only if the user runs some again, before `Exhausted`."""


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
class Throttle:
    """How much may run from now on. Running jobs continue. It replaces the previous one."""

    paused: bool = False
    """Whether no job is started."""
    devices: int | None = None
    """Maximum number of devices in use. While more are in use, no job that needs one is started. None for no limit."""


UNTHROTTLED = Throttle()


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


Statement = Offer | AllOffered | Exhausted | Stop | Cancel | Throttle | Reply | Remark | Facts


class JobSource(Protocol):
    """Decides on jobs one by one, in the head, which starts no job and draws nothing while a method blocks."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when `receive` has something to return."""

    def receive(self) -> list[Statement]:
        """Return the decisions since the last call. Raising GpuLauncherError ends the sweep."""

    def request_jobs(self, count: int) -> None:
        """Ask for `count` more jobs."""

    def coming(self) -> range:
        """Return the numbers of jobs that it has not offered and may offer later, as far as they are known."""

    def started(self, job: Job, devices: tuple[Device, ...], log: str | None) -> None:
        """Take note that the job runs."""

    def on_message(self, number: int, what: Any) -> None:
        """Take note of a message from a running job. Messages arrive in the order in which they were sent."""

    def ended(self, result: JobResult) -> None:
        """Take note that the job has ended, whether it was started or not. It runs again only after `retry`."""

    def retry(self, jobs: Sequence[Job]) -> None:
        """Take note that these jobs, which had not completed, run again.

        Raises ValueError if they cannot, with a message for the user. Nothing has changed then.
        """

    def tick(self) -> None:
        """Called at least a few times a second."""
