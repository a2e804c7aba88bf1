"""The session of one sweep, or one call of `optimize`, on one study: it asks for trials and tells how they ended.

Theory of operation. A running search uses the study only through its session. The session never waits for jobs.
Each trial that it asks for is told exactly once: complete, pruned or failed. A trial has an owner from the moment it
exists: the sweep and its head, recorded so that other programs can tell later whether it is alive (`ownership.py`). The
next session on the study fails the trials of a dead owner, and queues their parameters again unless they were lost too
often (`stale_trials.py`). A trial that is ended from outside meanwhile, for example from a dashboard, stays as it is.

A session is used in one thread at a time.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.debug_log import get_logger
from gpu_launcher.studies import stale_trials
from gpu_launcher.studies.pruning import Judge
from gpu_launcher.studies.stale_trials import fail, losses, queue_again
from gpu_launcher.studies.stopping import FINISHED_STATES, Bounds, SearchEnded, Stopping, Tally
from gpu_launcher.studies.study_storage import StudyStorage
from gpu_launcher.studies.trial import TrialInfo
from gpu_launcher.studies.trial_attrs import FAILURE, JOB, LEFT_OUT, LOST

_log = get_logger("studies.study_session")

STOPPED = "the sweep was stopped"
CHECK_SECONDS = 2.0
"""Seconds between two checks for trials that were ended elsewhere."""
MAX_LEFT_OUT = 100
"""Trials in a row that are left out after which the sweep ends, so that it cannot ask for ever."""
DRAW_EVERY = 10
"""Trials in a row that are left out after which a random point that is not left out is queued.

Some samplers learn only from completed trials, and would propose the same excluded point again and again."""
MAX_HOPELESS = 3
"""Trials without a usable value after which the sweep ends, if no other trial has ended."""


class LeftOutError(Exception):
    """Raised by `define` for a trial that is not to run, because the user has excluded its values."""


class TrialOutcome(str, Enum):
    """How a trial ended."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """The search was stopped. The trial is queued again for the next sweep that continues the study."""


STATES = {
    TrialOutcome.COMPLETE: TrialState.COMPLETE,
    TrialOutcome.PRUNED: TrialState.PRUNED,
    TrialOutcome.FAILED: TrialState.FAIL,
}


@dataclass(frozen=True, slots=True)
class TrialEnding:
    """How a trial ended, as told to the study."""

    outcome: TrialOutcome
    values: tuple[float, ...] = ()
    message: str | None = None
    """Why the trial did not complete."""
    remarkable: bool = False
    """Whether the search must tell the user, because nothing else does."""
    hopeless: bool = False
    """Whether the job ended normally but did not return a usable value, as every other job will."""


@dataclass(frozen=True, slots=True)
class AskedTrial:
    """A trial to run."""

    trial: TrialInfo
    """The trial as it is at its beginning, with parameters, distributions and attributes."""
    spec: list[str]
    """The result of `define`, such as a list of overrides."""


@dataclass(frozen=True, slots=True)
class UnusablePoint:
    """A trial that does not become a job; ask again.

    Either it was queued with values that do not define a job, and has failed. Or it is left out, and has been pruned.
    """

    message: str | None
    """A line for the user; None for a trial that the sampler proposed and that is left out."""


@dataclass(slots=True)
class RunningTrial:
    """A trial that this session has asked for and not yet told."""

    trial: optuna.Trial
    job: dict[str, Any] | None = None
    """What is known about its job, in the form of the user attribute `JOB`; None before it runs."""

    @property
    def id(self) -> int:
        """The trial's id in the storage."""
        return self.trial._trial_id


@dataclass(frozen=True, slots=True)
class Best:
    """One of the best trials of a study."""

    number: int
    values: list[float]
    params: dict[str, Any]
    directory: str | None


@dataclass(frozen=True, slots=True)
class SearchSummary:
    """The outcome of a search."""

    best: list[Best]
    """The best trial, or for several objectives the Pareto front; empty if none completed."""
    first_failure: str | None
    left: int | None
    """Trials that this sweep should still have run; None if `n_trials` was not set."""


def _no_spec(trial: optuna.Trial) -> list[str]:
    return []


@dataclass
class StudySession:
    """Asks for trials of one study and tells how they ended; see the module."""

    study: optuna.Study
    storage: StudyStorage
    """The study's own storage, or a wrapper of it."""
    define: Callable[[optuna.Trial], list[str]] = _no_spec
    """Suggests a trial's parameters and returns what its job is called with. Raises LeftOutError for excluded ones."""
    bounds: Bounds = Bounds()  # noqa: RUF009  (frozen)
    max_retries: int = 0
    """How often a lost trial's parameters are queued again; `stale_trials.NEVER`: not even after an interruption."""
    combinations: int | None = None
    """The number of all combinations, for a sampler that tries each once."""
    in_turn: bool = False
    """Whether sweeps on the study must sample one after another; see `ask`."""
    warm_up: Callable[[], object] = lambda: None
    """Imports what the sampler needs later, which may take seconds. Call it while no trial is needed."""
    draw: Callable[[], Mapping[str, Any] | None] = lambda: None
    """Draws random parameters that are not left out; returns None if it finds none."""
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    running: dict[int, RunningTrial] = field(default_factory=dict)
    """The trials of this session that have not been told, by number."""
    asked: int = 0
    """The number of trials that this session has asked for, without those that were left out."""
    left_out: int = 0
    """The number of trials that were left out."""

    def __post_init__(self) -> None:
        self._opened = self.clock()
        self._ended: Counter[TrialOutcome] = Counter()
        self._hopeless = 0
        self._left_out_in_a_row = 0
        self._why_left_out = ""
        self._exhausted = False
        """Whether the sampler has said that it has tried every combination."""
        self._sampling_seconds = 0.0
        self._first_failure: str | None = None
        self._judge = Judge(self.study, self.storage, self.clock)
        self._prunes = not isinstance(self.study.pruner, optuna.pruners.NopPruner)
        self._unjudged: dict[int, dict[int, float]] = {}
        """Reports since the pruner was last asked: `{trial id: {step: value}}`."""

    # Before the first trial

    def fail_stale_trials(self, who: str = "sweep") -> list[str]:
        """See `stale_trials`. Only one session does this at a time, or two would queue the same trial again."""
        with self.storage.locked():
            return stale_trials.fail_stale_trials(self.study, self.storage.sweep, self.max_retries, who)

    def enqueue(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Queue these parameters to be tried first, unless the study already has them."""
        with self.storage.locked() if points else nullcontext():
            for point in points:
                self.study.enqueue_trial(dict(point), skip_if_exists=True)

    @property
    def is_new(self) -> bool:
        """Whether no trial of the study has begun."""
        return not self._trials(TrialState.RUNNING, *FINISHED_STATES)

    @property
    def expected(self) -> int | None:
        """The number of trials that this session will run, as far as known now."""
        return self._stopping.expected(self._ended[TrialOutcome.FAILED])

    # While it runs

    def over(self) -> SearchEnded | None:
        """Why no more trials are asked for; None if more may be."""
        if (over := self._stopping.over(self._tally)) is not None:
            return over
        if self._left_out_in_a_row >= MAX_LEFT_OUT and self.combinations is None:
            return SearchEnded(
                f"no more trials are asked for: {self._left_out_in_a_row} proposals in a row were left out, the "
                f"last because {self._why_left_out}; allow more, or change the search space"
            )
        if self._hopeless >= MAX_HOPELESS and self._hopeless == self._ended.total():
            reason = f"no more trials are asked for: none of the first {self._hopeless} returned a usable value"
            return SearchEnded(f"{reason}; the task function must return a number for each direction", failed=True)
        return None

    def ask(self) -> AskedTrial | SearchEnded | UnusablePoint:
        """Ask for the next trial.

        Raises whatever `define` or the sampler raises, and StudyError; no trial is left untold. If `define` raises for
        a queued trial, the trial's values are assumed to be the reason. Then the error is not raised, and the answer is
        an UnusablePoint.

        A sampler of a sequence or a grid first reads which points are taken, and then takes the next one. Two sweeps
        that read at the same time would take the same point. With `in_turn`, they sample one after another.
        """
        if (over := self.over()) is not None:
            return over
        with self.storage.locked() if self.in_turn else nullcontext():
            return self._sample()

    def _sample(self) -> AskedTrial | UnusablePoint:
        began = self.clock()
        try:
            with self.storage.used_by(self.study):
                trial = self.study.ask()
        except BaseException as error:
            for unknown in self._unknown():
                self._drop(unknown, "it could not be sampled", stopped=not isinstance(error, Exception))
            raise
        try:
            spec = self.define(trial)
        except LeftOutError as error:
            return self._leave_out(trial, str(error))
        except BaseException as error:
            stopped = not isinstance(error, Exception)
            asked = self.storage.get_trial(trial._trial_id)
            queued = self._drop(asked, f"it could not be defined: {error}", stopped=stopped)
            if not queued or stopped:
                raise
            values = ", ".join(f"{name}={value!r}" for name, value in queued.items())
            message = f"trial {trial.number} failed: it was queued with {values}, which do not define a job: {error}"
            self._first_failure = self._first_failure or message
            return UnusablePoint(message)
        frozen = self.storage.get_trial(trial._trial_id)
        # If another worker of `sweep_search` has taken over, this raises. Otherwise none takes over within the block:
        # the new worker tells all trials in `running`, and must not find it half updated.
        with self.storage.uninterrupted():
            self.asked += 1
            self._left_out_in_a_row = 0
            self.running[trial.number] = RunningTrial(trial)
            self._sampling_seconds += self.clock() - began
        info = TrialInfo(
            number=trial.number,
            study=self.study.study_name,
            params=dict(frozen.params),
            distributions=dict(frozen.distributions),
            user_attrs=dict(frozen.user_attrs),
            datetime_start=frozen.datetime_start,
            prunes=self._prunes,
            directions=tuple(direction.value for direction in self.study.directions),
        )
        return AskedTrial(info, spec)

    def _leave_out(self, trial: optuna.Trial, why: str) -> UnusablePoint:
        """Tell a trial that is not to run as pruned. Samplers that learn from pruned trials then avoid its values."""
        trial.set_user_attr(LEFT_OUT, why)
        self._tell(trial, None, TrialState.PRUNED)
        _log.info("trial %d is left out: %s", trial.number, why)
        self.left_out += 1
        self._why_left_out = why
        self._left_out_in_a_row += 1
        if self.combinations is None and self._left_out_in_a_row % DRAW_EVERY == 0 and (point := self.draw()):
            self.study.enqueue_trial(dict(point), skip_if_exists=True)
        queued = self.storage.get_trial(trial._trial_id).system_attrs.get("fixed_params")
        return UnusablePoint(f"trial {trial.number} was queued, but is left out: {why}" if queued else None)

    def started(
        self, number: int, devices: Sequence[str], directory: str | None = None, log: str | None = None
    ) -> None:
        """Note that a trial's job is now running."""
        if number not in self.running:
            return
        job: dict[str, Any] = {"devices": list(devices), "host": self.storage.sweep.identity.host}
        job |= {name: value for name, value in (("directory", directory), ("log", log)) if value is not None}
        self.running[number].job = {**job, "started": self.wall_clock()}
        self._note_job(number)

    def ran_in(self, number: int, directory: str | None) -> None:
        """Note a trial's directory, if it was not known when the job started."""
        if (job := self.running[number].job) is not None:
            job["directory"] = directory

    def report(self, reports: Mapping[int, Mapping[int, float]]) -> list[int]:
        """Store reports, `{number: {step: value}}`; returns the numbers of the trials that were ended elsewhere."""
        known = {self.running[number].id: number for number in reports if number in self.running}
        if not known:
            return []
        ended = self.storage.store_reports({id: reports[number] for id, number in known.items()})
        for id in known.keys() - ended:
            self._unjudged.setdefault(id, {}).update(reports[known[id]])
        return [known[id] for id in ended]

    def judge(self, numbers: Iterable[int]) -> dict[int, bool | Exception]:
        """Decide whether to prune each of these trials; the value is an exception if the pruner raised it.

        Trials that this session has not asked for, or has already told, are left out. Raises what the storage raises.
        """
        asked = {number: self.running[number].id for number in numbers if number in self.running}
        if not asked or not self._prunes:
            return dict.fromkeys(asked, False)
        reports, self._unjudged = self._unjudged, {}
        running = {trial.id for trial in self.running.values()}
        return self._judge.judge(asked, {id: steps for id, steps in reports.items() if id in running})

    def annotate(self, number: int, name: str, value: Any) -> None:
        """Set a user attribute that a job gave its trial."""
        if number in self.running:
            self._note(number, name, value)

    def tell(self, number: int, ending: TrialEnding) -> FrozenTrial:
        """End a trial in the study; returns it as it is then. A trial that was ended elsewhere is not changed.

        Raises whatever the sampler or the storage raises.
        """
        running = self.running[number]
        _log.info("trial %d: %s%s", number, ending.outcome.name, f": {ending.message}" if ending.message else "")
        self._ended[ending.outcome] += 1
        self._hopeless += ending.hopeless
        if ending.outcome is TrialOutcome.FAILED and self._first_failure is None:
            self._first_failure = f"trial {number} {ending.message or 'failed'}"
        try:
            self._note_end(number, ending.message)
            if ending.outcome is TrialOutcome.INTERRUPTED:
                self._fail_or_retry(running.id, ending.message, interrupted=True)
            else:
                if ending.outcome is TrialOutcome.FAILED and ending.message is not None:
                    self._note(number, FAILURE, ending.message)
                values = list(ending.values) if ending.outcome is TrialOutcome.COMPLETE else None
                self._tell(running.trial, values, STATES[ending.outcome])
            return self.storage.get_trial(running.id)
        finally:
            self._forget(number)

    def retry_lost(self, number: int, message: str) -> FrozenTrial | None:
        """Fail a lost trial and queue its parameters again; returns the failed trial.

        Returns None and queues nothing if they were lost too often, or if the trial was ended elsewhere.
        """
        trial = self.storage.get_trial(self.running[number].id)
        if (lost := losses(trial)) > self.max_retries:
            return None
        self._note_end(number, message)
        if not queue_again(self.study, trial, lost, message):
            return None
        self._first_failure = self._first_failure or f"trial {number} {message}"
        self._forget(number)
        return self.storage.get_trial(trial._trial_id)

    def ended_elsewhere(self) -> list[int]:
        """Numbers of this session's trials that were ended elsewhere, for example from a dashboard."""
        if not self.running:
            return []
        ended = {trial._trial_id for trial in self._trials(*FINISHED_STATES)}  # one query instead of one per trial
        return [number for number, trial in self.running.items() if trial.id in ended]

    def facts(self) -> tuple[tuple[str, str], ...]:
        """The state of the search, as pairs of name and text for a display."""
        shown: list[tuple[str, str]] = []
        best = self.best()
        if len(self.study.directions) > 1:
            shown.append(("Pareto front", f"{len(best)} trials"))
        elif best:
            (trial, *_) = best
            params = " ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
            shown.append(("best", f"{_short(trial.values[0])} (#{trial.number} {params})"))
        if self.asked:
            shown.append(("sampler", f"{self._sampling_seconds / self.asked * 1000:.0f} ms per trial"))
        return tuple(shown)

    # At the end

    def close(self, message: str = "the sweep ended before it did", *, interrupted: bool = True) -> None:
        """Fail all trials that have not been told, and queue their parameters again unless they were lost too often.

        `interrupted` says whether the trials were interrupted or lost. A trial whose sampling was cut short by an
        exception fails, too.
        """
        for unknown in self._unknown():
            self._drop(unknown, message, stopped=True)
        for number in self.running:
            self._note_end(number, message)
        self.running.clear()
        for trial in self._mine():
            self._fail_or_retry(trial._trial_id, message, interrupted=interrupted)

    def summary(self) -> SearchSummary:
        """The outcome of the search."""
        done = self._ended.total() - self._ended[TrialOutcome.INTERRUPTED]
        left = None if self.bounds.n_trials is None else max(0, self.bounds.n_trials - done)
        return SearchSummary(self.best(), self._first_failure, left)

    def best(self) -> list[Best]:
        """The best trial, or the Pareto front."""
        if len(self.study.directions) > 1:
            trials = self.study.best_trials
        else:
            try:
                trials = [self.study.best_trial]
            except ValueError:  # no trial has completed
                trials = []
        return [
            Best(trial.number, list(trial.values), dict(trial.params), trial.user_attrs.get(JOB, {}).get("directory"))
            for trial in trials
        ]

    # Internal

    def _forget(self, number: int) -> None:
        del self.running[number]
        self._judge.forget()

    @property
    def _stopping(self) -> Stopping:
        return Stopping(self.study, self.bounds, self.combinations)

    @property
    def _tally(self) -> Tally:
        ended, failed = self._ended.total(), self._ended[TrialOutcome.FAILED]
        return Tally(self.asked, ended, failed, self.clock() - self._opened, self._exhausted)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.storage.get_all_trials(self.study._study_id, deepcopy=False, states=states or None)

    def _mine(self) -> list[FrozenTrial]:
        """This sweep's running trials."""
        return [trial for trial in self._trials(TrialState.RUNNING) if self.storage.sweep.owns(trial)]

    def _unknown(self) -> list[FrozenTrial]:
        """This sweep's running trials in the storage that `ask` has not returned."""
        known = {running.id for running in self.running.values()}
        return [trial for trial in self._mine() if trial._trial_id not in known]

    def _drop(self, trial: FrozenTrial, why: str, *, stopped: bool) -> dict[str, Any]:
        """End a trial that was asked for and will not run; returns the values with which it was queued, if any."""
        queued: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
        if stopped and queued:  # the user may know it to be a good point
            self._fail_or_retry(trial._trial_id, STOPPED, interrupted=True)
        else:
            fail(self.storage, trial._trial_id, STOPPED if stopped else why)
        return queued

    def _fail_or_retry(self, id: int, message: str | None, *, interrupted: bool) -> None:
        """Fail an interrupted or lost trial, and queue its parameters again unless they were lost too often."""
        trial = self.storage.get_trial(id)
        lost = trial.user_attrs.get(LOST, 0) if interrupted else losses(trial)
        if lost <= self.max_retries:
            queue_again(self.study, trial, lost, message)
        else:
            fail(self.storage, id, message)

    def _note_end(self, number: int, message: str | None) -> None:
        if (job := self.running[number].job) is not None:
            job["ended"] = self.wall_clock()
            if message:
                job["message"] = message
            self._note_job(number)

    def _note_job(self, number: int) -> None:
        # A copy, because a storage in memory keeps what it is given, and the trial may have ended when this changes.
        self._note(number, JOB, copy.copy(self.running[number].job))

    def _note(self, number: int, name: str, value: Any) -> None:
        with suppress(UpdateFinishedTrialError):  # it was ended elsewhere
            self.running[number].trial.set_user_attr(name, value)

    def _tell(self, trial: optuna.Trial, values: list[float] | None, state: TrialState) -> None:
        try:
            self.study.tell(trial, values, state, skip_if_finished=True)
        except UpdateFinishedTrialError:
            return  # it was ended elsewhere in this moment
        except RuntimeError as error:
            # Samplers that try every combination call `Study.stop` after they have stored the trial.
            if "Study.stop" not in str(error):
                raise
            self._exhausted = True


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
