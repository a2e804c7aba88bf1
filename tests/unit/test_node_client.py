"""A job loop in a process beside this one: what it says, what it is told, and that nothing outlives it."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher.errors import NodeDiedError, OptionError
from gpu_launcher.jobs import node, node_client
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import JobRetried, JobStarted, Notice, Outcome
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.job import Cause, Job
from gpu_launcher.jobs.node_client import RemoteLoop, busy, calling_back, harmless_thread
from gpu_launcher.jobs.node_messages import Closed, Ended, Heard, Message, Wanted
from gpu_launcher.jobs.where import Where
from gpu_launcher.model import Request
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.worker import JobContext
from tests.waiting import until


class Program:
    """Calls what it is given with its context."""

    def __call__(self, number: int, spec: Callable[[JobContext], Any], context: JobContext) -> Report:
        context.prepared(Request.of(1), None)
        context.wait()
        try:
            return Report(True, None, pickle.dumps(spec(context)))
        except KeyboardInterrupt:
            return Report(False, "was interrupted", b"")


def pid(context: JobContext) -> int:
    return os.getpid()


def ask(context: JobContext) -> Any:
    context.say("a question")
    return context.hear()


def sleep(context: JobContext) -> None:
    context.say(os.getpid())
    time.sleep(600)


def stubborn(context: JobContext) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sleep(context)


def file_in(directory: Path) -> Callable[[JobContext], None]:
    return _FileIn(directory)


class _FileIn:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, context: JobContext) -> None:
        (self.directory / "value").write_text("here")


Start = Callable[..., RemoteLoop]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    loops = []

    def start(devices: str = "simulated:2", method: Any = "fork", *, kept: bool = True) -> RemoteLoop:
        options = Where(devices, tmp_path / "pool").options(Request.of(1))
        loop = RemoteLoop(Program(), options, "a test", method=method)
        if kept:
            loops.append(loop)
        return loop

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


def offer(loop: RemoteLoop, number: int, function: Callable[[JobContext], Any]) -> None:
    loop.say(s.Offer(Job(number, "a call", function)))


def gone(*pids: int) -> bool:
    return not any(map(lives, pids))


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stopped(parent: psutil.Process) -> list[psutil.Process]:
    """It and all its descendants, none of which can fork another one any more."""
    parent.suspend()
    until(lambda: parent.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
    return [parent, *(process for child in parent.children() for process in stopped(child))]


def test_jobs_are_asked_for_run_and_told_of(start: Start) -> None:
    loop = start()
    opened = loop.open()
    assert (len(opened.devices), opened.at_once, opened.method) == (2, 2, "fork")
    assert hear(loop, Notice).text.startswith("2 devices are simulated")
    assert hear(loop, Wanted).count == 2
    offer(loop, 7, pid)
    started = hear(loop, JobStarted)
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
    until(lambda: gone(job))
    assert not loop.directory.exists()


def test_when_the_node_is_killed_that_is_raised_and_its_jobs_end(start: Start) -> None:
    loop = start()
    loop.open()
    hear(loop, Wanted)
    offer(loop, 0, stubborn)
    job = hear(loop, Heard).what
    assert loop._pid is not None
    os.kill(loop._pid, signal.SIGKILL)
    with pytest.raises(NodeDiedError):
        hear(loop, Closed)
    with pytest.raises(NodeDiedError):
        loop.say(s.Exhausted())
    until(lambda: gone(job))


def test_to_be_interrupted_while_it_closes_leaves_nothing(start: Start, alarm: type[BaseException]) -> None:
    loop = start()
    loop.open()
    hear(loop, Wanted)
    offer(loop, 0, stubborn)
    job = hear(loop, Heard).what
    assert loop._pid is not None
    node = psutil.Process(loop._pid)
    node.suspend()  # so that closing takes time
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(alarm):
        loop.close()
    assert not node.is_running(), "it was not waited for"
    assert not loop.directory.exists()
    until(lambda: gone(job))
    loop.close()


# Of what it was about to close: Python closes that, and says so.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_to_be_interrupted_anywhere_leaves_nothing(start: Start, alarm: type[BaseException]) -> None:
    before = psutil.Process().children()
    for step in range(25):
        with contextlib.suppress(alarm):
            signal.setitimer(signal.ITIMER_REAL, 0.004 * (step + 1))
            loop = start(kept=False)
            signal.setitimer(signal.ITIMER_REAL, 0.0005 * (step + 1))
            loop.open()
            loop.close()
        signal.setitimer(signal.ITIMER_REAL, 0)
        loop = None  # type: ignore[assignment]
        gc.collect()
        assert psutil.Process().children() == before


def test_what_is_left_when_program_and_node_are_killed_goes_at_the_next_start(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    other = start()
    program = os.fork()
    if program == 0:
        try:
            mine = start()
            mine.open()
            (mine.directory / "value").write_bytes(b"x")
            signal.pause()
        finally:
            os._exit(1)
    until(lambda: list((tmp_path / "tmp").glob("*/value")))
    (left,) = [value.parent for value in (tmp_path / "tmp").glob("*/value")]
    processes = stopped(psutil.Process(program))
    for process in processes:
        process.kill()
    os.waitpid(program, 0)
    until(lambda: gone(*(process.pid for process in processes)))
    assert left.exists()
    third = start()
    assert not left.exists()
    assert other.directory.exists()
    assert third.directory.exists()
    for loop in (other, third):
        loop.close()
    assert list((tmp_path / "tmp").iterdir()) == []


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


def test_job_is_taken_back_only_if_it_was_not_started(start: Start) -> None:
    loop = start("simulated:1")
    loop.open()
    hear(loop, Wanted)
    offer(loop, 0, ask)
    assert hear(loop, Heard).what == "a question"
    offer(loop, 1, pid)
    for number in range(2):
        loop.say(s.Cancel(number, "was not started", unstarted=True))
    result = hear(loop, Ended).result
    assert (result.number, result.outcome, result.duration) == (1, Outcome.CANCELLED, None)
    loop.say(s.Reply(0, "an answer"))
    result = hear(loop, Ended).result
    assert (result.number, result.outcome) == (0, Outcome.COMPLETED)


class FailingProgram(Program):
    """Fails, and leaves a report."""

    def __call__(self, number: int, spec: Callable[[JobContext], Any], context: JobContext) -> Report:
        super().__call__(number, spec, context)
        return Report(False, "raised OSError", b"error")


def test_report_of_a_failed_attempt_is_removed_before_its_retry_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = node._Link.send

    def note_report(self: node._Link, message: Message) -> None:
        if isinstance(message, JobRetried):
            assert self._run is not None
            there = self._run.reports.path(message.number).exists()
            message = replace(message, message=f"{message.message}, report {'left' if there else 'removed'}")
        send(self, message)

    monkeypatch.setattr(node._Link, "send", note_report)
    failures = FailurePolicy(retries=1, retry_on=frozenset(Cause))
    options = replace(Where("simulated:1", tmp_path / "pool").options(Request.of(1)), failures=failures)
    loop = RemoteLoop(FailingProgram(), options, "a test", method="fork")
    with contextlib.closing(loop):
        loop.open()
        hear(loop, Wanted)
        offer(loop, 0, pid)
        assert hear(loop, JobRetried).message == "raised OSError, report removed"
        assert hear(loop, Ended).result.attempts == 2


def test_the_jobs_files_stay_until_this_program_has_heard_everything(start: Start) -> None:
    loop = start()
    loop.open()
    hear(loop, Wanted)
    offer(loop, 0, file_in(loop.directory))
    loop.say(s.Exhausted())
    assert loop._pid is not None
    node = psutil.Process(loop._pid)
    # It has nothing more to do, and none of its processes is left.
    until(lambda: (loop.directory / "value").exists() and not node.children())
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
        assert "somebody" in hear(loop, Notice).text + hear(loop, Notice).text
    finally:
        over.set()
        thread.join()


def test_a_harmless_thread_does_not_and_the_fork_waits_while_it_is_busy(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_client, "FORK_WAIT_SECONDS", 60.0)
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
    start: Start, monkeypatch: pytest.MonkeyPatch, seconds: float, method: str
) -> None:
    if method == "fork":
        monkeypatch.setattr(node_client, "FORK_WAIT_SECONDS", 60.0)
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
        texts = " ".join(hear(loop, Notice).text for _ in range(2 if method == "spawn" else 1))
        assert ("add_done_callback" in texts) == (method == "spawn")
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("stopped", [False, True])
def test_close_with_a_time_limit_kills_a_node_that_does_not_end(start: Start, stopped: bool) -> None:
    loop = start()
    loop.open()
    assert loop._pid is not None
    node = psutil.Process(loop._pid)
    if stopped:
        node.suspend()
    loop.close(0.1 if stopped else 100.0)
    assert not node.is_running()
    assert loop.was_killed is stopped
