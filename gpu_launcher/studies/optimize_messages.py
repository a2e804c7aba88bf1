"""What an objective in a process of its own and the program with the study say to each other.

All of it passes through the job loop's process, which must not have to know the user's classes: what may be of such a
class is in here as bytes.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from gpu_launcher.errors import JobError
from gpu_launcher.processes.exceptions import PortableException, RemoteTraceback


def unpack(carried: PortableException, number: int) -> BaseException:
    """The exception, caused by its traceback. If it cannot be loaded here, a JobError of the trial `number`."""
    try:
        return carried.load()
    except LookupError as why:
        error = JobError(number, f"trial {number}", f"raised {carried.summary}. {why}", None)
        error.__cause__ = RemoteTraceback(carried.traceback)
        return error


# From the program.


@dataclass(frozen=True, slots=True)
class TrialToRun:
    """The first message that a job gets, unless there is no trial for it."""

    number: int
    study: str
    directions: tuple[int, ...]
    """As the values of optuna.study.StudyDirection."""
    datetime_start: datetime.datetime | None
    prunes: bool
    """Whether the study has a pruner."""


@dataclass(frozen=True, slots=True)
class NothingToRun:
    """Instead of a trial."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned, or raised."""

    call: int
    result: bytes | PortableException


# From a job.


@dataclass(frozen=True, slots=True)
class Call:
    """Calls a method of the program's trial or study, or asks for an attribute; gets an Answer."""

    number: int
    """Identifies the answer."""
    target: str
    """`trial` or `study`."""
    name: str
    arguments: bytes
    """(positional, keyword)"""


@dataclass(frozen=True, slots=True)
class ShallPrune:
    """Asks for a verdict; gets an Answer."""

    number: int


@dataclass(frozen=True, slots=True)
class NotANumber:
    """Something that an objective returned and that is not a number."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


@dataclass(frozen=True, slots=True)
class Returned:
    """The objective's values; None if it returned that."""

    values: tuple[float | NotANumber, ...] | None


@dataclass(frozen=True, slots=True)
class Pruned:
    """It raised optuna.TrialPruned."""

    text: str


@dataclass(frozen=True, slots=True)
class Raised:
    """It raised something else."""

    error: PortableException
    caught: bool
    """Whether it is of a class to catch. The process that raised it knows that best."""


ObjectiveEnding = Returned | Pruned | Raised
