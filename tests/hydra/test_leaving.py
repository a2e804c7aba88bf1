"""Sweeps of each kind that are watched, waited for and left alone."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher.errors import SteeringError
from gpu_launcher.jobs.directory import DirectoryLock
from gpu_launcher.jobs.ending import ending_of
from gpu_launcher.jobs.manifest import State, read
from gpu_launcher.jobs.steering import Sweep
from tests.emulated_terminal import EmulatedTerminal
from tests.hydra.conftest import PROGRAMS, environment
from tests.waiting import alive, until
from tests.warm import TextProgram

Start = Callable[..., TextProgram]

CLI = (sys.executable, "-m", "gpu_launcher.cli")
POOL = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2", "hydra.sweep.dir=sweep")
SEARCH = ("hydra/sweeper=optuna_async", "x=interval(0.0,1.0)", "hydra.sweeper.n_trials=3")
GRID_ASYNC = ("hydra/sweeper=grid_async", "x=0,1,2")
GRID = ("x=0,1,2",)
KINDS = {"grid": GRID, "batches": (*GRID, "hydra.sweeper.max_batch_size=2"), "async": GRID_ASYNC, "search": SEARCH}


@pytest.fixture
def sweeping(start: Start, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start a sweep, and wait until two jobs run."""
    processes = []

    def sweep(*arguments: str) -> subprocess.Popen[str]:
        process = start(tmp_path, "steered.py", "-m", *POOL, *arguments)
        processes.append(process)
        until(lambda: running(tmp_path) == 2 or process.poll() is not None, "the sweep does not run")
        assert process.poll() is None, process.communicate()
        return process

    yield sweep
    for process in processes:
        process.kill()
        process.communicate()


def running(directory: Path) -> int:
    return sum(entry.state is State.RUNNING for entry in read(directory / "sweep").values())


def command(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, *arguments],
        cwd=directory,
        env=environment(directory),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("kind", [pytest.param("grid", marks=pytest.mark.smoke), *list(KINDS)[1:]])
def test_sweep_of_each_kind_is_watched_to_its_end(sweeping: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    process = sweeping(*KINDS[kind])
    view, waiting = command(tmp_path, "attach"), command(tmp_path, "wait")
    assert view.stdout is not None
    assert ": 2 running" in view.stdout.readline()
    assert ending_of(tmp_path / "sweep") is None
    (tmp_path / "go").touch()
    assert process.wait(100) == 0
    seen, _ = view.communicate(timeout=100)
    said, _ = waiting.communicate(timeout=100)
    assert (view.returncode, waiting.returncode) == (0, 0)
    assert "3 completed" in said
    if kind == "batches":  # the second may end before it can be watched
        assert seen.count(" done)") >= 2
    else:
        assert seen.count(" done)") == 3
    assert "table: gpu-launcher results sweep" in seen


@pytest.mark.parametrize("kind", KINDS)
def test_exit_code_of_a_stopped_sweep_is_known(sweeping: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    process = sweeping(*KINDS[kind])
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 128 + signal.SIGTERM
    ending = ending_of(tmp_path / "sweep")
    assert ending is not None
    assert (ending.exit_code, ending.killed) == (128 + signal.SIGTERM, False)


@pytest.mark.parametrize("kind", ["grid", "async", "search"])
def test_exit_code_of_a_failed_sweep_is_known(start: Start, tmp_path: Path, kind: str) -> None:
    process = start(tmp_path, "steered.py", "-m", *POOL, *KINDS[kind], "hydra.launcher.timeout=0.2")
    process.communicate(timeout=100)
    ending = ending_of(tmp_path / "sweep")
    assert ending is not None
    assert ending.exit_code == process.returncode == 1


@pytest.mark.parametrize("kind", KINDS)
def test_exit_code_of_a_sweep_with_cancelled_jobs_is_known(
    sweeping: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    process = sweeping(*KINDS[kind])
    number = next(number for number, entry in read(tmp_path / "sweep").items() if entry.state is State.RUNNING)
    Sweep(tmp_path / "sweep").cancel(number)
    until(lambda: read(tmp_path / "sweep")[number].ended is not None, "the job does not end")
    (tmp_path / "go").touch()
    process.communicate(timeout=100)
    ending = ending_of(tmp_path / "sweep")
    assert ending is not None
    assert ending.exit_code == process.returncode == (0 if kind == "search" else 1)


def test_killed_sweep_has_ended_with_an_exit_code(sweeping: Callable[..., Any], tmp_path: Path) -> None:
    process = sweeping(*GRID)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    ending = ending_of(tmp_path / "sweep")
    assert ending is not None
    assert (ending.exit_code, ending.killed) == (1, True)
    assert f"process {process.pid} (steered.py) was killed" in ending.text
    assert "hydra.launcher.resume=true" in ending.text


# Detached sweeps


@pytest.fixture
def detached(start: Start, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start a sweep that leaves its terminal, and return what it printed and its process, unless that has ended."""
    heads = []

    def detach(*arguments: str, **environ: str) -> tuple[str, psutil.Process | None]:
        process = start(tmp_path, "steered.py", "-m", *POOL, "hydra.launcher.detach=true", *arguments, **environ)
        out, err = process.communicate(timeout=100)  # no process keeps its streams open
        assert (process.returncode, out) == (0, ""), err
        (pid,) = re.findall(r"detached: process (\d+) continues the sweep, and writes to sweep/sweep.log$", err, re.M)
        try:
            heads.append(psutil.Process(int(pid)))
        except psutil.NoSuchProcess:  # its sweep was short
            return err, None
        return err, heads[-1]

    yield detach
    for head in heads:
        if alive(head):
            head.kill()
            until(lambda: not alive(head))  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
def test_detached_sweep_of_each_kind_continues_to_its_end(
    detached: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    err, head = detached(*KINDS[kind])
    assert "to show it: gpu-launcher attach --dir sweep; to stop it: gpu-launcher stop --dir sweep\n" in err
    assert "on 2 simulated GPUs" in err, "the first lines are shown"
    until(lambda: running(tmp_path) == 2, "no jobs run")
    assert os.getsid(head.pid) == head.pid
    assert {Path(f"/proc/{head.pid}/fd/{number}").readlink() for number in (1, 2)} == {tmp_path / "sweep/sweep.log"}
    head.send_signal(signal.SIGHUP)
    view = command(tmp_path, "attach")
    assert view.stdout is not None
    assert ": 2 running" in view.stdout.readline()
    (tmp_path / "go").touch()
    seen, _ = view.communicate(timeout=100)
    assert view.returncode == 0
    assert "3 completed" in seen or kind == "batches"
    ending = ending_of(tmp_path / "sweep")
    assert ending is not None
    assert (ending.exit_code, ending.killed) == (0, False)
    assert "table: gpu-launcher results sweep" in (tmp_path / "sweep/sweep.log").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_sweep_of_each_kind_leaves_its_terminal_with_a_key(tmp_path: Path, kind: str) -> None:
    variables = {**environment(tmp_path), "PS1": "ready> "}
    view = EmulatedTerminal(("bash", "--norc", "--noprofile", "-i"), variables, tmp_path, (240, 30))
    view.until("ready>")
    view.press(shlex.join([sys.executable, str(PROGRAMS / "steered.py"), "-m", *POOL, *KINDS[kind]]) + "\r")
    view.until(lambda: "2 running" in view.text and "d detach" in view.text)
    (head,) = psutil.Process(view.pid).children()
    try:
        view.press("d")
        view.until("leave this terminal, and let the sweep continue? y/n")
        view.press("y")
        view.until(lambda: "ready>" in view.text.partition("at once, in the background")[2])
        until(lambda: Path(f"/proc/{head.pid}/fd/2").readlink() == tmp_path / "sweep/sweep.log")
        view.close()
        head.send_signal(signal.SIGHUP)
        (tmp_path / "go").touch()
        ending = until(lambda: ending_of(tmp_path / "sweep"))
        assert (ending.exit_code, ending.killed) == (0, False)
        assert [entry.state for entry in read(tmp_path / "sweep").values()] == [State.COMPLETED] * 3
        assert "table: gpu-launcher results sweep" in (tmp_path / "sweep/sweep.log").read_text()
    finally:
        if alive(head):
            head.kill()
            until(lambda: not alive(head))


def test_detached_sweep_is_stopped(detached: Callable[..., Any], tmp_path: Path) -> None:
    _, head = detached(*GRID)
    until(lambda: running(tmp_path) == 2, "no jobs run")
    Sweep(tmp_path / "sweep").stop(now=True)
    waiting = command(tmp_path, "wait")
    out, _ = waiting.communicate(timeout=100)
    assert waiting.returncode == 130
    assert "sweep has ended with exit code 130." in out
    until(lambda: not alive(head), "the program does not end")
    assert "(stopped by `gpu-launcher stop --now`: 0 of 3 finished)" in (tmp_path / "sweep/sweep.log").read_text()


def test_killed_detached_sweep_leaves_nothing_that_runs(detached: Callable[..., Any], tmp_path: Path) -> None:
    _, head = detached(*GRID)
    until(lambda: running(tmp_path) == 2, "no jobs run")
    below = head.children(recursive=True)
    assert len(below) >= 4
    head.kill()
    until(lambda: not any(map(alive, below)), "jobs are left")
    waiting = command(tmp_path, "wait")
    out, _ = waiting.communicate(timeout=100)
    assert waiting.returncode == 1
    assert f"process {head.pid} (steered.py) was killed, or crashed" in out
    (tmp_path / "go").touch()
    detached(*GRID, "hydra.launcher.resume=true")
    waiting = command(tmp_path, "wait")
    out, _ = waiting.communicate(timeout=100)
    assert (waiting.returncode, "3 completed" in out) == (0, True), "the devices are free"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("hydra.launcher.gpus=[0,1]",), "hydra.launcher.gpus: [0,1] names GPUs"),
        (("hydra.launcher.devices=[7,x]",), "hydra.launcher.devices"),
        (("hydra.launcher.resume=true",), None),
    ],
)
def test_errors_before_the_jobs_are_shown_as_without_detach(
    start: Start, tmp_path: Path, arguments: tuple[str, ...], said: str | None
) -> None:
    if said is None:  # a directory that another sweep has
        said = "is being run by process"
        (tmp_path / "sweep").mkdir()
        lock = DirectoryLock.take(tmp_path / "sweep", "other.py", "")
    process = start(tmp_path, "steered.py", "-m", *POOL, *GRID, "hydra.launcher.detach=true", *arguments)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert "detached" not in err
    if said == "is being run by process":
        assert not (tmp_path / "sweep/sweep.log").exists()
        lock.close()


def test_sweep_that_begins_and_ends_at_once_is_detached(start: Start, tmp_path: Path) -> None:
    program = tmp_path / "quick.py"
    program.write_text(
        "import os\n"
        "from pathlib import Path\n"
        "from gpu_launcher.processes.detaching import continue_detached\n"
        "output = Path('sweep.log')\n"
        "detachment = continue_detached(output, lambda pid: 'last line\\n')\n"
        "detachment.redirect(output)\n"
        "os.write(2, b'first line\\n')\n"
        "detachment.begun()\n"
        "os._exit(3)\n"
    )
    process = start(tmp_path, str(program))
    assert process.communicate(timeout=100) == ("", "first line\nlast line\n")
    assert process.returncode == 0, "it is the exit code of `gpu-launcher wait`"


def test_program_with_threads_is_not_detached(start: Start, tmp_path: Path) -> None:
    program = tmp_path / "threaded.py"
    text = (PROGRAMS / "steered.py").read_text()
    thread = (
        "import threading\n    threading.Thread(target=time.sleep, args=(600,), name='clock', daemon=True).start()\n"
    )
    program.write_text(text.replace('__main__":\n', f'__main__":\n    {thread}'))
    process = start(tmp_path, str(program), "-m", *POOL, *GRID, "hydra.launcher.detach=true")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    problem = "1 other thread(s) run in this program (clock), so it cannot continue in another process"
    assert err == f"hydra.launcher.detach: {problem}: use nohup or tmux instead\n"


def test_ctrl_c_before_the_sweep_has_begun_ends_it(start: Start, tmp_path: Path) -> None:
    nodes = "hydra.launcher.nodes=\"command:sh -c 'echo > begun; exec sleep 600'\""
    process = start(tmp_path, "steered.py", "-m", *POOL, *GRID, "hydra.launcher.detach=true", nodes)
    until(lambda: (tmp_path / "begun").exists() or process.poll() is not None, "the node is not started")
    below: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    if process.poll() is None:  # it may have begun, because it can wait for its nodes
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    if process.returncode == 0:
        with suppress(SteeringError):  # the signal may have reached it when it had begun
            Sweep(tmp_path / "sweep").stop(now=True)
    else:
        assert process.returncode == 130, err
    until(lambda: not any(map(alive, below)), "processes are left")
