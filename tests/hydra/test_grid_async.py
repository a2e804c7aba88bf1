"""Tests `hydra/sweeper=grid_async`, which runs the basic sweeper's grids without composing configs in advance."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.warm import TextProgram

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., TextProgram]

GRID_ASYNC = "hydra/sweeper=grid_async"
PROGRAM = "grid.py"
GPU_POOL = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2")


def jobs(directory: Path) -> list[list[str]]:
    """The overrides of each job, in order."""
    return [
        yaml.safe_load((directory / str(n) / ".hydra" / "overrides.yaml").read_text()) for n in range(count(directory))
    ]


def count(directory: Path) -> int:
    return sum(path.name.isdecimal() for path in directory.iterdir())


PARAMS = """
# @package _global_
hydra:
  sweeper:
    params:
      lr: choice(0.5,0.25)
      n: 7,8
"""


@pytest.mark.parametrize(
    "grid",
    [
        ("lr=1,2", "n=range(3)", "kind=b"),
        pytest.param(("--config-dir=conf", "+more=params", "n=3,4"), marks=pytest.mark.smoke),
    ],
)
def test_it_makes_the_jobs_of_the_basic_sweeper_in_its_order(run: Run, tmp_path: Path, grid: tuple[str, ...]) -> None:
    (tmp_path / "conf" / "more").mkdir(parents=True)
    (tmp_path / "conf" / "more" / "params.yaml").write_text(PARAMS)
    for sweeper in ("basic", "grid_async"):
        options = (f"hydra/sweeper={sweeper}", f"hydra.sweep.dir={sweeper}")
        done = run(tmp_path, PROGRAM, "-m", *grid, *GPU_POOL, *options)
        assert done.returncode == 0, done.stderr
    assert count(tmp_path / "grid_async") >= 4
    assert jobs(tmp_path / "grid_async") == jobs(tmp_path / "basic")
    assert (tmp_path / "grid_async" / "multirun.yaml").exists()


def test_a_job_that_does_not_compose_fails_alone(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path, PROGRAM, "-m", "n=1,two,3", GRID_ASYNC, *GPU_POOL, "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert "3 jobs: 2 completed, 1 failed" in done.stderr
    assert "job 1 (n=two)" in done.stderr
    assert "'two'" in done.stderr


def test_of_20000_jobs_the_first_runs_before_any_but_the_next_few_are_composed(start: Start, tmp_path: Path) -> None:
    program = start(tmp_path, PROGRAM, "-m", "n=range(20000)", GRID_ASYNC, *GPU_POOL, "hydra.sweep.dir=sweep")
    assert program.stderr is not None
    assert any("(1/20000 done)" in line for line in program.stderr)
    program.send_signal(signal.SIGINT)
    _, rest = program.communicate(timeout=500)
    assert re.search(r"20000 jobs: \d+ completed, (\d+ cancelled, )?\d+ not run", rest)
    composed = (tmp_path / "composed").read_text().split()
    assert str(program.pid) not in composed
    assert len(composed) < 1000


@pytest.mark.parametrize(
    ("launcher", "line"), [(GPU_POOL, r"\d jobs?: \d completed"), ((), r"Launching \d jobs locally")]
)
def test_batches_are_given_to_any_launcher_one_after_another(
    start: Start, tmp_path: Path, launcher: tuple[str, ...], line: str
) -> None:
    batches = ("hydra.sweeper.max_batch_size=2", "hydra.sweep.dir=sweep")
    program = start(tmp_path, PROGRAM, "-m", "n=range(5)", GRID_ASYNC, *batches, *launcher)
    out, err = program.communicate(timeout=500)
    assert program.returncode == 0, err
    assert jobs(tmp_path / "sweep") == [[f"n={n}"] for n in range(5)]
    assert len(re.findall(line, out + err)) == 3


def test_an_interval_is_answered_with_the_sweeper_that_searches_it(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path, PROGRAM, "-m", "n=tag(log,interval(1,9))", GRID_ASYNC, *GPU_POOL, "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert "use hydra/sweeper=optuna_async to search it" in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "sweep" / "0").exists()


@pytest.mark.parametrize("launcher", [GPU_POOL, ()])
def test_a_failure_does_not_keep_later_batches_from_running(
    run: Run, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    batches = ("hydra.sweeper.max_batch_size=2", "hydra.sweep.dir=sweep")
    done = run(tmp_path, PROGRAM, "-m", "n=0,1,2,3,4", "fails=1", GRID_ASYNC, *batches, *launcher)
    assert done.returncode == 1
    assert jobs(tmp_path / "sweep") == [[f"n={n}", "fails=1"] for n in range(5)]
    assert "ValueError: 1 was meant to fail" in done.stderr


ZIP = '+pair="zip(kind=choice(a,b), lr=[0.5,0.25])"'
PARAMS_WITH_ZIP = """
# @package _global_
hydra:
  sweeper:
    params:
      pair: >-
        zip(kind=choice(a,b),
            lr=[0.5,0.25])
      n: 1,2,3
    filter: lr * n < 1
"""
LEFT = [["kind=a", "lr=0.5", "n=1"], ["kind=b", "lr=0.25", "n=1"], ["kind=b", "lr=0.25", "n=2"]]
LEFT.append(["kind=b", "lr=0.25", "n=3"])


@pytest.mark.parametrize(
    "grid", [(ZIP, "n=1,2,3", 'hydra.sweeper.filter="lr * n < 1"'), ("--config-dir=conf", "+more=params")]
)
def test_a_filtered_grid_with_a_zip_numbers_its_jobs_densely_and_resumes(
    run: Run, tmp_path: Path, grid: tuple[str, ...]
) -> None:
    (tmp_path / "conf" / "more").mkdir(parents=True)
    (tmp_path / "conf" / "more" / "params.yaml").write_text(PARAMS_WITH_ZIP)

    def ran() -> list[list[str]]:
        return [[text for text in job if text not in grid] for job in jobs(tmp_path / "sweep")]

    command = (PROGRAM, "-m", *grid, GRID_ASYNC, *GPU_POOL, "hydra.sweep.dir=sweep")
    done = run(tmp_path, *command, "hydra.sweeper.max_batch_size=3")
    assert done.returncode == 0, done.stderr
    assert "hydra.sweeper.filter leaves 4 of 6 combinations" in done.stdout + done.stderr
    assert ran() == LEFT
    again = run(tmp_path, *command, "hydra.launcher.resume=true")
    assert again.returncode == 0, again.stderr
    assert "4 of 4 jobs completed before" in again.stderr
    assert ran() == LEFT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (('hydra.sweeper.filter="n >> 1"',), "hydra.sweeper.filter: n >> 1: 'n >> 1' at character 1 is not supported"),
        (('hydra.sweeper.filter="m > 1"',), "m is not the key of an override (there are: n)"),
        (('hydra.sweeper.filter="n > 9"',), "leaves out all 2 combinations: nothing would run"),
        (('+pair="zip(n=[1,2], lr=[1,2])"',), "n is also swept or fixed on its own"),
        (('+pair="zip(kind=[a,b], lr=[1])"',), "kind has 2, lr has 1"),
    ],
)
def test_a_wrong_zip_or_filter_is_answered_before_any_job_runs(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run(tmp_path, PROGRAM, "-m", "n=1,2", *arguments, GRID_ASYNC, *GPU_POOL, "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert message in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "sweep" / "0").exists()


def test_hydra_shows_it_and_its_options(run: Run, tmp_path: Path) -> None:
    assert "GridAsyncSweeper" in run(tmp_path, PROGRAM, "--info", "plugins").stdout
    shown = yaml.safe_load(run(tmp_path, PROGRAM, "--cfg=hydra", "-p=hydra.sweeper", GRID_ASYNC).stdout)
    assert shown["max_batch_size"] is None
    assert set(shown["help"]) == shown.keys() - {"_target_", "help"}
