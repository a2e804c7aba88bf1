"""The trials that one call of `optimize` runs, as the study sees them: asked for, judged, and told once each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import NopPruner
from optuna.trial import FrozenTrial, TrialState

from gpu_launcher.studies.attributes import FAILURE, JOB, LOST
from gpu_launcher.studies.dialogue import TrialToRun
from gpu_launcher.studies.pruning import Judge
from gpu_launcher.studies.settling import fail, losses, queue_again
from gpu_launcher.studies.stopping import ENDED
from gpu_launcher.studies.study_storage import StudyStorage
from gpu_launcher.studies.worker_trial import STUDY_ATTRIBUTES, STUDY_METHODS, TRIAL_ATTRIBUTES, TRIAL_METHODS


@dataclass
class AtWork:
    """A trial that has been asked for and not told."""

    trial: optuna.Trial
    job: dict[str, Any]
    """As its user attribute `JOB` has it."""
    sampled: bool = False
    """Whether its first parameter has been asked for."""


@dataclass
class TrialsAtWork:
    """Not to be used by several threads, and in a thread that is in the study's `optimize`."""

    study: optuna.Study
    storage: StudyStorage
    """On that of the study."""
    most_retries: int
    """How often what a lost trial tries is queued again; NEVER for not even what was interrupted."""
    by_number: dict[int, AtWork] = field(default_factory=dict)
    """Those that run, by the number of the trial."""

    def __post_init__(self) -> None:
        self._judge = Judge(self.study, self.storage, time.monotonic)
        self._unjudged: dict[int, dict[int, float]] = {}
        """Reported since the judge last looked: `{trial id: {step: value}}`."""

    def ask(self, devices: Sequence[str]) -> TrialToRun:
        """One more, which runs on these devices. Raises whatever the sampler or the storage raises."""
        try:
            with self.storage.used_by(self.study):
                trial = self.study.ask()
        except BaseException:
            self._fail_unknown("it could not be sampled")
            raise
        job = {"devices": list(devices), "host": self.storage.sweep.identity.host, "started": time.time()}
        self.by_number[trial.number] = AtWork(trial, job)
        self._judge.forget()
        self._note(trial, JOB, job)
        study = self.study
        return TrialToRun(
            number=trial.number,
            study=study.study_name,
            directions=tuple(direction.value for direction in study.directions),
            datetime_start=trial.datetime_start,
            prunes=not isinstance(study.pruner, NopPruner),
        )

    def call(self, number: int, target: str, name: str, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """What that method or attribute of the trial, or of its study, returns. Raises what it raises."""
        at_work = self.by_number[number]
        thing: object = at_work.trial if target == "trial" else self.study
        attributes, methods = (
            (TRIAL_ATTRIBUTES, TRIAL_METHODS) if target == "trial" else (STUDY_ATTRIBUTES, STUDY_METHODS)
        )
        if target == "trial" and not at_work.sampled and (name.startswith("suggest_") or name == "relative_params"):
            at_work.sampled = True
            # Which Optuna keeps for each thread from one `ask` to the next: what others were given meanwhile counts.
            self.study._thread_local.cached_all_trials = None
        if name in attributes:
            return getattr(thing, name)
        assert name in methods, name
        return getattr(thing, name)(*positional, **named)

    def report(self, reports: Mapping[int, Mapping[int, float]]) -> list[int]:
        """Store what trials report, `{number: {step: value}}`; returns those that have been ended elsewhere."""
        ids = {self.by_number[number].trial._trial_id: number for number in reports if number in self.by_number}
        values = {id: reports[number] for id, number in ids.items()}
        if not values:
            return []
        ended = self.storage.store_reports(values)
        for id in values.keys() - ended:
            self._unjudged.setdefault(id, {}).update(values[id])
        return [ids[id] for id in ended]

    def judge(self, numbers: Sequence[int]) -> dict[int, bool | Exception]:
        """Whether each of these trials is to be pruned, or what the pruner raises. Raises what the storage raises."""
        asked = {number: self.by_number[number].trial._trial_id for number in numbers if number in self.by_number}
        if not asked:
            return {}
        reports, self._unjudged = self._unjudged, {}
        running = {at_work.trial._trial_id for at_work in self.by_number.values()}
        found = self._judge.judge(asked, {id: steps for id, steps in reports.items() if id in running})
        return {number: found.get(number, False) for number in asked}

    def tell(
        self, number: int, state: TrialState, values: Sequence[float] | None = None, failure: str | None = None
    ) -> FrozenTrial:
        """End a trial; returns it as it is then. Nothing happens to one that somebody else has ended.

        Raises whatever the sampler or the storage raises.
        """
        at_work = self.by_number[number]
        trial = at_work.trial
        job = {**at_work.job, "ended": time.time()}
        if failure is not None:
            job["message"] = failure
            self._note(trial, FAILURE, failure)
        self._note(trial, JOB, job)
        try:
            return self.study.tell(trial, None if values is None else list(values), state, skip_if_finished=True)
        except UpdateFinishedTrialError:
            return self.storage.get_trial(trial._trial_id)  # somebody else has ended it in this moment
        finally:
            self._judge.forget()
            del self.by_number[number]

    def drop(self, number: int) -> None:
        """Leave alone a trial that somebody else has ended."""
        del self.by_number[number]

    def lose(self, number: int, failure: str) -> FrozenTrial | None:
        """Fail a trial that has been lost, and queue what it tried again; returns it as it is then.

        None, and nothing has happened, if that was lost too often, or somebody else has ended the trial.
        """
        at_work = self.by_number[number]
        trial = self._as_stored(number)
        if (lost := losses(trial)) > self.most_retries:
            return None
        self._note(at_work.trial, JOB, {**at_work.job, "ended": time.time(), "message": failure})
        if not queue_again(self.study, trial, lost, failure):
            return None
        del self.by_number[number]
        self._judge.forget()
        return self.storage.get_trial(trial._trial_id)

    def give_up(self, number: int, failure: str) -> None:
        """Fail a trial that was interrupted."""
        trial = self._as_stored(number)
        del self.by_number[number]
        self._give_up(trial, failure, interrupted=True)

    def give_up_the_rest(self, failure: str, *, interrupted: bool) -> None:
        """Fail all that are left, interrupted or lost: also one that was asked for when an exception cut that short."""
        self.by_number.clear()
        for trial in self._mine():
            self._give_up(trial, failure, interrupted=interrupted)

    def ended_elsewhere(self) -> list[int]:
        """Those that somebody else has ended, as from a dashboard."""
        if not self.by_number:
            return []
        ended = {trial._trial_id for trial in self._trials(*ENDED)}
        return [number for number, at_work in self.by_number.items() if at_work.trial._trial_id in ended]

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.storage.get_all_trials(self.study._study_id, deepcopy=False, states=states)

    def _mine(self) -> list[FrozenTrial]:
        return [trial for trial in self._trials(TrialState.RUNNING) if self.storage.sweep.owns(trial)]

    def _fail_unknown(self, failure: str) -> None:
        known = {at_work.trial._trial_id for at_work in self.by_number.values()}
        for trial in self._mine():
            if trial._trial_id not in known:
                fail(self.storage, trial._trial_id, failure)

    def _as_stored(self, number: int) -> FrozenTrial:
        return self.storage.get_trial(self.by_number[number].trial._trial_id)

    def _give_up(self, trial: FrozenTrial, failure: str, *, interrupted: bool) -> None:
        lost = trial.user_attrs.get(LOST, 0) if interrupted else losses(trial)
        if lost <= self.most_retries:
            queue_again(self.study, trial, lost, failure)
        else:
            fail(self.storage, trial._trial_id, failure)

    def _note(self, trial: optuna.Trial, name: str, value: Any) -> None:
        with suppress(UpdateFinishedTrialError):  # somebody else has ended it
            trial.set_user_attr(name, value)
