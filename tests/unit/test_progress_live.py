"""The live view: its layout at many sizes, and its bytes on a real terminal."""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.cells import cell_len

from gpu_launcher.jobs.events import (
    Event,
    JobEnded,
    JobReturned,
    JobStarted,
    JobWaiting,
    NodesChanged,
    Notice,
    Outcome,
    OutOfContact,
    StopRequested,
    SweepEnded,
    SweepStarted,
    Throttled,
)
from gpu_launcher.jobs.progress.live import LiveProgress
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.jobs.progress.terminal import ALTERNATE, NORMAL
from gpu_launcher.jobs.progress.view import frame
from gpu_launcher.model import Device, DeviceKind
from gpu_launcher.processes.keyboard import Keyboard

if TYPE_CHECKING:
    from pathlib import Path


def devices(number: int, kind: DeviceKind = DeviceKind.GPU) -> tuple[Device, ...]:
    return tuple(Device(f"{kind.value}-{i}", i, "A card", kind) for i in range(number))


GPUS = devices(4)


def completed(time: float, number: int, seconds: float) -> JobEnded:
    return JobEnded(time, number, "", (), Outcome.COMPLETED, seconds, None, None)


def failed(time: float, number: int, log: str | None = None) -> JobEnded:
    return JobEnded(time, number, f"lr={number}", (), Outcome.FAILED, 0.8, "ValueError: nan", log)


def view(*events: Event, now: float = 0.0, width: int = 80, height: int = 24) -> list[str]:
    tally = SweepTally()
    for event in events:
        tally.take(event)
    tally.advance(now)
    lines = [line.plain for line in frame(tally, width, height)]
    assert len(lines) < height
    assert all(cell_len(line) < width for line in lines)
    return lines


def test_the_view_at_a_typical_moment() -> None:
    lines = view(
        SweepStarted(0.0, 8, GPUS, None),
        *(completed(60.0, i, 60.0) for i in range(2)),
        failed(60.0, 2),
        JobStarted(60.0, 3, "lr=0.1 hidden=32", GPUS[:2], None),
        JobStarted(61.0, 4, "lr=0.1 hidden=64", GPUS[2:3], None),
        now=72.0,
    )
    assert lines == [
        "3/8 done  1 failed  2 running  3 waiting                  about 3m left  1m 12s",
        "━" * 29 + "─" * 50,
        "GPU 0  #3  lr=0.1 hidden=32                                                12 s",
        "GPU 1  #3  lr=0.1 hidden=32                                                12 s",
        "GPU 2  #4  lr=0.1 hidden=64                                                11 s",
        "GPU 3  idle",
    ]


def test_devices_that_others_hold_are_told_from_idle_ones() -> None:
    wait = JobWaiting(1.0, 3, "lr=3", "needs 2 GPUs, 1 is free", GPUS[3:])
    lines = view(SweepStarted(0.0, 8, GPUS, None), JobStarted(1.0, 0, "lr=0", GPUS[:1], None), wait)
    assert lines[3:] == [
        "GPU 1  idle",
        "GPU 2  idle",
        "GPU 3  held by others",
        "waits: needs 2 GPUs, 1 is free; job 3 (lr=3)",
    ]


def test_a_wait_ends_when_its_job_starts_or_nobody_else_holds_anything() -> None:
    wait = JobWaiting(1.0, 0, "lr=3", "held by alice")
    start = SweepStarted(0.0, 8, GPUS, None)
    assert view(start, wait)[2:] == [
        *(f"GPU {i}  held by others" for i in range(4)),
        "waits: held by alice; job 0 (lr=3)",
    ]
    assert "others" not in "".join(view(start, wait, JobWaiting(2.0, 0, "lr=3", "")))
    assert "alice" not in "".join(view(start, wait, JobStarted(2.0, 0, "lr=3", GPUS[:1], None)))


def test_jobs_and_devices_of_a_node_that_is_not_heard_are_not_shown_as_running_or_idle() -> None:
    here = (replace(GPUS[0], node="a"), replace(GPUS[1], node="a"), replace(GPUS[2], node="b"))
    events: list[Event] = [
        SweepStarted(0.0, 4, here, None),
        JobStarted(0.0, 0, "lr=0", here[:1], None),
        JobStarted(0.0, 1, "lr=1", here[2:], None),
        OutOfContact(2.0, frozenset("a"), frozenset([0])),
    ]
    lines = view(*events, now=3.0)
    assert lines[0].startswith("0/4 done  1 running  1 lost contact  2 waiting")
    assert [" ".join(line.split()) for line in lines[2:]] == [
        "a GPU 0 #0 lost contact lr=0 3 s",
        "a GPU 1 lost contact",
        "b GPU 2 #1 lr=1 3 s",
    ]
    assert "lost contact" not in "".join(view(*events, OutOfContact(4.0, frozenset(), frozenset())))
    lost = (JobReturned(5.0, 0, "lr=0"), NodesChanged(5.0, here[2:], "node a is lost"))
    lines = view(*events, *lost, OutOfContact(5.0, frozenset(), frozenset()), now=5.0)
    assert lines[0].startswith("0/4 done  1 running  3 waiting"), "it waits until it runs elsewhere"


def test_jobs_without_devices_have_rows_too() -> None:
    lines = view(SweepStarted(0.0, 2, (), None), JobStarted(0.0, 0, "x=1", (), None), now=3.0)
    assert lines[2].split() == ["-", "#0", "x=1", "3", "s"]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (40, 10), (20, 4), (10, 2), (300, 100)])
@pytest.mark.parametrize("number", [0, 1, 8, 64])
def test_the_view_fits_every_terminal(width: int, height: int, number: int) -> None:
    slots = devices(number, DeviceKind.CPU)
    running = [JobStarted(0.0, i, f"tag=学習率 x={i} [red]", slots[i : i + 1], None) for i in range(number // 2 + 3)]
    wait = JobWaiting(1.0, 99, "x=99", "because " * 20)
    view(SweepStarted(0.0, 1000, slots, None), *running, failed(2.0, 500), wait, now=4000.0, width=width, height=height)


def test_many_devices_collapse_into_a_count_that_names_the_longest_job() -> None:
    slots = devices(64, DeviceKind.CPU)
    running = [JobStarted(0.0 if i == 50 else 9.0, i, "", slots[i : i + 1], None) for i in range(60)]
    lines = view(SweepStarted(0.0, 100, slots, None), *running, now=10.0)
    assert len(lines) == 22
    assert lines[-1] == "and 45 more: 41 running, 4 idle (longest: #50, 10 s)"


def test_rows_stay_where_they_are_while_jobs_come_and_go() -> None:
    start = SweepStarted(0.0, 8, GPUS, None)
    first = JobStarted(0.0, 0, "a", GPUS[2:3], None)
    history: list[Event] = [start, first, completed(5.0, 0, 5.0)]
    for events in (history[:1], history[:2], history):
        assert [line.split("  ")[0] for line in view(*events)[2:]] == ["GPU 0", "GPU 1", "GPU 2", "GPU 3"]


def test_header_says_how_much_may_run() -> None:
    waits = JobWaiting(0.0, 0, "lr=3", "held by alice", (), "1 GPU")
    events = [SweepStarted(0.0, 4, GPUS, None), waits]
    limited = view(*events, Throttled(0.0, False, 2, ""))
    assert "at most 2 devices" in limited[0]
    assert any("held by alice" in line for line in limited)
    paused = view(*events, Throttled(0.0, True, 2, ""))
    assert "paused" in paused[0]
    assert not any("held by alice" in line for line in paused), "it does not wait for her now"
    continued = view(*events, Throttled(0.0, True, None, ""), Throttled(0.0, False, None, ""))
    assert "paused" not in continued[0]


def test_a_stop_says_how_long_it_waits_and_how_to_hurry_it() -> None:
    start: list[Event] = [SweepStarted(0.0, 8, GPUS, None), JobStarted(0.0, 0, "a", GPUS[:1], None)]
    stop = StopRequested(5.0, 1, 10.0, False, "SIGINT")
    assert view(*start, stop, now=8.0)[0].startswith(
        "stopping: waiting up to 7 s for 1 job (Ctrl-C again to kill them)"
    )
    assert view(*start, stop, StopRequested(9.0, 1, 10.0, True, "SIGINT"))[0].startswith("stopping: killing 1 job ")


def test_one_failure_among_thousands_is_seen_in_the_bar() -> None:
    tally = SweepTally()
    for event in (SweepStarted(0.0, 5000, GPUS, None), failed(1.0, 0)):
        tally.take(event)
    bar = frame(tally, 80, 24)[1]
    assert [bar.plain[span.start : span.end] for span in bar.spans if span.style == "red"] == ["━"]


class Screen:
    """The few things a terminal does that the view relies on. Anything else in the bytes is an error."""

    def __init__(self, width: int = 80, height: int = 24) -> None:
        self.width, self.height = width, height
        self.lines = [""]
        self.row = 0
        self.column = 0

    def feed(self, text: str) -> None:
        for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\x1b.|[^\x1b\n\r]|\n|\r", text):
            if token == "\n":
                self.row, self.column = self.row + 1, self.column
                if self.row == len(self.lines):
                    self.lines.append("")
            elif token == "\r":
                self.column = 0
            elif token.endswith("m") and token.startswith("\x1b"):
                continue
            elif token.endswith("A") and token.startswith("\x1b"):
                self.row = max(0, len(self.lines) - self.height, self.row - int(token[2:-1]))
            elif token == "\x1b[K":
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif token == "\x1b[J":
                self.lines[self.row] = self.lines[self.row][: self.column]
                del self.lines[self.row + 1 :]
            elif token.startswith("\x1b"):
                raise AssertionError(f"unexpected {token!r}")
            else:
                self.put(token)

    def put(self, char: str) -> None:
        if self.column == self.width:
            self.feed("\r\n")
        line = self.lines[self.row]
        self.lines[self.row] = line[: self.column].ljust(self.column) + char + line[self.column + 1 :]
        self.column += 1

    def text(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


DRIVER = """
import fcntl, os, sys, termios
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
from gpu_launcher.jobs.events import *
from gpu_launcher.jobs.progress import PlainProgress, open_progress
from gpu_launcher.jobs.progress.live import LiveProgress
from gpu_launcher.model import Device, DeviceKind
from gpu_launcher.processes.keyboard import Keyboard
gpus = tuple(Device(f"s{i}", i, "made up", DeviceKind.SIMULATED) for i in range(4))
progress = open_progress()
"""


class OnTerminal:
    """A driver script whose stderr is a terminal of its own and whose stdout is a socket."""

    def __init__(self, script: str) -> None:
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environ = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
        stdout, ours = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER + script],
            stdin=slave,
            stdout=stdout,
            stderr=slave,
            start_new_session=True,
            env=environ,
        )
        os.close(slave)
        stdout.close()
        ours.settimeout(60)
        self.out = ours.makefile("rb")
        ours.close()

    def read_until(self, wanted: str | None, seconds: float = 60.0) -> str:
        """What the terminal gets until `wanted` is in it, or until its other side is closed."""
        deadline = time.monotonic() + seconds
        data = b""
        while wanted is None or wanted.encode() not in data:
            assert select.select([self.master], [], [], deadline - time.monotonic())[0], data
            try:
                chunk = os.read(self.master, 65536)
            except OSError:  # EIO: nobody has the terminal open any more
                chunk = b""
            if not chunk:
                assert wanted is None, data
                break
            data += chunk
        return data.decode()

    def finish(self) -> bytes:
        out = self.out.read()
        self.out.close()
        assert self.process.wait(timeout=60) == 0
        return out


def test_a_whole_sweep_on_a_terminal_leaves_only_what_is_to_last(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text("epoch 1\nValueError: nan\n")
    terminal = OnTerminal(f"""
assert isinstance(progress, LiveProgress)
progress.handle(SweepStarted(0.0, 3, gpus, None))
for i in range(3):
    progress.handle(JobStarted(1.0 + i, i, f"x=[{{i}},2] y=[red] z=" + "long" * 40, gpus[i:i+1], None))
    progress.tick(1.5 + i)
progress.handle(Notice(5.0, "a notice"))
progress.handle(JobEnded(6.0, 0, "x=[0,2]", gpus[:1], Outcome.FAILED, 5.0, "ValueError: nan", {str(log)!r}))
progress.handle(JobEnded(6.01, 1, "x=[1,2]", gpus[1:2], Outcome.COMPLETED, 4.0, None, None))
progress.tick(7.0)
assert len(os.listdir("/proc/self/task")) == 1
progress.handle(JobEnded(9.0, 2, "x=[2,2]", gpus[2:3], Outcome.COMPLETED, 6.0, None, None))
progress.handle(SweepEnded(9.0))
progress.close()
progress.close()
""")
    written = terminal.read_until(None)
    assert terminal.finish() == b""
    screen = Screen()
    paintings = written.replace("\r\n", "\n").split("\r")
    notice = next(i for i, painting in enumerate(paintings) if "a notice" in painting)
    screen.feed("\r".join(paintings[:notice]).replace("\n", "\r\n"))
    assert "simulated GPU 1  #1  x=[1,2] y=[red] z=longlo…longlong" in "\n".join(screen.text())
    screen.feed("\r" + "\r".join(paintings[notice:]).replace("\n", "\r\n"))
    assert screen.text() == [
        "[gpu_pool] 3 jobs on 4 simulated GPUs",
        "[gpu_pool] a notice",
        *wrapped(f"[gpu_pool] job 0 (x=[0,2]) FAILED after 5.0 s: ValueError: nan; log: {log}"),
        "    | epoch 1",
        "    | ValueError: nan",
        "[gpu_pool] 3 jobs: 2 completed, 1 failed in 9.0 s",
        *wrapped(f"  job 0 (x=[0,2]) FAILED after 5.0 s: ValueError: nan; log: {log}"),
    ]
    assert "\x1b[?" not in written, "no mode is set that a killed process would leave behind"


def wrapped(line: str, width: int = 80) -> list[str]:
    return [line[i : i + width].rstrip() for i in range(0, len(line), width)]


def test_an_error_in_the_loop_leaves_a_clean_terminal() -> None:
    terminal = OnTerminal("""
progress.handle(SweepStarted(0.0, 3, gpus, None))
progress.tick(2.0)
progress.close()
""")
    screen = Screen()
    screen.feed(terminal.read_until(None))
    assert terminal.finish() == b""
    assert screen.text() == ["[gpu_pool] 3 jobs on 4 simulated GPUs", "[gpu_pool] 3 jobs: 3 unfinished in 2.0 s"]


def test_a_terminal_that_hangs_up_does_not_end_the_sweep() -> None:
    terminal = OnTerminal("""
import signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
progress.handle(SweepStarted(0.0, 3, gpus, None))
try:
    sys.stdin.readline()
except OSError:
    pass
for i in range(50):
    progress.tick(float(i))
progress.handle(SweepEnded(60.0))
progress.close()
print("the sweep went on")
""")
    terminal.read_until("0/3 done")
    os.close(terminal.master)
    assert terminal.finish() == b"the sweep went on\n"


def test_a_sweep_in_the_background_of_its_terminal_gets_plain_lines() -> None:
    terminal = OnTerminal("""
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    os._exit(0 if isinstance(open_progress(), PlainProgress) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
""")
    assert terminal.finish() == b""


def test_a_view_that_goes_to_the_background_rests_but_still_tells_of_failures() -> None:
    terminal = OnTerminal("""
import signal
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
progress.handle(SweepStarted(0.0, 3, gpus, None))
foreground = os.getpgrp()
if os.fork() == 0:
    os.setpgid(0, 0)
    sys.stderr.write("BACKGROUND")
    sys.stderr.flush()
    for i in range(20):
        progress.tick(float(i))
    progress.handle(JobEnded(21.0, 0, "lr=0", (), Outcome.FAILED, 5.0, "no", None))
    progress.tick(22.0)
    os._exit(0)
os.wait()
""")
    written = terminal.read_until(None)
    terminal.finish()
    after = written.partition("BACKGROUND")[2]
    assert "FAILED" in after
    assert "done" not in after.partition("FAILED")[2]
    assert "0/3 done" not in after


class Recorder:
    """A stream that keeps what each single write wrote."""

    encoding = "utf-8"
    closed = False

    def __init__(self) -> None:
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("no descriptor")


def test_the_view_is_painted_at_most_eight_times_a_second_and_only_when_it_changes() -> None:
    stream = Recorder()
    progress = LiveProgress(stream, lambda: (80, 24))  # type: ignore[arg-type]
    progress.handle(SweepStarted(0.0, 1000, GPUS, None))
    for i in range(900):
        progress.handle(completed(i / 1000, i, 0.001))
    assert len(stream.writes) <= 9
    painted = len(stream.writes)
    for i in range(90):
        progress.tick(1.2 + i / 1000)
    assert len(stream.writes) <= painted + 1


def test_a_terminal_that_becomes_narrower_keeps_no_piece_of_the_old_view() -> None:
    stream = Recorder()
    size = [(80, 24)]
    progress = LiveProgress(stream, lambda: size[0])  # type: ignore[arg-type]
    progress.handle(SweepStarted(0.0, 8, GPUS, None))
    progress.handle(JobStarted(1.0, 0, "x=1", GPUS[:1], None))
    size[0] = (50, 24)
    progress.tick(2.0)
    # The header, the bar and the row of GPU 0 were 79 wide and are two rows each now; three idle devices are one each.
    assert stream.writes[-1].startswith("\r\x1b[9A")


def test_colours_are_left_out_where_the_user_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Recorder()
    progress = LiveProgress(stream, lambda: (80, 24))  # type: ignore[arg-type]
    progress.handle(SweepStarted(0.0, 8, GPUS, None))
    progress.handle(failed(1.0, 0))
    progress.handle(Notice(2.0, "[bold]a notice[/bold] :smile:"))
    written = "".join(stream.writes)
    assert "\x1b[31m" not in written
    assert "[bold]a notice[/bold] :smile:" in written
    progress.handle(SweepEnded(3.0))


def echoes(terminal: int) -> bool:
    return bool(termios.tcgetattr(terminal)[3] & termios.ECHO)


TYPING = """
progress.handle(SweepStarted(0.0, 3, gpus, None))
for i in range(3):
    progress.tick(1.0 + i)
os.write(1, b"shown\\n")
"""


def shown(terminal: OnTerminal) -> None:
    assert terminal.out.readline() == b"shown\n"


def test_what_is_typed_neither_shows_in_the_view_nor_stays_for_the_shell() -> None:
    terminal = OnTerminal(
        TYPING
        + """
while fcntl.ioctl(0, termios.FIONREAD, bytes(4)) == bytes(4):
    progress.tick(4.0)
progress.tick(5.0)
progress.handle(SweepEnded(6.0))
progress.close()
os.set_blocking(0, False)
try:
    os.write(1, b"left: " + os.read(0, 100))
except BlockingIOError:
    os.write(1, b"nothing left")
"""
    )
    shown(terminal)
    assert not echoes(terminal.master)
    os.write(terminal.master, b"\x13rm -rf x\nls\n")
    written = terminal.read_until(None)
    assert "rm" not in written
    assert terminal.finish() == b"nothing left"


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_the_keyboard_is_left_to_a_pager_that_has_taken_it(when: str) -> None:
    take = "import tty; tty.setcbreak(0); pagers = termios.tcgetattr(0)\n"
    parts = [take, TYPING] if when == "before" else [TYPING, take, "progress.tick(5.0)\n"]
    check = "assert termios.tcgetattr(0) == pagers\n"
    terminal = OnTerminal("".join([*parts, check, "progress.close()\n", check]))
    terminal.read_until(None)
    terminal.finish()


def test_long_paste_is_read_to_its_end() -> None:
    terminal = OnTerminal("""
from gpu_launcher.processes.keyboard import Keyboard
keyboard = Keyboard(0, keys=True)
keyboard.take()
keyboard.fileno()
os.write(1, b"shown\\n")
while int.from_bytes(fcntl.ioctl(0, termios.FIONREAD, bytes(4)), sys.byteorder) < 3000:
    pass
os.write(1, str(len(keyboard.read())).encode())
keyboard.close()
""")
    shown(terminal)
    os.write(terminal.master, 3000 * b"y")
    terminal.read_until(None)
    assert terminal.finish() == b"3000"


def test_the_terminal_is_as_before_when_a_sweep_breaks_off() -> None:
    terminal = OnTerminal(
        "before = termios.tcgetattr(0)\n"
        + TYPING
        + "assert termios.tcgetattr(0) != before\nprogress.close()\nassert termios.tcgetattr(0) == before\n"
    )
    shown(terminal)
    terminal.read_until(None)
    terminal.finish()


SLOW = """
from gpu_launcher.processes.keyboard import Keyboard

def slowly(self, take=Keyboard.take):
    take(self)
    time.sleep(0.1)

Keyboard.take = slowly
"""


@pytest.mark.parametrize("busy", ["", SLOW], ids=["idle", "on a busy machine"])
def test_a_stopped_sweep_gives_the_keyboard_back_and_takes_it_again(busy: str) -> None:
    # A shell has the sweep in its foreground, sees it stopped, and continues it.
    terminal = OnTerminal(f"""
import signal, time
{busy}
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
def echo():
    return bool(termios.tcgetattr(0)[3] & termios.ECHO)
job = os.fork()
if job == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    progress = open_progress()
    progress.handle(SweepStarted(0.0, 3, gpus, None))
    for i in range(1, 100000):
        progress.tick(float(i))
        time.sleep(0.01)
    os._exit(1)
while echo():
    time.sleep(0.01)
os.write(1, b"shown\\n")
_, status = os.waitpid(job, os.WUNTRACED)
assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGTSTP
assert echo()
os.tcsetpgrp(0, os.getpgrp())
os.kill(job, signal.SIGCONT)
time.sleep(0.5)
assert echo(), "in the background it is the shell's"
assert os.waitpid(job, os.WNOHANG | os.WUNTRACED) == (0, 0), "and nothing stops it there"
os.tcsetpgrp(0, job)
while echo():
    time.sleep(0.01)
os.kill(job, signal.SIGTERM)
os.waitpid(job, 0)
os.write(1, b"taken again\\n")
""")
    shown(terminal)
    os.write(terminal.master, b"\x1a")
    terminal.read_until(None)
    assert terminal.finish() == b"taken again\n"


def test_the_guard_gives_the_terminal_back_when_the_launcher_was_killed() -> None:
    terminal = OnTerminal("""
import signal, time
from gpu_launcher.processes.guard import guarded
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
before = termios.tcgetattr(0)
ready, write = os.pipe()
def serve(lifeline):
    os.write(write, b"!")
    os.read(lifeline, 1)
    os._exit(0)
launcher = os.fork()
if launcher == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    launcher = os.getpid()
    if os.fork() == 0:
        guarded(launcher, serve, lambda: None)
        os._exit(0)
    os.read(ready, 1)
    progress = open_progress()
    progress.handle(SweepStarted(0.0, 3, gpus, None))
    assert termios.tcgetattr(0) != before
    os.kill(launcher, signal.SIGKILL)
assert os.WTERMSIG(os.waitpid(launcher, 0)[1]) == signal.SIGKILL
while termios.tcgetattr(0) != before:
    time.sleep(0.05)
""")
    terminal.read_until(None)
    terminal.finish()


class Typist(Keyboard):
    """A keyboard of a test."""

    def __init__(self) -> None:
        super().__init__(-1, keys=True)
        self.typed = b""
        self.is_taken = False

    def take(self) -> None:
        self.is_taken = True

    def fileno(self) -> int:
        return -1

    def read(self) -> bytes:
        typed, self.typed = self.typed, b""
        return typed

    def close(self) -> None:
        self.is_taken = False


def with_page(stream: Recorder) -> tuple[LiveProgress, Typist]:
    """Return the view of a sweep on which the help is open."""
    typist = Typist()
    progress = LiveProgress(stream, lambda: (80, 24), keyboard=typist)  # type: ignore[arg-type]
    progress.handle(SweepStarted(0.0, 8, GPUS, None))
    assert progress.fileno() is not None
    typist.typed = b"?"
    progress.serve(lambda request: "")
    assert stream.writes[-2] == ALTERNATE
    return progress, typist


def test_page_gives_way_to_the_view_when_the_sweep_is_stopped() -> None:
    stream = Recorder()
    progress, _ = with_page(stream)
    progress.handle(StopRequested(1.0, 4, 10.0, False, "SIGINT"))
    assert stream.writes[-2] == NORMAL
    assert "stopping" in stream.writes[-1]
    progress.close()


def test_lines_that_come_while_a_page_is_open_are_not_kept_without_bound() -> None:
    stream = Recorder()
    progress, _ = with_page(stream)
    before = len(stream.writes)
    for number in range(2500):
        progress.handle(Notice(1.0 + number, f"notice {number}."))
    written = "".join(stream.writes[before:])
    assert [f"notice {number}." in written for number in (0, 999, 2400)] == [True, True, False]
    assert stream.writes[-1].startswith("\x1b[H"), "the page is open again"
    progress.handle(SweepEnded(9000.0))
    assert "notice 2499." in "".join(stream.writes)
    progress.close()


def test_keyboard_is_given_back_if_the_summary_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Recorder()
    progress, typist = with_page(stream)

    def interrupted(text: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        progress.close()
    assert not typist.is_taken
