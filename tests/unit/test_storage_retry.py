"""A database that cannot be used for a while."""

from __future__ import annotations

import select

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage

from gpu_launcher.errors import StudyError
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.pruning import Judge
from gpu_launcher.studies.storage_retry import MAX_OUTAGE_SECONDS, StorageRetry
from gpu_launcher.studies.study_session import StudySession
from gpu_launcher.studies.study_storage import StudyStorage
from gpu_launcher.studies.sweep_search import SweepSearch


class World:
    """A clock that only sleeping moves, and a database that is out of order until some time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.broken_until = 0.0
        self.said: list[str] = []
        self.retry = StorageRetry(self.said.append, lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def check(self) -> None:
        if self.now < self.broken_until:
            raise StorageInternalError("An exception is raised during the commit.") from OSError("disk full")

    def storage(self) -> StudyStorage:
        storage = StudyStorage(Fragile(self), TrialOwner(ProcessIdentity.here()))
        storage.retry = self.retry
        return storage


class Fragile(InMemoryStorage):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def create_new_trial(self, *arguments, **options):
        self.world.check()
        return super().create_new_trial(*arguments, **options)


def test_an_operation_is_repeated_until_it_succeeds_and_the_user_is_told_once():
    world = World()
    storage = world.storage()
    study = optuna.create_study(storage=storage)
    world.broken_until = 30.0
    study.ask()
    assert len(study.trials) == 1
    assert world.now >= 30.0
    assert world.said == [
        "study database unavailable (disk full); running jobs continue, retrying",
        "study database available again",
    ]


def test_after_a_long_while_it_is_given_up():
    world = World()
    world.broken_until = 10 * MAX_OUTAGE_SECONDS

    with pytest.raises(StorageInternalError):
        world.retry.retrying(world.check)()
    assert MAX_OUTAGE_SECONDS < world.now < 2 * MAX_OUTAGE_SECONDS


def test_what_is_wrong_otherwise_is_raised_at_once():
    world = World()

    with pytest.raises(ZeroDivisionError):
        world.retry.retrying(lambda: 1 / 0)()
    assert world.now == 0.0
    assert world.said == []


def test_judging_trials_leaves_the_storage_as_it_was():
    world = World()
    storage = world.storage()
    study = optuna.create_study(storage=storage, pruner=optuna.pruners.ThresholdPruner(upper=1.0))
    trial = study.ask()
    Judge(study, storage, lambda: world.now).judge({0: trial._trial_id}, {})
    assert study._storage is storage
    study.ask()
    assert len(study.trials) == 2, "it shows the trials as they are"


def test_a_database_that_was_given_up_is_not_waited_for_again_to_tell_the_rest():
    tries = []

    class Out(StudySession):
        def ask(self):
            raise StorageInternalError("out of order for ten minutes")

        def close(self, *arguments, **options):
            tries.append("waits for ten minutes more")

    storage = StudyStorage(InMemoryStorage(), TrialOwner(ProcessIdentity.here()))
    session = Out(optuna.create_study(storage=storage), storage)
    search = SweepSearch(session, lambda asked: None, lambda result: None, lambda session, summary: [])
    search.request_jobs(1)
    assert select.select([search], [], [], 60)[0]
    with pytest.raises(StudyError, match="out of order"):
        search.receive()
    with pytest.raises(StudyError, match="out of order"):
        search.close()
    assert tries == []
