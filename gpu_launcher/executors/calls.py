"""The program that runs in the process of a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_launcher.executors.transport import NoValue, Payload, ReturnedValue, pack, unreturnable
from gpu_launcher.model import Request
from gpu_launcher.processes.exceptions import PortableException, describe, reason, traceback_of
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.out_of_memory import is_out_of_gpu_memory
from gpu_launcher.processes.pickling import main_namespace
from gpu_launcher.processes.worker import JobContext


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call to make."""

    value: str | None
    """Path of the file for a large value. None if the program could not read it."""


@dataclass(frozen=True, slots=True)
class IsWanted:
    """Asks whether the call is still wanted, once its process has its devices.

    The answer is a Payload with the function, its arguments and its keyword arguments, or None.
    """


CallOutcome = ReturnedValue | NoValue | PortableException
"""The message of a call's process when the call has ended."""


@dataclass(frozen=True, slots=True)
class CallProgram:
    """The program of an executor's processes, each of which makes one call."""

    request: Request

    def __call__(self, number: int, spec: FunctionCall, context: JobContext) -> Report:
        """Wait for devices, and make the call."""
        context.prepared(self.request, None)
        context.wait()  # before the arguments are unpickled, which may use a GPU
        context.say(IsWanted())
        packed: Payload | None = context.hear()
        if packed is None:
            return Report(True, None, b"")
        job = os.getpid()
        made = _make(packed, None if spec.value is None else Path(spec.value))
        if os.getpid() == job:  # a fork that the call made may arrive here, too, and must not report
            made = _say(context, made)
        return Report(made.problem is None, made.problem, b"", out_of_memory=made.out_of_memory)


@dataclass(frozen=True, slots=True)
class _Made:
    """The outcome of a call, with what the report needs."""

    outcome: CallOutcome
    problem: str | None = None
    """Why the call failed: a sentence without its subject."""
    out_of_memory: bool = False


def _say(context: JobContext, made: _Made) -> _Made:
    """Send the outcome of the call. Returns what was sent: a failure, if the outcome could not be sent."""
    try:
        context.say(made.outcome)
    except OSError as error:  # large messages travel in memory files, to which resource limits apply
        made = _not_handed_over(error)
        context.say(made.outcome)
    return made


def _make(packed: Payload, file: Path | None) -> _Made:
    """Make the call. A large value goes into `file`, unless that is None."""
    try:
        function, args, kwargs = packed.unpack()
        del packed  # it may be large
    except BaseException as error:  # user objects may raise anything when they are unpickled
        problem = f"was not made, as its function and arguments cannot be unpickled: {describe(error)}"
        return _failed(problem, error, NoValue(traceback_of(error)))
    known = dict(main_namespace())  # copied now: the program does not have what the call adds
    try:
        value = _call(function, args, kwargs)
        del function, args, kwargs
        try:
            return _Made(ReturnedValue(pack(value, file, known)))
        except OSError as error:
            return _not_handed_over(error)
        except Exception as error:
            problem = f"returned what cannot be pickled: {unreturnable(value, error)}"
            return _failed(problem, error, NoValue(traceback_of(error), unpicklable=True))
    except BaseException as error:  # SystemExit and KeyboardInterrupt go to the caller, too
        return _failed(reason(error), error, PortableException.of(error, known))


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _not_handed_over(error: OSError) -> _Made:
    problem = f"returned a value that could not be handed over: {describe(error)}"
    return _failed(problem, error, NoValue(traceback_of(error)))


def _failed(problem: str, error: BaseException, outcome: CallOutcome) -> _Made:
    return _Made(outcome, problem, is_out_of_gpu_memory(error))
