"""The trial of an objective of `optimize`: what it sends to the head. The head is not run."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from gpu_launcher.processes import pickling
from gpu_launcher.studies.optimize_messages import Answer, Call, Ping, ShouldPrune
from gpu_launcher.studies.rank_reporters import Intermediate
from gpu_launcher.studies.trial import TrialInfo
from gpu_launcher.studies.worker_trial import MAX_UNANSWERED, ObjectiveChannel, WorkerTrial


class BusyHead:
    """A head, as the context of its job: it handles messages only when the job waits for an answer."""

    def __init__(self) -> None:
        self.handled: list[Any] = []
        self._arrived: deque[Any] = deque()
        self.most_waiting = 0

    def say(self, what: Any) -> None:
        self._arrived.append(what)
        self.most_waiting = max(self.most_waiting, len(self._arrived))

    def hear(self) -> Answer:
        while self._arrived:
            self.handled.append(what := self._arrived.popleft())
            if isinstance(what, (Call, Ping, ShouldPrune)):
                return Answer(what.number, pickling.dump(None))
        raise AssertionError("the job waits for an answer to no question")

    def reports(self) -> list[int]:
        return [what.step for what in (*self.handled, *self._arrived) if isinstance(what, Intermediate)]

    def pings(self) -> int:
        return sum(isinstance(what, Ping) for what in self.handled)


@pytest.fixture
def head() -> BusyHead:
    return BusyHead()


@pytest.fixture
def trial(head: BusyHead) -> WorkerTrial:
    info = TrialInfo(0, "study", {}, {}, {}, None, prunes=True, directions=(1,))
    return WorkerTrial(info, ObjectiveChannel(head))  # type: ignore[arg-type]


def test_a_tight_loop_of_reports_waits_for_the_head(head: BusyHead, trial: WorkerTrial) -> None:
    steps = 10 * MAX_UNANSWERED
    for step in range(steps):
        trial.report(0.5, step)
    assert head.reports() == list(range(steps))
    assert head.most_waiting == MAX_UNANSWERED + 1, "the reports and the question whether they are handled"


def test_reports_between_which_a_trial_asks_do_not_wait(head: BusyHead, trial: WorkerTrial) -> None:
    for step in range(10 * MAX_UNANSWERED):
        trial.report(0.5, step)
        if step % MAX_UNANSWERED == MAX_UNANSWERED - 1:
            assert not trial.should_prune()
    assert head.pings() == 0
