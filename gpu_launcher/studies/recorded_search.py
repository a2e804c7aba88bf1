"""A call of `optimize` that has a directory: other terminals see, steer and read it as they do any sweep.

Theory of operation. The directory has what that of a Hydra sweep has: a lock, a manifest, a control socket, a log for
each job, and a table of results. Jobs have the numbers of their trials, because these are what Optuna's messages name.
A job of the node is numbered otherwise, and gets its trial, its log and its place in the manifest when it has its
devices. Its parameters are recorded as they become known: every few seconds, and when it ends.

Requests are served where the search waits for messages, in the thread that called `optimize`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs import node_messages as node
from gpu_launcher.jobs.control import MAX_RANGES, Answer, Ranges, named, ranges_of
from gpu_launcher.jobs.controlled_sweep import ControlledSweep
from gpu_launcher.jobs.directory import DirectoryLock
from gpu_launcher.jobs.events import (
    JobEnded,
    JobReturned,
    JobStarted,
    JobWaiting,
    NodesChanged,
    Notice,
    Outcome,
    SearchStatus,
    StopRequested,
    SweepEnded,
    SweepStarted,
    Throttled,
)
from gpu_launcher.jobs.failures import set_aside
from gpu_launcher.jobs.figures import Figures
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.manifest import how_to_resume
from gpu_launcher.jobs.progress.plain import stopping
from gpu_launcher.jobs.recorder import Recorder, new_reports
from gpu_launcher.jobs.result_table import value_names, write_results
from gpu_launcher.jobs.source import Cancel, Statement, Stop, Throttle
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.jobs.where import this_program
from gpu_launcher.model import Device
from gpu_launcher.studies.objective import TrialLogs
from gpu_launcher.studies.study_session import StudySession
from gpu_launcher.text import short_path

log = logging.getLogger("gpu_launcher")
_logger = optuna.logging.get_logger("optuna.study._optimize")
"""The logger that shows how trials end."""

ANOTHER = "give another directory, or wait for it"
OUTCOMES = {
    TrialState.COMPLETE: Outcome.COMPLETED,
    TrialState.PRUNED: Outcome.PRUNED,
    TrialState.FAIL: Outcome.FAILED,
}
ENDED_BEFORE = "its search ended before it did"
ENDS_ONCE = (
    "a trial ends once, and cannot run again: to try its parameters again, call study.enqueue_trial with them; "
    "`gpu-launcher jobs` shows them"
)


class SearchDirectory:
    """The directory of a search, locked for this program."""

    def __init__(self, directory: Path) -> None:
        """Take the directory before any process is started. Raises ManifestError and OptionError."""
        self.path = directory
        try:
            # Another thread of this program may have it.
            self._lock = DirectoryLock.take(directory, this_program(), ANOTHER, log.warning, exclusive=True)
        except OSError as error:
            problem = f"{short_path(directory)} cannot be written to ({error.strerror}): give a directory of yours"
            raise OptionError("directory", problem) from error
        try:
            if how_to_resume(directory) is not None:  # searches do not record that
                problem = f"{short_path(directory)} has the results of a Hydra sweep or a map: give another directory"
                raise OptionError("directory", problem)
        except BaseException:
            self.close()
            raise
        self.reports = new_reports(directory)
        self.logs = TrialLogs(directory, self.reports.directory / f"launch-{self.reports.launch}.json")

    @property
    def descriptor(self) -> int:
        """The descriptor that the search's processes keep open."""
        return self._lock.descriptor

    def close(self) -> None:
        """Release the directory, once no process of the search is left."""
        self._lock.close()


@dataclass(slots=True)
class _Running:
    """A job that has a trial and has not ended."""

    trial: int
    label: str = ""
    params: Mapping[str, Any] | None = None
    """The parameters that were recorded."""
    outcome: Outcome | None = None
    """How the trial has ended. The job's processes end later."""
    message: str | None = None
    values: tuple[float, ...] = ()


class RecordedSearch(ControlledSweep):
    """The record of a search in its directory, and the requests from other terminals."""

    def __init__(
        self,
        directory: SearchDirectory,
        session: StudySession,
        devices: tuple[Device, ...],
        options: Options,
    ) -> None:
        """Begin the record. If the study is new, what the directory has is of an earlier search.

        Raises ManifestError.
        """
        study = session.study
        self._directory = directory
        self._session = session
        self._names = study.metric_names or value_names(len(study.directions))
        recorder = Recorder(
            directory.path,
            [],
            this_program(),
            launch=directory.reports.launch,
            directions=[direction.name.lower() for direction in study.directions],
            objectives=self._names,
            anew=session.is_new,
            warn=log.warning,
        )
        super().__init__(recorder, session.bounds.n_trials, options.grace)
        self._running: dict[int, _Running] = {}
        """Jobs that have a trial."""
        self._known: set[int] = set()
        """Trials that this call has run."""
        self._completed: set[int] = set()
        self._said: list[Statement] = []
        """What requests have told the search and `serve_requests` has not returned."""
        self.show(SweepStarted(time.monotonic(), self._total, devices, options.max_parallel, is_search=True))

    # What happens

    def take(self, message: node.Message) -> None:
        """Take note of a message of the node, after the search has handled it."""
        match message:
            case JobReturned(number=job):
                if (running := self._running.pop(job, None)) is not None:
                    self.show(replace(message, number=running.trial, label=running.label))
            case node.Ended(result):
                if (running := self._running.pop(result.number, None)) is not None:
                    self._end(running, result)
            case Notice() | NodesChanged() | JobWaiting():
                self.show(message)

    def began(self, started: JobStarted, trial: int) -> str:
        """Take note that a job that has started has a trial. Returns the path of its log."""
        log_file = self.log_of(trial)
        if trial not in self._known:  # otherwise its node was lost, and it runs on another one
            self._known.add(trial)
            if Path(log_file).exists():  # of an earlier study
                set_aside(log_file, 1)
            self._recorder.add(Job(trial, "", {}))
        self._running[started.number] = _Running(trial)
        self.show(replace(started, number=trial, label="", log=log_file))
        return log_file

    def told(self, job: int, trial: FrozenTrial, message: str | None, *, stopped: bool) -> None:
        """Take note of how a trial ended. `stopped` says whether it did not end by itself.

        Raises whatever the storage raises.
        """
        running = self._running.get(job)
        if running is None:
            return
        outcome = OUTCOMES.get(trial.state, Outcome.CANCELLED)
        if outcome is Outcome.FAILED and (stopped or trial.number in self._cancelled):
            outcome = Outcome.CANCELLED
        running.outcome, running.message = outcome, message or None
        running.values = tuple(trial.values or ()) if outcome is Outcome.COMPLETED else ()
        self._describe(running, trial.params)
        # Most sampling is done while a trial runs, so its time is not known here.
        facts = tuple(fact for fact in self._session.facts() if fact[0] != "sampler")
        if facts != self._tally.facts:
            self.show(SearchStatus(time.monotonic(), facts))

    def look(self) -> None:
        """Record which parameters the running trials have chosen."""
        for running in self._running.values():
            if (asked := self._session.running.get(running.trial)) is not None:
                self._describe(running, asked.trial.params)

    def _describe(self, running: _Running, params: Mapping[str, Any]) -> None:
        if params == (running.params or {}):
            return
        running.params = dict(params)
        spec = {name: one if isinstance(one, _PLAIN) else repr(one) for name, one in params.items()}
        running.label = Job(running.trial, " ".join(f"{name}={_short(one)}" for name, one in spec.items()), None).label
        self._recorder.describe(running.trial, running.label, spec)

    def _end(self, running: _Running, result: JobResult | None) -> None:
        """Record the end of a job. None for one that ended with the search."""
        if running.outcome is None and self._stopping is None:  # the node was killed, for example
            running.outcome, running.message = Outcome.FAILED, ENDED_BEFORE
        outcome = running.outcome or Outcome.CANCELLED
        figures = Figures() if result is None else result.figures
        self._cancelled.discard(running.trial)
        if outcome in (Outcome.COMPLETED, Outcome.PRUNED):
            self._completed.add(running.trial)
        started, now = self._tally.running[running.trial], time.monotonic()
        self.show(
            JobEnded(
                time=now,
                number=running.trial,
                label=running.label,
                devices=started.devices,
                outcome=outcome,
                duration=now - started.time if result is None else result.duration,
                message=running.message if outcome is Outcome.FAILED else None,
                log=started.log,
                left_behind=() if result is None else result.left_behind,
                figures=replace(figures, values=dict(zip(self._names, running.values, strict=False))),
            )
        )

    def log_of(self, trial: int) -> str:
        """Return the path of a trial's log."""
        return str(self._directory.logs.path(trial))

    def interrupted(self) -> None:
        """Take note that the search is interrupted: by Ctrl-C, if no request did it."""
        if self._stopping is None:
            self.show(self._stop_requested("SIGINT"))

    def close(self) -> None:
        """End the record, and write the table of results."""
        for running in self._running.values():
            self._end(running, None)
        self._running.clear()
        best, problems = write_results(self._directory.path, best_of=self._completed)
        for line in [*best, f"results: gpu-launcher results {short_path(self._directory.path)}"]:
            _logger.info(line)
        for line in problems:
            log.warning("%s", line)
        self.show(SweepEnded(time.monotonic(), (*best, *problems)))
        super().close()
        self._recorder.close()

    # Requests

    def serve_requests(self) -> list[Statement]:
        """Carry out the requests that have arrived. Never waits. Returns what they tell the search, with its jobs."""
        self.serve()
        said, self._said = self._said, []
        return said

    def _tell(self, statement: Cancel | Stop | Throttle) -> None:
        if isinstance(statement, Cancel):
            (job,) = (job for job, running in self._running.items() if running.trial == statement.number)
            statement = replace(statement, number=job)
        self._said.append(statement)

    def _announce(self, event: Notice | StopRequested | Throttled) -> None:
        if isinstance(event, StopRequested):
            log.warning("%s", stopping(event, event.running, event.grace))
        else:
            log.warning("%s", event.text)
        self.show(event)

    def _retry(self, jobs: Ranges | None, by: str) -> Answer:
        """Say why no trial runs again. Raises ValueError if some of them would, if they were jobs of another sweep."""
        running = self._tally.running
        ended = self._known - self._completed - running.keys()
        if ended if jobs is None else named(jobs, ended):
            raise ValueError(ENDS_ONCE)
        unfinished = ranges_of(running if jobs is None else named(jobs, running))
        return {"over": False, "again": [], "ahead": [], "unfinished": unfinished[:MAX_RANGES]}


_PLAIN = (str, int, float, bool, type(None))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
