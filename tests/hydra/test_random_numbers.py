"""Tests that unseeded generators differ between jobs, and that seeded ones draw what a fresh run draws."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numpy")

Run = Callable[..., subprocess.CompletedProcess[str]]
PROGRAM = "generators.py"


@pytest.fixture(scope="module")
def alone(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The numbers that the seeded program draws when it runs alone."""
    directory = tmp_path_factory.mktemp("alone")
    ran = run(directory, PROGRAM, "hydra.run.dir=.", "hydra.job.chdir=true", SEED="5")
    assert ran.returncode == 0, ran.stderr
    return json.loads((directory / "found.json").read_text())


@pytest.fixture(scope="module", params=["fork", "spawn"])
def jobs(run: Run, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The numbers that three jobs of the seeded program draw, including both attempts of one of them."""
    jobs, screen = drawn(run, tmp_path_factory.mktemp("seeded"), request.param, SEED="5")
    assert "cannot tell" not in screen
    return jobs


def drawn(run: Run, directory: Path, method: str, **environment: str) -> tuple[list[Any], str]:
    """Run three jobs; return the numbers that they draw, and stderr."""
    ran = run(
        directory,
        PROGRAM,
        "-m",
        "hydra.sweep.dir=sweep",
        "hydra.job.chdir=true",
        f"hydra.launcher.start_method={method}",
        "hydra.launcher.retries=1",
        "+again=true,false,0",
        **environment,
    )
    assert ran.returncode == 0, ran.stderr
    files = ["0/found.json", "0/first.json", "1/found.json", "2/found.json"]
    return [json.loads((directory / "sweep" / file).read_text()) for file in files], ran.stderr


def test_unseeded_generators_differ_between_jobs_and_attempts(jobs: list[Any]) -> None:
    numbers = [number for found in jobs for number in found["unseeded"]]
    assert len(set(numbers)) == len(numbers)


def test_seeded_generators_draw_in_every_job_what_a_fresh_run_draws(alone: Any, jobs: list[Any]) -> None:
    for found in jobs:
        assert found["seeded"] == alone["seeded"]
        assert found["global"] == alone["global"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_global_generators_and_those_in_doubt_differ_with_a_notice(run: Run, tmp_path: Path, method: str) -> None:
    jobs, screen = drawn(run, tmp_path, method, DOUBT="1")
    numbers = [number for found in jobs for number in (*found["global"], *found["in doubt"])]
    assert len(numbers) == 3 * len(jobs)
    assert len(set(numbers)) == len(numbers)
    (notice,) = [line for line in screen.splitlines() if "cannot tell" in line]
    assert notice.startswith("[gpu_pool] cannot tell whether IN_DOUBT was seeded, as it has been used since: each job")
