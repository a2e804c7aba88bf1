"""Ends a Hydra program with one of our errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import FrameType

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import CompactHydraException

from gpu_launcher.errors import JobError


def final(error: CompactHydraException | JobError, before: str = "") -> BaseException:
    """Return the exception to raise to end the program with only the error's message.

    Hydra 1.3 prints the message and then advises the user to set HYDRA_FULL_ERROR=1, which would only show our own
    frames. If Hydra would do that, this function itself prints `before` and the message, and returns a SystemExit that
    ends the program as Hydra does. Otherwise it returns the error.
    """
    full = os.environ.get("HYDRA_FULL_ERROR", "0") != "0" or sys.gettrace() is not None
    if full or not any(_is(frame, "hydra._internal.utils", "run_and_report") for frame in _stack()):
        return error
    sys.stderr.write(f"{before}{error}{os.linesep}")
    return SystemExit(1)


def is_for_basic_sweeper() -> bool:
    """Whether Hydra's own sweeper called the launcher. That sweeper raises the first error among the jobs' returns."""
    caller = next(frame for frame in _stack() if not _module(frame).startswith(__package__))
    return _is(caller, BasicSweeper.__module__, "sweep") and type(caller.f_locals.get("self")) is BasicSweeper


def _is(frame: FrameType, module: str, function: str) -> bool:
    return frame.f_code.co_name == function and _module(frame) == module


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
