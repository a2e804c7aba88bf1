"""The head of a node that the test plays: what it makes of messages, also when the node dies."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path

from gpu_launcher.errors import NodeDiedError
from gpu_launcher.jobs.events import GaveUp, JobStarted, Outcome
from gpu_launcher.jobs.head import NOT_RUN, SweepResult, run_jobs
from gpu_launcher.jobs.job import Cause, JobResult
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Ended, Message, Wanted
from gpu_launcher.jobs.notifications import Hooks, Notifier
from gpu_launcher.jobs.source import Offer, Statement
from tests.played_node import OPTIONS, Display, PlayedNode, PlayedSource, listed, started


class Node(PlayedNode):
    """A node that says what it is told to say. After `offers` offers it is dead."""

    def __init__(self, *batches: list[Message], offers: int) -> None:
        super().__init__()
        self.batches = deque(batches)
        self.offers = offers
        self.offered: list[int] = []

    def receive_ready(self) -> list[Message]:
        if not self.batches:
            raise NodeDiedError("the node was killed")
        return self.batches.popleft()

    def say(self, what: Statement | BeginRun) -> None:
        if isinstance(what, Offer):
            if len(self.offered) == self.offers:
                raise NodeDiedError("the node was killed")
            self.offered.append(what.job.number)


def run(node: Node, jobs: int, directory: Path, display: Display, notifier: Notifier | None = None) -> SweepResult:
    return run_jobs(listed(jobs), node, OPTIONS, directory, "program", display=display, notifier=notifier)


def failed(number: int) -> Ended:
    message = "raised ValueError"
    result = JobResult(number, f"n={number}", Outcome.FAILED, b"error", message, (), 1.0, None, Cause.EXCEPTION)
    return Ended(result)


def test_messages_that_arrived_before_the_node_died_are_handled(tmp_path: Path, display: Display) -> None:
    batch = [started(0), Wanted(1), failed(0), Wanted(1), started(1), failed(1)]
    node = Node([Wanted(2)], batch, [started(2)], offers=2)
    results = run(node, 5, tmp_path, display).results
    assert node.closed
    assert [result.message for result in results[:2]] == ["raised ValueError"] * 2
    assert [event.number for event in display.events if isinstance(event, JobStarted)] == [0, 1, 2]
    assert [result.message for result in results[3:]] == [NOT_RUN] * 2


def test_early_messages_are_handled_when_the_node_has_died(tmp_path: Path, display: Display) -> None:
    node = Node(offers=1)
    node.early = [Wanted(1), Wanted(1), started(0), failed(0)]
    results = run(node, 2, tmp_path, display).results
    assert [result.message for result in results] == ["raised ValueError", NOT_RUN]


class GivesUp(Node):
    """A node that starts no more jobs when it is offered the first one."""

    def receive_ready(self) -> list[Message]:
        return self.batches.popleft() if self.batches else []

    def say(self, what: Statement | BeginRun) -> None:
        if isinstance(what, Offer):
            self.batches.append([GaveUp(0.0, "was not run: no node is left"), Closed()])


class Source(PlayedSource):
    """Has one job."""

    def receive(self) -> list[Statement]:
        os.eventfd_read(self._readable)
        return [Offer(listed(1)[0])]

    def request_jobs(self, count: int) -> None:
        os.eventfd_write(self._readable, 1)


def test_job_of_a_source_that_was_not_started_when_its_node_gave_up_can_run_later(
    tmp_path: Path, display: Display
) -> None:
    node, source = GivesUp([Wanted(1)], offers=1), Source()
    try:
        run_jobs([], node, OPTIONS, tmp_path, "program", source=source, display=display)
    finally:
        node.close()
        source.close()
    (result,) = source.results.values()
    assert (result.outcome, result.message) == (Outcome.CANCELLED, "was not run: no node is left")


def test_hooks_are_told_failures_and_why_the_sweep_ended(tmp_path: Path, display: Display) -> None:
    node = Node([Wanted(2)], [started(0), failed(0)], offers=2)
    hooks = Hooks(("sh", "-c", f"cat > {tmp_path}/end"), ("sh", "-c", f"cat >> {tmp_path}/failures"))
    with Notifier(hooks, tmp_path, "program", spell=str, tell=print) as notifier:
        run(node, 4, tmp_path, display, notifier)
    assert json.loads((tmp_path / "failures").read_text())["number"] == 0  # the others did not fail by themselves
    ending = json.loads((tmp_path / "end").read_text())
    assert (ending["reason"], ending["message"]) == ("given_up", NOT_RUN)
    assert ending["jobs"]["failed"] == 4


def test_a_hook_that_fails_is_a_notice(tmp_path: Path, display: Display) -> None:
    node = Node([Wanted(1)], [started(0), failed(0)], [Closed()], offers=1)
    told: list[str] = []
    with Notifier(Hooks(None, ("no-such-program",)), tmp_path, "program", spell=str, tell=told.append) as notifier:
        run(node, 1, tmp_path, display, notifier)
    assert [*display.notices, *told] == [
        "the command of on_job_failure cannot be run: no-such-program: No such file or directory"
    ]
