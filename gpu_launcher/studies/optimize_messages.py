"""Messages between an objective in its own process and the head, which has the study.

All of them pass through the node, which must not need the user's classes. So values that may be of such a class are
sent as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_launcher.errors import JobError
from gpu_launcher.processes.exceptions import PortableException, RemoteTraceback


def unpack(carried: PortableException, number: int) -> BaseException:
    """The exception, with its traceback as its cause. If it cannot be loaded here, a JobError of trial `number`."""
    try:
        return carried.load()
    except LookupError as why:
        error = JobError(number, f"trial {number}", f"raised {carried.summary}. {why}", None)
        error.__cause__ = RemoteTraceback(carried.traceback)
        return error


# From the head. The first message to a job is the TrialInfo of its trial, unless there is no trial for it.


@dataclass(frozen=True, slots=True)
class NothingToRun:
    """There is no trial for the job."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call returned or raised."""

    call: int
    result: bytes | PortableException


# From a job.


@dataclass(frozen=True, slots=True)
class Call:
    """Calls a method, or reads an attribute, of the trial or study in the head. The reply is an Answer."""

    number: int
    """Identifies the answer."""
    target: str
    """`trial` or `study`."""
    name: str
    arguments: bytes
    """The pair (positional, keyword), pickled."""


@dataclass(frozen=True, slots=True)
class ShouldPrune:
    """Asks for a verdict. The reply is an Answer."""

    number: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks for an answer once all that the job has sent before is handled. The reply is an Answer."""

    number: int


@dataclass(frozen=True, slots=True)
class NotANumber:
    """A value that an objective returned but that is not a number."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


@dataclass(frozen=True, slots=True)
class Returned:
    """The objective returned these values; None if it returned None."""

    values: tuple[float | NotANumber, ...] | None


@dataclass(frozen=True, slots=True)
class Pruned:
    """The objective raised optuna.TrialPruned."""

    text: str


@dataclass(frozen=True, slots=True)
class Raised:
    """The objective raised another exception."""

    error: PortableException
    caught: bool
    """Whether the exception is of a class in `catch`. The process that raised it knows best."""
    interrupted: bool
    """Whether the exception is KeyboardInterrupt."""


ObjectiveEnding = Returned | Pruned | Raised
