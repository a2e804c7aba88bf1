"""The example of a plain Optuna study, as its README shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

import gpu_launcher

SCRIPT = Path(__file__).parents[2] / "examples" / "optuna_study" / "study.py"

pytest.importorskip("sklearn")


def test_the_example_searches_and_goes_on_with_its_study(tmp_path: Path) -> None:
    environment = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "OMP_NUM_THREADS": "1"}
    for trials, devices, more in ((6, "simulated:4", ["--directory", "search"]), (3, "auto", [])):
        command = [sys.executable, str(SCRIPT), "--trials", str(trials), "--devices", devices, *more]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("best accuracy: 0."), done.stdout
    study = optuna.load_study(study_name="digits", storage=gpu_launcher.storage(f"sqlite:///{tmp_path}/study.db"))
    assert len(study.trials) == 9
    assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "PRUNED"}
    assert study.best_value > 0.5
    table = gpu_launcher.load_results(tmp_path / "search")
    assert len(table) == 6
    assert table.directions == {"value": "maximize"}
