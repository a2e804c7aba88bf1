"""Tests that existing programs work however they are started and configured, and with their own worker processes."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra.experimental.callbacks
import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
PROGRAMS = Path(__file__).parent / "programs"

POOL = ["hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:4", "hydra.sweep.dir=sweep"]
METHODS = pytest.mark.parametrize("method", ["fork", "spawn"])
CONSOLE_SCRIPT = "import sys\nfrom package.train import main\nsys.exit(main())\n"


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}")


@dataclass
class Way:
    """One way to start a program of the package. `module` is the module that `-m` runs, if any."""

    command: tuple[str, ...]
    module: str | None = None
    arguments: tuple[str, ...] = ("-m", *POOL, "lr=1,2")


WAYS = [
    pytest.param(Way(("-m", "package.train"), "package.train"), id="module"),
    pytest.param(Way(("bin/train",)), id="console-script"),
    pytest.param(Way(("-m", "package.train"), "package.train", ("--config-name=sweeping",)), id="mode-in-config"),
    pytest.param(Way(("-m", "package.zen"), "package.zen"), id="hydra-zen", marks=needs("hydra_zen")),
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with the package, and with a console script like those that pip writes."""
    (tmp_path / "package").symlink_to(PROGRAMS / "package")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "train").write_text(CONSOLE_SCRIPT)
    return tmp_path


def ranks(project: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """The records of each job and of the rank 1 that it started as DDP does, by job and rank."""
    return {
        (job, rank): json.loads((project / "sweep" / str(job) / f"rank-{rank}.json").read_text())
        for job in (0, 1)
        for rank in (0, 1)
    }


@METHODS
@pytest.mark.parametrize("way", WAYS)
def test_a_program_runs_and_runs_again_however_it_is_started(run: Run, project: Path, way: Way, method: str) -> None:
    path = {"PYTHONPATH": str(project)} if way.module is None else {}  # as if the package were installed
    start_method = f"hydra.launcher.start_method={method}"
    ran = run(project, way.command, *way.arguments, start_method, "hydra.job.chdir=true", **path)
    assert ran.returncode == 0, ran.stderr
    found = ranks(project)
    for (job, rank), one in found.items():
        assert one["number"] == job
        assert one["lr"] == job + 1
        assert one["mode"] == ("RUN" if rank else "MULTIRUN")
        assert one["output_dir"] == str(project / "sweep" / str(job))
        assert one["original_cwd"] == str(project)
        assert one["module"] == way.module
        assert one["mask"] == found[job, 0]["mask"] != ""
    assert len({one["pid"] for one in found.values()}) == 4
    left = {path.name for path in (project / "sweep").iterdir()}
    assert left == {".gpu_launcher", "multirun.yaml", "results.csv", "0", "1"}
    assert {path.name for path in project.iterdir()} == {"package", "bin", "pool", "sweep"}


@METHODS
def test_job_logging_and_callbacks_of_the_programs_config_work_in_each_job(
    run: Run, project: Path, method: str
) -> None:
    start_method = f"hydra.launcher.start_method={method}"
    ran = run(project, ("-m", "package.train"), "-m", *POOL, start_method, "lr=1,2,many")
    assert ran.returncode == 1, ran.stderr
    for job, lr in enumerate((1, 2)):
        directory = project / "sweep" / str(job)
        messages = (directory / f"messages-{job}-train.txt").read_text().splitlines()
        assert f"DEBUG|package.work|rank 0 learns at {lr}" in messages
        assert f"INFO|package.callbacks|COMPLETED with {10.0 * lr}" in messages
        again = (directory / f"messages-{job}-rank_1.txt").read_text().splitlines()
        assert f"DEBUG|package.work|rank 1 learns at {lr}" in again
        printed = (directory / "job.log").read_text()
        assert f"DEBUG|package.work|rank 0 learns at {lr}\n" in printed
        assert f"DEBUG|package.work|rank 1 learns at {lr}\n" in printed
        for rank in (0, 1):
            job_return = pickle.loads((directory / f"job_return-{rank}.pickle").read_bytes())
            assert job_return.return_value == 10 * lr
            config = pickle.loads((directory / f"config-{rank}.pickle").read_bytes())
            assert (config.lr, config.hydra.job.num) == (lr, job)
    failed = (project / "sweep" / "2" / "messages-2-train.txt").read_text()
    assert "INFO|package.callbacks|FAILED with ValueError(" in failed
    assert "learns" not in ran.stdout + ran.stderr


def test_hydra_runs_a_job_of_the_sweep_again(run: Run, project: Path) -> None:
    callback = "+hydra.callbacks.save._target_=hydra.experimental.callbacks.PickleJobInfoCallback"
    with_pickle = hasattr(hydra.experimental.callbacks, "PickleJobInfoCallback")  # up to Hydra 1.3
    ran = run(project, ("-m", "package.train"), "-m", *POOL, "lr=1,2", *([callback] if with_pickle else []))
    assert ran.returncode == 0, ran.stderr
    directory = project / "sweep" / "1"
    witness = directory / "rank-0.json"
    before = json.loads(witness.read_text())
    witness.unlink()
    saved = directory / ".hydra" / "config.pickle" if with_pickle else directory
    again = run(project, ("-m", "package.train"), f"--experimental-rerun={saved}", LOCAL_RANK="0")
    assert again.returncode == 0, again.stderr
    after = json.loads(witness.read_text())
    assert after["pid"] != before["pid"]
    assert after["lr"] == before["lr"] == 2


@needs("hydra_zen")
def test_hydra_zens_launch_returns_the_values_of_its_jobs(run: Run, project: Path) -> None:
    ran = run(project, ("-m", "package.zen_launch"))
    assert ran.returncode == 0, ran.stderr
    assert json.loads((project / "returned.json").read_text()) == [10, 20]


WAYS_TO_HAVE_CHILDREN = [
    *(f"{way}-{method}" for way in ("pool", "executor", "process") for method in ("fork", "spawn", "forkserver")),
    "joblib-loky",
]
WITH_TORCH = ["loader-fork", "loader-spawn"]


def check_children(run: Run, directory: Path, method: str, ways: list[str]) -> None:
    start_method = f"hydra.launcher.start_method={method}"
    ran = run(directory, "children.py", "-m", *POOL, start_method, "hydra.job.chdir=true", f"+how={','.join(ways)}")
    assert ran.returncode == 0, ran.stderr
    for job, way in enumerate(ways):
        answers = json.loads((directory / "sweep" / str(job) / "answers.json").read_text())
        assert answers["numbers"] == [-1, -2, -3], way
        assert answers["others"] == [True] * 3, way
        assert answers["masks"] == [True] * 3, way


@METHODS
def test_jobs_use_multiprocessing_in_every_way(run: Run, tmp_path: Path, method: str) -> None:
    check_children(run, tmp_path, method, WAYS_TO_HAVE_CHILDREN)


@METHODS
@needs("torch")
def test_jobs_use_the_workers_of_a_data_loader(run: Run, tmp_path: Path, method: str) -> None:
    check_children(run, tmp_path, method, WITH_TORCH)
