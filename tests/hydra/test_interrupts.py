"""Ctrl-C and SIGTERM: jobs may clean up, then they are killed; the second time at once."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., subprocess.Popen[str]]
MANNERS = ["polite", "stubborn", "polite", "stubborn", "waiting"]
"""On four devices, so that the last one waits."""


def sweep(start: Start, directory: Path, method: str, grace: float) -> subprocess.Popen[str]:
    """A sweep whose first four jobs are at work."""
    process = start(
        directory,
        "interrupted.py",
        "-m",
        f"+manners={','.join(MANNERS)}",
        "hydra/launcher=gpu_pool",
        "hydra.launcher.devices=simulated:4",
        f"hydra.launcher.start_method={method}",
        f"hydra.launcher.grace={grace}",
        "hydra.sweep.dir=sweep",
    )
    deadline = time.monotonic() + 60
    while len(list((directory / "sweep").glob("*/pids"))) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def alive(directory: Path) -> list[int]:
    """Processes of the jobs and their children that are still there."""
    pids = [int(pid) for file in (directory / "sweep").glob("*/pids") for pid in file.read_text().split()]
    assert len(pids) == 8
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("method", "signum", "status"),
    [("fork", signal.SIGINT, -signal.SIGINT), ("spawn", signal.SIGTERM, 128 + signal.SIGTERM)],
)
def test_jobs_may_clean_up_and_are_killed_when_the_grace_is_over(
    start: Start, tmp_path: Path, method: str, signum: int, status: int
) -> None:
    process = sweep(start, tmp_path, method, grace=1.5)
    asked = time.monotonic()
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    took = time.monotonic() - asked
    assert 1.5 <= took < 5
    assert process.returncode == status
    assert out == ""
    assert "Traceback" not in err.replace("| Traceback", ""), "of the launching program"
    assert alive(tmp_path) == []
    for number, manners in enumerate(MANNERS):
        assert (tmp_path / "sweep" / str(number) / "cleaned_up").exists() == (manners == "polite")
    assert "5 jobs: 4 cancelled, 1 not run" in err
    assert list((tmp_path / "pool" / "queue").iterdir()) == []


def test_a_second_ctrl_c_kills_at_once(start: Start, tmp_path: Path) -> None:
    process = sweep(start, tmp_path, "fork", grace=300)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert any("stopping" in line for line in process.stderr)  # reads no further than that
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - asked < 3
    assert process.returncode == -signal.SIGINT
    assert alive(tmp_path) == []
