"""A database that cannot be used for a while."""

from __future__ import annotations

import signal

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage

from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.processes.messages import channel, receive, send
from gpu_launcher.studies import source
from gpu_launcher.studies.bearing import PATIENCE, Bearing
from gpu_launcher.studies.desk import Desk
from gpu_launcher.studies.ownership import Sweep
from gpu_launcher.studies.pruning import Judge
from gpu_launcher.studies.stopping import Bounds


class World:
    """A clock that only sleeping moves, and a database that is out of order until some time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.broken_until = 0.0
        self.said: list[str] = []
        self.bearing = Bearing(self.said.append, lambda: self.now, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def check(self) -> None:
        if self.now < self.broken_until:
            raise StorageInternalError("An exception is raised during the commit.") from OSError("disk full")


class Fragile(InMemoryStorage):
    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def create_new_trial(self, *arguments, **options):
        self.world.check()
        return super().create_new_trial(*arguments, **options)


def test_an_operation_is_repeated_until_it_succeeds_and_the_user_is_told_once():
    world = World()
    storage = Fragile(world)
    study = optuna.create_study(storage=storage)
    world.bearing.over_all(storage)
    world.broken_until = 30.0
    study.ask()
    assert len(study.trials) == 1
    assert world.now >= 30.0
    assert world.said == [
        "the study's database cannot be used: disk full. Jobs run on, the rest waits",
        "the study's database can be used again",
    ]


def test_after_a_long_while_it_is_given_up():
    world = World()
    world.broken_until = 10 * PATIENCE

    with pytest.raises(StorageInternalError):
        world.bearing.over(world.check)()
    assert PATIENCE < world.now < 2 * PATIENCE


def test_what_is_wrong_otherwise_is_raised_at_once():
    world = World()

    with pytest.raises(ZeroDivisionError):
        world.bearing.over(lambda: 1 / 0)()
    assert world.now == 0.0
    assert world.said == []


def test_judging_trials_leaves_the_storage_as_it_was():
    world = World()
    storage = Fragile(world)
    study = optuna.create_study(storage=storage, pruner=optuna.pruners.ThresholdPruner(upper=1.0))
    world.bearing.over_all(storage)
    before = dict(vars(storage))
    trial = study.ask()
    Judge(study, lambda: world.now).verdicts({0: trial._trial_id}, {})
    assert vars(storage).keys() == before.keys()
    assert storage.get_all_trials is before["get_all_trials"]


def test_a_database_that_was_given_up_is_not_waited_for_again_to_tell_the_rest(monkeypatch):
    tries = []

    class Out(Desk):
        def ask(self):
            raise StorageInternalError("out of order for ten minutes")

        def close(self):
            tries.append("waits for ten minutes more")

    def open_desk():
        study = optuna.create_study()
        return Out(study, lambda trial: [], Bounds(), Sweep(ProcessIdentity.here())), []

    ours, theirs = channel()
    with ours, theirs:
        monkeypatch.setattr(signal, "signal", lambda *arguments: None)
        send(ours, source._Ask(1))
        source._serve(theirs, open_desk, lambda desk, summary: [])
        receive(ours)
        assert "out of order" in str(receive(ours)[0].error)
    assert tries == []
