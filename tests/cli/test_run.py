"""Tests `gpu-launcher run` with real commands, signals and kills. The processes of a test share one pool."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from gpu_launcher.devices import simulated_devices
from gpu_launcher.leases import FileLedger
from gpu_launcher.model import Owner, Request
from gpu_launcher.processes.command_witness import RECENT_SECONDS
from gpu_launcher.users import user_name
from tests.waiting import alive, until

if TYPE_CHECKING:
    from conftest import Cli, Lab, Terminal  # type: ignore[import-not-found]

PYTHON = sys.executable
CLI = (PYTHON, "-m", "gpu_launcher.cli")
ONE = ("run", "--devices", "simulated:1")
NOTICE = (
    "gpu-launcher: 1 device is simulated: no real GPU is reserved, so jobs must not use the GPUs that "
    "CUDA_VISIBLE_DEVICES names\n"
)

RECORDER = """
import os, signal, sys, time
def note(signum, frame):
    os.write(1, f"{signal.Signals(signum).name}\\n".encode())  # print must not interrupt print
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
               signal.SIGALRM, signal.SIGWINCH):
    signal.signal(signum, note)
print("ready", flush=True)
while True:
    time.sleep(0.01)
    if os.path.exists(sys.argv[1]):
        break
"""
"""A program that prints the name of each signal it gets, until a file exists."""

FAMILY = """
import os, subprocess, sys, time
def forked():
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(600)
    os.wait()
forked()
sleepers = [subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sleep", "600"], start_new_session=True)]
deaf = "trap '' TERM INT HUP; sleep 600 & echo deaf; wait; sleep 600"
stubborn = subprocess.Popen(["sh", "-c", deaf], start_new_session=True, stdout=subprocess.PIPE)
stubborn.stdout.readline()
print("ready", flush=True)
while len(sys.argv) == 1 or not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
"""
"""A program that starts processes of all kinds: forked, executed, in other sessions, ignoring signals.

It ends when a file exists, if it is given one.
"""


@dataclass
class Run:
    """`gpu-launcher run` in its own process group, as a shell would start it."""

    process: subprocess.Popen[str]

    @property
    def parts(self) -> dict[str, psutil.Process]:
        """The processes of the run. Valid once the command runs."""
        front = psutil.Process(self.process.pid)
        parts = {"front": front}
        for child in front.children():
            parts["supervisor" if os.getsid(child.pid) == child.pid else "witness"] = child
        (parts["command"],) = (
            child for child in parts["supervisor"].children() if os.getpgid(child.pid) == os.getpgid(front.pid)
        )
        return parts

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def complaint(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline().rstrip("\n")

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def wait(self, seconds: float = 100) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def start(cli: Cli) -> Iterator[Callable[..., Run]]:
    """Start `gpu-launcher`, or the program `within`, with these arguments. stderr is a pipe of its own."""
    runs = []

    def start(*arguments: str, within: tuple[str, ...] = CLI) -> Run:
        process = subprocess.Popen(
            [*within, *arguments],
            env=cli.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        runs.append(process)
        return Run(process)

    yield start
    for process in runs:
        left = [process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            left += [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def tickets(cli: Cli) -> list[str]:
    return sorted(path.name for path in (cli.pool / "queue").glob("ticket-*"))


def held(cli: Cli) -> bool:
    with FileLedger(cli.pool) as ledger:
        return bool(ledger.snapshot().leases)


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-c", code, *arguments)


def test_the_help_and_the_document_name_every_option_and_exit_code(cli: Cli) -> None:
    text = "\n".join(cli.lines("run", "--help"))
    document = (Path(__file__).parents[2] / "docs" / "run.md").read_text()
    assert re.search(r"Usage: gpu-launcher run \[OPTIONS\] \{?COMMAND", text)
    assert text.partition("Examples:")[2].count("    gpu-launcher run ") >= 5
    options = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    assert len(options) >= 9
    assert [option for option in options if f"`{option}`" not in document] == []
    table = set(re.findall(r"^\| (\d+) \|", document, re.MULTILINE))
    assert table - {"137"} == set(re.findall(r"\b\d+\b", text.partition("Exit codes:")[2].partition("Examples:")[0]))


# Devices, environment and exit codes


@pytest.mark.smoke
def test_the_command_has_its_devices_and_nothing_else_is_changed(cli: Cli) -> None:
    code = (
        "import os, signal, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'], "
        "os.environ['GPU_LAUNCHER_MEMORY_FRACTION'], sys.stdin.read(), sys.argv[1:], "
        "signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    )
    done = subprocess.run(
        [*CLI, "run", "--devices", "simulated:2", "--gpus", "2", "--", *python(code, "--gpus", "7", "--", "a b", "")],
        env=cli.environ,
        input="typed",
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.stdout == "0,1 PCI_BUS_ID 1 typed ['--gpus', '7', '--', 'a b', ''] set()\n"
    assert done.returncode == 0
    assert not held(cli)


def test_options_behind_the_command_are_its_own_also_without_the_two_dashes(cli: Cli) -> None:
    assert cli(*ONE, "echo", "--gpus", "2", "--help").stdout == "--gpus 2 --help\n"


def test_the_command_ignores_what_a_command_ignores_that_the_shell_starts(cli: Cli) -> None:
    shell = f"grep SigIgn /proc/self/status; {shlex.join([*CLI, *ONE])} grep SigIgn /proc/self/status"
    done = subprocess.run(["bash", "-c", shell], env=cli.environ, capture_output=True, text=True, check=True)
    before, inside = done.stdout.splitlines()
    assert before == inside


@pytest.mark.parametrize("code", [0, 1, 75, 255])
@pytest.mark.smoke
def test_the_exit_code_is_the_commands(cli: Cli, code: int) -> None:
    assert cli(*ONE, "sh", "-c", f"exit {code}").returncode == code


@pytest.mark.parametrize("name", ["TERM", "KILL", "SEGV", "USR1", "INT"])
def test_it_dies_of_the_signal_that_the_command_died_of(cli: Cli, name: str) -> None:
    done = cli(*ONE, "sh", "-c", f"kill -{name} $$")
    assert (done.returncode, done.stderr) == (-getattr(signal, f"SIG{name}"), NOTICE)
    assert not held(cli)


def test_status_shows_whose_the_lease_is(cli: Cli, start: Callable[..., Run]) -> None:
    run = start(*ONE, "--timeout", "1h", "--", "sh", "-c", "echo ready; sleep 600 # a b")
    assert run.line() == "ready"
    (lease,) = cli.json("status")["leases"]
    assert lease["command"] == "sh -c 'echo ready; sleep 600 # a b'"
    assert lease["pid"] == run.process.pid
    assert 3300 < lease["seconds_left"] < 3620


def test_without_a_gpu_it_takes_a_cpu_slot_and_says_so_in_one_line(cli: Cli) -> None:
    done = cli("run", "sh", "-c", "echo [$CUDA_VISIBLE_DEVICES]")
    assert done.stdout == "[]\n"
    assert re.fullmatch(r"gpu-launcher: no NVIDIA driver .*; using \d+ CPU slots? instead .*\n", done.stderr)


def test_a_command_that_needs_no_device_waits_for_none_and_sees_none(cli: Cli) -> None:
    done = cli("run", "--gpus", "0", "sh", "-c", "echo [$CUDA_VISIBLE_DEVICES]")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_it_gets_the_gpu_that_nobody_uses(lab: Lab) -> None:
    lab.cli.started[-1].communicate()  # the program that waits for all four
    done = lab.cli("run", "--wait", "200", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr


def test_it_says_who_uses_a_gpu_without_asking_the_pool(lab: Lab, start: Callable[..., Run]) -> None:
    run = start("run", "--devices", "2", "--wait", "200", "true")
    reason = f"GPU 2 is used by jupyter 600 (pid {lab.stranger}"
    assert run.process.stderr is not None
    assert any(f"gpu-launcher: waiting for 1 GPU: {reason}" in line for line in run.process.stderr)
    run.send(signal.SIGTERM)
    assert run.wait() == -signal.SIGTERM
    lab.cli.started[-1].communicate()
    assert lab.cli("run", "--devices", "2", "--busy-memory", "null", "--wait", "200", "true").returncode == 0


# Invalid commands and requests


def test_what_is_no_program_is_said_before_anything_is_waited_for(cli: Cli, tmp_path: Path) -> None:
    cli.hold(["simulated:1", 1, None, 0, "train.py"])
    plain = tmp_path / "train.py"
    plain.write_text("print()")
    for name, code, problem in (
        ("no-such-program", 127, "no such program is found in $PATH"),
        (str(tmp_path / "missing.py"), 127, "there is no such file"),
        (str(plain), 126, f"cannot be executed: it needs the permission (chmod +x {plain})"),
        (str(tmp_path), 126, "is a directory"),
        ("", 127, "has no name"),
    ):
        done = cli(*ONE, name)
        assert (done.returncode, done.stdout) == (code, "")
        assert done.stderr.startswith(f"gpu-launcher: {name or repr('')}: ")
        assert problem in done.stderr


def test_what_turns_out_to_be_no_program_frees_its_devices(cli: Cli, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    done = cli(*ONE, str(script))
    assert done.returncode == 126
    assert "the interpreter that its first line names is not there" in done.stderr
    script.write_text("echo\n")
    done = cli(*ONE, str(script))
    assert done.returncode == 126
    assert "name its interpreter before it" in done.stderr
    assert not held(cli)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--gpus", "2"), "gpus: the request is for 2 devices, but the pool has 1"),
        (("--memory", "1TiB"), "memory: the request is for 1024 GiB of memory, but the largest device has 80 GiB"),
        (("--gpus", "1.5"), "gpus: '1.5' is neither a number"),
        (("--memory", "much"), "memory: 'much' is not an amount"),
        (("--timeout", "soon"), "timeout: 'soon' is not a time span"),
        (("--wait", "-1"), "wait: '-1' is not a time span"),
        (("--grace", "x"), "grace: 'x' is not a time span"),
        (("--priority", "high"), "priority: must be an integer from -499999 to 499999, got 'high'"),
        (("--busy-memory", "x"), "'x' is not an amount"),
        (("--devices", "quantum"), "quantum"),
    ],
)
def test_what_can_never_be_is_refused_at_once(cli: Cli, arguments: tuple[str, ...], problem: str) -> None:
    done = cli(*ONE, *arguments, "--", "echo", "ran")
    assert (done.returncode, done.stdout) == (2, "")
    assert problem in done.stderr


def test_a_pool_that_cannot_be_used_is_an_exit_code_of_its_own(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = cli(*ONE, "--pool-dir", str(tmp_path / "file"), "true")
    assert done.returncode == 125
    assert f"pool directory {tmp_path / 'file'}" in done.stderr


# Waiting


def test_two_runs_on_one_device_are_one_after_the_other_and_the_second_says_for_whom_it_waits(
    cli: Cli, start: Callable[..., Run], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    first = start(*ONE, "--", *python(RECORDER, str(gate)))
    assert first.line() == "ready"
    second = start(*ONE, "echo", "second")
    assert second.complaint() == NOTICE.rstrip("\n")
    message = second.complaint()
    holder = r"\w+ \(.*" + re.escape(str(gate)[-20:]) + r"\) since \d\d:\d\d"
    assert re.fullmatch(rf"gpu-launcher: waiting for 1 GPU: simulated GPU 0 held by {holder}", message)
    time.sleep(2.5)
    gate.touch()
    assert second.line() == "second"
    assert (first.wait(), second.wait()) == (0, 0)
    assert second.process.stderr is not None
    assert second.process.stderr.read() == "gpu-launcher: got simulated GPU 0\n", "nothing is said twice"


def test_parts_of_a_device_are_used_at_the_same_time(cli: Cli, start: Callable[..., Run], tmp_path: Path) -> None:
    runs = [
        start(*ONE, *needs, "--", *python(RECORDER, str(tmp_path / "gate")))
        for needs in (("--gpus", "0.5"), ("--memory", "20GiB"), ("--gpus", "0.25", "--memory", "10GiB"))
    ]
    assert [run.line() for run in runs] == ["ready"] * 3
    (tmp_path / "gate").touch()
    assert [run.wait() for run in runs] == [0, 0, 0]


@pytest.mark.parametrize("wait", ["0", "0.5s"])
def test_when_there_is_no_time_left_to_wait_it_says_who_holds_what(cli: Cli, wait: str) -> None:
    cli.hold(["simulated:1", 1, None, 0, "train.py #7"])
    before = tickets(cli)
    done = cli(*ONE, "--wait", wait, "echo", "ran")
    assert (done.returncode, done.stdout) == (75, "")
    last = done.stderr.splitlines()[-1]
    over = "1 GPU not available now" if wait == "0" else "timed out after 0.5 s waiting for 1 GPU"
    who = user_name(os.geteuid())
    said = f"gpu-launcher: {over}: simulated GPU 0 held by {who} (train.py #7)"
    assert re.fullmatch(re.escape(said) + r" since \d\d:\d\d", last)
    assert tickets(cli) == before


def test_without_time_to_wait_it_takes_what_is_free(cli: Cli) -> None:
    assert cli(*ONE, "--wait", "0", "echo", "ran").stdout == "ran\n"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_while_it_waits_gives_the_place_in_line_back_at_once(
    cli: Cli, start: Callable[..., Run], signum: signal.Signals
) -> None:
    cli.hold(["simulated:1", 1, None, 0, "train.py"])
    run = start(*ONE, "echo", "ran")
    run.complaint()
    run.complaint()
    assert len(tickets(cli)) == 1
    run.send(signum)
    assert run.wait(100) == -signum, "which a shell shows as 128 and the signal"
    assert tickets(cli) == []
    assert run.line() == ""


# Signals


PASSED_ON = ("TERM", "HUP", "INT", "QUIT", "USR1", "USR2", "ALRM", "WINCH")


@pytest.mark.smoke
def test_signals_sent_to_it_are_passed_on(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(*ONE, "--", *python(RECORDER, str(tmp_path / "gate")))
    assert run.line() == "ready"
    for name in PASSED_ON:
        run.send(getattr(signal, f"SIG{name}"))
        assert run.line() == f"SIG{name}"
    (tmp_path / "gate").touch()
    assert run.line() == ""
    assert run.wait() == 0


def test_signals_sent_to_its_whole_process_group_reach_the_command_once(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start(*ONE, "--", *python(RECORDER, str(tmp_path / "gate")))
    assert run.line() == "ready"
    for name in PASSED_ON:
        os.killpg(run.process.pid, getattr(signal, f"SIG{name}"))
        assert run.line() == f"SIG{name}"
    time.sleep(0.2)  # long enough for a second one to arrive
    (tmp_path / "gate").touch()
    assert run.line() == ""


def test_the_kill_of_timeout_reaches_the_command_once(start: Callable[..., Run], tmp_path: Path) -> None:
    # timeout(1) signals its child and then its group.
    run = start("600", *CLI, *ONE, "--", *python(RECORDER, str(tmp_path / "gate")), within=("timeout",))
    assert run.line() == "ready"
    run.send(signal.SIGTERM)
    assert run.line() == "SIGTERM"
    time.sleep(0.2)
    (tmp_path / "gate").touch()
    assert run.line() == ""


def test_a_command_in_a_group_of_its_own_gets_what_is_sent_to_the_group_of_the_shells_job(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    code = "import os, sys; os.setpgid(0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    run = start(*ONE, "--", *python(code, *python(RECORDER, str(tmp_path / "gate"))))
    assert run.line() == "ready"
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.line() == "SIGINT"
    (tmp_path / "gate").touch()
    assert run.line() == ""


def test_what_was_ignored_stays_ignored_as_under_nohup(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(*CLI, *ONE, "--", "sh", "-c", "echo ready; read line; echo $line", within=("nohup",))
    assert run.line() == "ready"
    os.killpg(run.process.pid, signal.SIGHUP)
    run.send(signal.SIGHUP)
    assert run.process.stdin is not None
    run.process.stdin.write("typed\n")
    run.process.stdin.flush()
    assert run.line() == "typed"
    assert run.wait() == 0


def test_a_reader_sees_that_the_command_closed_its_output(start: Callable[..., Run]) -> None:
    run = start(*ONE, "sh", "-c", "exec >&- 2>&-; read line")
    assert run.line() == ""
    assert run.process.poll() is None
    run.process.communicate("\n", timeout=100)
    assert run.process.returncode == 0


def test_what_is_closed_stays_closed_and_nothing_else_takes_its_place(cli: Cli, start: Callable[..., Run]) -> None:
    closed = "[os.path.exists(f'/proc/self/fd/{number}') for number in (0, 1)]"
    code = f"import os, sys, time; print({closed}, file=sys.stderr); time.sleep(600)"
    run = start(f"exec {shlex.join([*CLI, *ONE, '--', *python(code)])} <&- >&-", within=("bash", "-c"))
    assert run.complaint() == NOTICE.strip()
    assert run.complaint() == "[False, False]"
    assert held(cli)
    run.send(signal.SIGTERM)
    assert run.wait() == -signal.SIGTERM


# Ends


@pytest.mark.smoke
def test_what_the_command_leaves_is_ended_before_its_devices_are_free(
    cli: Cli, start: Callable[..., Run], tmp_path: Path
) -> None:
    run = start(*ONE, "--", *python(FAMILY, str(tmp_path / "gate")))
    assert run.line() == "ready"
    left = run.parts["supervisor"].children(recursive=True)
    assert len(left) >= 5
    began = time.monotonic()
    (tmp_path / "gate").touch()
    assert_free_only_when_gone(cli, left)
    assert time.monotonic() - began > 2, "SIGTERM, and what is deaf to that gets SIGKILL two seconds later"
    assert run.wait() == 0


def test_a_signal_while_it_ends_what_was_left_ends_that_at_once(
    cli: Cli, start: Callable[..., Run], tmp_path: Path
) -> None:
    patient = "from gpu_launcher.cli.main import main; from gpu_launcher.processes import tree; "
    patient += "tree.TERMINATE_SECONDS = 600.0; main()"
    run = start(*ONE, "--", *python(FAMILY, str(tmp_path / "gate")), within=python(patient))
    assert run.line() == "ready"
    command = run.parts["command"]
    (tmp_path / "gate").touch()
    until(lambda: not command.is_running())
    run.send(signal.SIGTERM)
    assert run.wait() == 0, "the command had ended well"
    assert not held(cli)


def assert_free_only_when_gone(cli: Cli, processes: list[psutil.Process]) -> None:
    """Take the device as soon as it is free, and check that none of `processes` is alive then."""
    with FileLedger(cli.pool) as ledger:
        ticket = ledger.enqueue(Request.of(1), simulated_devices(1), Owner(os.getpid(), "test", "test"))
        until(lambda: ledger.claim(ticket), "the device is not free")
        assert [process for process in processes if alive(process)] == []


@pytest.mark.parametrize("who", ["front", "supervisor", "command", "witness and front", "group"])
def test_whoever_is_killed_the_tree_ends_within_seconds_and_then_its_devices_are_free(
    cli: Cli, start: Callable[..., Run], who: str
) -> None:
    run = start(*ONE, "--", *python(FAMILY))
    assert run.line() == "ready"
    parts = run.parts
    everything = [process for process in run.tree() if process not in (parts["witness"], parts["supervisor"])]
    assert len(everything) >= 6
    if who == "group":
        os.killpg(run.process.pid, signal.SIGKILL)
    else:
        for name in who.split(" and "):
            parts[name].kill()
    assert_free_only_when_gone(cli, everything)
    until(lambda: not any(alive(part) for part in parts.values()), seconds=60)
    code = run.wait(100)
    assert code == (137 if who == "supervisor" else -signal.SIGKILL)


def test_without_its_witness_it_goes_on_and_signals_for_all_arrive(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(*ONE, "--", *python(RECORDER, str(tmp_path / "gate")))
    assert run.line() == "ready"
    run.parts["witness"].kill()
    run.send(signal.SIGTERM)
    assert run.line() == "SIGTERM"
    os.killpg(run.process.pid, signal.SIGUSR1)
    assert run.line() in ("SIGUSR1", "SIGUSR1SIGUSR1"), "it may come twice then, also into its own handler"
    (tmp_path / "gate").touch()
    assert run.wait() == 0


def test_children_that_it_had_before_are_nobody_elses_to_end(cli: Cli, start: Callable[..., Run]) -> None:
    run = start(f"sleep 600 & echo $!; exec {shlex.join([*CLI, *ONE, '--', *python(FAMILY)])}", within=("bash", "-c"))
    bystander = psutil.Process(int(run.line()))
    assert run.line() == "ready"
    children = psutil.Process(run.process.pid).children()
    (supervisor,) = (child for child in children if os.getsid(child.pid) == child.pid)
    supervisor.kill()
    assert run.wait(100) == 137
    assert alive(bystander)
    bystander.kill()


@pytest.mark.parametrize("deaf", [False, True])
def test_when_its_time_is_over_the_whole_tree_gets_sigterm_and_then_sigkill(
    cli: Cli, start: Callable[..., Run], deaf: bool
) -> None:
    trap = "trap '' TERM" if deaf else "trap 'echo ended; exit 0' TERM"
    inner = f"{trap}; echo $$ $PPID; while :; do sleep 0.05; done"
    began = time.monotonic()
    grace = "3s" if deaf else "60s"
    run = start(*ONE, "--timeout", "5", "--grace", grace, "--", "bash", "-c", f"bash -c {shlex.quote(inner)}; true")
    tree = [int(pid) for pid in run.line().split()]
    assert len(tree) == 2
    assert run.wait(100) == 124
    assert not deaf or time.monotonic() - began > 7.9
    assert run.line() == ("" if deaf else "ended"), "a part of the tree got SIGTERM, too, and could clean up"
    assert not any(psutil.pid_exists(pid) for pid in tree)
    assert run.process.stderr is not None
    said = run.process.stderr.read()
    assert "the command's time is over: it gets SIGTERM" in said
    assert ("did not end within 3 s of SIGTERM: it is killed" in said) == deaf


def test_time_is_over_also_for_a_command_that_is_stopped(start: Callable[..., Run]) -> None:
    run = start(*ONE, "--timeout", "5", "--", "sh", "-c", "echo ready; kill -STOP $$; sleep 600")
    assert run.line() == "ready"
    assert run.wait(100) == 124


LOUD = "trap 'echo continued' CONT; trap 'echo interrupted' INT; echo ready; while :; do sleep 0.05; done"


def test_who_stops_the_command_can_continue_it_with_the_program_that_stands_in_for_it(
    start: Callable[..., Run],
) -> None:
    run = start(*ONE, "--", "bash", "-c", LOUD)
    assert run.line() == "ready"
    front, command = run.parts["front"], run.parts["command"]
    for _ in range(3):
        command.suspend()
        until_stopped(front)
        front.resume()
        assert run.line() == "continued"
        until(lambda: front.status() != psutil.STATUS_STOPPED, "it is not continued")


def test_signals_to_it_alone_are_passed_on_if_the_witness_has_seen_one_before_or_is_stopped(
    start: Callable[..., Run],
) -> None:
    run = start(*ONE, "--", "bash", "-c", LOUD)
    assert run.line() == "ready"
    front, witness = run.parts["front"], run.parts["witness"]
    os.killpg(front.pid, signal.SIGINT)
    assert run.line() == "interrupted"
    time.sleep(RECENT_SECONDS + 0.1)
    front.send_signal(signal.SIGINT)
    assert run.line() == "interrupted"
    witness.suspend()
    for _ in range(3):
        front.send_signal(signal.SIGINT)
        assert run.line() == "interrupted"


# At a terminal


@dataclass
class Shell:
    """An interactive shell in a terminal, in which `run` is `gpu-launcher run` with one simulated device."""

    terminal: Terminal

    def says(self, command: str, *expected: str) -> None:
        self.terminal.press(command + "\n")
        self.shows(*expected)

    def shows(self, *expected: str) -> None:
        """Wait until all of these have appeared, in this order, after everything awaited before."""
        for text in expected:
            self.terminal.read_until(lambda text=text: text in self.terminal.text)
            self.terminal.output = self.terminal.text.partition(text)[2].encode()

    def job_in_front(self) -> psutil.Process:
        """Wait until a job of the shell has the terminal and is not stopped. Returns its first process."""

        def job() -> psutil.Process | None:
            group = os.tcgetpgrp(self.terminal.master)
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(group)
                if group != self.terminal.pid and process.status() != psutil.STATUS_STOPPED:
                    return process
            return None

        return until(job, "no job has the terminal")


def below(front: psutil.Process) -> tuple[psutil.Process, psutil.Process]:
    """The supervisor and the command of a program that stands in for a command."""

    def supervisors() -> list[psutil.Process]:
        return [child for child in front.children() if os.getsid(child.pid) == child.pid]

    (supervisor,) = until(supervisors, "no process has a session of its own")
    (command,) = supervisor.children()
    return supervisor, command


def until_stopped(process: psutil.Process) -> None:
    until(lambda: process.status() == psutil.STATUS_STOPPED, f"{process} is not stopped")


@pytest.fixture
def shell(terminal: Callable[..., Terminal], tmp_path: Path) -> Shell:
    file = tmp_path / "rc"
    file.write_text(f"PS1='>> '\nrun() {{ {shlex.join([*CLI, *ONE])} \"$@\"; }}\nset +o history\n")
    shell = Shell(terminal("--rcfile", str(file), "-i", within=("bash", "--noprofile")))
    shell.shows(">> ")
    return shell


def test_ctrl_c_at_the_terminal_reaches_the_command_once_and_the_shell_goes_on(shell: Shell, tmp_path: Path) -> None:
    program = tmp_path / "recorder.py"
    program.write_text(RECORDER)
    shell.says(f"run -- {PYTHON} {program} {tmp_path}/gate", "ready")
    shell.terminal.press("\x03")
    shell.shows("SIGINT")
    time.sleep(0.3)
    shell.terminal._read()
    assert "SIGINT" not in shell.terminal.text
    shell.terminal.press("\x1c")
    shell.shows("SIGQUIT")
    (tmp_path / "gate").touch()
    shell.shows(">> ")
    shell.says("run -- sh -c 'echo rea''dy; exec sleep 600'; echo never", "ready")
    shell.terminal.press("\x03")
    shell.shows(">> ")
    shell.says("echo code $?", "code 130", ">> ")
    assert "never" not in shell.terminal.text


def test_ctrl_z_stops_and_fg_continues_it_again_and_again(shell: Shell, tmp_path: Path) -> None:
    shell.says("run -- sh -c 'echo rea''dy; read line; echo [$line]; exit 7'", "ready")
    _, command = below(shell.job_in_front())
    for _ in range(3):
        shell.terminal.press("\x1a")
        shell.shows("Stopped", ">> ")
        until_stopped(command)  # the shell has waited only for the program that stands in for it
        shell.says("jobs", "Stopped", ">> ")
        shell.says("fg", "run")
        shell.job_in_front()
    shell.terminal.press("typed\n")
    shell.shows("[typed]", ">> ")
    shell.says("echo code $?", "code 7")


def test_ctrl_z_right_after_fg_stops_it_again(shell: Shell) -> None:
    shell.says("run -- sh -c 'echo rea''dy; read line; echo [$line]'", "ready")
    supervisor, command = below(shell.job_in_front())
    shell.terminal.press("\x1a")
    shell.shows("Stopped", ">> ")
    supervisor.suspend()  # a busy machine: it does not see that the command continues
    shell.says("fg", "run")
    shell.job_in_front()
    until(lambda: command.status() != psutil.STATUS_STOPPED, "the command is stopped")
    shell.terminal.press("\x1a")
    until_stopped(command)
    supervisor.resume()
    shell.shows("Stopped", ">> ")
    shell.says("fg", "run")
    shell.job_in_front()
    shell.terminal.press("typed\n")
    shell.shows("[typed]", ">> ")


def test_ctrl_z_while_it_waits_keeps_its_place_in_line(cli: Cli, shell: Shell) -> None:
    holder = cli.hold(["simulated:1", 1, None, 0, "train.py"])
    shell.says("run -- echo ra''n", "waiting for 1 GPU")
    shell.terminal.press("\x1a")
    shell.shows("Stopped", ">> ")
    assert len(tickets(cli)) == 1
    holder.communicate()
    shell.says("fg", "ran", ">> ")


def test_a_command_that_ignores_ctrl_z_is_not_stopped(shell: Shell) -> None:
    shell.says("run -- sh -c 'trap \"\" TSTP; echo rea''dy; read line; echo [$line]'", "ready")
    shell.terminal.press("\x1a")
    time.sleep(0.3)
    shell.terminal.press("typed\n")
    shell.shows("[typed]", ">> ")
    assert "Stopped" not in shell.terminal.text


def test_in_the_background_it_is_stopped_when_it_reads_and_continued_by_fg(shell: Shell) -> None:
    shell.says("run -- sh -c 'echo rea''dy; read line; echo [$line]' &", "ready")
    shell.terminal.press("\n")
    shell.shows(">> ")
    (job,) = psutil.Process(shell.terminal.pid).children()
    until_stopped(job)
    shell.says("jobs", "Stopped")
    shell.says("fg", "run")
    shell.job_in_front()
    shell.terminal.press("typed\n")
    shell.shows("[typed]", ">> ")


def test_programs_that_own_the_terminal_work_in_it(shell: Shell) -> None:
    # A pager at the end of a pipe, in the same shell job as the command, reads keys from the terminal.
    shell.says("run -- seq 1000 | less -X", "22", "23", ":")
    shell.terminal.press("q")
    shell.shows(">> ")
    # An interactive shell has its own job control.
    shell.says("run -- bash --norc -i", "bash-")
    shell.says("PS1='inner> '", "inner> ", "inner> ")
    shell.says("sleep 600")
    until(lambda: shell.job_in_front().name() == "sleep")
    shell.terminal.press("\x1a")
    shell.shows("Stopped", "inner> ")
    shell.says("fg", "sleep 600")
    for _ in range(10):  # the shell prints the command just before it gives it the terminal
        shell.terminal.press("\x03")
        end = time.monotonic() + 2
        while "inner> " not in shell.terminal.text and time.monotonic() < end:
            shell.terminal._read()
        if "inner> " in shell.terminal.text:
            break
    shell.shows("inner> ")
    shell.says("exit 5", ">> ")
    shell.says("echo code $?", "code 5")


def test_the_terminal_is_the_commands_controlling_terminal(shell: Shell) -> None:
    shell.says("run -- sh -c 'test -t 0 && test -t 1 && test -t 2 && echo typed > /dev/tty'", "typed", ">> ")


def test_when_the_terminal_is_closed_nothing_is_left(cli: Cli, shell: Shell, tmp_path: Path) -> None:
    program = tmp_path / "family.py"
    program.write_text(FAMILY)
    shell.says(f"run -- {PYTHON} {program}", "ready")
    tree = psutil.Process(shell.terminal.pid).children(recursive=True)
    assert len(tree) >= 8
    os.close(shell.terminal.master)
    shell.terminal.master = os.open(os.devnull, os.O_RDWR)
    until(lambda: not any(alive(process) for process in tree), seconds=60)
    assert not held(cli)
