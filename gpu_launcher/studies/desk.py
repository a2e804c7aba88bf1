"""Asking and telling: what one sweep does with one study. Whoever has the desk has the study; nothing here waits.

Each trial that is asked for is told exactly once, and has an owner from the moment it exists: the launching program,
named so that anybody can say later whether it lives. A trial of a dead owner is settled by the next sweep on the study.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.studies.attributes import JOB, LOST
from gpu_launcher.studies.pruning import Judge
from gpu_launcher.studies.settling import fail, queue_again, settle
from gpu_launcher.studies.stopping import ENDED, Bounds, Exhausted, Stopping, Tally
from gpu_launcher.studies.study_storage import StudyStorage

STOPPED = "the sweep was stopped"
MAX_HOPELESS = 3
"""Trials without a usable value after which the sweep ends, if no other trial has ended."""


class StudyError(GpuLauncherError):
    """A study that this sweep cannot work on. The message says why, and what to do."""


class How(str, Enum):
    """How a trial ended."""

    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """The sweep was stopped. It is queued again, for whoever goes on with the study."""


@dataclass(frozen=True, slots=True)
class Ending:
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
class Asked:
    """A trial to run."""

    trial: FrozenTrial
    """As it is at the beginning: its parameters, distributions and attributes."""
    spec: list[str]
    """What `define` made of it, such as a list of overrides."""
    study: str
    prunes: bool
    """Whether it is any use to ask for a verdict on its reports."""
    objectives: int


@dataclass(frozen=True, slots=True)
class Unusable:
    """A trial that somebody queued, with values of which no job can be made. It has failed; ask again."""

    message: str


@dataclass(frozen=True, slots=True)
class Best:
    """One of the best trials of a study."""

    number: int
    values: list[float]
    params: dict[str, Any]
    directory: str | None


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of it."""

    study: str
    best: list[Best]
    """The best trial, or for several objectives the Pareto front; empty if none completed."""
    states: dict[str, int]
    """How many trials of the study are in each state, by Optuna's name for it."""
    first_failure: str | None
    left: int | None
    """Trials that this sweep was to run and has not; None if it was not to run a number."""


@dataclass
class _Sampling:
    count: int = 0
    seconds: float = 0.0


@dataclass
class Desk:
    """See the module. `define` turns a trial into what its job is called with, and suggests its parameters."""

    study: optuna.Study
    storage: StudyStorage
    """The study's."""
    define: Callable[[optuna.Trial], list[str]]
    bounds: Bounds
    combinations: int | None = None
    """How many there are in all, for a sampler that tries each once."""
    in_turn: bool = False
    """Whether sweeps on the study must sample one after another; see `ask`."""
    warm_up: Callable[[], object] = lambda: None
    """Imports what the sampler needs later, which may take seconds. To be called while there is time."""
    sampling: Callable[[], AbstractContextManager[None]] = nullcontext
    """What a trial is sampled in."""
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    running: dict[int, int] = field(default_factory=dict)
    """Ids of this sweep's trials that have not been told, by number."""

    def __post_init__(self) -> None:
        self._opened = self.clock()
        self._asked = 0
        self._ended: Counter[How] = Counter()
        self._hopeless = 0
        self._exhausted = False
        """The sampler has said so."""
        self._sampling = _Sampling()
        self._jobs: dict[int, dict[str, Any]] = {}
        self._first_failure: str | None = None
        self._judge = Judge(self.study, self.storage, self.clock)
        self._prunes = not isinstance(self.study.pruner, optuna.pruners.NopPruner)

    # Before the first trial

    def settle(self, most_retries: int) -> list[str]:
        """See `settling.settle`. One sweep at a time, or two would queue the same trial again."""
        with self.storage.alone():
            return settle(self.study, self.storage.sweep, most_retries)

    def enqueue(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Try these parameters first, unless the study has them already."""
        with self.storage.alone() if points else nullcontext():
            for point in points:
                self.study.enqueue_trial(dict(point), skip_if_exists=True)

    @property
    def expected(self) -> int | None:
        """How many trials this sweep is going to run, as far as that is known now."""
        return self._stopping.expected(self._ended[How.FAILED])

    # While it goes

    def ask(self) -> Asked | Exhausted | Unusable:
        """The next trial. Raises whatever `define` or the sampler raises, and StudyError; no trial is left untold.

        What `define` raises for a trial that was queued is taken for the fault of that one, and not raised.

        A sampler of a sequence or a grid looks for what is taken, and then takes the next point. Two sweeps that look
        at the same time would take the same one: with `in_turn` they sample one after another.
        """
        if (over := self._stopping.over(self._tally)) is not None:
            return over
        if self._hopeless >= MAX_HOPELESS and self._hopeless == self._ended.total():
            reason = f"no more trials are asked for: none of the first {self._hopeless} returned a value to search by"
            return Exhausted(f"{reason}; the task function must return a number for each direction", failed=True)
        with self.storage.alone() if self.in_turn else nullcontext():
            return self._sample()

    def _sample(self) -> Asked | Unusable:
        began = self.clock()
        try:
            with self.sampling():
                trial = self.study.ask()
        except BaseException as error:
            for id in self._mine() - set(self.running.values()):
                self._drop(id, error, "it could not be sampled")
            raise
        try:
            with self.sampling():
                spec = self.define(trial)
        except BaseException as error:
            queued = self._drop(trial._trial_id, error, f"it could not be defined: {error}")
            if not queued or not isinstance(error, Exception):
                raise
            values = ", ".join(f"{name}={value!r}" for name, value in queued.items())
            message = f"trial {trial.number} failed: it was queued with {values}, of which no job can be made: {error}"
            self._first_failure = self._first_failure or message
            return Unusable(message)
        self._asked += 1
        self.running[trial.number] = trial._trial_id
        self._sampling.count += 1
        self._sampling.seconds += self.clock() - began
        frozen = self.storage.get_trial(trial._trial_id)
        return Asked(frozen, spec, self.study.study_name, self._prunes, len(self.study.directions))

    def started(self, number: int, devices: Sequence[str], directory: str | None, log: str | None) -> None:
        """Its job runs now."""
        job = {"directory": directory, "log": log, "devices": list(devices), "host": self.storage.sweep.identity.host}
        self._jobs[number] = {**job, "started": self.wall_clock()}
        self._note(number)

    def ran_in(self, number: int, directory: str | None) -> None:
        """It ran there, which was not known before."""
        self._jobs[number]["directory"] = directory

    def report(self, reports: Mapping[int, Mapping[int, float]]) -> dict[int, bool]:
        """Store what trials report, `{number: {step: value}}`; returns which of them are to be pruned.

        Those that are not this desk's, or have been told, are not among them.
        """
        ids = {self.running[number]: steps for number, steps in reports.items() if number in self.running}
        ended = self.storage.store_reports(ids)
        judged = {number: id for number, id in self.running.items() if id in ids and id not in ended}
        if not self._prunes:
            return dict.fromkeys(judged, False)
        return self._judge.verdicts(judged, {id: ids[id] for id in judged.values()})

    def annotate(self, number: int, name: str, value: Any) -> None:
        """Set a user attribute that a job gave its trial."""
        if number in self.running:
            self._set(self.running[number], name, value)

    def tell(self, number: int, ending: Ending) -> None:
        """End a trial of this desk. Nothing happens to one that somebody else has ended."""
        id = self.running.pop(number)
        self._judge.forget()
        if number in self._jobs:
            self._jobs[number]["ended"] = self.wall_clock()
            if ending.message:
                self._jobs[number]["message"] = ending.message
            self._note_by_id(number, id)
            del self._jobs[number]
        self._ended[ending.how] += 1
        self._hopeless += ending.hopeless
        if ending.how is How.FAILED and self._first_failure is None:
            self._first_failure = f"trial {number} {ending.message or 'failed'}"
        if ending.how in (How.FAILED, How.INTERRUPTED):
            if ending.how is How.FAILED:
                fail(self.storage, id, ending.message)
            else:
                trial = self.storage.get_trial(id)
                queue_again(self.study, trial, trial.user_attrs.get(LOST, 0), ending.message)
            return
        state = TrialState.COMPLETE if ending.how is How.COMPLETE else TrialState.PRUNED
        values = list(ending.values) if state is TrialState.COMPLETE else None
        self._tell(number, state, values)

    def cancelled(self) -> list[int]:
        """This desk's trials that somebody else has ended, as from a dashboard."""
        if not self.running:
            return []
        ended = {trial._trial_id for trial in self._trials(*ENDED)}  # one query, instead of one for each
        return [number for number, id in self.running.items() if id in ended]

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
        if self._sampling.count:
            shown.append(("sampler", f"{self._sampling.seconds / self._sampling.count * 1000:.0f} ms per trial"))
        return tuple(shown)

    # In the end

    def close(self) -> Summary:
        """Tell whatever has not been told, and say what came of it."""
        for number in list(self.running):
            self.tell(number, Ending(How.INTERRUPTED, message="the sweep ended before it did"))
        states = Counter(trial.state.name.lower() for trial in self._trials())
        done = self._ended.total() - self._ended[How.INTERRUPTED]
        left = None if self.bounds.n_trials is None else max(0, self.bounds.n_trials - done)
        return Summary(self.study.study_name, self.best(), dict(states), self._first_failure, left)

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
        return Tally(self._asked, ended, failed, self.clock() - self._opened, self._exhausted)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.storage.get_all_trials(self.study._study_id, deepcopy=False, states=states or None)

    def _mine(self) -> set[int]:
        """Ids of the trials that run and are this program's."""
        return {trial._trial_id for trial in self._trials(TrialState.RUNNING) if self.storage.sweep.owns(trial)}

    def _drop(self, id: int, error: BaseException, why: str) -> dict[str, Any]:
        """End a trial that was asked for and will not run. Returns the values that it was queued with, if it was."""
        trial = self.storage.get_trial(id)
        queued: dict[str, Any] = trial.system_attrs.get("fixed_params", {})
        stopped = not isinstance(error, Exception)
        if stopped and queued:  # it may be somebody's known good point
            queue_again(self.study, trial, trial.user_attrs.get(LOST, 0), STOPPED)
        else:
            fail(self.storage, id, STOPPED if stopped else why)
        return queued

    def _note(self, number: int) -> None:
        if number in self.running:
            self._note_by_id(number, self.running[number])

    def _note_by_id(self, number: int, id: int) -> None:
        self._set(id, JOB, self._jobs[number])

    def _set(self, id: int, name: str, value: Any) -> None:
        try:
            self.storage.set_trial_user_attr(id, name, value)
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # somebody else has ended it

    def _tell(self, number: int, state: TrialState, values: list[float] | None) -> None:
        try:
            self.study.tell(number, values, state, skip_if_finished=True)
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # somebody else has ended it in this moment
        except RuntimeError as error:
            # The samplers that try every combination call this after they have stored the trial.
            if "Study.stop" not in str(error):
                raise
            self._exhausted = True


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
