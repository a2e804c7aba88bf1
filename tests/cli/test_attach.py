"""`attach` and `wait`: maps that run, and views of them in terminals that come and go."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gpu_launcher.errors import SteeringError
from gpu_launcher.jobs.manifest import read
from gpu_launcher.jobs.steering import Sweep
from tests.cli.conftest import CLI, Cli, Terminal
from tests.waiting import alive, until

Open = Callable[..., Terminal]


class Map:
    """A map of four runs on two devices. Run 2 fails. Runs end when there is a file `go`."""

    def __init__(self, cli: Cli, directory: Path) -> None:
        self.directory = directory / "sweep"
        self.go = directory / "go"
        wait = f"while [ ! -e {self.go} ]; do sleep 0.02; done; test {{n}} != 2"
        options = ("--devices", "simulated:2", "--dir", str(self.directory), "--param", "n=0,1,2,3", "--shell")
        self.process = subprocess.Popen(
            [*CLI, "map", *options, "--", wait],
            env=cli.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: self.running == 2, "the map does not run")

    @property
    def running(self) -> int:
        try:
            return int(Sweep(self.directory).status()["running"])
        except SteeringError:
            return 0

    def end(self) -> int:
        self.go.touch()
        return self.process.wait(100)


@pytest.fixture
def a_map(cli: Cli, tmp_path: Path) -> Iterator[Map]:
    running = Map(cli, tmp_path)
    yield running
    running.process.kill()
    running.process.communicate()


def text_of(view: Terminal) -> str:
    """What a terminal shows, without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", view.text)


def see(view: Terminal, text: str) -> None:
    """Wait until a terminal shows a text."""
    view.read_until(lambda: text in text_of(view), 100)


def test_views_come_and_go_and_the_map_continues(a_map: Map, terminal: Open, cli: Cli) -> None:
    where = ("--dir", str(a_map.directory))
    one, other = terminal("attach", *where), terminal("attach", *where)
    for view in (one, other):
        see(view, "0/4 done")
        see(view, "n=1")
        assert "[gpu-launcher] 4 jobs on 2 simulated GPUs: 2 running, 2 waiting" in text_of(view)
    one.press("\x03")
    assert one.wait(100) == 130
    assert "sweep continues; `gpu-launcher attach` shows it again" in text_of(one)
    assert "unfinished" not in text_of(one)
    assert "cancelled before the start" in cli("cancel", "3", *where).stdout
    see(other, "job 3 cancelled by `gpu-launcher cancel`")
    again = terminal("attach", *where)
    see(again, "0/4 done")
    assert a_map.end() == 1
    for view in (other, again):
        assert view.wait(100) == 1
        assert "4 jobs: 2 completed, 1 failed, 1 not run in" in text_of(view)
        assert "table: gpu-launcher results" in text_of(view)


def test_keys_of_a_view_steer_the_map(a_map: Map, terminal: Open) -> None:
    view = terminal("attach", "--dir", str(a_map.directory))
    see(view, "q quit")
    view.press("p")
    until(lambda: Sweep(a_map.directory).status()["paused"], "key p does not pause it")
    see(view, "no job is started from now on, because of `gpu-launcher pause`")
    view.press("q")
    assert view.wait(100) == 130
    assert "sweep continues; `gpu-launcher attach` shows it again" in text_of(view)
    Sweep(a_map.directory).resume()
    assert a_map.end() == 1


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGSTOP])
def test_signals_to_a_view_do_not_reach_the_map(a_map: Map, terminal: Open, signum: signal.Signals) -> None:
    view = terminal("attach", "--dir", str(a_map.directory))
    before = view.initial_attributes
    see(view, "0/4 done")
    os.kill(view.pid, signum)
    if signum in (signal.SIGTERM, signal.SIGHUP):
        assert view.wait(100) == 128 + signum
        assert view.attributes() == before
        assert "sweep continues" in text_of(view)
    elif signum is signal.SIGKILL:
        assert view.wait(100) == -signum
    assert a_map.running == 2
    assert a_map.end() == 1
    if signum is signal.SIGSTOP:
        os.kill(view.pid, signal.SIGCONT)
        assert view.wait(100) == 1
        assert "4 jobs: 3 completed, 1 failed in" in text_of(view)


def test_view_ends_when_its_terminal_does(a_map: Map, terminal: Open) -> None:
    view = terminal("attach", "--dir", str(a_map.directory))
    see(view, "0/4 done")
    os.close(view.master)
    view.master = os.open(os.devnull, os.O_RDONLY)
    until(lambda: not alive(view.pid), "the view does not end")
    assert a_map.running == 2


def test_view_without_a_terminal_prints_lines(a_map: Map, cli: Cli) -> None:
    view = subprocess.Popen(
        [*CLI, "attach", "--dir", str(a_map.directory)],
        env=cli.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert view.stdout is not None
    assert view.stdout.readline() == "[gpu-launcher] 4 jobs on 2 simulated GPUs: 2 running, 2 waiting\n"
    assert a_map.end() == 1
    out, err = view.communicate(timeout=100)
    assert view.returncode == 1
    assert err == ""
    assert "[gpu-launcher] job 2 (n=2) FAILED after" in out
    assert out.splitlines()[-1].strip().startswith("table: gpu-launcher results")


def test_view_of_a_map_that_is_killed_says_so(a_map: Map, terminal: Open, cli: Cli) -> None:
    where = ("--dir", str(a_map.directory))
    view = terminal("attach", *where)
    see(view, "0/4 done")
    until(lambda: len(read(a_map.directory)) == 3, "no third run is prepared")
    pid = a_map.process.pid
    a_map.process.kill()
    a_map.process.wait()
    assert view.wait(100) == 1
    killed = f"sweep has ended: process {pid} (gpu-launcher map) was killed, or crashed. 3 jobs (3 lost)"
    text = " ".join(text_of(view).split())
    assert killed in text
    assert "; to run the rest: " in text
    done = cli("wait", *where)
    assert (done.returncode, done.stderr) == (1, "")
    assert killed in done.stdout
    assert "--resume" in done.stdout


def test_waiting_returns_the_exit_code_of_the_map(a_map: Map, cli: Cli) -> None:
    waiting = subprocess.Popen([*CLI, "wait", "--dir", str(a_map.directory)], env=cli.environ, stdout=subprocess.PIPE)
    assert a_map.end() == 1
    out, _ = waiting.communicate(timeout=100)
    assert waiting.returncode == 1
    assert b"sweep has ended with exit code 1. 4 jobs (3 completed, 1 failed); to run the rest: " in out
    done = cli("wait", "--dir", str(a_map.directory))
    assert (done.returncode, done.stdout.encode()) == (1, out), "it has ended"


def test_waiting_for_a_map_that_is_stopped_and_resumed(a_map: Map, cli: Cli) -> None:
    where = ("--dir", str(a_map.directory))
    Sweep(a_map.directory).stop(now=True)
    assert a_map.process.wait(100) == 130
    assert cli("wait", *where).returncode == 130
    a_map.go.touch()
    assert cli("map", "--resume", str(a_map.directory)).returncode == 1
    assert cli("wait", *where).returncode == 1


def test_sweep_that_cannot_be_shown(a_map: Map, cli: Cli, tmp_path: Path) -> None:
    assert a_map.end() == 1
    for command, directory, said in (
        ("attach", a_map.directory, "has ended; to run the rest: "),
        ("attach", tmp_path, "is not the directory of a sweep"),
        ("wait", tmp_path / "missing", "does not exist"),
    ):
        done = cli(command, "--dir", str(directory))
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


DETACHED = re.compile(r"detached: process (\d+) continues the sweep, and writes to \S*sweep/sweep\.log\n")


def pid_of(terminal: Terminal) -> int:
    (pid,) = DETACHED.findall(text_of(terminal))
    return int(pid)


def a_long_map(directory: Path) -> list[str]:
    wait = f"while [ ! -e {directory}/go ]; do sleep 0.02; done; echo {{n}}"
    return [
        "map",
        "--devices",
        "simulated:2",
        "--dir",
        str(directory / "sweep"),
        "--param",
        "n=0,1",
        "--shell",
        "--",
        wait,
    ]


def test_detached_map_continues_when_its_terminal_is_closed(terminal: Open, cli: Cli, tmp_path: Path) -> None:
    _, *arguments = a_long_map(tmp_path)
    shell = terminal(
        "-c", f'{shlex.join(CLI)} map --detach "$@"; echo code $?; sleep 600', "sh", *arguments, within=("sh",)
    )
    see(shell, "code 0")
    assert "2 jobs on 2 simulated GPUs" in text_of(shell)
    head = psutil.Process(pid_of(shell))
    assert head.terminal() is None
    until(lambda: Sweep(tmp_path / "sweep").status()["running"] == 2, "no jobs run")
    below = head.children(recursive=True)
    for process in below:
        with suppress(psutil.NoSuchProcess):  # it was short
            assert process.terminal() is None
    os.close(shell.master)
    shell.master = os.open(os.devnull, os.O_RDONLY)
    until(lambda: not alive(shell.pid), "the shell does not end")
    assert alive(head)
    assert Sweep(tmp_path / "sweep").status()["running"] == 2
    view = terminal("attach", "--dir", str(tmp_path / "sweep"))
    see(view, "0/2 done")
    (tmp_path / "go").touch()
    assert view.wait(100) == 0
    assert "2 jobs: 2 completed" in text_of(view)
    assert cli("wait", "--dir", str(tmp_path / "sweep")).returncode == 0
    log = (tmp_path / "sweep/sweep.log").read_text()
    assert "2 jobs: 2 completed" in log
    assert log.endswith("sweep/results.jsonl\n")


def test_detached_map_reads_its_parameters_from_a_pipe(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    arguments = a_long_map(tmp_path)
    arguments[arguments.index("--param") : arguments.index("--shell")] = ["--detach", "--from", "-"]
    producer = subprocess.Popen(
        [*CLI, *arguments], env=cli.environ, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert producer.stdin is not None
    producer.stdin.write(b'{"n": 0}\n')
    producer.stdin.flush()
    assert producer.wait(100) == 0
    producer.stdin.write(b'{"n": 1}\n')
    producer.communicate()
    done = cli("wait", "--dir", str(tmp_path / "sweep"))
    assert done.returncode == 0
    assert "2 jobs (2 completed)" in done.stdout


def test_map_whose_parameters_are_typed_is_not_detached(terminal: Open, tmp_path: Path) -> None:
    view = terminal("map", "--detach", "--from", "-", "--dir", str(tmp_path / "sweep"), "--", "true", "{n}")
    assert view.wait(100) == 2
    assert "--detach: the parameters are typed on the terminal" in text_of(view)
    assert not (tmp_path / "sweep").exists()


def test_detach_is_not_stored_for_a_later_launch(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "go").touch()
    command, *arguments = a_long_map(tmp_path)
    done = cli(command, "--detach", *arguments)
    assert done.returncode == 0
    assert DETACHED.search(done.stderr)
    assert cli("wait", "--dir", str(tmp_path / "sweep")).returncode == 0
    resumed = cli("map", "--resume", str(tmp_path / "sweep"))
    assert resumed.returncode == 0
    assert "detached" not in resumed.stderr


@pytest.mark.parametrize(
    ("environ", "warned"),
    [
        ({}, False),
        ({"SSH_CONNECTION": "10.0.0.1 4711 10.0.0.2 22"}, True),
        ({"SSH_TTY": "/dev/pts/3"}, True),
        ({"SSH_TTY": "/dev/pts/3", "TMUX": "/tmp/tmux-0/default,1,0"}, False),
        ({"SSH_TTY": "/dev/pts/3", "STY": "1.pts"}, False),
        ({"SSH_TTY": "/dev/pts/3", "TERM": "dumb"}, False),
    ],
)
def test_map_over_ssh_says_that_it_ends_with_the_connection(
    terminal: Open, tmp_path: Path, environ: dict[str, str], warned: bool
) -> None:
    (tmp_path / "go").touch()
    nothing = dict.fromkeys(("SSH_CONNECTION", "SSH_TTY", "TMUX", "STY", "CI"), "")
    view = terminal(*a_long_map(tmp_path), **{**nothing, **environ})
    assert view.wait(100) == 0
    line = "the sweep ends when this connection does: to leave it running, start it with --detach, or in tmux"
    assert (line in text_of(view)) == warned
