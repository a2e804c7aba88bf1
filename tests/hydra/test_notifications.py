"""Hooks of real sweeps: grids, searches and sweeps that are stopped."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until
from tests.warm import TextProgram

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., TextProgram]

SWEEP = ("-m", "hydra.sweep.dir=sweep")
TELL_END = "hydra.launcher.on_end=[sh,-c,'cat > end; ls sweep > listed']"


def told(directory: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((directory / "end").read_text())
    assert document.pop("schema") == 1
    assert document.pop("duration") > 0
    return document


def test_hooks_of_a_grid_are_told_failures_and_the_end(run: Run, tmp_path: Path) -> None:
    failures = "hydra.launcher.on_job_failure='sh -c \"cat >> failures\"'"
    done = run(tmp_path, "quadratic.py", *SWEEP, "x=1,wrong,3", "hydra.launcher.direction=minimize",
               "hydra/sweeper=grid_async", failures, TELL_END)  # fmt: skip
    assert "the command of" not in done.stderr
    failure = json.loads((tmp_path / "failures").read_text())
    assert (failure["number"], failure["params"], failure["outcome"]) == (1, {"x": "wrong"}, "failed")
    document = told(tmp_path)
    assert document.pop("command").endswith("hydra/launcher=gpu_pool hydra.launcher.devices=simulated:4")
    assert document == {
        "event": "end",
        "directory": str(tmp_path / "sweep"),
        "reason": "completed",
        "message": None,
        "jobs": {"completed": 2, "failed": 1, "cancelled": 0, "pruned": 0},
        "best": {
            "number": 0,
            "params": {"x": 1},
            "value": 0.25,
            "direction": "minimize",
            "directory": str(tmp_path / "sweep" / "0"),
        },
    }
    assert "results.csv" in (tmp_path / "listed").read_text()


@pytest.mark.thorough
def test_a_hook_that_is_no_command_is_refused_before_any_job_runs(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path, "quadratic.py", *SWEEP, "x=1,2", "hydra.launcher.on_end=[]")
    assert done.returncode == 1
    assert "hydra.launcher.on_end: names no program" in done.stderr
    assert not list(tmp_path.glob("sweep/*/value"))


@pytest.mark.thorough
def test_the_end_is_told_after_ctrl_c(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path, "steered.py", *SWEEP, "hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2",
                    "x=1,2,3", "hydra.launcher.on_job_failure=[touch,failed]", TELL_END)  # fmt: skip
    try:
        until(lambda: len(list(tmp_path.glob("sweep/*/pids"))) == 2 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=500)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGINT, error
    document = told(tmp_path)
    assert (document["reason"], document["message"]) == ("stopped", "SIGINT")
    assert document["jobs"]["cancelled"] == 3
    assert not (tmp_path / "failed").exists()


@pytest.mark.thorough
def test_the_end_of_a_search_is_told_after_its_results_are_written(run: Run, tmp_path: Path) -> None:
    run(tmp_path, "quadratic.py", *SWEEP, "hydra/sweeper=optuna_async", "x=interval(0,1)", "hydra.sweeper.n_trials=3",
        TELL_END)  # fmt: skip
    listed = (tmp_path / "listed").read_text().split()
    assert {"results.csv", "optimization_results.yaml"} <= set(listed)
    document = told(tmp_path)
    assert document["jobs"]["completed"] == 3
    assert document["best"]["direction"] == "minimize"
