"""Tests that with `GPU_LAUNCHER_LOG`, all processes of a sweep write one log."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_log_in_the_sweeps_directory_tells_what_each_process_decides(run: Run, tmp_path: Path, method: str) -> None:
    done = run(
        tmp_path,
        "retries.py",
        *("-m", "hydra.sweep.dir=sweep", "hydra.launcher.devices=simulated:2", "hydra.launcher.retries=1"),
        *("kind=exit", f"hydra.launcher.start_method={method}", "hydra.verbose=true"),
        GPU_LAUNCHER_LOG="debug",
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "sweep" / "gpu-launcher.log").read_text()
    roles = set(re.findall(r"^\S+ [A-Z]+ \S+ ([a-z ]+?)(?: \d+)?\[\d+\] ", log, re.MULTILINE))
    assert {"head", "node", "guard", "fork server", "supervisor", "job"} <= roles
    story = [
        "jobs.loop: job 0 attempt 1: prepared",
        "jobs.loop: job 0 attempt 1: granted simulated GPU 0 by lease",
        "jobs.loop: job 0 attempt 1: failed and is retried: ended with exit code 3",
        "jobs.loop: job 0 attempt 2: completed",
        "jobs.head: job 0 attempt 2 has its result: completed",
    ]
    places = [log.find(line) for line in story]
    assert -1 not in places, story[places.index(-1)]
    assert places == sorted(places)
    assert "Exited(number=0, problem=None): [Release(number=0), Conclude(" in log
    # A sweep that a job starts has its own log.
    assert "GPU_LAUNCHER_LOG=debug\n" in (tmp_path / "sweep" / "0" / "job.log").read_text()
    ours = re.compile(r"\[\d+\] (jobs|leases|processes)\.")
    for other in (tmp_path / "sweep").rglob("*.log"):
        assert other.name == "gpu-launcher.log" or not ours.search(other.read_text()), f"{other} has lines of ours"
    assert not ours.search(done.stderr)
