"""What an objective in a process of its own and the program with the study say to each other.

All of it passes through the job loop's process, which must not have to know the user's classes: what may be of such a
class is in here as bytes.
"""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from gpu_launcher.errors import JobError
from gpu_launcher.processes import pickling


class RemoteTraceback(Exception):
    """The cause of an exception that was raised in another process: its traceback there, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


@dataclass(frozen=True, slots=True)
class Carried:
    """An exception on its way to another process."""

    pickled: bytes | None
    text: str
    """Such as `ValueError: no such file`."""
    traceback: str
    problem: str = ""
    """Why it could not be pickled."""

    @classmethod
    def of(cls, error: BaseException, known: Mapping[str, object], *, skip: int = 0) -> Carried:
        """For a process whose `__main__` has what is `known`; without the first `skip` frames, which are ours."""
        frames = error.__traceback__
        for _ in range(skip):
            frames = frames and frames.tb_next
        shown = "".join(traceback.format_exception(type(error), error, frames))
        text = "".join(traceback.format_exception_only(type(error), error)).strip()
        try:
            return cls(pickling.dump(error, known), text, shown)
        except Exception as unpicklable:  # whatever the user's objects raise
            return cls(None, text, shown, f"it cannot be pickled: {_first_line(unpicklable)}")

    def unpack(self, number: int) -> BaseException:
        """The exception, caused by its traceback. If it cannot be had here, a JobError of the trial `number`."""
        error: BaseException | None = None
        problem = self.problem
        if self.pickled is not None:
            try:
                error = pickling.load(self.pickled)
            except Exception as unreadable:  # whatever the user's objects raise
                problem = f"it cannot be unpickled: {_first_line(unreadable)}"
        if not isinstance(error, BaseException):
            text = f"raised {self.text}\n({problem or 'it is no exception when it is unpickled'})"
            error = JobError(number, f"trial {number}", text, None)
        error.__cause__ = RemoteTraceback(self.traceback)
        return error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


# From the program.


@dataclass(frozen=True, slots=True)
class TrialToRun:
    """The first thing that a job hears, unless there is no trial for it."""

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
    result: bytes | Carried


# From a job.


@dataclass(frozen=True, slots=True)
class Call:
    """Of a method of the trial or the study in the program, or of an attribute; to be answered."""

    number: int
    """By which the answer is known."""
    target: str
    """`trial` or `study`."""
    name: str
    arguments: bytes
    """(positional, keyword)"""


@dataclass(frozen=True, slots=True)
class Intermediate:
    """A value reported."""

    step: int
    value: float


@dataclass(frozen=True, slots=True)
class ShallPrune:
    """Asks for a verdict; to be answered."""

    number: int


@dataclass(frozen=True, slots=True)
class Unusable:
    """Something that an objective returned and that is no number."""

    shown: str

    def __repr__(self) -> str:
        return self.shown


@dataclass(frozen=True, slots=True)
class Returned:
    """The objective's values; None if it returned that."""

    values: tuple[float | Unusable, ...] | None


@dataclass(frozen=True, slots=True)
class Pruned:
    """It raised optuna.TrialPruned."""

    text: str


@dataclass(frozen=True, slots=True)
class Raised:
    """It raised something else."""

    error: Carried


Ending = Returned | Pruned | Raised
