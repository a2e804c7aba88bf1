"""Tests that the launcher works with other projects' sweepers, which run batch after batch."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

Run = Callable[..., subprocess.CompletedProcess[str]]

SWEEPERS = [
    pytest.param("optuna", ("hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=3"), id="optuna"),
    pytest.param(
        "ax",
        ("hydra.sweeper.ax_config.max_trials=6", "hydra.sweeper.max_batch_size=3"),
        id="ax",
    ),
    pytest.param(
        "nevergrad",
        ("hydra.sweeper.optim.budget=6", "hydra.sweeper.optim.num_workers=3"),
        id="nevergrad",
    ),
]


@pytest.mark.parametrize(("sweeper", "options"), SWEEPERS)
def test_every_batch_of_another_sweeper_runs_and_its_best_is_found(
    run: Run, tmp_path: Path, sweeper: str, options: tuple[str, ...]
) -> None:
    if importlib.util.find_spec(f"hydra_plugins.hydra_{sweeper}_sweeper") is None:
        pytest.skip(f"needs hydra-{sweeper}-sweeper")
    space = ("x=interval(-2.0,2.0)", "kind=choice(a,b)")
    done = run(tmp_path, "quadratic.py", "-m", *space, f"hydra/sweeper={sweeper}", *options, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    values = [float(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/value"))]
    assert len(values) == 6
    launches = re.findall(r"(\d+) jobs?: (\d+) completed", done.stderr)
    assert sum(int(completed) for _, completed in launches) == 6
    assert len(launches) > 1, "batches"
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert found.get("name", found.get("optimizer")) == sweeper
    best = found.get("best_value", found.get("best_evaluated_result"))
    assert best in (None, pytest.approx(min(values))), "Ax does not say"
