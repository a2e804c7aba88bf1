"""The running sweeps in `gpu-launcher top`, in a real terminal, which pyte emulates."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import environment
from tests.emulated_terminal import EmulatedTerminal

pytestmark = pytest.mark.thorough

CLI = (sys.executable, "-m", "gpu_launcher.cli")
JOB = "if [ {n} = 0 ]; then echo a cause >&2; exit 3; fi; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done"
Start = Callable[[str, int], "subprocess.Popen[str]"]


def variables(directory: Path) -> dict[str, str]:
    return {**environment(), "GPU_LAUNCHER_POOL_DIR": str(directory / "pool")}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a map of jobs on two devices. Its job 0 fails, and the others never end."""
    maps = []

    def start_map(name: str, first: int) -> subprocess.Popen[str]:
        command = [*CLI, "map", "--devices", "simulated:2", "--dir", name, "--param"]
        numbers = ",".join(map(str, range(first, first + 4)))
        process = subprocess.Popen(
            [*command, f"n={numbers}", "--shell", "--", JOB],
            env=variables(tmp_path),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        maps.append(process)
        return process

    yield start_map
    for process in maps:
        process.send_signal(signal.SIGINT)
    for process in maps:
        process.communicate(timeout=100)


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Callable[..., EmulatedTerminal]]:
    terminals = []

    def start_top(size: tuple[int, int] = (100, 24)) -> EmulatedTerminal:
        terminals.append(EmulatedTerminal([*CLI, "top", "--devices", "cpu:2"], variables(tmp_path), tmp_path, size))
        return terminals[-1]

    yield start_top
    for terminal in terminals:
        terminal.close()


def row(terminal: EmulatedTerminal, name: str) -> str:
    return next((line for line in terminal.screen.display if line.startswith(name)), "")


def test_running_sweeps_appear_are_opened_and_go(
    start: Start, top: Callable[..., EmulatedTerminal], tmp_path: Path
) -> None:
    screen = top()
    screen.until("the queue is empty")
    assert "SWEEPS" not in screen.text
    first = start("one", 0)
    screen.until(lambda: "1/4 done  1 failed  2 running" in row(screen, "one"))
    start("two", 1)
    screen.until(lambda: "0/4 done" in row(screen, "two"))
    screen.press("k")
    screen.press("\r")
    screen.until(lambda: screen.text.startswith("one\n") and "? help" in screen.text)
    screen.press("p")
    screen.until("one is paused: no job is started, and 2 running jobs may continue")
    screen.press("f\r")
    screen.until("a cause")
    screen.press("q")
    screen.until("failures: 1 job")
    screen.press("q")
    screen.until("p continue")
    screen.press("j")
    screen.until(lambda: any(cell.reverse for line in screen.screen.buffer.values() for cell in line.values()))
    screen.press("l")
    screen.until(lambda: re.search(r"line \d", screen.text))
    before = screen.text
    screen.until(lambda: re.search(r"line \d", screen.text) and screen.text != before)  # it is live
    screen.press("c")
    screen.until("y/n")
    screen.press("y")
    screen.until("cancelled: SIGTERM now")
    screen.press("q")
    screen.until("2/4 done  1 failed  1 running")
    first.send_signal(signal.SIGINT)
    screen.until(lambda: "SWEEPS" in screen.text and not row(screen, "one"))
    screen.press("q")
    assert screen.wait() == 0
    assert not screen.screen.is_alternate


@pytest.mark.parametrize("size", [(60, 12), (200, 50), (40, 6)])
def test_sweeps_fit_every_terminal(start: Start, top: Callable[..., EmulatedTerminal], size: tuple[int, int]) -> None:
    start("a-sweep-with-a-long-name-学習率-and-more-and-more", 0)
    screen = top(size)
    screen.until(lambda: "SWEEPS" in screen.text and " on " in screen.screen.display[-1])  # beside the clock
    screen.press("\r")
    screen.until(lambda: "? help" in screen.screen.display[-1])
    screen.resize(80, 24)
    screen.until(lambda: "? help" in screen.screen.display[-1])
    screen.press("q")
    screen.until("SWEEPS")
    screen.press("q")
    assert screen.wait() == 0


def test_sweep_that_does_not_answer_does_not_stop_top(start: Start, top: Callable[..., EmulatedTerminal]) -> None:
    process = start("one", 1)
    screen = top()
    screen.until(lambda: "2 running" in row(screen, "one") and "1 ticket waits" in screen.text)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        other = top()
        other.until("1 ticket waits")
        other.press("q")
        assert other.wait() == 0
        clock = screen.screen.display[-1][:8]
        screen.until(lambda: screen.screen.display[-1][:8] != clock)
    finally:
        os.kill(process.pid, signal.SIGCONT)
