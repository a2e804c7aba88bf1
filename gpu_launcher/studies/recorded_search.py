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
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs import node_messages as node
from gpu_launcher.jobs.control import (
    MAX_RANGES,
    Answer,
    AskStatus,
    CancelJobs,
    ContinueSweep,
    LimitDevices,
    PauseSweep,
    Ranges,
    RetryJobs,
    Steering,
    StopSweep,
    WatchSweep,
    contains,
    name_of,
    named,
    ranges_of,
    spell,
)
from gpu_launcher.jobs.control_socket import open_control
from gpu_launcher.jobs.directory import DirectoryLock
from gpu_launcher.jobs.events import (
    Event,
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
from gpu_launcher.jobs.recorder import Recorder, new_reports
from gpu_launcher.jobs.result_table import value_names, write_results
from gpu_launcher.jobs.source import UNTHROTTLED, Throttle
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.jobs.watched import Watched
from gpu_launcher.jobs.where import this_program
from gpu_launcher.model import Device
from gpu_launcher.studies.objective import TrialLogs
from gpu_launcher.studies.study_session import StudySession
from gpu_launcher.text import short_path
from gpu_launcher.wording import count

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


class Search(Protocol):
    """What requests do to a search."""

    def withdraw(self, job: int, why: str) -> None:
        """End a running job. Its trial fails, and is not queued again."""

    def set_throttle(self, throttle: Throttle) -> None:
        """Change how much may run."""

    def request_stop(self, *, now: bool) -> None:
        """Interrupt the search as Ctrl-C does, or with `now` as a second Ctrl-C does."""


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
    started: JobStarted
    label: str = ""
    params: Mapping[str, Any] | None = None
    """The parameters that were recorded."""
    outcome: Outcome | None = None
    """How the trial has ended. The job's processes end later."""
    message: str | None = None
    values: tuple[float, ...] = ()


class RecordedSearch:
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
        self._n_trials = session.bounds.n_trials
        self._grace = options.grace
        self._names = study.metric_names or value_names(len(study.directions))
        self._recorder = Recorder(
            directory.path,
            [],
            this_program(),
            launch=directory.reports.launch,
            directions=[direction.name.lower() for direction in study.directions],
            objectives=self._names,
            anew=session.is_new,
            warn=log.warning,
        )
        self._progress = Watched(_Unseen())
        self._control = self._progress.control = open_control(self._recorder.directory, self._recorder.socket)
        self._started: dict[int, JobStarted] = {}
        """Jobs that have their devices and no trial yet."""
        self._running: dict[int, _Running] = {}
        """Jobs that have a trial."""
        self._known: set[int] = set()
        """Trials that this call has run."""
        self._withdrawn: dict[int, str] = {}
        """Trials that a request has cancelled and that have not ended, with what cancelled them."""
        self._counts: Counter[Outcome] = Counter()
        self._incomplete: set[int] = set()
        """Trials of this call that failed or were cancelled."""
        self._completed: set[int] = set()
        self._throttle = UNTHROTTLED
        self._stopping: str | None = None
        self._facts: tuple[tuple[str, str], ...] = ()
        self._show(SweepStarted(time.monotonic(), self._n_trials, devices, options.max_parallel))

    def fileno(self) -> int | None:
        """Return a descriptor that is readable when `serve` has something to do. None if there is no socket."""
        return None if self._control is None else self._control.fileno()

    # What happens

    def take(self, message: node.Message) -> None:
        """Take note of a message of the node, after the search has handled it."""
        match message:
            case JobStarted(number=job):
                self._started[job] = message
            case JobReturned(number=job):
                self._started.pop(job, None)
                if (running := self._running.pop(job, None)) is not None:
                    self._show(replace(message, number=running.trial, label=running.label))
            case node.Ended(result):
                self._started.pop(result.number, None)
                if (running := self._running.pop(result.number, None)) is not None:
                    self._end(running, result)
            case Notice() | NodesChanged():
                self._show(message)
            case JobWaiting():
                self._progress.handle(message)

    def began(self, job: int, trial: int) -> str:
        """Take note that a job runs with a trial. Returns the path of its log."""
        log_file = self._directory.logs.path(trial)
        started = replace(self._started.pop(job), number=trial, label="", log=str(log_file))
        if trial not in self._known:  # otherwise its node was lost, and it runs on another one
            self._known.add(trial)
            if log_file.exists():  # of an earlier study
                set_aside(str(log_file), 1)
            self._recorder.add(Job(trial, "", {}))
        self._running[job] = _Running(trial, started)
        self._show(started)
        return str(log_file)

    def told(self, job: int, trial: FrozenTrial, message: str | None, *, stopped: bool) -> None:
        """Take note of how a trial ended. `stopped` says whether it did not end by itself.

        Raises whatever the storage raises.
        """
        running = self._running.get(job)
        if running is None:
            return
        outcome = OUTCOMES.get(trial.state, Outcome.CANCELLED)
        if outcome is Outcome.FAILED and (stopped or trial.number in self._withdrawn):
            outcome = Outcome.CANCELLED
        running.outcome, running.message = outcome, message or None
        running.values = tuple(trial.values or ()) if outcome is Outcome.COMPLETED else ()
        self._describe(running, trial.params)
        # Most sampling is done while a trial runs, so its time is not known here.
        facts = tuple(fact for fact in self._session.facts() if fact[0] != "sampler")
        if facts != self._facts:
            self._facts = facts
            self._show(SearchStatus(time.monotonic(), facts))

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
        self._counts[outcome] += 1
        self._withdrawn.pop(running.trial, None)
        (self._completed if outcome in (Outcome.COMPLETED, Outcome.PRUNED) else self._incomplete).add(running.trial)
        now = time.monotonic()
        self._show(
            JobEnded(
                time=now,
                number=running.trial,
                label=running.label,
                devices=running.started.devices,
                outcome=outcome,
                duration=now - running.started.time if result is None else result.duration,
                message=running.message if outcome is Outcome.FAILED else None,
                log=running.started.log,
                left_behind=() if result is None else result.left_behind,
                figures=replace(figures, values=dict(zip(self._names, running.values, strict=False))),
            )
        )

    def log_of(self, job: int) -> str | None:
        """Return the path of a job's log."""
        return self._running[job].started.log if job in self._running else None

    def interrupted(self) -> None:
        """Take note that the search is interrupted: by Ctrl-C, if no request did it."""
        if self._stopping is None:
            self._note_stop("SIGINT", forced=False)

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
        self._progress.handle(SweepEnded(time.monotonic(), (*best, *problems)))
        if self._control is not None:
            self._control.close()
        self._recorder.close()

    def _show(self, event: Event) -> None:
        """Record an event, and tell those who watch."""
        self._recorder.handle(event)
        self._progress.handle(event)

    def _say(self, event: Notice | Throttled) -> None:
        log.warning("%s", event.text)
        self._show(event)

    # Requests

    def serve(self, search: Search) -> None:
        """Carry out the requests that have arrived. Never waits."""
        if self._control is None:
            return

        def carry_out(request: Steering) -> Answer:
            return self._carry_out(search, request, f"`gpu-launcher {name_of(request)}`")

        self._control.serve(carry_out, self._progress.state)

    def _carry_out(self, search: Search, request: Steering, by: str) -> Answer:
        """Carry out a request. Raises ValueError if that is not possible, with a message for the sender."""
        match request:
            case AskStatus():
                return self._status()
            case WatchSweep():  # the control socket answers it
                return {}
            case CancelJobs(jobs):
                return self._cancel(search, jobs, by)
            case RetryJobs(jobs):
                return self._refuse_retry(jobs)
            case StopSweep(now):
                return self._stop(search, by, now=now)
            case PauseSweep():
                return self._change(search, replace(self._throttle, paused=True), "no trial is started", by)
            case ContinueSweep():
                return self._change(search, replace(self._throttle, paused=False), "trials are started again", by)
            case LimitDevices(devices):
                limit = "no limit on devices" if devices is None else f"at most {count(devices, 'device')}"
                return self._change(search, replace(self._throttle, devices=devices), limit, by)

    def _status(self) -> Answer:
        return {
            "stopping": self._stopping,
            "paused": self._throttle.paused,
            "devices": self._throttle.devices,
            "total": self._n_trials,
            "running": len(self._running),
            "ended": {outcome.value: number for outcome, number in self._counts.items() if number},
            "facts": self._facts,
        }

    def _cancel(self, search: Search, jobs: Ranges, by: str) -> Answer:
        meant = {running.trial: job for job, running in self._running.items() if contains(jobs, running.trial)}
        already = [trial for trial in meant if trial in self._withdrawn]
        ending = [trial for trial in meant if trial not in self._withdrawn]
        for trial in ending:
            self._withdrawn[trial] = by
            search.withdraw(meant[trial], f"was cancelled by {by}")
        if ending:
            self._say(Notice(time.monotonic(), f"{spell(ranges_of(ending))} cancelled by {by}"))
        return {
            "ending": ranges_of(ending)[:MAX_RANGES],
            "dropped": [],
            "already": ranges_of(already)[:MAX_RANGES],
            "coming": [],
            "grace": self._grace,
        }

    def _refuse_retry(self, jobs: Ranges | None) -> Answer:
        """Say why no trial runs again. Raises ValueError if some of them would, if they were jobs of another sweep."""
        if self._incomplete if jobs is None else named(jobs, self._incomplete):
            raise ValueError(ENDS_ONCE)
        running = [one.trial for one in self._running.values()]
        unfinished = ranges_of(running if jobs is None else named(jobs, running))
        return {"over": False, "again": [], "ahead": [], "unfinished": unfinished[:MAX_RANGES]}

    def _stop(self, search: Search, by: str, *, now: bool) -> Answer:
        already = self._stopping is not None
        if now or not already:
            self._note_stop(by.replace("stop", "stop --now") if now else by, forced=now)
            search.request_stop(now=now)
        return {"already": already, "running": len(self._running), "grace": self._grace}

    def _note_stop(self, by: str, *, forced: bool) -> None:
        self._stopping = self._stopping or by
        if not by.startswith("SIG"):
            log.warning("the search stops, because of %s", by)
        self._show(StopRequested(time.monotonic(), len(self._running), self._grace, forced, by))

    def _change(self, search: Search, throttle: Throttle, what: str, by: str) -> Answer:
        if self._stopping is not None:
            raise ValueError("it is stopping, so no more trials are started")
        changed = throttle != self._throttle
        if changed:
            self._throttle = throttle
            search.set_throttle(throttle)
            text = f"{what} from now on, because of {by}"
            self._say(Throttled(time.monotonic(), throttle.paused, throttle.devices, text))
        running = len(self._running)
        return {"changed": changed, "paused": throttle.paused, "devices": throttle.devices, "running": running}


_PLAIN = (str, int, float, bool, type(None))


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Unseen:
    """A display that shows nothing: Optuna and the program show what happens. A `Progress`."""

    def handle(self, event: Event) -> None:
        """See `Progress`."""

    def tick(self, now: float) -> None:
        """See `Progress`."""

    def close(self) -> None:
        """See `Progress`."""
