"""What went wrong with a record, as a value that says which one it was."""

from __future__ import annotations

import reprlib
from typing import Any

from gpu_launcher.errors import GpuLauncherError

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


class WorkerDiedError(GpuLauncherError):
    """A worker's process ended: a signal, `os._exit`, the memory of the host ran out."""


class UnreadableError(GpuLauncherError):
    """What a worker sent could not be unpickled here, or what was sent to it could not be unpickled there."""


class RecordError(GpuLauncherError):
    """A record that has no result, and why.

    `parallel_map(..., on_error="return")` has it among the results; with `on_error="raise"` it is the `__cause__` of
    the exception that is raised.
    """

    def __init__(self, index: int, record: Any, exception: BaseException, traceback: str, where: str = "") -> None:
        super().__init__(index, record, exception, traceback, where)
        self.index = index
        """Which record it was, counted from 0."""
        self.record = record
        self.exception = exception
        """What the function raised; a WorkerDiedError if it did not get so far."""
        self.traceback = traceback
        """Of the worker, as text; may be empty."""
        self.where = where
        """The devices it was on, such as `GPU 1`; may be empty."""

    def __str__(self) -> str:
        where = f" on {self.where}" if self.where else ""
        what = f"record {self.index} ({_show(self.record)}) failed{where}"
        if self.traceback:
            return f"{what}:\n\n{self.traceback.rstrip()}"
        return f"{what}: {type(self.exception).__name__}: {self.exception}"


class SetupError(GpuLauncherError):
    """`setup` raised in a worker: the `__cause__` of the exception that is raised, with the worker's traceback."""


def _show(record: object) -> str:
    try:
        return _short.repr(record)
    except Exception:  # the user's __repr__ may raise anything
        return f"of type {type(record).__name__}"
