"""Sweeps that leave the terminal of their shell while they run, with key d of the live view."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gpu_launcher.jobs.directory import holder_of
from gpu_launcher.jobs.ending import ending_of
from gpu_launcher.jobs.manifest import State, read
from tests.cli.conftest import CLI, environment
from tests.emulated_terminal import EmulatedTerminal
from tests.ssh_server import NEEDS_SSH, Ssh, ssh_server
from tests.waiting import alive, until

pytestmark = pytest.mark.thorough

BASH = ("bash", "--norc", "--noprofile", "-i")
MAP = " ".join([*CLI, "map --devices simulated:2 --dir sweep --param n=0,1,2,3 -- sh job.sh {n}"])
"""A map of four jobs on two devices. They end when there is a file `go`."""
JOB = "while [ ! -e go ]; do sleep 0.05; done; echo end of $1"
Open = Callable[..., EmulatedTerminal]
Leave = Callable[..., tuple[EmulatedTerminal, psutil.Process]]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Open]:
    """Run a command in a terminal, in a directory in which `MAP` can be run."""
    (tmp_path / "job.sh").write_text(JOB)
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


def test_sweep_that_left_is_waited_for_and_its_jobs_are_cancelled(left: Leave, terminal: Open, tmp_path: Path) -> None:
    view, _ = left(*BASH)
    close(view)
    waiting = terminal(*CLI, "wait")
    cancelling = terminal(*CLI, "cancel", "0", "3")
    cancelling.until("job 0 cancelled: SIGTERM now, SIGKILL after 10.0 s; job 3 cancelled before the start")
    assert cancelling.wait() == 0
    (tmp_path / "go").touch()
    assert waiting.wait() == 1
    assert "sweep has ended with exit code 1. 4 jobs (2 completed, 2 cancelled)" in waiting.text
    assert [entry.state.value for entry in read(tmp_path / "sweep").values()] == [
        "cancelled",
        "completed",
        "completed",
        "cancelled",
    ]


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_sweep_in_tmux_leaves_and_survives_its_session(terminal: Open, tmp_path: Path) -> None:
    variables = {**environment(), "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "PS1": "ready> "}
    variables = {**variables, "SSH_TTY": "/dev/pts/3", "LC_ALL": "C.UTF-8", "CI": ""}
    (tmp_path / "job.sh").write_text(JOB)

    def tmux(*words: str) -> str:
        command = ["tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null", *words]
        return subprocess.run(
            command, cwd=tmp_path, env=variables, check=True, timeout=100, capture_output=True, text=True
        ).stdout

    def shows(*texts: str) -> bool:
        screen = tmux("capture-pane", "-p", "-t", "0")
        return all(text in screen for text in texts)

    tmux("new-session", "-d", "-x", "200", "-y", "40", *BASH)
    try:
        until(lambda: shows("ready>"), "no shell")
        tmux("send-keys", MAP, "Enter")
        until(lambda: shows("2 running", "d detach"), "the map does not run")
        assert not shows("the sweep ends when this connection does"), "tmux keeps it"
        head = holder_of(tmp_path / "sweep")
        assert head is not None
        tmux("send-keys", "d")
        until(lambda: shows("leave this terminal, and let the sweep continue? y/n"))
        tmux("send-keys", "y")
        until(lambda: shows("at once, in the background"), "it does not leave")
        until(lambda: output_of(psutil.Process(head.pid))[2] == tmp_path / "sweep/sweep.log")
    finally:
        tmux("kill-server")
    ends_well(tmp_path)


def ends_well(directory: Path) -> None:
    """Let a sweep that has left its terminal come to its end."""
    assert ending_of(directory / "sweep") is None
    (directory / "go").touch()
    ending = until(lambda: ending_of(directory / "sweep"))
    assert (ending.exit_code, ending.killed) == (0, False)
    assert [entry.state for entry in read(directory / "sweep").values()] == [State.COMPLETED] * 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    """An sshd that lets this user in."""
    with ssh_server(tmp_path_factory) as ssh:
        yield ssh


@NEEDS_SSH
@pytest.mark.parametrize("leaves", [False, True], ids=["stays", "leaves"])
def test_sweep_over_ssh_whose_client_is_killed(server: Ssh, tmp_path: Path, leaves: bool) -> None:
    (tmp_path / "job.sh").write_text(JOB)
    path = server.environment(tmp_path)["PATH"]
    own = {"PYTHONPATH": environment()["PYTHONPATH"], "GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool")}
    own |= {"PS1": "ready> ", "LC_ALL": "C.UTF-8"}
    words = shlex.join(["env", *(f"{name}={value}" for name, value in own.items()), *BASH])
    client = ("ssh", "-t", "node1", f"cd {shlex.quote(str(tmp_path))} && exec {words}")
    view = EmulatedTerminal(client, {**environment(), "PATH": path, "TERM": "xterm-256color"}, tmp_path, (240, 30))
    try:
        view.until("ready>")
        view.press(f"{MAP}\r")
        view.until(lambda: "2 running" in view.text and "d detach" in view.text)
        assert "to leave it running, press d, or start it with --detach, or in tmux" in view.text
        head = holder_of(tmp_path / "sweep")
        assert head is not None
        if leaves:
            press_d(view)
            view.until(lambda: "ready>" in view.text.partition("at once, in the background")[2])
            until(lambda: output_of(psutil.Process(head.pid))[2] == tmp_path / "sweep/sweep.log")
        os.kill(view.pid, signal.SIGKILL)
        view.wait()
    finally:
        close(view)
    if leaves:
        ends_well(tmp_path)
    else:
        ending = until(lambda: ending_of(tmp_path / "sweep"))
        assert (ending.exit_code, ending.killed) == (128 + signal.SIGHUP, False)
        until(lambda: not alive(head.pid))


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
