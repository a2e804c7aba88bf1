"""What happens in the process of a call."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_launcher.executors.packing import NoValue, Packed, Returned, pack, unreturnable
from gpu_launcher.model import Request
from gpu_launcher.processes.exceptions import PortableException, describe, reason, traceback_of
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.out_of_memory import is_out_of_gpu_memory
from gpu_launcher.processes.pickling import main_namespace
from gpu_launcher.processes.worker import JobContext


@dataclass(frozen=True, slots=True)
class Call:
    """What to call, and how to report."""

    packed: Packed
    """The function, its arguments, and its keyword arguments."""
    value: str
    """Path of a file for a large value."""


@dataclass(frozen=True, slots=True)
class Granted:
    """What a call's process says when it has its devices: is the call still wanted? The answer is a bool."""


@dataclass(frozen=True, slots=True)
class Calls:
    """The program of an executor's processes, each of which makes one call."""

    request: Request

    def __call__(self, number: int, spec: Call, context: JobContext) -> Report:
        """Make it, on its devices."""
        context.prepared(self.request, None)
        context.wait()  # before the arguments are unpickled, which may well use a GPU
        context.say(Granted())
        if not context.hear():
            return Report(True, None, b"")  # which nobody reads
        return _make(spec)


def _make(call: Call) -> Report:
    """What came of it."""
    try:
        function, args, kwargs = call.packed.unpack()
    except BaseException as error:  # whatever the user's objects raise when they are unpickled
        problem = f"was not made, as its function and arguments cannot be unpickled: {describe(error)}"
        return _failed(problem, error, NoValue(traceback_of(error)))
    known = dict(main_namespace())  # which the program has, too; what the call puts there, it has not
    try:
        value = _call(function, args, kwargs)
        del function, args, kwargs
        try:
            return Report(True, None, _dump(Returned(pack(value, Path(call.value), known))))
        except OSError as error:
            problem = f"returned a value that could not be handed over: {describe(error)}"
            return _failed(problem, error, NoValue(traceback_of(error)))
        except Exception as error:
            problem = f"returned what cannot be pickled: {unreturnable(value, error)}"
            return _failed(problem, error, NoValue(traceback_of(error), unpicklable=True))
    except BaseException as error:  # SystemExit and KeyboardInterrupt are the caller's to interpret as well
        return _failed(reason(error), error, PortableException.of(error, known))


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _failed(problem: str, error: BaseException, outcome: NoValue | PortableException) -> Report:
    return Report(False, problem, _dump(outcome), out_of_memory=is_out_of_gpu_memory(error))


def _dump(outcome: Returned | NoValue | PortableException) -> bytes:
    return pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL)
