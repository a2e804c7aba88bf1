"""The process of one trial that `optimize` runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna import TrialPruned

from gpu_launcher.errors import OptionError
from gpu_launcher.model import Request
from gpu_launcher.processes import pickling
from gpu_launcher.processes.exceptions import PortableException, describe, reason, users_part
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.unpicklable import found_at
from gpu_launcher.processes.worker import JobContext, print_exception
from gpu_launcher.studies import reporting, trial
from gpu_launcher.studies.optimize_messages import NotANumber, ObjectiveEnding, Pruned, Raised, Returned, TrialToRun
from gpu_launcher.studies.study_proxy import install_proxy, unpickled
from gpu_launcher.studies.worker_trial import ObjectiveChannel, WorkerTrial

DONE = Report(ok=True, message=None, payload=b"")
"""Says no more: a message has told by then how the objective ended."""


@dataclass(frozen=True)
class Objective:
    """The program of each job. See `gpu_launcher.processes.worker.Program`.

    How the objective ended is said before the process ends, so that the study knows of it when the next trial is
    asked for, which may be as soon as the devices are free.
    """

    function: Callable[[Any], Any]
    request: Request
    catch: tuple[type[BaseException], ...]
    """Exceptions that do not end the search."""
    study: optuna.Study
    """The program's, of which the function may have a copy: in the same process this very object."""

    def __reduce__(self) -> Any:
        # Together, so that the function's own study is that study, which itself is not sent.
        instead = {id(self.study): unpickled}
        try:
            dumped = pickling.dump((pickling.Afresh(self.function), self.catch, self.study), instead=instead)
        except Exception as error:  # whatever the user's objects raise when they are pickled
            where = found_at({"objective": self.function, "catch": self.catch}, instead=instead)
            raise OptionError(
                "objective",
                f"trials start in fresh interpreters (spawn), to which it cannot be sent: {describe(error)}{where}. "
                'Remedy: make it inside the objective, or use start_method="fork"',
            ) from error
        return _load, (dumped, self.request)

    def __call__(self, number: int, spec: Any, context: JobContext) -> Report:
        """See `Program`."""
        context.prepared(self.request, None)
        context.wait()
        channel = ObjectiveChannel(context)
        try:
            seen = channel.hear()
        except KeyboardInterrupt:
            return Report(ok=False, message="was interrupted before it had a trial", payload=b"")
        if not isinstance(seen, TrialToRun):
            return DONE
        try:
            ending = self._run(WorkerTrial(seen, channel), channel)
        except BaseException as error:  # neither an Exception nor KeyboardInterrupt, and so no ending of an objective
            return _left(error)
        if channel.mine:  # or this is a fork of the objective's, and comes here as it would in any program
            channel.say(ending)
        return DONE

    def _run(self, mine: WorkerTrial, channel: ObjectiveChannel) -> ObjectiveEnding:
        trial.become(mine)
        reporting.objective_in = os.getpid()
        install_proxy(self.study, mine.study)
        try:
            return Returned(_values(self.function(mine)))
        except TrialPruned as pruned:
            return Pruned(str(pruned))
        except (Exception, KeyboardInterrupt) as error:
            return Raised(PortableException.of(error, channel.known), isinstance(error, self.catch))


def _left(error: BaseException) -> Report:
    """What to report of this process, which ends with `error`; printed as Python does, without our frames."""
    if not isinstance(error, SystemExit):
        print_exception(error, users_part(error.__traceback__))
    elif error.code is None or isinstance(error.code, int):
        raise error  # with its status, for whoever waits for a fork of the objective's
    else:
        print(error.code, file=sys.stderr)
    return Report(ok=False, message=reason(error), payload=b"")


def _load(dumped: bytes, request: Request) -> Objective:
    function, catch, study = pickling.load(dumped)
    return Objective(function, request, catch, study)


def _values(returned: Any) -> tuple[float | NotANumber, ...] | None:
    """What an objective returned, as Optuna takes it: a number, or a sequence of them."""
    if returned is None:
        return None
    return tuple(map(_value, returned)) if isinstance(returned, Sequence) else (_value(returned),)


def _value(returned: Any) -> float | NotANumber:
    # Optuna takes no text for a number. Anything else may be of a class that the program does not have.
    try:
        return NotANumber(repr(returned)) if isinstance(returned, (str, bytes)) else float(returned)
    except (TypeError, ValueError):
        return NotANumber(repr(returned))
