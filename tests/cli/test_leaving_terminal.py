"""Sweeps that leave the terminal of their shell while they run, with key d of the live view."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gpu_launcher.jobs.ending import ending_of
from gpu_launcher.jobs.manifest import State, read
from tests.cli.conftest import CLI, environment
from tests.emulated_terminal import EmulatedTerminal
from tests.waiting import alive, until

pytestmark = pytest.mark.thorough

BASH = ("bash", "--norc", "--noprofile", "-i")
MAP = " ".join([*CLI, "map --devices simulated:2 --dir sweep --param n=0,1,2,3 -- sh job.sh {n}"])
"""A map of four jobs on two devices. They end when there is a file `go`."""
Open = Callable[..., EmulatedTerminal]
Leave = Callable[..., tuple[EmulatedTerminal, psutil.Process]]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Open]:
    """Run a command in a terminal, in a directory in which `MAP` can be run."""
    (tmp_path / "job.sh").write_text("while [ ! -e go ]; do sleep 0.05; done; echo end of $1")
    opened = []

    def start(*command: str) -> EmulatedTerminal:
        variables = {**environment(), "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "PS1": "ready> ", "ENV": ""}
        opened.append(EmulatedTerminal(command, variables, tmp_path, (240, 30)))
        return opened[-1]

    yield start
    for one in opened:
        close(one)


def close(one: EmulatedTerminal) -> None:
    """Close a terminal, unless the test has."""
    if one.master >= 0:
        one.close()
        one.master = -1


@pytest.fixture
def left(terminal: Open, tmp_path: Path) -> Iterator[Leave]:
    """Run `MAP` in a shell, let it leave, and return the terminal and the head."""
    heads = []

    def leave(*shell: str) -> tuple[EmulatedTerminal, psutil.Process]:
        view = terminal(*shell)
        view.until("ready>")
        before = view.modes()
        view.press(f"{MAP}\r")
        view.until(lambda: "2 running" in view.text and "d detach" in view.text)
        (head,) = psutil.Process(view.pid).children()
        heads.append(head)
        press_d(view)
        view.until(lambda: "ready>" in view.text.partition("at once, in the background")[2])
        continues = f"process {head.pid} continues the sweep, and writes to sweep/sweep.log"
        assert f"leaving this terminal: {continues}" in view.text
        until(lambda: output_of(head) == [Path("/dev/null"), *[tmp_path / "sweep/sweep.log"] * 2])
        view.until(lambda: view.modes() == before)
        return view, head

    yield leave
    for head in heads:
        if alive(head):
            head.kill()
            until(lambda: not alive(head))  # noqa: B023


def press_d(view: EmulatedTerminal) -> None:
    view.press("d")
    view.until("leave this terminal, and let the sweep continue? y/n")
    view.press("y")


def output_of(process: psutil.Process) -> list[Path]:
    return [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in (0, 1, 2)]


@pytest.mark.parametrize("shell", [BASH, ("sh", "-i")], ids=["bash", "sh"])
def test_sweep_continues_without_its_terminal(
    left: Leave, terminal: Open, tmp_path: Path, shell: tuple[str, ...]
) -> None:
    view, _ = left(*shell)
    view.press("echo and the shell wor''ks\r")
    view.until("and the shell works")
    attached = terminal(*CLI, "attach")
    attached.until("2 running")
    attached.until("q quit")
    attached.press("q")
    attached.until("sweep continues")
    assert attached.wait() == 130
    close(view)
    assert ending_of(tmp_path / "sweep") is None
    (tmp_path / "go").touch()
    ending = until(lambda: ending_of(tmp_path / "sweep"))
    assert (ending.exit_code, ending.killed) == (0, False)
    assert [entry.state for entry in read(tmp_path / "sweep").values()] == [State.COMPLETED] * 4
    log = (tmp_path / "sweep/sweep.log").read_text()
    assert "4 jobs: 4 completed" in log
    assert "\x1b" not in log


def test_sweep_that_left_is_a_job_of_the_shell(left: Leave, tmp_path: Path) -> None:
    view, head = left(*BASH)
    view.press("fg\r")
    until(lambda: os.tcgetpgrp(view.master) == head.pid)
    view.press("\x03")
    until(lambda: not alive(head))
    ending = until(lambda: ending_of(tmp_path / "sweep"))
    assert (ending.exit_code, ending.killed) == (130, False)


def test_killed_sweep_that_left_leaves_nothing_that_runs(left: Leave, tmp_path: Path) -> None:
    view, head = left(*BASH)
    below = head.children(recursive=True)
    assert len(below) >= 4
    close(view)
    head.kill()
    until(lambda: not any(map(alive, below)), "jobs are left")
    ending = until(lambda: ending_of(tmp_path / "sweep"))
    assert ending.killed


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("sh", "-c", f"{MAP}; exit 3"), "waits for the sweep"),
        (("sh", "-c", f"exec {MAP}"), "no shell would use it then"),
    ],
    ids=["script", "no shell"],
)
def test_sweep_stays_if_no_shell_would_take_the_terminal(terminal: Open, command: tuple[str, ...], why: str) -> None:
    view = terminal(*command)
    view.until(lambda: "2 running" in view.text and "d detach" in view.text)
    press_d(view)
    view.until("the sweep cannot leave this terminal: ")
    view.until("start it with --detach")
    assert why in view.text
    view.until("? help")
    view.press("\x03")
    view.until("to run the rest")
    view.wait()


def test_line_at_the_start_over_ssh_names_the_key_where_it_works(terminal: Open, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    over_ssh = "env -u TMUX -u STY SSH_TTY=/dev/pts/3"
    line = "the sweep ends when this connection does: to leave it running, "
    view = terminal(*BASH)
    view.until("ready>")
    view.press(f"{over_ssh} {MAP}\r")
    view.until(f"{line}press d, or start it with --detach, or in tmux")
    view.until("4 completed")
    view.press(f"rm -r sweep; {over_ssh} {MAP} | cat\r")
    view.until(f"{line}start it with --detach, or in tmux")


def test_sweep_in_a_pipeline_stays(terminal: Open) -> None:
    view = terminal(*BASH)
    view.until("ready>")
    view.press(f"{MAP} | cat\r")
    view.until(lambda: "2 running" in view.text and "d detach" in view.text)
    press_d(view)
    view.until("the sweep is part of a pipeline")
    view.press("\x03")
    view.until("to run the rest")


def test_program_stays_in_front_if_its_parent_does_not_take_the_terminal(terminal: Open, tmp_path: Path) -> None:
    program = tmp_path / "front.py"
    program.write_text(
        "import os, signal\n"
        "from gpu_launcher.processes.backgrounding import leave_terminal, obstacle\n"
        "signal.signal(signal.SIGTTOU, signal.SIG_IGN)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.setpgid(0, 0)\n"
        "    os.tcsetpgrp(2, os.getpid())\n"
        "    print('obstacle:', obstacle())\n"
        "    print('left:', leave_terminal(2, os.open('log', os.O_WRONLY | os.O_CREAT), seconds=0.5), flush=True)\n"
        "    os._exit(0)\n"
        "print('status:', os.waitpid(child, 0)[1])\n"
    )
    view = terminal(sys.executable, str(program))
    view.until("obstacle: None")
    view.until("left: False")
    view.until("status: 0")
    assert (tmp_path / "log").read_text() == ""


SHELL = """
import contextlib, os, shutil, signal, subprocess, sys, threading
from gpu_launcher.processes.backgrounding import leave_terminal

signal.signal(signal.SIGTTOU, signal.SIG_IGN)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(2, os.getpid())
    output = os.open("log", os.O_WRONLY | os.O_CREAT)
    {program}
    os._exit(0)
status = None
while status is None or os.WIFSTOPPED(status):
    status = os.waitpid(child, os.WUNTRACED)[1]
    os.tcsetpgrp(2, os.getpid())
print("the child has ended")
"""
"""A shell that runs a program in the foreground, and takes its terminal back when the program stops or ends."""


def test_ctrl_z_meanwhile_does_not_leave_the_program_stopped(terminal: Open, tmp_path: Path) -> None:
    program = """
    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            os.kill(os.getpid(), signal.SIGTSTP)

    subprocess.Popen = Popen
    print("left:", leave_terminal(2, output), flush=True)
    """
    (tmp_path / "shell.py").write_text(SHELL.format(program=program))
    terminal(sys.executable, str(tmp_path / "shell.py")).until("the child has ended", seconds=60)
    assert (tmp_path / "log").read_text() == "left: True\n"


def test_program_does_not_stop_without_a_helper_that_continues_it(terminal: Open, tmp_path: Path) -> None:
    program = """
    sys.executable = shutil.which("false")
    try:
        leave_terminal(2, output)
    except OSError as error:
        print("refused:", error, flush=True)
    """
    (tmp_path / "shell.py").write_text(SHELL.format(program=program))
    view = terminal(sys.executable, str(tmp_path / "shell.py"))
    view.until("the child has ended", seconds=60)
    assert "false does not run the helper that would continue the sweep" in view.text


def test_thread_that_reads_the_terminal_does_not_stop_the_program(terminal: Open, tmp_path: Path) -> None:
    program = """
    def read():
        with contextlib.suppress(OSError):
            sys.stdin.readline()

    reader = threading.Thread(target=read)
    reader.start()
    print("left:", leave_terminal(2, output), flush=True)
    reader.join()
    """
    (tmp_path / "shell.py").write_text(SHELL.format(program=program))
    terminal(sys.executable, str(tmp_path / "shell.py")).until("the child has ended", seconds=60)
    assert (tmp_path / "log").read_text() == "left: True\n"
