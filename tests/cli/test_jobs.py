"""Tests `gpu-launcher jobs DIR`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_launcher.jobs.events import JobEnded, JobRetried, JobReturned, JobStarted, Outcome
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.model import Device, DeviceKind

GPU = Device("GPU-1", 1, "a GPU", DeviceKind.GPU)


def jobs(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpu_launcher.cli", "jobs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The directory of a sweep with four jobs: one completed in its second attempt, one failed, one runs, one waits."""
    directory = tmp_path / "sweep"
    directory.mkdir()
    times = iter([1000.0, 1001.0, 1003.0, 1010.0, 1040.0, 1050.0, 1052.5, 1060.0])
    names = [f"lr={number}" for number in range(4)]
    recorder = Recorder(
        directory, [Job(n, name, [name]) for n, name in enumerate(names)], "train.py", wall_clock=lambda: next(times)
    )
    log = str(directory / "0" / "job.log")
    recorder.handle(JobStarted(0.0, 0, names[0], (GPU,), log))
    recorder.handle(JobRetried(0.0, 0, names[0], 2.0, "was killed by SIGKILL", f"{log}.1", 2, 2, 1))
    recorder.handle(JobStarted(0.0, 0, names[0], (GPU,), log))
    recorder.handle(JobEnded(0.0, 0, names[0], (GPU,), Outcome.COMPLETED, 30.0, None, log))
    recorder.handle(JobStarted(0.0, 1, names[1], (GPU,), None))
    recorder.handle(JobEnded(0.0, 1, names[1], (GPU,), Outcome.FAILED, 2.5, "raised ValueError: no\nway", None))
    recorder.handle(JobStarted(0.0, 2, names[2], (GPU,), None))
    return directory


@pytest.mark.smoke
def test_it_lists_what_became_of_each_job(sweep: Path) -> None:
    done = jobs(str(sweep))
    assert done.returncode == 0, done.stderr
    head, _, *rows = done.stdout.splitlines()
    assert head == f"{sweep}: 4 jobs: 1 waiting, 1 running, 1 completed, 1 failed"
    assert [row.split() for row in rows] == [
        ["0", "completed", "2", "30.0", "s", "GPU", "1", "lr=0", "-"],
        ["1", "failed", "1", "2.5", "s", "GPU", "1", "lr=1", "raised", "ValueError:", "no", "way"],
        ["2", "running", "1", "-", "GPU", "1", "lr=2", "-"],
        ["3", "waiting", "-", "-", "-", "lr=3", "-"],
    ]


def test_job_whose_node_was_lost_waits(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, [Job(0, "lr=0", ["lr=0"])], "train.py")
    recorder.handle(JobStarted(0.0, 0, "lr=0", (GPU,), str(tmp_path / "job.log"), 1))
    recorder.handle(JobReturned(0.0, 0, "lr=0"))
    (job,) = json.loads(jobs("--json", str(tmp_path)).stdout)["jobs"]
    assert (job["state"], job["attempts"], job["moves"]) == ("waiting", 0, 1)
    assert (job["devices"], job["pid"], job["started"], job["ended"]) == ([], None, None, None)


def test_moves_of_a_job_are_not_counted_as_attempts(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, [Job(0, "lr=0", ["lr=0"])], "train.py")
    started, returned = JobStarted(0.0, 0, "lr=0", (GPU,), None), JobReturned(0.0, 0, "lr=0")
    recorder.handle(started)
    recorder.handle(returned)
    recorder.handle(returned)  # it was dealt to a node that left before it had started the job
    recorder.close()
    resumed = Recorder(tmp_path, [Job(0, "lr=0", ["lr=0"], attempts_before=1)], "train.py")
    resumed.handle(started)
    resumed.handle(JobRetried(0.0, 0, "lr=0", 2.0, "was killed by SIGKILL", None, 3, 3, 1))
    resumed.handle(started)
    resumed.handle(JobEnded(0.0, 0, "lr=0", (GPU,), Outcome.COMPLETED, 30.0, None, None))
    (job,) = json.loads(jobs("--json", str(tmp_path)).stdout)["jobs"]
    assert (job["state"], job["attempts"], job["moves"]) == ("completed", 2, 1)
    assert jobs(str(tmp_path)).stdout.splitlines()[-1].split()[:3] == ["0", "completed", "2"]


def test_it_lists_only_those_that_failed_as_json(sweep: Path) -> None:
    found = json.loads(jobs("--failed", "--json", str(sweep)).stdout)
    assert found == {
        "schema": 1,
        "directory": str(sweep),
        "jobs": [
            {
                "number": 1,
                "state": "failed",
                "overrides": ["lr=1"],
                "attempts": 1,
                "moves": 0,
                "devices": ["GPU 1"],
                "pid": None,
                "started": 1050.0,
                "ended": 1052.5,
                "message": "raised ValueError: no\nway",
                "log": None,
            }
        ],
    }


def test_a_directory_that_is_no_sweep_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    done = jobs(str(tmp_path))
    assert done.returncode == 1
    assert "is not the directory of a sweep: give the directory that hydra.sweep.dir named" in done.stderr


def test_above_a_sweep_the_newest_one_is_named(sweep: Path) -> None:
    done = jobs(str(sweep.parent))
    assert done.returncode == 1
    assert f"{sweep.parent} is not the directory of a sweep: the newest sweep in it is {sweep}" in done.stderr


@pytest.mark.parametrize("name", ["file", "file/below", "n" * 300, "missing"])
def test_what_is_no_directory_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    done = jobs(str(tmp_path / name))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    reasons = {"missing": "does not exist", "n" * 300: "(File name too long)"}
    assert reasons.get(name, "(Not a directory)") in line
