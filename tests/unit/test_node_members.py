"""What the end of a job on a node of a group means, and the phases of a node."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import Cause, JobResult, Refusal
from gpu_launcher.jobs.node_messages import Opened
from gpu_launcher.nodes.group_jobs import _Fate, _fate
from gpu_launcher.nodes.member import _TRANSITIONS, MAX_FAILURES, Member, MemberPhase
from gpu_launcher.nodes.remote_node import Life, RemoteNode

COMPLETED = JobResult(0, "n=0", Outcome.COMPLETED, b"value", None, (), 1.0, None)
CANCELLED = replace(COMPLETED, outcome=Outcome.CANCELLED, payload=None)
RAISED = replace(COMPLETED, outcome=Outcome.FAILED, payload=b"error", cause=Cause.EXCEPTION)
KILLED = replace(RAISED, payload=None, cause=Cause.CRASH)
TIMED_OUT = replace(RAISED, payload=None, cause=Cause.TIMEOUT)
REFUSED = replace(RAISED, payload=None, refused=Refusal.NEVER)


@pytest.mark.parametrize(
    ("result", "phase", "has_spoken", "taken_back", "fate"),
    [
        (COMPLETED, "OPEN", False, False, "CONCLUDED"),
        (KILLED, "OPEN", False, False, "CONCLUDED"),
        (CANCELLED, "OPEN", False, False, "CONCLUDED"),
        (CANCELLED, "OPEN", False, True, "TAKEN_BACK"),
        (COMPLETED, "OPEN", False, True, "CONCLUDED"),
        (REFUSED, "OPEN", False, False, "REFUSED"),
        (COMPLETED, "LEAVING", False, False, "CONCLUDED"),
        (CANCELLED, "LEAVING", False, False, "RETURNED"),
        (CANCELLED, "LEAVING", True, False, "CUT_OFF"),
        (RAISED, "LEAVING", False, False, "RETURNED"),
        (RAISED, "LEAVING", True, False, "CUT_OFF"),
        (TIMED_OUT, "LEAVING", True, False, "CONCLUDED"),
        (RAISED, "RETIRED", False, False, "CONCLUDED"),
        (KILLED, "RETIRED", False, False, "RETURNED"),
        (KILLED, "RETIRED", True, False, "CONCLUDED"),
        (CANCELLED, "RETIRED", True, False, "CUT_OFF"),
        (TIMED_OUT, "RETIRED", False, False, "CONCLUDED"),
    ],
)
def test_end_of_a_job_means_what_its_node_and_its_result_say(
    result: JobResult, phase: str, has_spoken: bool, taken_back: bool, fate: str
) -> None:
    assert _fate(result, MemberPhase[phase], has_spoken=has_spoken, taken_back=taken_back) is _Fate[fate]


class Remote(RemoteNode):
    """A node without a process."""

    def __init__(self) -> None:
        self.life = Life.LIVES
        self.unfit = self.interrupted = False
        self.problem = None


@pytest.fixture
def member() -> Member:
    return Member("a", Remote())


def test_phases_of_a_node_are_logged(member: Member, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log = logging.getLogger("gpu_launcher.decisions.nodes.member")
    handler = Lines()
    monkeypatch.setattr(log, "level", logging.DEBUG)
    monkeypatch.setattr(log, "_cache", {})
    log.addHandler(handler)
    try:
        member.open(Opened((), 2, "fork"))
        member.retire(MemberPhase.LEAVING, "got SIGTERM and ends")
        member.become(MemberPhase.ENDED, "its run is over")
    finally:
        log.removeHandler(handler)
    assert lines == [
        "a: STARTING -> OPEN: its pool has 0 devices",
        "a: OPEN -> LEAVING: got SIGTERM and ends",
        "a: LEAVING -> ENDED: its run is over",
    ]


def test_impossible_phase_of_a_node_is_an_error(member: Member) -> None:
    member.become(MemberPhase.ENDED, "")
    with pytest.raises(AssertionError, match="a: ENDED -> OPEN: late"):
        member.become(MemberPhase.OPEN, "late")


def test_every_phase_of_a_node_has_followers() -> None:
    assert set(_TRANSITIONS) == set(MemberPhase)
    assert set().union(*_TRANSITIONS.values()) == set(MemberPhase)


def test_node_that_gave_up_and_is_asked_to_end_does_not_return(member: Member) -> None:
    member.open(Opened((), 2, "fork"))
    member.retire(MemberPhase.RETIRED, "starts no more jobs")
    member.retire(MemberPhase.LEAVING, "got SIGTERM and ends")
    assert member.phase is MemberPhase.LEAVING
    assert not member.will_return
    assert not member.may_run


def test_node_that_was_asked_to_end_and_gives_up_still_interrupts_its_jobs(member: Member) -> None:
    member.open(Opened((), 2, "fork"))
    member.retire(MemberPhase.LEAVING, "got SIGTERM and ends")
    assert member.will_return
    member.retire(MemberPhase.RETIRED, "starts no more jobs")
    assert member.phase is MemberPhase.LEAVING
    assert not member.will_return


@pytest.mark.parametrize("interrupted", [False, True])
def test_node_that_never_ran_jobs_returns_only_if_its_engine_ended_it(member: Member, interrupted: bool) -> None:
    assert isinstance(member.node, Remote)
    member.node.interrupted = interrupted
    for _ in range(MAX_FAILURES):
        member.become(MemberPhase.ENDED, "got SIGTERM before it could run jobs")
        member.plan_restart()
        assert member.will_return is interrupted
        if not interrupted:
            return
        member.become(MemberPhase.STARTING, "")
    member.become(MemberPhase.ENDED, "got SIGTERM before it could run jobs")
    member.plan_restart()
    assert not member.will_return


def test_pool_that_opens_while_its_node_leaves_counts_until_the_run_is_over(member: Member) -> None:
    member.retire(MemberPhase.LEAVING, "got SIGTERM and ends")
    member.open(Opened((), 2, "fork"))
    assert member.pool is not None
    assert member.leaving
    member.become(MemberPhase.ENDED, "its run is over")
    assert member.pool is None
    assert member.at_once == 2


def test_node_that_is_lost_before_its_pool_was_open_is_not_started_again(member: Member) -> None:
    member.become(MemberPhase.ENDED, "lost")
    member.plan_restart()
    assert member.phase is MemberPhase.ENDED
