"""Sweeps that begin at the same moment on one study: what one of them settles or queues, the others do not."""

from __future__ import annotations

import multiprocessing
import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

import gpu_launcher
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.studies.ownership import TrialOwner
from gpu_launcher.studies.study_session import StudySession
from gpu_launcher.studies.study_storage import StudyStorage
from gpu_launcher.studies.trial_attrs import RETRY_OF

FORK = multiprocessing.get_context("fork")
SWEEPS = 6
TRIALS = 10
DEAD = replace(ProcessIdentity.here(), pid=2**22)


@pytest.fixture(params=["sqlite", "journal", "elsewhere"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "elsewhere":
        if not (given := os.environ.get("GPU_LAUNCHER_TEST_DATABASE")):
            pytest.skip("there is no database in GPU_LAUNCHER_TEST_DATABASE, such as postgresql://localhost/test")
        return given
    return f"{request.param}:///{tmp_path}/study.db"


@pytest.fixture
def name() -> str:
    """Of a study, in a database that may have those of earlier tests."""
    return uuid.uuid4().hex


def session(url: str, name: str, identity: ProcessIdentity) -> StudySession:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = StudyStorage(optuna.storages.get_storage(gpu_launcher.storage(url)), TrialOwner(identity))
    study = optuna.create_study(
        study_name=name, storage=storage, sampler=optuna.samplers.RandomSampler(), load_if_exists=True
    )
    return StudySession(study, storage, lambda trial: [f"x={trial.suggest_float('x', 0, 1)}"], max_retries=1)


def at_once(url: str, name: str, do: Callable[[StudySession], object]) -> None:
    barrier = FORK.Barrier(SWEEPS)

    def run() -> None:
        mine = session(url, name, ProcessIdentity.here())
        barrier.wait(60)
        do(mine)

    sweeps = [FORK.Process(target=run) for _ in range(SWEEPS)]
    for sweep in sweeps:
        sweep.start()
    for sweep in sweeps:
        sweep.join(100)
    assert [sweep.exitcode for sweep in sweeps] == [0] * SWEEPS


def test_each_known_point_is_queued_once(url: str, name: str) -> None:
    points = [{"x": number / TRIALS} for number in range(TRIALS)]
    before = session(url, name, DEAD)  # Optuna cannot make its tables in several programs at once
    at_once(url, name, lambda mine: mine.enqueue(points))
    assert [trial.system_attrs["fixed_params"] for trial in before.study.trials] == points


def test_each_trial_of_a_dead_sweep_is_queued_again_once(url: str, name: str) -> None:
    dead = session(url, name, DEAD)
    for _ in range(TRIALS):
        dead.ask()
    at_once(url, name, lambda mine: mine.fail_stale_trials())
    trials = dead.study.trials
    assert [trial.state for trial in trials] == [TrialState.FAIL] * TRIALS + [TrialState.WAITING] * TRIALS
    assert sorted(trial.user_attrs[RETRY_OF] for trial in trials[TRIALS:]) == [[number] for number in range(TRIALS)]
