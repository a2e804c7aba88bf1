"""A job loop in a process beside this one: what it says, what it is told, and that nothing outlives it."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.manager_messages import Closed, Ended, Heard, Message, Remarked, Started, Wanted
from gpu_launcher.jobs.remote import ManagerDiedError, RemoteLoop, busy, calling_back, harmless_thread
from gpu_launcher.jobs.where import Where
from gpu_launcher.model import Request
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.worker import Gate


class Program:
    """Calls what it is given with its gate."""

    def __call__(self, number: int, spec: Callable[[Gate], Any], gate: Gate) -> Report:
        gate.prepared(Request.of(1), None)
        gate.wait()
        try:
            return Report(True, None, pickle.dumps(spec(gate)))
        except KeyboardInterrupt:
            return Report(False, "was interrupted", b"")


def pid(gate: Gate) -> int:
    return os.getpid()


def ask(gate: Gate) -> Any:
    gate.say("a question")
    return gate.hear()


def sleep(gate: Gate) -> None:
    gate.say(os.getpid())
    time.sleep(600)


def stubborn(gate: Gate) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sleep(gate)


def file_in(directory: Path) -> Callable[[Gate], None]:
    return _FileIn(directory)


class _FileIn:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, gate: Gate) -> None:
        (self.directory / "value").write_text("here")


Start = Callable[..., RemoteLoop]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    loops = []

    def start(devices: str = "simulated:2", method: Any = "fork") -> RemoteLoop:
        options = Where(devices, tmp_path / "pool").options(Request.of(1))
        loops.append(RemoteLoop(Program(), options, "a test", method=method))
        return loops[-1]

    yield start
    for loop in loops:
        loop.close()


def hear(loop: RemoteLoop, kind: type) -> Any:
    """The next message of that kind."""
    while True:
        message: Message = loop.receive()
        if isinstance(message, kind):
            return message
        assert not isinstance(message, Closed), message


def offer(loop: RemoteLoop, number: int, function: Callable[[Gate], Any]) -> None:
    loop.say(s.Offer(Job(number, "a call", function)))


def gone(*pids: int) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.005)


def test_jobs_are_asked_for_run_and_told_of(start: Start) -> None:
    loop = start()
    opened = loop.open()
    assert (len(opened.devices), opened.at_once, opened.method) == (2, 2, "fork")
    assert hear(loop, Remarked).text.startswith("2 devices are simulated")
    assert hear(loop, Wanted).count == 2
    offer(loop, 7, pid)
    started = hear(loop, Started)
    assert started.number == 7
    result = hear(loop, Ended).result
    assert (result.number, result.outcome, result.devices) == (7, Outcome.COMPLETED, started.devices)
    assert pickle.loads(result.payload) not in (os.getpid(), 0)
    loop.say(s.Exhausted())
    assert hear(loop, Closed).error is None


def test_a_job_is_answered(start: Start) -> None:
    loop = start()
    loop.open()
    hear(loop, Wanted)
    offer(loop, 0, ask)
    assert hear(loop, Heard).what == "a question"
    loop.say(s.Reply(0, "an answer"))
    assert pickle.loads(hear(loop, Ended).result.payload) == "an answer"


def test_what_keeps_jobs_from_running_is_raised_when_it_is_opened(start: Start) -> None:
    with pytest.raises(OptionError, match="devices"):
        start("simulated:none").open()


def test_closing_ends_jobs_that_run(start: Start) -> None:
    loop = start()
    loop.open()
    hear(loop, Wanted)
    offer(loop, 0, stubborn)
    job = hear(loop, Heard).what
    loop.close()
    wait_until(lambda: gone(job), 5)
    assert not loop.directory.exists()


def test_when_the_manager_is_killed_that_is_raised_and_its_jobs_end(start: Start) -> None:
    loop = start()
    loop.open()
    hear(loop, Wanted)
    offer(loop, 0, stubborn)
    job = hear(loop, Heard).what
    assert loop._pid is not None
    os.kill(loop._pid, signal.SIGKILL)
    with pytest.raises(ManagerDiedError):
        hear(loop, Closed)
    with pytest.raises(ManagerDiedError):
        loop.say(s.Exhausted())
    wait_until(lambda: gone(job), 5)


def test_to_be_stopped_interrupts_the_jobs_and_to_be_stopped_again_kills_them(start: Start) -> None:
    loop = start()
    loop.open()
    hear(loop, Wanted)
    offer(loop, 0, sleep)
    offer(loop, 1, stubborn)
    jobs = [hear(loop, Heard).what for _ in range(2)]
    loop.say(s.Stop())
    result = hear(loop, Ended).result
    assert (result.number, result.outcome, result.message) == (0, Outcome.CANCELLED, "was interrupted")
    assert not gone(*jobs)
    loop.say(s.Stop())
    result = hear(loop, Ended).result
    assert (result.number, result.outcome) == (1, Outcome.CANCELLED)
    assert hear(loop, Closed).error is None
    assert gone(*jobs)


def test_the_jobs_files_stay_until_this_program_has_heard_everything(start: Start) -> None:
    loop = start()
    loop.open()
    hear(loop, Wanted)
    offer(loop, 0, file_in(loop.directory))
    loop.say(s.Exhausted())
    assert loop._pid is not None
    manager = psutil.Process(loop._pid)
    # It has nothing more to do, and none of its processes is left.
    wait_until(lambda: (loop.directory / "value").exists() and not manager.children())
    time.sleep(0.2)
    hear(loop, Closed)
    assert (loop.directory / "value").read_text() == "here"
    loop.close()
    assert not loop.directory.exists()


def test_a_thread_of_which_nothing_is_known_keeps_jobs_from_being_forked(start: Start) -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, name="somebody")
    thread.start()
    try:
        loop = start(method="auto")
        assert loop.open().method == "spawn"
        assert "somebody" in hear(loop, Remarked).text + hear(loop, Remarked).text
    finally:
        over.set()
        thread.join()


def test_a_harmless_thread_does_not_and_the_fork_waits_while_it_is_busy(start: Start) -> None:
    over, ready, released = threading.Event(), threading.Event(), []

    def work() -> None:
        with harmless_thread():
            with busy():
                ready.set()
                time.sleep(0.3)
                released.append(time.monotonic())
            over.wait()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        ready.wait()
        loop = start()
        assert released
        assert released[0] <= time.monotonic()
        assert loop.open().method == "fork"
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("seconds", "method"), [(0.3, "fork"), (600.0, "spawn")])
def test_a_harmless_thread_is_none_while_it_calls_back_for_which_a_fork_waits_a_moment_only(
    start: Start, seconds: float, method: str
) -> None:
    over, ready = threading.Event(), threading.Event()

    def work() -> None:
        with harmless_thread():
            with calling_back():
                ready.set()
                over.wait(seconds)
            with calling_back():
                pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        ready.wait()
        loop = start(method="auto")
        opened = loop.open()
        assert opened.method == method
        texts = " ".join(hear(loop, Remarked).text for _ in range(2 if method == "spawn" else 1))
        assert ("add_done_callback" in texts) == (method == "spawn")
    finally:
        over.set()
        thread.join()
