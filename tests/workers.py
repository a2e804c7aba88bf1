"""Runs the tests in N processes, one file at a time: `pytest --workers N`.

Each worker is a fork of the pytest process that collected the tests, so it imports nothing again and has only one
thread. pytest-xdist's workers have a second thread. That would change what is tested, because gpu-launcher does not
fork jobs while other threads run.

    pytest (collects, reports) --- a pipe of file numbers ---> workers (a free one takes the next number)
                               <--- a pipe for each worker --- the test that has started, and reports
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import traceback
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.runner import pytest_sessionfinish as tear_down_all

if TYPE_CHECKING:
    from collections.abc import Iterator

NUMBER = struct.Struct("H")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workers", type=int, default=0, metavar="N", help="run the test files in N forked processes")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    count = session.config.getoption("--workers")
    if not count or session.testsfailed or session.config.option.collectonly:
        return None
    files = [list(items) for _, items in groupby(session.items, key=lambda item: item.path)]
    numbers, give = os.pipe()
    os.write(give, b"".join(NUMBER.pack(number) for number in range(len(files))))
    os.close(give)
    session.config._tmp_path_factory.getbasetemp()  # one for all workers
    workers = [start(session, files, numbers) for _ in range(min(count, len(files)))]
    os.close(numbers)
    try:
        report_all(session, workers)
    finally:
        for worker in workers:
            worker.close()
    return True


@dataclass
class Worker:
    """A process that runs tests."""

    pid: int
    pidfd: int
    messages: Connection
    test: tuple[str, Any] = ("none yet", ("", None, ""))
    """The name and location of the last test that started."""

    def close(self) -> None:
        self.messages.close()
        os.kill(self.pid, signal.SIGINT)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)


def start(session: pytest.Session, files: list[list[pytest.Item]], numbers: int) -> Worker:
    messages, sender = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid:
        sender.close()
        return Worker(pid, os.pidfd_open(pid), messages)
    try:
        messages.close()
        work(session, files, numbers, sender)
        sender.send(("done", None))
    except BaseException:
        with suppress(BrokenPipeError):  # the parent has stopped and interrupted this worker
            sender.send(("failed", traceback.format_exc()))
    finally:
        os._exit(0)


def work(session: pytest.Session, files: list[list[pytest.Item]], numbers: int, sender: Connection) -> None:
    """Run files until none are left, and send what happens."""
    config = session.config
    capture = config.pluginmanager.getplugin("capturemanager")
    capture.stop_global_capturing()  # its capture files are shared with the parent
    capture.start_global_capturing()
    config.get_terminal_writer()._file = open(os.devnull, "w")  # the parent shows the reports

    class Reporter:
        @staticmethod
        def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
            sender.send(("started", (nodeid, location)))

        @staticmethod
        def pytest_runtest_logreport(report: pytest.TestReport) -> None:
            sender.send(("report", config.hook.pytest_report_to_serializable(config=config, report=report)))

        @staticmethod
        def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
            sender.send(("finished", (nodeid, location)))

    config.pluginmanager.register(Reporter)
    for file in taken(files, numbers):
        session._setupstate.teardown_exact(file[0])  # tear down the previous file's directory
        elsewhere = next((items[0] for items in files if items is not file), None)  # ends the file's fixtures
        for item, following in zip(file, [*file[1:], elsewhere], strict=True):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    tear_down_all(session)


def taken(files: list[list[pytest.Item]], numbers: int) -> Iterator[list[pytest.Item]]:
    while number := os.read(numbers, NUMBER.size):
        yield files[NUMBER.unpack(number)[0]]


def report_all(session: pytest.Session, workers: list[Worker]) -> None:
    """Report the workers' tests as if they ran here, until all workers have ended."""
    working = list(workers)
    while working:
        ready = wait([one for worker in working for one in (worker.messages, worker.pidfd)])
        for worker in [worker for worker in working if worker.messages in ready or worker.pidfd in ready]:
            if not report_next(session.config, worker):
                working.remove(worker)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)


def report_next(config: pytest.Config, worker: Worker) -> bool:
    """Report one message from a worker; return whether it may send more."""
    try:
        # A process that a test left behind can keep the pipe open. So the death of the worker is seen by its pidfd.
        kind, content = worker.messages.recv() if worker.messages.poll() else ("failed", "the worker died")
    except EOFError:
        kind, content = "failed", "the worker died"
    if kind == "started":
        worker.test = content
    elif kind == "finished":
        config.hook.pytest_runtest_logfinish(nodeid=content[0], location=content[1])
    elif kind == "report":
        show(config, config.hook.pytest_report_from_serializable(config=config, data=content))
    elif kind == "failed":
        nodeid, location = worker.test
        lost = f"{content}\nThe tests after this one in its file were not run."
        show(config, pytest.TestReport(nodeid, location, {}, "failed", lost, "call"))
    return kind not in ("done", "failed")


def show(config: pytest.Config, report: pytest.TestReport) -> None:
    config.hook.pytest_runtest_logreport(report=report)
    if report.failed:  # also now, because the summary comes minutes later
        terminal = config.get_terminal_writer()
        terminal.line()
        terminal.sep("_", report.nodeid)
        report.toterminal(terminal)
