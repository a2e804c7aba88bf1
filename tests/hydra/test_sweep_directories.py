"""Directories that are used twice: by two sweeps at once, one after the other, and by several jobs of one sweep."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_launcher.jobs.manifest import State, read

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., "subprocess.Popen[str]"]

PROGRAM = "directories.py"
POOL = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:4")
DEADLINE = 60.0


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def files(directory: Path) -> dict[str, bytes]:
    """All but what the lock says and the log of the running jobs grows by."""
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
    assert f"is being run by process {both[won].pid} ({PROGRAM}): both were started in the same second" in said[lost]
    (directory,) = tmp_path.glob("2*")
    assert [entry.spec[0] for entry in read(directory).values()] == [f"x={won + 1}"]
    assert f"x={won + 1}" in (directory / "multirun.yaml").read_text(), "the loser has written nothing"


def test_after_a_killed_sweep_the_next_says_what_it_left(tmp_path: Path, start: Start, run: Run) -> None:
    with start(tmp_path, PROGRAM, "-m", "x=1,2", "holds=true", "hydra.sweep.dir=s", *POOL) as first:
        until(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
        first.send_signal(signal.SIGKILL)
    second = run(tmp_path, PROGRAM, "-m", "x=3", "hydra.sweep.dir=s")
    assert second.returncode == 0, second.stderr
    assert f"{tmp_path / 's'} has 2 jobs (2 lost) from an earlier sweep: " in second.stderr
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
