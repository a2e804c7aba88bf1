"""Tests `hydra.launcher.dry_run` and what is said while Hydra composes a large grid."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import gpu_launcher

Run = Callable[..., subprocess.CompletedProcess[str]]

DRY = ("hydra/launcher=gpu_pool", "hydra.launcher.dry_run=true", "hydra.launcher.devices=simulated:2")
GRID_ASYNC = "hydra/sweeper=grid_async"


def commands(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The command lines that were printed, without the program."""
    return [line.partition(".py ")[2] for line in done.stdout.splitlines() if ".py " in line]


def left(directory: Path) -> set[str]:
    """What lies in the directory, but for what the programs of these tests write while configs are composed."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")} - {"composed"}


@pytest.mark.parametrize("sweeper", ["basic", "grid_async"])
@pytest.mark.smoke
def test_grid_is_shown_and_nothing_is_run_or_left(run: Run, tmp_path: Path, sweeper: str) -> None:
    done = run(tmp_path, "grid.py", "-m", "n=1,2,3", "lr=0.5,0.25", *DRY, f"hydra/sweeper={sweeper}")
    assert done.returncode == 0, done.stderr
    assert commands(done) == [f"n={n} lr={lr}" for n in (1, 2, 3) for lr in (0.5, 0.25)]
    assert "6 jobs; this is a dry run, and nothing is started" in done.stderr
    assert "6 of 6 examined configs are valid" in done.stderr
    assert "6 jobs need 1 GPU each: 2 can start now, the others when those end" in done.stderr
    assert "GPU hours: 6 for each hour that a job takes" in done.stderr
    assert left(tmp_path) == set()


def test_printed_command_runs_that_job(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path, "grid.py", "-m", "n=1,2", *DRY)
    command = done.stdout.splitlines()[1].split()
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    (overrides,) = tmp_path.glob("outputs/*/*/.hydra/overrides.yaml")
    assert overrides.read_text() == "- n=2\n"


def test_jobs_that_cannot_run_are_named_with_the_reason(run: Run, tmp_path: Path) -> None:
    needs = ("hydra.launcher.gpus=${n}", "hydra.launcher.timeout=30m")
    done = run(tmp_path, "grid.py", "-m", "n=1,two,9", "lr=0.5,0.25", *DRY, GRID_ASYNC, *needs)
    assert done.returncode == 1
    assert "2 jobs cannot run, such as job 2 (n=two lr=0.5): " in done.stderr
    assert "Value 'two' of type 'str' could not be converted to Integer" in done.stderr
    assert "4 of 6 examined configs are valid" in done.stderr
    assert "2 jobs need 9 GPUs each, which is never granted: the request is for 9 devices" in done.stderr
    assert "GPU hours: at most 10, if each job takes as long as hydra.launcher.timeout" in done.stderr
    assert "Traceback" not in done.stderr


def test_option_that_a_job_gets_wrong_is_named(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path, "grid.py", "-m", "kind=1,x", *DRY, "hydra.launcher.gpus=${kind}")
    assert done.returncode == 1
    assert "cannot run: job 1 (kind=x): hydra.launcher.gpus: 'x' is neither a number of devices" in done.stderr


def test_holder_of_the_devices_is_named(run: Run, tmp_path: Path) -> None:
    with gpu_launcher.Pool("simulated:2", pool_dir=tmp_path / "pool") as pool, pool.lease(2):
        before = {path.name for path in (tmp_path / "pool").rglob("*")}
        done = run(tmp_path, "grid.py", "-m", "n=1,2", *DRY)
        assert {path.name for path in (tmp_path / "pool").rglob("*")} == before
    assert done.returncode == 0, done.stderr
    assert "2 jobs need 1 GPU each: they wait now: simulated GPU 0, simulated GPU 1 held by " in done.stderr


def test_sample_of_a_large_grid_is_composed_and_batches_are_ignored(run: Run, tmp_path: Path) -> None:
    batches = ("hydra.sweeper.max_batch_size=10", "hydra.launcher.gpus=0.5")
    done = run(tmp_path, "grid.py", "-m", "n=range(1,4001)", *DRY, GRID_ASYNC, *batches)
    assert done.returncode == 0, done.stderr
    assert commands(done) == [f"n={n}" for n in range(1, 21)]
    assert "... and 3980 more: 4000 jobs" in done.stderr
    assert "composing a sample of 100 of 4000 configs ..." in done.stderr
    assert "4000 jobs need 0.5 of a GPU each: 4 can start now" in done.stderr
    assert "GPU hours: 2000 for each hour that a job takes" in done.stderr
    assert len((tmp_path / "composed").read_text().split()) == 100


def test_first_batch_is_shown_as_such(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path, "grid.py", "-m", "n=1,2,3", *DRY, "hydra.sweeper.max_batch_size=2")
    assert done.returncode == 0, done.stderr
    assert commands(done) == ["n=1", "n=2"]
    assert "these are the first jobs that the sweeper launches; others may follow" in done.stderr


def test_jobs_that_completed_before_are_left_out_and_the_directory_stays(run: Run, tmp_path: Path) -> None:
    words = ("grid.py", "-m", "n=1,2,3", "hydra.sweep.dir=sweep")
    assert run(tmp_path, *words, "fails=2").returncode == 1
    before = {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    resumed = run(tmp_path, *words, "fails=2", *DRY, "hydra.launcher.resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert commands(resumed) == ["n=2 fails=2"]
    assert "2 jobs completed before, and would not run again" in resumed.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "sweep").rglob("*") if path.is_file()} == before


def test_directory_of_a_config_that_does_not_compose_is_removed_too(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path, "grid.py", "-m", "n=1,two", *DRY, "hydra.sweep.dir=here/sweep")
    assert done.returncode == 1
    assert "could not be converted to Integer" in done.stderr, "Hydra's own sweeper says so"
    assert left(tmp_path) == set()


@pytest.mark.parametrize(
    "option",
    ["start_method=bogus", "outputs=bogus", "on_end=[]", "resume=true"],
    ids=lambda option: option.split("=")[0],
)
def test_what_the_sweep_would_refuse_is_refused(run: Run, tmp_path: Path, option: str) -> None:
    words = ("grid.py", "-m", "n=1,2", f"hydra.launcher.{option}")
    dry = run(tmp_path, *words, *DRY)
    wet = run(tmp_path, *words, DRY[0], DRY[2])
    assert dry.returncode == wet.returncode == 1
    assert f"hydra.launcher.{option.split('=')[0]}" in dry.stderr
    assert dry.stderr.splitlines()[-1].split("in multirun")[0] == wet.stderr.splitlines()[-1].split("in multirun")[0]
    assert commands(dry) == []


def test_hooks_do_not_run(run: Run, tmp_path: Path) -> None:
    hooks = ("hydra.launcher.on_end=[touch,ended]", "hydra.launcher.on_job_failure=[touch,failed]")
    assert run(tmp_path, "grid.py", "-m", "n=1,2", *DRY, *hooks).returncode == 0
    assert left(tmp_path) == set()


def test_what_other_machines_have_is_not_asked(run: Run, tmp_path: Path) -> None:
    nodes = ("hydra.launcher.nodes=command:no-such-program", "hydra.launcher.gpus=64")
    done = run(tmp_path, "grid.py", "-m", "n=1,2", *DRY, *nodes)
    assert done.returncode == 0, done.stderr
    assert "2 jobs need 64 GPUs each; the nodes say whether they can grant that once they run" in done.stderr


SEARCH = ("hydra/sweeper=optuna_async", "hydra.sweeper.storage=sqlite:///study.db")


def test_search_is_shown_with_examples_and_no_study_is_made(run: Run, tmp_path: Path) -> None:
    limits = ("hydra.sweeper.n_trials=40", "hydra.launcher.timeout=15m")
    done = run(tmp_path, "quadratic.py", "-m", "x=interval(0,1)", "kind=a,b", *DRY, *SEARCH, *limits)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert "x: float from 0.0 to 1.0" in shown
    assert "kind: choice(a, b)" in shown
    assert "x=0.0 kind=a" in commands(done)
    assert "40 trials; this is a dry run" in done.stderr
    assert "40 trials need 1 GPU each: 2 can start now" in done.stderr
    assert "GPU hours: at most 10," in done.stderr
    assert left(tmp_path) == set()


def test_examples_of_a_search_satisfy_its_filter(run: Run, tmp_path: Path) -> None:
    grid = ("x=interval(1,9)", "hydra.sweeper.filter='x < 5'", "hydra.sweeper.n_trials=null")
    limits = ("hydra.sweeper.timeout=60", "hydra.launcher.gpus=${kind}", "kind=1,2")
    done = run(tmp_path, "quadratic.py", "-m", *grid, *DRY, *SEARCH, *limits)
    assert done.returncode == 0, done.stderr
    assert commands(done) == ["x=1.0 kind=1"]
    assert "trials without a limit on their number" in done.stderr
    assert "each trial needs 1 GPU: 2 can start now" in done.stderr


# A large grid


def test_long_silence_of_hydras_own_sweeper_is_announced(run: Run, tmp_path: Path) -> None:
    words = ("grid.py", "-m", "n=two,3", "lr=range(51)", *DRY)  # the first job's config ends it
    line = "Hydra composes the configs of 102 jobs before the first job starts; with hydra/sweeper=grid_async"
    many = run(tmp_path, *words)
    assert many.returncode == 1
    assert line in many.stderr
    assert "could not be converted to Integer" in many.stderr
    for calm in (
        ("lr=range(50)",),  # the last override of a key counts
        ("hydra.sweeper.max_batch_size=2",),
        (GRID_ASYNC, "hydra.sweeper.filter='lr < 0'"),
    ):
        few = run(tmp_path, *words, *calm)
        assert few.returncode == 1
        assert "Hydra composes" not in few.stderr, calm
