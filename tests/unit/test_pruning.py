"""Trials that report are judged from one look at the study, whichever pruner judges, and as that pruner would alone."""

from __future__ import annotations

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.pruning import VIEW_SECONDS, Judge
from gpu_launcher.studies.study_storage import StudyStorage


class CountingStorage(InMemoryStorage):
    """Counts how often all trials are read from it."""

    looks = 0

    def get_all_trials(self, *arguments, **options):
        self.looks += 1
        return super().get_all_trials(*arguments, **options)


def study_with_running_trials(pruner):
    """Six trials that completed with values 0 to 5, worse at each of 4 steps; six run and have reported the same."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="one",  # by which Hyperband draws brackets
        storage=CountingStorage(),
        pruner=pruner,
        sampler=optuna.samplers.RandomSampler(),
    )
    trials = [study.ask() for _ in range(12)]
    for trial in trials:
        for step in range(1, 5):
            trial.report(trial.number % 6 + step / 10, step)
    for trial in trials[:6]:
        study.tell(trial, trial.number)
    return study, {trial.number: trial._trial_id for trial in trials[6:]}


pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

PRUNERS = {
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=1),
    "patient": lambda: optuna.pruners.PatientPruner(optuna.pruners.MedianPruner(n_startup_trials=1), patience=1),
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    "hyperband": lambda: optuna.pruners.HyperbandPruner(max_resource=9),
    "threshold": lambda: optuna.pruners.ThresholdPruner(upper=3.5),
    "nop": optuna.pruners.NopPruner,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def judge_with(study: optuna.Study, clock: Clock) -> Judge:
    return Judge(study, StudyStorage(study._storage, TrialOwner(ProcessIdentity.here())), clock)


def judge(study: optuna.Study) -> Judge:
    return judge_with(study, Clock())


@pytest.mark.parametrize("name", PRUNERS)
def test_verdicts_are_those_of_the_pruner_for_each_trial_alone(name: str) -> None:
    study, running = study_with_running_trials(PRUNERS[name]())
    together = judge(study).judge(running, {})
    other, ids = study_with_running_trials(PRUNERS[name]())
    alone = {number: other.pruner.prune(other, other._storage.get_trial(id)) for number, id in ids.items()}
    assert together == alone
    assert any(together.values()) == (name != "nop")


@pytest.mark.parametrize("name", PRUNERS)
def test_the_trials_are_read_once_for_all(name: str) -> None:
    study, running = study_with_running_trials(PRUNERS[name]())
    storage = study._storage
    storage.looks = 0
    judge(study).judge(running, {})
    assert storage.looks == 1


def test_afterwards_the_study_is_read_as_it_is() -> None:
    study, running = study_with_running_trials(PRUNERS["median"]())
    judge(study).judge(running, {})
    study.tell(6, 1.0)
    assert study.get_trials(states=(TrialState.COMPLETE,))[-1].number == 6


def test_a_pruner_that_fails_leaves_the_study_readable() -> None:
    class Broken(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            raise ZeroDivisionError

    study, running = study_with_running_trials(Broken())
    verdicts = judge(study).judge(running, {})
    assert {type(verdict) for verdict in verdicts.values()} == {ZeroDivisionError}
    study.tell(6, 1.0)
    assert len(study.get_trials(states=(TrialState.COMPLETE,))) == 7


@pytest.mark.parametrize("name", PRUNERS)
def test_what_is_reported_after_a_look_counts_without_another(name: str) -> None:
    """Round after round, as many trials report that run at the same time."""
    study, running = study_with_running_trials(PRUNERS[name]())
    other, ids = study_with_running_trials(PRUNERS[name]())
    judging = judge(study)
    judging.judge(running, {})
    for id in ids.values():
        other.pruner.prune(other, other._storage.get_trial(id))
    study._storage.looks = 0
    for step in range(5, 9):
        reports = {id: {step: 10.0 - number + step / 10} for number, id in running.items()}
        for storage in (study._storage, other._storage):
            for id, steps in reports.items():
                storage.set_trial_intermediate_value(id, step, steps[step])
        together = judging.judge(running, reports)
        alone = {number: other.pruner.prune(other, other._storage.get_trial(id)) for number, id in ids.items()}
        assert together == alone, step
    assert study._storage.looks == 0


def test_it_looks_again_after_a_while_when_told_and_for_a_new_trial() -> None:
    study, running = study_with_running_trials(PRUNERS["median"]())
    clock = Clock()
    judging = judge_with(study, clock)
    judging.judge(running, {})
    study._storage.looks = 0
    clock.now += VIEW_SECONDS / 2
    judging.judge(running, {})
    assert study._storage.looks == 0
    clock.now += VIEW_SECONDS
    judging.judge(running, {})
    assert study._storage.looks == 1
    judging.forget()
    judging.judge(running, {})
    assert study._storage.looks == 2
    new = study.ask()
    judging.judge({new.number: new._trial_id}, {})
    assert study._storage.looks > 2
