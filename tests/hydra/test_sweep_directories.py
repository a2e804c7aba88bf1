"""Tests directories that are shared: by two sweeps at once, by one sweep after another, and by several jobs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher import load_results
from gpu_launcher.jobs.manifest import State, read
from hydra_plugins.gpu_pool_launcher._commands import override
from tests.waiting import until
from tests.warm import TextProgram

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., TextProgram]

PROGRAM = "directories.py"
POOL = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:4")
DEADLINE = 60.0


def files(directory: Path) -> dict[str, bytes]:
    """The contents of all files."""
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("sweeper", ["basic", "grid_async", "optuna_async"])
def test_a_second_launch_into_a_running_sweep_changes_nothing(
    tmp_path: Path, start: Start, run: Run, sweeper: str
) -> None:
    with start(tmp_path, PROGRAM, "-m", "x=1,2", "holds=true", "hydra.sweep.dir=s", *POOL) as first:
        until(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
        before = files(tmp_path / "s")
        second = run(tmp_path, PROGRAM, "-m", "x=3,4", "hydra.sweep.dir=s", f"hydra/sweeper={sweeper}")
        after = files(tmp_path / "s")
        (tmp_path / "go").touch()
        assert first.wait(DEADLINE) == 0
    assert second.returncode == 1
    (line,) = [line for line in second.stderr.splitlines() if "is being run by" in line]
    assert line == (
        f"{tmp_path / 's'} is being run by process {first.pid} ({PROGRAM}): "
        "wait for it, or name another directory with hydra.sweep.dir=..."
    )
    assert "Traceback" not in second.stderr
    assert after == before
    assert {entry.spec[0]: entry.state for entry in read(tmp_path / "s").values()} == {
        "x=1": State.COMPLETED,
        "x=2": State.COMPLETED,
    }


def test_of_two_sweeps_started_in_the_same_second_one_is_refused(tmp_path: Path, start: Start) -> None:
    same_second = "hydra.sweep.dir=${now:%Y}"
    both = [start(tmp_path, PROGRAM, "-m", f"x={x}", "holds=true", same_second, *POOL) for x in (1, 2)]
    until(lambda: any(process.poll() is not None for process in both))
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=DEADLINE)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], said
    won, lost = sorted(range(2), key=lambda number: both[number].returncode)
    assert f"is being run by process {both[won].pid} ({PROGRAM}): both started in the same second" in said[lost]
    (directory,) = tmp_path.glob("2*")
    assert [entry.spec[0] for entry in read(directory).values()] == [f"x={won + 1}"]
    assert f"x={won + 1}" in (directory / "multirun.yaml").read_text(), "the loser has written nothing"


def test_after_a_killed_sweep_the_next_says_what_it_left(tmp_path: Path, start: Start, run: Run) -> None:
    with start(tmp_path, PROGRAM, "-m", "x=1,2", "holds=true", "hydra.sweep.dir=s", *POOL) as first:
        until(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
        first.send_signal(signal.SIGKILL)
    second = run(tmp_path, PROGRAM, "-m", "x=3", "hydra.sweep.dir=s")
    assert second.returncode == 0, second.stderr
    assert f"{tmp_path / 's'} has 2 jobs (2 lost) from an earlier sweep: its results are dropped, " in second.stderr
    assert "hydra.launcher.resume=true runs only what did not complete" in second.stderr
    assert (tmp_path / "s" / "0" / "job.log").read_text() == "this is job 3\n"
    assert (tmp_path / "s" / "0" / "job.attempt-1.log").read_text() == "this is job 1\n"


@pytest.mark.parametrize("sweeper", ["basic", "grid_async"])
def test_batches_of_one_sweep_are_no_earlier_sweep(tmp_path: Path, run: Run, sweeper: str) -> None:
    batches = ["hydra.sweep.dir=s", f"hydra/sweeper={sweeper}", "hydra.sweeper.max_batch_size=1"]
    first = run(tmp_path, PROGRAM, "-m", "x=1,2,3", *batches)
    assert first.returncode == 0, first.stderr
    assert "earlier" not in first.stderr
    second = run(tmp_path, PROGRAM, "-m", "x=1,2,3", *batches)
    assert second.stderr.count("has 3 jobs (3 completed) from an earlier sweep") == 1


@pytest.mark.parametrize("batches", [(), ("hydra.sweeper.max_batch_size=2",)])
def test_results_are_those_of_the_last_sweep_in_the_directory(
    tmp_path: Path, run: Run, batches: tuple[str, ...]
) -> None:
    def rows(*arguments: str) -> list[tuple[int, Any]]:
        done = run(tmp_path, PROGRAM, "-m", "hydra.sweep.dir=s", *batches, *arguments)
        assert done.returncode == 0, done.stderr
        assert len((tmp_path / "s/results.csv").read_text().splitlines()) == 1 + len(load_results(tmp_path / "s"))
        return [(row.number, row.params["x"]) for row in load_results(tmp_path / "s")]

    assert rows("x=1,2,3,4,5") == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert rows("x=6,7,8") == [(0, 6), (1, 7), (2, 8)]
    assert rows("x=6,7,8,9", "hydra.launcher.resume=true") == [(0, 6), (1, 7), (2, 8), (3, 9)]
    assert rows("x=6,7", "hydra.launcher.resume=true") == [(0, 6), (1, 7), (2, 8), (3, 9)], "it continues that sweep"


def test_a_study_keeps_the_results_of_its_earlier_sweeps_alone(tmp_path: Path, run: Run) -> None:
    grid = run(tmp_path, PROGRAM, "-m", "hydra.sweep.dir=s", "x=1,2,3,4,5,6")
    assert grid.returncode == 0, grid.stderr
    search = (PROGRAM, "-m", "hydra.sweep.dir=s", "hydra/sweeper=optuna_async", "x=range(0,99)")
    for trials in (2, 4):
        done = run(tmp_path, *search, "hydra.sweeper.n_trials=2")
        assert done.returncode == 0, done.stderr
        table = load_results(tmp_path / "s")
        assert [row.number for row in table] == list(range(trials))
        assert table.directions == {"value": "minimize"}


def test_a_launch_on_another_machine_may_still_run(tmp_path: Path, run: Run) -> None:
    launch = tmp_path / "s" / ".gpu_launcher" / "launch-0123456789ab.json"
    launch.parent.mkdir(parents=True)
    identity = {"pid": 1, "start": 1, "namespace": "", "boot": "another", "host": "elsewhere", "command": "train.py"}
    launch.write_text(json.dumps(identity))
    refused = run(tmp_path, PROGRAM, "-m", "x=1", "hydra.sweep.dir=s")
    assert refused.returncode == 1
    assert "may still be run by process 1 (train.py) of elsewhere" in refused.stderr
    assert f"remove {launch}" in refused.stderr
    assert not (tmp_path / "s" / "multirun.yaml").exists()


@pytest.mark.parametrize("directory", ["s", "a (dir), it's"])
def test_the_end_of_a_sweep_says_how_to_continue_and_to_run_one_job(tmp_path: Path, run: Run, directory: str) -> None:
    where = override("hydra.sweep.dir", directory)
    first = run(tmp_path, PROGRAM, "-m", "x=1,2,3", "fails=2", where)
    assert first.returncode == 1
    end = first.stderr.partition("[gpu_pool] 3 jobs: 2 completed, 1 failed")[2]
    assert f"  results: {directory}\n" in end
    commands = dict(re.findall(r"^  (to run [\w ]+): (.*)$", end, re.MULTILINE))
    environ = {**os.environ, "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool")}

    def typed(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=500
        )

    alone = typed(commands["to run job 1 alone"])
    assert alone.returncode == 1
    assert alone.stdout == "this is job 2\n"
    assert "ValueError: 2 fails" in alone.stderr
    rest = typed(commands["to run the rest"])
    assert rest.returncode == 1
    assert "resumed: 2 of 3 jobs completed before" in rest.stderr


def test_jobs_in_one_directory_show_their_own_lines_only(tmp_path: Path, run: Run) -> None:
    sweep = ["x=1,2,3,4", "fails=3", "hydra.sweep.subdir=.", "hydra.sweep.dir=s", "hydra.launcher.max_parallel=1"]
    done = run(tmp_path, PROGRAM, "-m", *sweep, "hydra.launcher.retries=1", "hydra.launcher.retry_on=exception")
    assert done.returncode == 1
    assert done.stderr.count(" share the output directory ") == 1
    assert set(re.findall(r"^    \| this is job (\d)", done.stderr, re.MULTILINE)) == {"3"}
    logs = {entry.number: Path(entry.log or "") for entry in read(tmp_path / "s").values()}
    for number, path in logs.items():
        assert re.findall(r"this is job (\d)", path.read_text()) == [str(number + 1)]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("hydra.sweep.dir=file/s", "cannot write to the sweep directory (Not a directory): file/s; name another"),
        (f"hydra.sweep.dir={'n' * 300}", "cannot write to the sweep directory (File name too long): nnn"),
        ("hydra.sweep.dir=/proc/s", "cannot write to the sweep directory (No such file or directory): /proc/s; name"),
        ("hydra.launcher.resume=true", "hydra.launcher.resume=true: there is nothing to resume in multirun/"),
        (f"hydra.sweep.subdir={'n' * 300}", "cannot write to the output directory (File name too long): "),
    ],
)
def test_a_directory_that_cannot_be_used_is_said_without_frames(
    tmp_path: Path, run: Run, option: str, said: str
) -> None:
    (tmp_path / "file").touch()
    done = run(tmp_path, PROGRAM, "-m", "x=1", option)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr


def test_resume_in_a_new_directory_names_the_newest_sweep(tmp_path: Path, run: Run) -> None:
    assert run(tmp_path, PROGRAM, "-m", "x=1").returncode == 0
    (newest,) = tmp_path.glob("multirun/*/*")
    name = newest.relative_to(tmp_path)
    refused = run(tmp_path, PROGRAM, "-m", "x=1", "hydra.launcher.resume=true")
    assert refused.returncode == 1
    assert f"The newest sweep is {name}: to resume it, give hydra.sweep.dir={name}\n" in refused.stderr
    assert list(tmp_path.glob("multirun/*/*")) == [newest], "no directory is made for it"
    named = run(tmp_path, PROGRAM, "-m", "x=1", "hydra.launcher.resume=true", "hydra.sweep.dir=other")
    assert named.returncode == 0
    assert f"there is nothing to resume in other. The newest sweep is {name}" in named.stderr
