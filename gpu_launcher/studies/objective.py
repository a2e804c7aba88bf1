"""The program that runs in the process of each trial of `optimize`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from gpu_launcher.studies.optimize_messages import NotANumber, NothingToRun, ObjectiveEnding, Pruned, Raised, Returned
from gpu_launcher.studies.study_proxy import install_proxy, unpickled
from gpu_launcher.studies.worker_trial import ObjectiveChannel, WorkerTrial

DONE = Report(ok=True, message=None, payload=b"")
"""An empty report, because a message has already told how the objective ended."""


@dataclass(frozen=True, slots=True)
class TrialLogs:
    """The logs of the trials of a search that has a directory."""

    directory: Path
    mark: Path
    """A file that is there while the search runs. A machine that does not see it has another directory at this path."""

    def path(self, number: int) -> Path:
        """Return the path of a trial's log."""
        return self.directory / str(number) / "job.log"

    def take_over(self, number: int, context: JobContext) -> bool:
        """Write the output of this job into the log of its trial. Returns whether that is possible."""
        try:
            if self.mark.exists():
                context.log_into(self.path(number))
                return True
        except OSError as error:
            print(f"gpu-launcher: no log of trial {number}: {error}", file=sys.stderr)
        return False


@dataclass(frozen=True)
class Objective:
    """The program of each job. See `gpu_launcher.processes.worker.Program`.

    It tells how the objective ended before the process ends. The next trial may be asked for as soon as the devices are
    free, and by then the study knows about this one.
    """

    function: Callable[[Any], Any]
    request: Request
    catch: tuple[type[BaseException], ...]
    """Exceptions that do not end the search."""
    study: optuna.Study
    """The head's study; in a job, a copy of it. If the function refers to the study, it refers to this very object."""
    logs: TrialLogs | None = None
    """Where the output of trials goes. None: where the program's output goes."""

    def __reduce__(self) -> Any:
        # Pickled together, so that the function's reference to the study stays the same object as `study`. The study
        # itself is not sent: `unpickled` takes its place.
        instead = {id(self.study): unpickled}
        try:
            dumped = pickling.dump((pickling.Afresh(self.function), self.catch, self.study), instead=instead)
        except Exception as error:  # the user's objects can raise anything when pickled
            where = found_at({"objective": self.function, "catch": self.catch}, instead=instead)
            raise OptionError(
                "objective",
                "trials start in fresh interpreters (spawn) or on other machines, to which it cannot be sent: "
                f"{describe(error)}{where}. Remedy: make it inside the objective, or run on this machine with "
                'start_method="fork"',
            ) from error
        return _load, (dumped, self.request, self.logs)

    def __call__(self, number: int, spec: Any, context: JobContext) -> Report:
        """See `Program`."""
        context.prepared(self.request, None)
        context.wait()
        channel = ObjectiveChannel(context)
        try:
            while not isinstance(info := channel.hear(), (trial.TrialInfo, NothingToRun)):
                pass  # an answer for a copy of this job, on a node that was lost
        except KeyboardInterrupt:
            return Report(ok=False, message="was interrupted before it had a trial", payload=b"")
        if not isinstance(info, trial.TrialInfo):
            return DONE
        has_log = self.logs is not None and self.logs.take_over(info.number, context)
        try:
            ending = self._run(WorkerTrial(info, channel), channel, has_log=has_log)
        except BaseException as error:  # not an Exception or KeyboardInterrupt, so not an end of an objective
            return _abnormal_report(error)
        if channel.mine:  # False in a fork that the objective made and that has returned from it
            channel.say(ending)
        if isinstance(ending, Raised) and ending.interrupted:
            return Report(ok=False, message="was interrupted", payload=b"")
        return DONE

    def _run(self, mine: WorkerTrial, channel: ObjectiveChannel, *, has_log: bool) -> ObjectiveEnding:
        trial.become(mine)
        reporting.objective_in = os.getpid()
        install_proxy(self.study, mine.study)
        try:
            return Returned(_values(self.function(mine)))
        except TrialPruned as pruned:
            return Pruned(str(pruned))
        except (Exception, KeyboardInterrupt) as error:
            if has_log:
                print_exception(error, users_part(error.__traceback__))
            carried = PortableException.of(error, channel.known)
            return Raised(carried, isinstance(error, self.catch), isinstance(error, KeyboardInterrupt))


def _abnormal_report(error: BaseException) -> Report:
    """The report of a process that ends with `error`. Prints the error as Python does, without our frames."""
    if not isinstance(error, SystemExit):
        print_exception(error, users_part(error.__traceback__))
    elif error.code is None or isinstance(error.code, int):
        raise error  # ends with that status, which matters if the objective waits for a fork of its own
    else:
        print(error.code, file=sys.stderr)
    return Report(ok=False, message=reason(error), payload=b"")


def _load(dumped: bytes, request: Request, logs: TrialLogs | None) -> Objective:
    function, catch, study = pickling.load(dumped)
    return Objective(function, request, catch, study, logs)


def _values(returned: Any) -> tuple[float | NotANumber, ...] | None:
    """The values that an objective returned, read as Optuna does: from a number or a sequence of numbers."""
    if returned is None:
        return None
    return tuple(map(_value, returned)) if isinstance(returned, Sequence) else (_value(returned),)


def _value(returned: Any) -> float | NotANumber:
    # Optuna does not accept text as a number. Anything else is sent as text, because the head may lack its class.
    try:
        return NotANumber(repr(returned)) if isinstance(returned, (str, bytes)) else float(returned)
    except (TypeError, ValueError):
        return NotANumber(repr(returned))
