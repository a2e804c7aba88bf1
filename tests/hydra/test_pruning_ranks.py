"""Tests sweeps whose jobs have several ranks: all ranks get the same verdicts in the same order."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

import gpu_launcher

Run = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = "rank_verdicts.py"
SWEEP = [
    "-m",
    "hydra/sweeper=optuna_async",
    "hydra.sweep.dir=sweep",
    "hydra.sweeper.pruner={_target_: optuna.pruners.ThresholdPruner, upper: 5.0}",
    "level=choice(0.0,9.0)",
    "hydra.sweeper.n_trials=2",
    "hydra.sweeper.enqueue=[{level: 0.0},{level: 9.0}]",
]


def study(directory: Path) -> list[optuna.trial.FrozenTrial]:
    storage = gpu_launcher.storage(f"sqlite:///{directory / 'sweep' / 'study.db'}")
    (name,) = optuna.study.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).trials


def told(directory: Path, job: int, attempt: int = 1) -> list[bool]:
    """The verdicts of a job. All of its ranks must have the same."""
    files = [directory / "sweep" / str(job) / f"attempt-{attempt}.rank-{rank}" for rank in range(3)]
    first, *others = [json.loads(file.read_text()) for file in files]
    assert others == [first, first]
    assert (first["number"], first["level"]) == (job, [0.0, 9.0][job])
    verdicts: list[bool] = first["verdicts"]
    return verdicts


def bulletins(directory: Path) -> list[Any]:
    kept = (directory / "sweep" / ".gpu_launcher").iterdir()
    return [file.name for file in kept if file.suffix not in (".report", ".jsonl") and file.name != "lock"]


def test_all_ranks_leave_at_the_same_step(run: Run, tmp_path: Path) -> None:
    ran = run(tmp_path, PROGRAM, *SWEEP)
    assert ran.returncode == 0, ran.stderr
    complete, pruned = study(tmp_path)
    assert (complete.state, pruned.state) == (TrialState.COMPLETE, TrialState.PRUNED)
    assert told(tmp_path, 0) == [False] * 12
    *before, last = told(tmp_path, 1)
    assert last
    assert not any(before)
    assert len(before) >= 3, "it is good until then"
    assert pruned.value == 9.0
    assert bulletins(tmp_path) == []


def test_with_spawn_too(run: Run, tmp_path: Path) -> None:
    ran = run(tmp_path, PROGRAM, *SWEEP, "hydra.launcher.start_method=spawn")
    assert ran.returncode == 0, ran.stderr
    assert [trial.state for trial in study(tmp_path)] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert told(tmp_path, 0) == [False] * 12
    assert told(tmp_path, 1)[-1]


def test_the_ranks_of_a_second_attempt_are_told_nothing_of_the_first(run: Run, tmp_path: Path) -> None:
    ran = run(
        tmp_path, PROGRAM, *SWEEP, "attempts=2", "hydra.launcher.retries=1", "hydra.launcher.retry_on=[exception]"
    )
    assert ran.returncode == 0, ran.stderr
    assert [trial.state for trial in study(tmp_path)] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert told(tmp_path, 0, attempt=1) == [False] * 2
    assert told(tmp_path, 0, attempt=2) == [False] * 12
    assert bulletins(tmp_path) == []


def test_a_sweep_started_in_a_trials_job_is_no_part_of_that_trial(run: Run, tmp_path: Path) -> None:
    outer = tmp_path / "7.trial"
    outer.write_bytes(b"is not to be read")
    arguments = ["-m", "does=reports", "hydra.sweep.dir=sweep"]
    ran = run(tmp_path, "trials.py", *arguments, GPU_LAUNCHER_TRIAL=str(outer), RANK="1")
    assert ran.returncode == 0, ran.stderr
