"""Ends a Hydra program with one of our errors, or because the user has stopped it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn

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
    sweeper = type(caller.f_locals.get("self"))
    # Compared by name: Hydra executes modules of plugins again that were imported before, which makes new classes.
    is_own = (sweeper.__module__, sweeper.__qualname__) == (BasicSweeper.__module__, BasicSweeper.__qualname__)
    return is_own and _is(caller, BasicSweeper.__module__, "sweep")


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """End the program with one line if Ctrl-C comes in this block, which may wait for other machines."""
    try:
        yield
    except KeyboardInterrupt:
        print("[gpu_pool] stopped by SIGINT", file=sys.stderr)
        stop(signal.SIGINT)


def stop(signum: signal.Signals) -> NoReturn:
    """End the program as the signal would, but without a traceback, because the summary already says what happened."""
    if signum is signal.SIGINT:
        sys.excepthook = _quietly(sys.excepthook)
        raise KeyboardInterrupt
    sys.exit(128 + signum)


def _quietly(hook: Callable[..., object]) -> Callable[..., object]:
    def excepthook(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
        sys.excepthook = hook
        if kind is not KeyboardInterrupt:
            hook(kind, error, tb)

    return excepthook


def _is(frame: FrameType, module: str, function: str) -> bool:
    return frame.f_code.co_name == function and _module(frame) == module


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
