"""Asking and telling: what one sweep, or one call of `optimize`, does with one study. Nothing here waits for jobs.

Theory of operation. A session alone uses the study while the search runs. Each trial that it asks for is told exactly
once: complete, pruned or failed. A trial has an owner from the moment it exists, the sweep with its launching program,
named so that anybody can say later whether that lives (`ownership.py`). A trial of a dead owner is failed by the next
session on the study, and queued again if it was not lost too often (`stale_trials.py`). A trial that somebody else ends
meanwhile, as from a dashboard, is left as it is.

Used in one thread.
"""

from __future__ import annotations

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
from gpu_launcher.studies.stopping import ENDED, Bounds, SearchEnded, Stopping, Tally
from gpu_launcher.studies.study_storage import StudyStorage
from gpu_launcher.studies.trial_attrs import FAILURE, JOB, LOST

_log = get_logger("studies.study_session")

STOPPED = "the sweep was stopped"
LOOK_SECONDS = 2.0
"""Between two looks at whether somebody else has ended a trial."""
MAX_HOPELESS = 3
"""Trials without a usable value after which the sweep ends, if no other trial has ended."""


class How(str, Enum):
    """How a trial ended."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """The search was stopped. The trial is queued again, for whoever continues the study."""


STATES = {How.COMPLETE: TrialState.COMPLETE, How.PRUNED: TrialState.PRUNED, How.FAILED: TrialState.FAIL}


@dataclass(frozen=True, slots=True)
class TrialEnding:
    """What is told of a trial."""

    how: How
    values: tuple[float, ...] = ()
    message: str | None = None
    """Why it did not complete."""
    remarkable: bool = False
    """Nobody else tells the user."""
    hopeless: bool = False
    """The job did its work and returned what is not a value, as every other will."""


@dataclass(frozen=True, slots=True)
class AskedTrial:
    """A trial to run."""

    trial: FrozenTrial
    """As it is at the beginning: its parameters, distributions and attributes."""
    spec: list[str]
    """What `define` made of it, such as a list of overrides."""
    study: str
    prunes: bool
    """Whether the study has a pruner, which can give a verdict on reports."""
    directions: tuple[int, ...]
    """As the values of optuna.study.StudyDirection."""


@dataclass(frozen=True, slots=True)
class UnusablePoint:
    """A trial that somebody queued, with values of which no job can be made. It has failed; ask again."""

    message: str


@dataclass(slots=True)
class RunningTrial:
    """A trial that this session has asked for and not told."""

    trial: optuna.Trial
    job: dict[str, Any] | None = None
    """What is known of its job, as the user attribute `JOB` has it; None before it runs."""

    @property
    def id(self) -> int:
        """By which the storage knows it."""
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
    """What came of it."""

    study: str
    best: list[Best]
    """The best trial, or for several objectives the Pareto front; empty if none completed."""
    states: dict[str, int]
    """How many trials of the study are in each state, by Optuna's name for it."""
    first_failure: str | None
    left: int | None
    """Trials that this sweep was to run and has not; None if it was not to run a number."""


def _no_spec(trial: optuna.Trial) -> list[str]:
    return []


@dataclass
class StudySession:
    """See the module."""

    study: optuna.Study
    storage: StudyStorage
    """On the study's storage, or the study's own."""
    define: Callable[[optuna.Trial], list[str]] = _no_spec
    """Turns a trial into what its job is called with, and suggests its parameters."""
    bounds: Bounds = Bounds()  # noqa: RUF009  (frozen)
    max_retries: int = 0
    """How often what a lost trial tries is queued again; `stale_trials.NEVER`: not even what was interrupted."""
    combinations: int | None = None
    """How many there are in all, for a sampler that tries each once."""
    in_turn: bool = False
    """Whether sweeps on the study must sample one after another; see `ask`."""
    warm_up: Callable[[], object] = lambda: None
    """Imports what the sampler needs later, which may take seconds. To be called while there is time."""
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    running: dict[int, RunningTrial] = field(default_factory=dict)
    """By number."""
    asked: int = 0
    """How many trials this session has asked for."""

    def __post_init__(self) -> None:
        self._opened = self.clock()
        self._ended: Counter[How] = Counter()
        self._hopeless = 0
        self._exhausted = False
        """The sampler has said so."""
        self._sampling_seconds = 0.0
        self._first_failure: str | None = None
        self._judge = Judge(self.study, self.storage, self.clock)
        self._prunes = not isinstance(self.study.pruner, optuna.pruners.NopPruner)
        self._unjudged: dict[int, dict[int, float]] = {}
        """Reported since the pruner was last asked: `{trial id: {step: value}}`."""

    # Before the first trial

    def fail_stale_trials(self, who: str = "sweep") -> list[str]:
        """See `stale_trials`. One session at a time, or two would queue the same trial again."""
        with self.storage.alone():
            return stale_trials.fail_stale_trials(self.study, self.storage.sweep, self.max_retries, who)

    def enqueue(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Try these parameters first, unless the study has them already."""
        with self.storage.alone() if points else nullcontext():
            for point in points:
                self.study.enqueue_trial(dict(point), skip_if_exists=True)

    @property
    def expected(self) -> int | None:
        """How many trials this session is going to run, as far as that is known now."""
        return self._stopping.expected(self._ended[How.FAILED])

    # While it runs

    def over(self) -> SearchEnded | None:
        """Whether no more trials are asked for, and why."""
        if (over := self._stopping.over(self._tally)) is not None:
            return over
        if self._hopeless >= MAX_HOPELESS and self._hopeless == self._ended.total():
            reason = f"no more trials are asked for: none of the first {self._hopeless} returned a value to search by"
            return SearchEnded(f"{reason}; the task function must return a number for each direction", failed=True)
        return None

    def ask(self) -> AskedTrial | SearchEnded | UnusablePoint:
        """The next trial. Raises whatever `define` or the sampler raises, and StudyError; no trial is left untold.

        What `define` raises for a trial that was queued is taken for the fault of that one, and not raised.

        A sampler of a sequence or a grid looks for what is taken, and then takes the next point. Two sweeps that look
        at the same time would take the same one: with `in_turn` they sample one after another.
        """
        if (over := self.over()) is not None:
            return over
        with self.storage.alone() if self.in_turn else nullcontext():
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
        except BaseException as error:
            stopped = not isinstance(error, Exception)
            asked = self.storage.get_trial(trial._trial_id)
            queued = self._drop(asked, f"it could not be defined: {error}", stopped=stopped)
            if not queued or stopped:
                raise
            values = ", ".join(f"{name}={value!r}" for name, value in queued.items())
            message = f"trial {trial.number} failed: it was queued with {values}, of which no job can be made: {error}"
            self._first_failure = self._first_failure or message
            return UnusablePoint(message)
        frozen = self.storage.get_trial(trial._trial_id)
        with self.storage.uninterrupted():  # or another thread, which has taken over, may tell trials at this moment
            self.asked += 1
            self.running[trial.number] = RunningTrial(trial)
            self._sampling_seconds += self.clock() - began
        directions = tuple(direction.value for direction in self.study.directions)
        return AskedTrial(frozen, spec, self.study.study_name, self._prunes, directions)

    def started(
        self, number: int, devices: Sequence[str], directory: str | None = None, log: str | None = None
    ) -> None:
        """Its job runs now."""
        if number not in self.running:
            return
        job: dict[str, Any] = {"devices": list(devices), "host": self.storage.sweep.identity.host}
        job |= {name: value for name, value in (("directory", directory), ("log", log)) if value is not None}
        self.running[number].job = {**job, "started": self.wall_clock()}
        self._note_job(number)

    def ran_in(self, number: int, directory: str | None) -> None:
        """It ran there, which was not known before."""
        if (job := self.running[number].job) is not None:
            job["directory"] = directory

    def report(self, reports: Mapping[int, Mapping[int, float]]) -> list[int]:
        """Store what trials report, `{number: {step: value}}`; returns those that have been ended elsewhere."""
        known = {self.running[number].id: number for number in reports if number in self.running}
        if not known:
            return []
        ended = self.storage.store_reports({id: reports[number] for id, number in known.items()})
        for id in known.keys() - ended:
            self._unjudged.setdefault(id, {}).update(reports[known[id]])
        return [known[id] for id in ended]

    def judge(self, numbers: Iterable[int]) -> dict[int, bool | Exception]:
        """Whether each of these trials is to be pruned, or what the pruner raises. Raises what the storage raises.

        Those that this session has not asked for, or has told, are not among them.
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
        """End a trial; returns it as it is then. Nothing happens to one that somebody else has ended.

        Raises whatever the sampler or the storage raises.
        """
        running = self.running[number]
        _log.info("trial %d: %s%s", number, ending.how.name, f": {ending.message}" if ending.message else "")
        self._ended[ending.how] += 1
        self._hopeless += ending.hopeless
        if ending.how is How.FAILED and self._first_failure is None:
            self._first_failure = f"trial {number} {ending.message or 'failed'}"
        try:
            self._note_end(number, ending.message)
            if ending.how is How.INTERRUPTED:
                self._give_up(running.id, ending.message, interrupted=True)
            else:
                if ending.how is How.FAILED and ending.message is not None:
                    self._note(number, FAILURE, ending.message)
                values = list(ending.values) if ending.how is How.COMPLETE else None
                self._tell(running.trial, values, STATES[ending.how])
            return self.storage.get_trial(running.id)
        finally:
            self.drop(number)

    def drop(self, number: int) -> None:
        """Leave alone a trial that somebody else has ended."""
        del self.running[number]
        self._judge.forget()

    def retry_lost(self, number: int, message: str) -> FrozenTrial | None:
        """Fail a trial that has been lost, and queue what it tried again; returns it as it is then.

        None, and nothing has happened, if that was lost too often, or somebody else has ended the trial.
        """
        trial = self.storage.get_trial(self.running[number].id)
        if (lost := losses(trial)) > self.max_retries:
            return None
        self._note_end(number, message)
        if not queue_again(self.study, trial, lost, message):
            return None
        self.drop(number)
        return self.storage.get_trial(trial._trial_id)

    def ended_elsewhere(self) -> list[int]:
        """This session's trials that somebody else has ended, as from a dashboard."""
        if not self.running:
            return []
        ended = {trial._trial_id for trial in self._trials(*ENDED)}  # one query, instead of one for each
        return [number for number, trial in self.running.items() if trial.id in ended]

    def facts(self) -> tuple[tuple[str, str], ...]:
        """How it goes, for a display."""
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

    # In the end

    def close(self, message: str = "the sweep ended before it did", *, interrupted: bool = True) -> None:
        """Fail all trials that have not been told, and queue again what they tried, unless that was lost too often.

        They were interrupted, or lost. Also one is failed that was being sampled when an exception cut that short.
        """
        for unknown in self._unknown():
            self._drop(unknown, message, stopped=True)
        for number in self.running:
            self._note_end(number, message)
        self.running.clear()
        for trial in self._mine():
            self._give_up(trial._trial_id, message, interrupted=interrupted)

    def summary(self) -> SearchSummary:
        """What came of it."""
        states = Counter(trial.state.name.lower() for trial in self._trials())
        done = self._ended.total() - self._ended[How.INTERRUPTED]
        left = None if self.bounds.n_trials is None else max(0, self.bounds.n_trials - done)
        return SearchSummary(self.study.study_name, self.best(), dict(states), self._first_failure, left)

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

    # How

    @property
    def _stopping(self) -> Stopping:
        return Stopping(self.study, self.bounds, self.combinations)

    @property
    def _tally(self) -> Tally:
        ended, failed = self._ended.total(), self._ended[How.FAILED]
        return Tally(self.asked, ended, failed, self.clock() - self._opened, self._exhausted)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.storage.get_all_trials(self.study._study_id, deepcopy=False, states=states or None)

    def _mine(self) -> list[FrozenTrial]:
        """The trials that run and are this sweep's."""
        return [trial for trial in self._trials(TrialState.RUNNING) if self.storage.sweep.owns(trial)]

    def _unknown(self) -> list[FrozenTrial]:
        """Trials of this sweep that have been asked for, and never got here."""
        known = {running.id for running in self.running.values()}
        return [trial for trial in self._mine() if trial._trial_id not in known]

    def _drop(self, trial: FrozenTrial, why: str, *, stopped: bool) -> dict[str, Any]:
        """End a trial that was asked for and will not run. Returns the values that it was queued with, if it was."""
        queued: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
        if stopped and queued:  # it may be somebody's known good point
            self._give_up(trial._trial_id, STOPPED, interrupted=True)
        else:
            fail(self.storage, trial._trial_id, STOPPED if stopped else why)
        return queued

    def _give_up(self, id: int, message: str | None, *, interrupted: bool) -> None:
        """Fail a trial that was interrupted or lost, and queue what it tried, unless that was lost too often."""
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
        self._note(number, JOB, self.running[number].job)

    def _note(self, number: int, name: str, value: Any) -> None:
        with suppress(UpdateFinishedTrialError):  # somebody else has ended it
            self.running[number].trial.set_user_attr(name, value)

    def _tell(self, trial: optuna.Trial, values: list[float] | None, state: TrialState) -> None:
        try:
            self.study.tell(trial, values, state, skip_if_finished=True)
        except UpdateFinishedTrialError:
            return  # somebody else has ended it in this moment
        except RuntimeError as error:
            # The samplers that try every combination call this after they have stored the trial.
            if "Study.stop" not in str(error):
                raise
            self._exhausted = True


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
