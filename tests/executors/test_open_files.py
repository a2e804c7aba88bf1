"""Files that are open when functions are first called: in calls, workers and trials, and meanwhile in the program."""

from __future__ import annotations

import fcntl
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import optuna
import pytest

import gpu_launcher
from gpu_launcher import PoolExecutor
from gpu_launcher.executors.parallel_map import parallel_map
from gpu_launcher.jobs.where import Where

CONTENT = random.Random(0).randbytes(100_000)
open_files: list[BinaryIO] = []
"""Functions that are called are pickled, and find it here by name."""


@pytest.fixture(params=[0, 1024])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[BinaryIO]:
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT)
    with open(path, "rb", buffering=request.param) as file:
        assert file.read(10) == CONTENT[:10]
        open_files[:] = [file]
        yield file
        open_files.clear()


def wrong(file: BinaryIO, seed: int, seconds: float = 0.2) -> int:
    """How many reads at random positions are wrong."""
    chance, count = random.Random(seed), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = chance.randrange(len(CONTENT))
        file.seek(start)
        count += file.read(100) != CONTENT[start : start + 100]
    return count


def read(number: int) -> tuple[bytes, int]:
    (file,) = open_files
    return file.read(10), wrong(file, number)


def test_calls_read_at_positions_of_their_own(file: BinaryIO, pool: Where) -> None:
    with PoolExecutor(pool=pool) as executor:
        calls = [executor.submit(read, number) for number in range(4)]
        file.seek(50_000)
        assert wrong(file, 4, 0.5) == 0
        assert [call.result() for call in calls] == [(CONTENT[10:20], 0)] * 4


def test_workers_read_at_positions_of_their_own(file: BinaryIO, pool: Where) -> None:
    results = []
    for result in parallel_map(
        range(8), lambda: file.read(10), lambda number, first: (first, wrong(file, number)), pool=pool
    ):
        results.append(result)
        assert wrong(file, 8) == 0
    assert results == [(CONTENT[10:20], 0)] * 8


def test_trials_read_at_positions_of_their_own(file: BinaryIO, pool: Where) -> None:
    def objective(trial: optuna.Trial) -> float:
        assert file.read(10) == CONTENT[10:20]
        return float(wrong(file, trial.number))

    def callback(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        assert wrong(file, 0) == 0

    study = optuna.create_study()
    gpu_launcher.optimize(study, objective, 4, pool=pool, callbacks=[callback])
    assert [trial.value for trial in study.trials] == [0.0] * 4


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.WARNING, "gpu_launcher"):
        yield caplog


def test_files_that_calls_may_overwrite_are_named_in_a_warning(
    pool: Where, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    with open(tmp_path / "cache.bin", "w+b"), PoolExecutor(pool=pool) as executor:
        assert executor.submit(int).result() == 0
        assert executor.submit(int).result() == 0
    (warning,) = said.messages
    assert f"jobs that write to {tmp_path / 'cache.bin'} may overwrite each other's data" in warning


def test_lock_files_of_the_program_cause_no_warning(
    pool: Where, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    with open(tmp_path / "one.lock", "w+") as one, open(tmp_path / "two.lock", "w+") as two:
        fcntl.lockf(one, fcntl.LOCK_EX)
        fcntl.flock(two, fcntl.LOCK_EX)
        with PoolExecutor(pool=pool) as executor:
            assert executor.submit(int).result() == 0
    assert said.messages == []


def test_the_database_of_the_study_that_is_optimized_causes_no_warning(
    pool: Where, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/study.db")
    gpu_launcher.optimize(study, lambda trial: trial.suggest_float("x", 0, 1), 2, pool=pool)
    assert len(study.trials) == 2
    assert said.messages == []
