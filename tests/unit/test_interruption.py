"""Cutting a long sample short, without cutting what is done to the database."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import optuna
import pytest
from optuna.storages import InMemoryStorage

from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.studies.interruption import SIGNAL, Interruption, SamplingInterrupted
from gpu_launcher.studies.ownership import Sweep
from gpu_launcher.studies.study_storage import StudyStorage


@pytest.fixture
def interruption() -> Iterator[Interruption]:
    before = signal.getsignal(SIGNAL)
    made = Interruption()
    made.listen()
    yield made
    signal.signal(SIGNAL, before)


def interrupt() -> None:
    os.kill(os.getpid(), SIGNAL)


def test_a_sample_is_cut_and_what_comes_after_it_is_not(interruption: Interruption) -> None:
    with pytest.raises(SamplingInterrupted), interruption.sampling():
        interrupt()
    interrupt()
    interruption.forget()
    with interruption.sampling():
        pass


def test_who_was_interrupted_before_it_begins_does_not_begin(interruption: Interruption) -> None:
    interrupt()
    with pytest.raises(SamplingInterrupted), interruption.sampling():
        pytest.fail("has begun")


def test_what_is_done_to_the_database_is_done_to_its_end(interruption: Interruption) -> None:
    class Slow(InMemoryStorage):
        done = False

        def create_new_trial(self, *arguments, **options):
            interrupt()
            self.done = True
            return super().create_new_trial(*arguments, **options)

    backend = Slow()
    storage = StudyStorage(backend, Sweep(ProcessIdentity.here()))
    storage.uninterrupted = interruption.storing
    study = optuna.create_study(storage=storage)
    with pytest.raises(SamplingInterrupted), interruption.sampling():
        study.ask()
    assert backend.done
    assert len(study.trials) == 1
    study.ask()
    assert len(study.trials) == 2, "cut once, and not what is done about it"
