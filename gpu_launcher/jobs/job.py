"""Jobs and their results: the input and output of the job loop."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.figures import Figures
from gpu_launcher.model import Device
from gpu_launcher.text import one_line
from gpu_launcher.wording import job_name

MAX_NAMED = 3
"""Maximum number of left-behind processes that a message names."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the user's program."""

    number: int
    label: str
    """Name for people, such as `lr=0.1 hidden=32`. May be empty. Other users see it, so secrets in it are hidden."""
    spec: Any
    """The program's argument. Picklable."""
    about: Any = None
    """Information for the program's code on request, such as its trial. Picklable."""
    channel: int | None = None
    """Descriptor of the job's end of a channel to its source, if the two exchange messages directly."""
    attempts_before: int = 0
    """How many times earlier launches, or other nodes of this one, started it, as far as its source knows."""
    failed_before: int = 0
    """How many of these attempts failed on other nodes of this launch and used a retry."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", one_line(self.label))


class Cause(str, Enum):
    """The cause of a job's failure, as the option `retry_on` names it."""

    EXCEPTION = "exception"
    """Its code raised, called `sys.exit`, or returned a value that cannot be pickled."""
    CRASH = "crash"
    """Its process ended without a report: a signal, `os._exit`, a lost supervisor or fork server."""
    OOM = "oom"
    """Its GPU's memory ran out, or the kernel killed it, most likely because the host's memory ran out."""
    TIMEOUT = "timeout"
    DEVICE_LOST = "device_lost"
    """One of its devices reports an error or is gone."""


class Refusal(Enum):
    """Why a node does not run a job, although another may."""

    NEVER = "never"
    """It can never grant the job's request, or never lasts as long as the job may run."""
    TOO_LATE = "too late"
    """It ends too soon. If its engine starts it again, it lasts long enough."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """The result of a job. Every job has exactly one."""

    number: int
    label: str
    outcome: Outcome
    payload: bytes | None
    """The payload of the program's report. None if it ended without a report or never ran."""
    message: str | None
    """The cause in one sentence without a subject, such as `was killed by SIGKILL after 12.0 s on GPU 2`;
    None for a completed job."""
    devices: tuple[Device, ...]
    """The devices that it ran on. Empty if it never ran."""
    duration: float | None
    """Seconds from its grant until its process tree was gone. None if it never ran."""
    log: str | None
    """Path of the file with its stdout and stderr. None if it never had one."""
    cause: Cause | None = None
    """Why it failed, if it failed and had a process."""
    attempts: int = 1
    """How many times it was started. The other fields are about the last attempt."""
    unsupervised: bool = False
    """Whether it failed because a process of ours was killed, such as its supervisor, and not through its own fault."""
    origin: str = ""
    """Where it failed, if it failed and left a report. See `Report`."""
    left_behind: tuple[str, ...] = ()
    """Processes that outlived it and had to be ended."""
    figures: Figures = Figures()  # noqa: RUF009  (frozen)
    refused: Refusal | None = None
    """Why its node could not run it, if it failed because of that."""
    withdrawn: bool = False
    """Whether the user cancelled this job, and not the whole sweep."""

    @property
    def left_behind_text(self) -> str | None:
        """A line for the user about the processes left behind. None if there are none, or if the job was cancelled."""
        if not self.left_behind or self.outcome is Outcome.CANCELLED:
            return None
        names = ", ".join(self.left_behind[:MAX_NAMED])
        more = f", and {len(self.left_behind) - MAX_NAMED} more" if len(self.left_behind) > MAX_NAMED else ""
        return f"{job_name(self.number, self.label)} left processes behind, which were ended: {names}{more}"
