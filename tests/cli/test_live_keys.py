"""The keys of the live view on a real sweep in a real terminal, which pyte emulates."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import environment
from tests.emulated_terminal import EmulatedTerminal

pytestmark = pytest.mark.thorough

CLI = (sys.executable, "-m", "gpu_launcher.cli")
JOB = (
    "if [ {n} = 0 ]; then echo 'a cause 学習率' >&2; exit 3; fi;"
    "i=0; while [ ! -e end{n} ]; do i=$((i+1)); echo line $i of {n}; sleep 0.05; done"
)
Start = Callable[..., EmulatedTerminal]


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Start]:
    """Start a map of six jobs on two devices. Job 0 fails; job n ends when `end<n>` exists."""
    terminals = []

    def start(
        size: tuple[int, int] = (80, 24), within: tuple[str, ...] = (), stdin: str = "", **environ: str
    ) -> EmulatedTerminal:
        command = [*CLI, "map", "--devices", "simulated:2", "--dir", "sweep", "--param", "n=0,1,2,3,4,5", "--shell"]
        variables = {**environment(**environ), "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "PS1": "ready> "}
        terminals.append(EmulatedTerminal(within or [*command, "--", JOB], variables, tmp_path, size))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def running(terminal: EmulatedTerminal) -> None:
    terminal.until(lambda: "1 failed  2 running" in terminal.text and "? help" in terminal.text)


def end(terminal: EmulatedTerminal) -> None:
    terminal.press("\x03")
    terminal.wait()
    assert "Traceback" not in terminal.text


@pytest.mark.smoke
def test_job_is_selected_read_and_cancelled(sweep: Start) -> None:
    terminal = sweep()
    running(terminal)
    terminal.press("\x1b[B")
    terminal.until(lambda: any(cell.reverse for row in terminal.screen.buffer.values() for cell in row.values()))
    terminal.press("l")
    terminal.until(lambda: re.search(r"line \d+ of ", terminal.text))
    before = terminal.text
    terminal.until(lambda: re.search(r"line \d+ of ", terminal.text) and terminal.text != before)  # it is live
    assert terminal.screen.is_alternate
    terminal.press("\t")
    terminal.until("the log is empty")
    terminal.press("q")
    terminal.until(lambda: not terminal.screen.is_alternate and "2 running" in terminal.text)
    assert "a cause 学 習 率" in terminal.text.replace("学習率", "学 習 率"), "the scrollback is as before"
    terminal.press("c")
    terminal.until("y/n")
    terminal.press("n")
    terminal.until("nothing was cancelled")
    terminal.press("c")
    terminal.until("y/n")
    terminal.press("y")
    terminal.until("cancelled by key c")
    terminal.until(lambda: "2/6 done" in terminal.text)
    end(terminal)


def test_sweep_is_paused_limited_and_continued(sweep: Start, tmp_path: Path) -> None:
    terminal = sweep()
    running(terminal)
    terminal.press("p")
    terminal.until("no job is started from now on, because of key p")
    terminal.until("paused")
    (tmp_path / "end1").touch()
    terminal.until(lambda: "2/6 done  1 failed  1 running" in terminal.text and "p continue" in terminal.text)
    terminal.press("L1\r")
    terminal.until("at most 1 device from now on, because of key +, - or L")
    terminal.press("p")
    terminal.until("jobs are started again from now on, because of key p")
    terminal.press("+")
    terminal.until("no limit on devices from now on, because of key +, - or L")
    terminal.until("2 running")
    end(terminal)


def test_failures_and_notices_while_a_page_is_open_come_back(sweep: Start, tmp_path: Path) -> None:
    terminal = sweep()
    running(terminal)
    terminal.press("f")
    terminal.until(lambda: "failures: 1 job" in terminal.text and "job 0 (n=0) FAILED" in terminal.text)
    terminal.press("\r")
    terminal.until("a cause")
    assert "2 running" not in terminal.text
    cancel = EmulatedTerminal([*CLI, "cancel", "1"], environment(), tmp_path)
    assert cancel.wait() == 0, cancel.text
    cancel.close()
    time.sleep(0.3)  # long enough to see that the page stays
    terminal.press("?")
    terminal.until("Select and scroll")
    assert "cancelled" not in terminal.text
    terminal.press("q")
    terminal.until("a cause")
    terminal.press("\x1b")
    terminal.until("failures: 1 job")
    terminal.press("r")
    terminal.until("job 0 runs again")
    terminal.press("q")
    terminal.until("job 1 cancelled by `gpu-launcher cancel`")
    assert not terminal.screen.is_alternate
    end(terminal)


@pytest.mark.parametrize("colours", [{}, {"NO_COLOR": "1"}], ids=["colours", "NO_COLOR"])
def test_view_and_pages_survive_every_size(sweep: Start, colours: dict[str, str]) -> None:
    terminal = sweep(**colours)
    running(terminal)
    for columns, lines in ((60, 12), (200, 50), (20, 4), (80, 24)):
        terminal.press("?")
        terminal.until(lambda: terminal.screen.is_alternate and "q back" in terminal.text)
        terminal.resize(columns, lines)
        terminal.until(lambda: "q back" in terminal.screen.display[-1])
        terminal.press("q")
        terminal.until(lambda: not terminal.screen.is_alternate and "/6 done" in terminal.text)
    terminal.press("j")
    terminal.until(lambda: any(cell.reverse for row in terminal.screen.buffer.values() for cell in row.values()))

    def coloured() -> bool:
        return any(cell.fg != "default" for row in terminal.screen.buffer.values() for cell in row.values())

    if colours:
        assert not coloured()
    else:
        terminal.until(coloured)
    end(terminal)


def test_ctrl_z_on_a_page_gives_the_terminal_back_and_fg_shows_the_page(sweep: Start, tmp_path: Path) -> None:
    shell = sweep(within=("bash", "--norc", "--noprofile", "-i"))
    shell.until("ready>")
    before = shell.modes()
    (tmp_path / "job.sh").write_text(JOB.replace("{n}", "$1"))
    shell.press(" ".join([*CLI, "map --devices simulated:2 --dir sweep --param n=0,1,2,3 -- sh job.sh {n}\r"]))
    running(shell)
    shell.press("?")
    shell.until("Select and scroll")
    shell.press("\x1a")
    shell.until("Stopped")
    assert not shell.screen.is_alternate
    shell.until(lambda: shell.modes() == before)
    shell.press("fg\r")
    shell.until(lambda: shell.screen.is_alternate and "Select and scroll" in shell.text)
    shell.press("q")
    shell.until("2 running")
    shell.press("\x03")
    shell.until("to run the rest")
    shell.until(lambda: shell.modes() == before)  # what is typed earlier may be discarded
    shell.press("exit\r")
    assert shell.wait() in (0, 1, 130)


def test_terminal_is_usable_after_sigkill(sweep: Start, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(JOB.replace("{n}", "$1"))
    command = " ".join([*CLI, "map --devices simulated:2 --dir sweep --param n=0,1,2,3 -- sh job.sh {n}"])
    shell = sweep(within=("sh", "-c", f"{command}; echo killed; exec cat"))
    before = shell.initial_modes
    running(shell)
    assert shell.modes() != before
    (head,) = map(int, Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split())
    os.kill(head, signal.SIGKILL)
    shell.until("killed")
    shell.until(lambda: shell.modes() == before)
    shell.press("echoed\r\x04")
    shell.until("echoed\nechoed")
    assert shell.wait() == 0


def test_sweep_that_ends_while_a_page_is_open_prints_its_summary(sweep: Start, tmp_path: Path) -> None:
    terminal = sweep()
    running(terminal)
    terminal.press("f")
    terminal.until("failures: 1 job")
    for number in range(1, 6):
        (tmp_path / f"end{number}").touch()
    terminal.until("6 jobs: 5 completed, 1 failed")
    assert not terminal.screen.is_alternate
    assert terminal.wait() == 1
