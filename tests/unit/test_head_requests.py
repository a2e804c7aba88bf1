"""Requests from other terminals to the head of a node that the test plays."""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from signal import SIGINT
from typing import Any

import pytest

from gpu_launcher.jobs.control import (
    AskStatus,
    CancelJobs,
    ContinueSweep,
    LimitDevices,
    PauseSweep,
    RetryJobs,
    Steering,
    StopSweep,
    WatchSweep,
    read_answer,
    write_request,
)
from gpu_launcher.jobs.control_socket import connect
from gpu_launcher.jobs.event_lines import read_line
from gpu_launcher.jobs.events import JobsRequeued, Outcome, StopRequested, Throttled
from gpu_launcher.jobs.head import SweepResult, run_jobs
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.launches import DIRECTORY
from gpu_launcher.jobs.manifest import read
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Ended, Message, Wanted
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.jobs.source import AllOffered, Cancel, Exhausted, Offer, Statement, Stop, Throttle
from tests.played_node import OPTIONS, Display, PlayedNode, PlayedSource, listed, started

CANCELLED = "was cancelled by `gpu-launcher cancel`"


class Node(PlayedNode):
    """A node that plays a script: messages for the head, requests of another terminal, and conditions.

    It goes on when a request is answered, and when a condition holds.
    """

    def __init__(self, directory: Path, *script: list[Message] | Steering | Callable[[Node], bool]) -> None:
        super().__init__()
        self.said: list[Statement] = []
        self.answers: list[dict[str, Any]] = []
        self._directory = directory / DIRECTORY
        self._script = deque(script)
        self._client: Any = None

    @property
    def offered(self) -> list[int]:
        return [what.job.number for what in self.said if isinstance(what, Offer)]

    def receive_ready(self) -> list[Message]:
        if self._client is not None:
            try:
                self.answers.append(read_answer(self._client.recv(100_000)))
            except BlockingIOError:
                return []
            self._client.close()
            self._client = None
        step = self._script.popleft()
        if isinstance(step, list):
            return step
        if callable(step):
            if not step(self):
                self._script.appendleft(step)
            return []
        (path,) = self._directory.glob("launch-*.sock")
        self._client = connect(path, 10.0)
        self._client.sendall(write_request(step))
        self._client.setblocking(False)
        return []

    def say(self, what: Statement | BeginRun) -> None:
        if not isinstance(what, BeginRun):
            self.said.append(what)


class Source(PlayedSource):
    """Has the jobs 0 to 3, and knows that."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0
        self._wanted = 0

    def receive(self) -> list[Statement]:
        os.eventfd_read(self._readable)
        statements: list[Statement] = []
        while self._wanted and self._next < 4:
            statements.append(Offer(Job(self._next, f"n={self._next}", None)))
            self._next += 1
            self._wanted -= 1
        return statements if self._next < 4 else [*statements, Exhausted()]

    def coming(self) -> range:
        return range(self._next, 4)

    def request_jobs(self, count: int) -> None:
        self._wanted += count
        os.eventfd_write(self._readable, 1)

    def retry(self, jobs: Sequence[Job]) -> None:
        if any(job.number == 3 for job in jobs):
            raise ValueError("not job 3")
        for job in jobs:
            del self.results[job.number]


def ended(number: int, outcome: Outcome = Outcome.COMPLETED, message: str | None = None) -> Ended:
    return Ended(JobResult(number, f"n={number}", outcome, None, message, (), 1.0, None))


def run(node: Node, jobs: int, directory: Path, display: Display, throttle: Throttle = Throttle()) -> SweepResult:  # noqa: B008
    try:
        return run_jobs(listed(jobs), node, OPTIONS, directory, "program", display=display, throttle=throttle)
    finally:
        node.close()


def outcomes(results: Any) -> list[str]:
    return [result.outcome.value for result in results]


def test_jobs_are_cancelled_wherever_they_are(tmp_path: Path, display: Display) -> None:
    script: list[Any] = [
        [Wanted(2)],
        [started(0)],
        CancelJobs(((0, 1), (3, 3), (9, 99))),
        CancelJobs(((0, 0),)),
        [ended(1, Outcome.CANCELLED, CANCELLED), ended(0, Outcome.CANCELLED, CANCELLED), Wanted(3)],
        [ended(2), ended(4), Closed()],
    ]
    node = Node(tmp_path, *script)
    results = run(node, 5, tmp_path, display).results
    assert node.answers[0]["ending"] == [[0, 0]]
    assert node.answers[0]["dropped"] == [[1, 1], [3, 3]]
    assert (node.answers[1]["ending"], node.answers[1]["already"]) == ([], [[0, 0]])
    cancels = [what for what in node.said if isinstance(what, Cancel)]
    assert cancels == [Cancel(0, CANCELLED), Cancel(1, CANCELLED)], "each is told once"
    assert node.offered == [0, 1, 2, 4]
    assert outcomes(results) == ["cancelled", "cancelled", "completed", "cancelled", "completed"]
    assert [result.withdrawn for result in results] == [True, True, False, True, False]
    assert "jobs 0-1, 3 cancelled by `gpu-launcher cancel`" in display.notices
    assert AllOffered() in node.said


def test_job_that_completes_although_it_was_cancelled_counts(tmp_path: Path, display: Display) -> None:
    node = Node(tmp_path, [Wanted(1)], [started(0)], CancelJobs(((0, 0),)), [ended(0), Closed()])
    (result,) = run(node, 1, tmp_path, display).results
    assert (result.outcome, result.withdrawn) == (Outcome.COMPLETED, False)


def test_cancelling_all_that_waits_lets_the_sweep_end(tmp_path: Path, display: Display) -> None:
    node = Node(tmp_path, [Wanted(1)], [started(0)], CancelJobs(((1, 3),)), [ended(0), Closed()])
    assert outcomes(run(node, 4, tmp_path, display).results) == ["completed", *["cancelled"] * 3]
    assert AllOffered() in node.said


def test_jobs_that_a_source_has_not_offered_are_cancelled(tmp_path: Path, display: Display) -> None:
    script: list[Any] = [
        [Wanted(1)],
        CancelJobs(((1, 2), (50, 60))),
        [ended(0), Wanted(1)],
        lambda node: node.offered == [0, 3],
        AskStatus(),
        [ended(3), Closed()],
    ]
    node, source = Node(tmp_path, *script), Source()
    try:
        run_jobs([], node, OPTIONS, tmp_path, "program", source=source, total=4, display=display)
    finally:
        node.close()
        source.close()
    assert node.answers[0]["dropped"] == [[1, 2]]
    assert node.answers[0]["coming"] == [[1, 3]]
    assert node.offered == [0, 3]
    assert outcomes(source.results[number] for number in range(4)) == ["completed", *["cancelled"] * 2, "completed"]
    assert source.results[1].withdrawn
    assert node.answers[1]["ended"] == {"completed": 1, "cancelled": 2}
    assert node.answers[1]["total"] == 4


@pytest.mark.parametrize(
    ("requests", "stops"),
    [
        ([StopSweep()], 1),
        ([StopSweep(), StopSweep()], 1),
        ([StopSweep(), StopSweep(now=True)], 2),
        ([StopSweep(now=True)], 2),
    ],
    ids=str,
)
def test_sweep_is_stopped_as_by_ctrl_c(requests: list[Any], stops: int, tmp_path: Path, display: Display) -> None:
    script = [[Wanted(1)], [started(0)], *requests, [ended(0, Outcome.CANCELLED), Closed(stopped=True)]]
    node = Node(tmp_path, *script)
    result = run(node, 3, tmp_path, display)
    assert (result.stopped, result.stopped_by) == (True, SIGINT)
    assert outcomes(result.results) == ["cancelled"] * 3
    assert not any(one.withdrawn for one in result.results)
    assert node.said.count(Stop()) == stops
    assert [answer["already"] for answer in node.answers] == [False, True][: len(requests)]
    shown = [event for event in display.events if isinstance(event, StopRequested)]
    assert [event.forced for event in shown] == [False, True][:stops]
    assert all("`gpu-launcher stop" in event.signal for event in shown)


def test_sweep_is_paused_continued_and_limited(tmp_path: Path, display: Display) -> None:
    requests = [PauseSweep(), PauseSweep(), LimitDevices(1), ContinueSweep(), ContinueSweep(), LimitDevices(None)]
    node = Node(tmp_path, [Wanted(1)], [started(0)], *requests, [ended(0), Closed()])
    run(node, 1, tmp_path, display)
    assert [what for what in node.said if isinstance(what, Throttle)] == [
        Throttle(paused=True),
        Throttle(paused=True, devices=1),
        Throttle(devices=1),
        Throttle(),
    ]
    assert [answer["changed"] for answer in node.answers] == [True, False, True, True, False, True]
    shown = [event.text for event in display.events if isinstance(event, Throttled)]
    assert shown == [
        "no job is started from now on, because of `gpu-launcher pause`",
        "at most 1 device from now on, because of `gpu-launcher limit`",
        "jobs are started again from now on, because of `gpu-launcher continue`",
        "no limit on devices from now on, because of `gpu-launcher limit`",
    ]


def test_sweep_that_stops_is_not_paused(tmp_path: Path, display: Display) -> None:
    script = [[Wanted(1)], [started(0)], StopSweep(), PauseSweep(), [ended(0, Outcome.CANCELLED), Closed(stopped=True)]]
    node = Node(tmp_path, *script)
    run(node, 1, tmp_path, display)
    assert node.answers[1]["problem"] == "it is stopping, so no more jobs are started"


def test_status_says_how_the_sweep_stands(tmp_path: Path, display: Display) -> None:
    node = Node(tmp_path, [Wanted(2)], [started(0), started(1), ended(0)], AskStatus(), [ended(1), Closed()])
    run(node, 2, tmp_path, display)
    expected = {"stopping": None, "paused": False, "devices": None, "total": 2, "running": 1, "facts": []}
    assert node.answers == [{"version": 1, "ok": True, "ended": {"completed": 1}, **expected}]


def test_sweep_runs_without_a_socket_if_there_can_be_none(
    tmp_path: Path, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def refuse(directory: Path, name: str) -> None:
        asked.append(directory)
        raise PermissionError("no sockets here")

    monkeypatch.setattr("gpu_launcher.jobs.control_socket.ControlSocket", refuse)
    node = Node(tmp_path, [Wanted(1)], [ended(0), Closed()])
    assert outcomes(run(node, 1, tmp_path, display).results) == ["completed"]
    assert asked == [tmp_path / DIRECTORY]


def test_nothing_of_the_socket_is_left(tmp_path: Path, display: Display) -> None:
    node = Node(tmp_path, [Wanted(1)], [ended(0), Closed()])
    run(node, 1, tmp_path, display)
    assert not list((tmp_path / DIRECTORY).glob("launch-*"))


def test_sweep_ends_and_begins_throttled(tmp_path: Path, display: Display) -> None:
    node = Node(tmp_path, PauseSweep(), LimitDevices(1), [Wanted(1), ended(0), Closed()])
    throttle = run(node, 1, tmp_path, display).throttle
    assert throttle == Throttle(paused=True, devices=1)
    again = Node(tmp_path, AskStatus(), ContinueSweep(), [Wanted(1), ended(0), Closed()])
    assert run(again, 1, tmp_path, display, throttle).throttle == Throttle(devices=1)
    assert again.said[0] == throttle
    assert (again.answers[0]["paused"], again.answers[0]["devices"]) == (True, 1)
    (_, _, still, _) = [event.text for event in display.events if isinstance(event, Throttled)]
    assert still == (
        "as in the batch before: no job is started before `gpu-launcher continue`, and at most 1 device before "
        "`gpu-launcher limit none`"
    )


def test_those_who_watch_get_the_state_and_each_event_until_the_end(tmp_path: Path, display: Display) -> None:
    clients: list[socket.socket] = []

    def watches(node: Node) -> bool:
        if not clients:
            (path,) = (tmp_path / DIRECTORY).glob("launch-*.sock")
            clients.append(connect(path, 10.0))
            clients[0].sendall(write_request(WatchSweep()))
        return bool(select.select(clients, [], [], 0.0)[0])

    node = Node(tmp_path, [Wanted(2)], [started(0)], watches, [started(1), ended(0)], [ended(1), Closed()])
    run(node, 2, tmp_path, display)
    with clients[0] as client, client.makefile("rb") as lines:
        answer, state, *events = list(lines)
    assert read_answer(answer)["ok"] is True
    tally = read_line(state)
    assert isinstance(tally, SweepTally)
    assert (tally.total, list(tally.running)) == (2, [0])
    kinds = [type(read_line(event)).__name__ for event in events]
    assert kinds == ["JobStarted", "JobEnded", "JobEnded", "SweepEnded"]


FAILED = Outcome.FAILED


def offers(node: Node) -> list[tuple[int, int, bool]]:
    """The offers: number, attempts before, and whether an earlier failure no longer counts."""
    said = [what for what in node.said if isinstance(what, Offer)]
    return [(what.job.number, what.job.attempts_before, what.forgiven) for what in said]


def test_jobs_that_did_not_complete_run_again(tmp_path: Path, display: Display) -> None:
    script: list[Any] = [
        [Wanted(4), started(0), ended(0, FAILED, "broke"), started(1), started(2)],
        CancelJobs(((3, 3),)),
        [Ended(not_begun(3))],
        RetryJobs(((0, 3),)),
        [started(0), ended(0), ended(2, FAILED, "broke"), started(3), ended(3, FAILED, "broke")],
        RetryJobs(None),
        AskStatus(),
        [started(2), ended(2), started(3), ended(3), ended(1)],
        lambda node: Exhausted() in node.said,
        RetryJobs(((0, 3),)),
        [Closed()],
    ]
    node = Node(tmp_path, *script)
    swept = run(node, 4, tmp_path, display)
    assert outcomes(swept.results) == ["completed"] * 4
    assert not swept.stopped
    again = [(0, 1, True), (3, 0, False), (2, 1, True), (3, 1, True)]
    assert offers(node) == [*((number, 0, False) for number in range(4)), *again]
    assert node.said.index(AllOffered()) < node.said.index(Exhausted()) == len(node.said) - 1
    first, all_failed, status, late = node.answers[1:]
    assert (first["again"], first["unfinished"], first["over"]) == ([[0, 0], [3, 3]], [[1, 2]], False)
    assert all_failed["again"] == [[2, 3]]
    assert status["ended"] == {"completed": 1}
    assert late["over"]
    entries = read(tmp_path)
    assert {number: (entry.state.value, entry.attempts) for number, entry in entries.items()} == {
        0: ("completed", 2),
        1: ("completed", 1),
        2: ("completed", 2),
        3: ("completed", 2),
    }, "job 3 was cancelled before it began"


def test_no_two_copies_of_a_job_are_offered(tmp_path: Path, display: Display) -> None:
    script: list[Any] = [
        [Wanted(1), started(0), ended(0, FAILED, "broke"), started(1)],
        RetryJobs(((0, 0),)),
        RetryJobs(((0, 0),)),
        [started(0)],
        RetryJobs(((0, 0),)),
        RetryJobs(None),
        [ended(0), Wanted(1), ended(1), Closed()],
    ]
    node = Node(tmp_path, *script)
    run(node, 2, tmp_path, display)
    assert [answer["again"] for answer in node.answers] == [[[0, 0]], [], [], []]
    assert [answer["unfinished"] for answer in node.answers[:3]] == [[], [[0, 0]], [[0, 0]]]
    assert offers(node) == [(0, 0, False), (0, 1, True), (1, 0, False)]


@pytest.mark.parametrize("again", [False, True])
def test_sweep_that_is_stopped_keeps_the_failure_if_the_job_did_not_begin_again(
    tmp_path: Path, display: Display, again: bool
) -> None:
    other = [ended(1, Outcome.CANCELLED, "was stopped"), Closed(stopped=True)]
    script: list[Any] = [
        [Wanted(2), started(1), started(0), ended(0, FAILED, "broke")],
        RetryJobs(None),
        [started(0)] if again else [],
        StopSweep(),
        [ended(0, Outcome.CANCELLED, "was stopped"), *other] if again else [Ended(not_begun(0)), *other],
    ]
    result, _ = run(Node(tmp_path, *script), 2, tmp_path, display).results
    assert (result.outcome.value, result.message) == (("cancelled", "was stopped") if again else ("failed", "broke"))
    assert read(tmp_path)[0].state.value == result.outcome.value


def not_begun(number: int) -> JobResult:
    return JobResult(number, f"n={number}", Outcome.CANCELLED, None, "was not started", (), None, None, attempts=1)


def test_jobs_of_a_source_run_again_unless_it_refuses(tmp_path: Path, display: Display) -> None:
    script: list[Any] = [
        [Wanted(2)],
        lambda node: node.offered == [0, 1],
        CancelJobs(((2, 3),)),
        RetryJobs(((2, 2),)),
        [started(0), ended(0, FAILED, "broke"), started(1), ended(1), Wanted(1)],
        lambda node: node.offered == [0, 1, 2],
        [started(2), Wanted(1)],
        lambda node: AllOffered() in node.said,
        RetryJobs(((0, 3),)),
        RetryJobs(((0, 0),)),
        [ended(2), started(0), ended(0)],
        lambda node: Exhausted() in node.said,
        [Closed()],
    ]
    node, source = Node(tmp_path, *script), Source()
    try:
        run_jobs([], node, OPTIONS, tmp_path, "program", source=source, total=4, display=display)
    finally:
        node.close()
        source.close()
    ahead, refused, again = node.answers[1:]
    assert (ahead["again"], ahead["ahead"]) == ([], [[2, 2]])
    assert (refused["ok"], refused["problem"]) == (False, "not job 3")
    assert again["again"] == [[0, 0]]
    assert outcomes(source.results[number] for number in range(4)) == ["completed"] * 3 + ["cancelled"]
    (requeued,) = [event for event in display.events if isinstance(event, JobsRequeued)]
    assert requeued.text == "job 0 runs again, because of `gpu-launcher retry`"
