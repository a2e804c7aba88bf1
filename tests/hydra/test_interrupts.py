"""Tests Ctrl-C, SIGTERM and SIGHUP: jobs may clean up before they are killed; a second signal kills them at once."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gpu_launcher.processes.signals import SAME_SIGNAL_SECONDS
from tests.waiting import until
from tests.warm import TextProgram

Start = Callable[..., TextProgram]
MANNERS = ["polite"] * 4 + ["waiting"]
"""The manners of each job. The sweep has four devices, so one job waits."""


def sweep(
    start: Start, directory: Path, method: str, grace: float, manners: list[str] = MANNERS, **how: tuple[str, ...]
) -> subprocess.Popen[str]:
    """Start a sweep; return once its first four jobs run."""
    process = start(
        directory,
        "interrupted.py",
        "-m",
        f"+manners={','.join(manners)}",
        "hydra/launcher=gpu_pool",
        "hydra.launcher.devices=simulated:4",
        f"hydra.launcher.start_method={method}",
        f"hydra.launcher.grace={grace}",
        "hydra.sweep.dir=sweep",
        **how,
    )
    until(lambda: len(list((directory / "sweep").glob("*/pids"))) == 4 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


def alive(directory: Path) -> list[int]:
    """Process ids of jobs and their children that still exist."""
    pids = [int(pid) for file in (directory / "sweep").glob("*/pids") for pid in file.read_text().split()]
    assert len(pids) == 8
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("method", "signum", "status"),
    [
        ("fork", signal.SIGINT, -signal.SIGINT),
        ("fork", signal.SIGHUP, 128 + signal.SIGHUP),
        ("spawn", signal.SIGTERM, 128 + signal.SIGTERM),
    ],
)
@pytest.mark.smoke
def test_jobs_may_clean_up(start: Start, tmp_path: Path, method: str, signum: int, status: int) -> None:
    process = sweep(start, tmp_path, method, grace=300)
    process.send_signal(signum)
    out, err = process.communicate(timeout=500)
    assert process.returncode == status
    assert out == ""
    assert "Traceback" not in err.replace("| Traceback", ""), "of the launching program"
    assert alive(tmp_path) == []
    for number in range(len(MANNERS)):
        directory = tmp_path / "sweep" / str(number)
        ran = (directory / "pids").exists()  # any of the jobs may wait
        assert (directory / "cleaned_up").exists() == ran
    assert "5 jobs: 4 cancelled, 1 not run" in err
    assert list((tmp_path / "pool" / "queue").iterdir()) == []


@pytest.mark.smoke
def test_jobs_are_killed_when_the_grace_is_over(start: Start, tmp_path: Path) -> None:
    process = sweep(start, tmp_path, "fork", grace=1, manners=["stubborn"] * 4)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=500)
    assert time.monotonic() - asked >= 1
    assert process.returncode == -signal.SIGINT
    assert alive(tmp_path) == []
    assert "4 jobs: 4 cancelled" in err


def test_a_second_ctrl_c_kills_at_once(start: Start, tmp_path: Path) -> None:
    process = sweep(start, tmp_path, "fork", grace=300)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert any("stopping" in line for line in process.stderr)  # reads only up to this line
    time.sleep(SAME_SIGNAL_SECONDS)  # an earlier signal counts as the same Ctrl-C
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=500)  # the grace is 300 s
    assert process.returncode == -signal.SIGINT
    assert alive(tmp_path) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_jobs_have_their_grace_when_every_process_is_asked_to_end_as_by_systemd(
    start: Start, tmp_path: Path, method: str, signum: signal.Signals
) -> None:
    process = sweep(start, tmp_path, method, grace=300, manners=["saving"] * 4)
    launcher = psutil.Process(process.pid)
    for each in (launcher, *launcher.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # the launching program has just ended it
            each.send_signal(signum)
    _, err = process.communicate(timeout=500)
    assert process.returncode == 128 + signum
    assert "4 jobs: 4 cancelled" in err
    assert len(list((tmp_path / "sweep").glob("*/cleaned_up"))) == 4
    assert alive(tmp_path) == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_sweep_under_nohup_goes_on_when_its_terminal_is_gone_and_so_do_its_jobs(
    start: Start, tmp_path: Path, method: str
) -> None:
    process = sweep(start, tmp_path, method, grace=300, manners=["polite"] * 4, within=("nohup",))
    launcher = psutil.Process(process.pid)
    for each in (launcher, *launcher.children(recursive=True)):
        each.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert len(alive(tmp_path)) == 8
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=500)
    assert process.returncode == 128 + signal.SIGTERM
    assert alive(tmp_path) == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_sweep_that_a_script_started_in_the_background_ignores_ctrl_c_but_its_jobs_are_asked_to_end(
    start: Start, tmp_path: Path, method: str
) -> None:
    ignoring = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
    process = sweep(start, tmp_path, method, grace=300, manners=["polite"] * 4, within=ignoring)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=500)
    assert process.returncode == 128 + signal.SIGTERM, "and not of SIGINT, which came first"
    assert len(list((tmp_path / "sweep").glob("*/cleaned_up"))) == 4
    assert alive(tmp_path) == []
