"""The life of a sweep's jobs, one stimulus at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpu_launcher.jobs import machine as m
from gpu_launcher.jobs.job import Refusal
from gpu_launcher.jobs.machine import IllegalTransitionError, Limits, Machine, Phase
from gpu_launcher.jobs.source import Throttle
from gpu_launcher.jobs.term import Term
from gpu_launcher.model import Request, Share
from tests.machine_state import check_state

ONE = Request(1)


def limits(**changes: object) -> Limits:
    standard = {
        "parallel": None,
        "without_devices": 2,
        "ahead": 2,
        "preparing": 2,
        "grace": 10.0,
    }
    return Limits(**{**standard, **changes})


def begun(jobs: int, **changes: object) -> Machine:
    machine = Machine(limits(**changes))
    for number in range(jobs):
        machine.handle(m.Arrived(number), 0.0)
    machine.handle(m.NoMore(), 0.0)
    return machine


def running(jobs: int, **changes: object) -> Machine:
    """All `jobs` run, each on a device of its own."""
    machine = begun(jobs, ahead=jobs, preparing=jobs, **changes)
    for number in range(jobs):
        machine.handle(m.Prepared(number, ONE), 0.0)
        machine.handle(m.LeaseGranted(number), 0.0)
    assert machine.running() == list(range(jobs))
    return machine


def test_a_sweep_of_no_jobs_is_finished_at_once():
    machine = Machine(limits())
    assert machine.handle(m.NoMore(), 0.0) == []
    assert machine.finished


def test_jobs_start_in_order_as_far_as_the_look_ahead_allows():
    machine = Machine(limits(ahead=2))
    instructions = [machine.handle(m.Arrived(number), 0.0) for number in (7, 8, 9)]
    assert instructions == [[m.StartProcess(7)], [m.StartProcess(8)], []]
    assert [machine.phase(number) for number in (7, 8, 9)] == [Phase.PREPARING, Phase.PREPARING, Phase.QUEUED]


def test_no_more_jobs_prepare_themselves_at_once_than_there_are_cpus_for():
    machine = begun(3, ahead=3, preparing=1)
    assert machine.phase(1) is Phase.QUEUED
    assert machine.handle(m.Prepared(0, ONE), 0.0) == [m.TakeTicket(0, ONE), m.StartProcess(1)]


def test_the_life_of_one_job():
    machine = begun(1)
    assert machine.handle(m.Prepared(0, ONE), 1.0) == [m.TakeTicket(0, ONE)]
    assert machine.handle(m.LeaseGranted(0), 2.0) == [m.Go(0)]
    assert machine.handle(m.Exited(0), 3.0) == [m.Release(0), m.Conclude(0, False, None)]
    assert machine.finished
    assert machine.phase(0) is Phase.ENDED


def test_a_job_without_devices_runs_without_a_ticket_and_releases_nothing():
    machine = begun(1)
    assert machine.handle(m.Prepared(0, Request(0)), 0.0) == [m.Go(0)]
    assert machine.handle(m.Exited(0), 0.0) == [m.Conclude(0, False, None)]


def test_only_one_ticket_is_out_and_the_next_one_is_taken_when_it_was_granted():
    machine = begun(2)
    assert machine.handle(m.Prepared(1, ONE), 0.0) == [m.TakeTicket(1, ONE)]
    assert machine.handle(m.Prepared(0, ONE), 0.0) == []
    assert machine.handle(m.LeaseGranted(1), 0.0) == [m.Go(1), m.TakeTicket(0, ONE)]


def test_learned_share_changes_what_jobs_with_auto_memory_ask_for_next():
    auto, share = replace(ONE, auto_memory=True), Share(0, 4 << 30)
    machine = begun(3, ahead=3, preparing=3)
    assert machine.handle(m.Prepared(0, auto), 0.0) == [m.TakeTicket(0, auto)]
    assert machine.handle(m.Prepared(1, auto), 0.0) == []
    assert machine.handle(m.Prepared(2, ONE), 0.0) == []
    assert machine.handle(m.ShareLearned(share), 0.0) == [], "the ticket that is out keeps its place in the queue"
    assert machine.handle(m.LeaseGranted(0), 0.0) == [m.Go(0), m.TakeTicket(1, replace(auto, share=share))]
    assert machine.handle(m.LeaseGranted(1), 0.0) == [m.Go(1), m.TakeTicket(2, ONE)], "it declared its own"


def test_a_job_that_dies_in_line_leaves_the_line_to_the_next_one():
    machine = begun(2)
    machine.handle(m.Prepared(0, ONE), 0.0)
    machine.handle(m.Prepared(1, ONE), 0.0)
    assert machine.handle(m.Exited(0), 0.0) == [
        m.DropTicket(0),
        m.TakeTicket(1, ONE),
        m.Conclude(0, False, None),
    ]


def test_devices_are_released_and_the_next_job_is_started_before_a_result_is_looked_at():
    machine = begun(3, ahead=1)
    machine.handle(m.Prepared(0, ONE), 0.0)
    machine.handle(m.LeaseGranted(0), 0.0)
    machine.handle(m.Prepared(1, ONE), 0.0)
    machine.handle(m.LeaseGranted(1), 0.0)
    machine.handle(m.Prepared(2, ONE), 0.0)
    assert machine.handle(m.Exited(0), 0.0) == [m.Release(0), m.Conclude(0, False, None)]
    assert machine.handle(m.LeaseGranted(2), 0.0) == [m.Go(2)]


def test_a_cap_on_running_jobs_counts_the_ticket_that_is_out():
    machine = begun(2, parallel=1)
    assert machine.handle(m.Prepared(0, ONE), 0.0) == [m.TakeTicket(0, ONE)]
    assert machine.handle(m.Prepared(1, Request(0)), 0.0) == []
    assert machine.handle(m.LeaseGranted(0), 0.0) == [m.Go(0)]
    assert machine.handle(m.Exited(0), 0.0) == [m.Release(0), m.Go(1), m.Conclude(0, False, None)]


def test_jobs_without_devices_have_a_cap_of_their_own():
    machine = begun(2, without_devices=1)
    assert machine.handle(m.Prepared(0, Request(0)), 0.0) == [m.Go(0)]
    assert machine.handle(m.Prepared(1, Request(0)), 0.0) == []
    assert machine.handle(m.Exited(0), 0.0) == [m.Go(1), m.Conclude(0, False, None)]


def test_a_job_that_asks_for_more_than_the_pool_has_is_ended_with_the_remedy_and_the_others_go_on():
    machine = begun(2)
    assert machine.handle(m.Prepared(0, Request(3), "for 3 devices, but the pool has 2"), 0.0) == [m.Kill(0)]
    assert machine.handle(m.Prepared(1, ONE), 0.0) == [m.TakeTicket(1, ONE)]
    (conclusion,) = machine.handle(m.Exited(0), 0.0)
    assert isinstance(conclusion, m.Conclude)
    assert not conclusion.stopped
    assert conclusion.problem == "cannot be run: its request is for 3 devices, but the pool has 2"


# Stopping


def test_the_first_stop_asks_running_jobs_kills_waiting_ones_and_forgets_the_rest():
    machine = begun(4)
    machine.handle(m.Prepared(0, ONE), 0.0)
    machine.handle(m.LeaseGranted(0), 0.0)
    machine.handle(m.Prepared(1, ONE), 0.0)
    assert machine.handle(m.StopAsked(), 5.0) == [
        m.DropTicket(1),
        m.Interrupt(0),
        m.Kill(1),
        m.Kill(2),
        m.Conclude(3, True, None),
    ]
    assert machine.stopping
    assert machine.deadline == 15.0


def test_jobs_are_killed_once_when_their_grace_is_over():
    machine = running(2)
    machine.handle(m.StopAsked(), 5.0)
    assert machine.handle(m.Tick(), 14.9) == []
    assert machine.handle(m.Tick(), 15.0) == [m.Kill(0), m.Kill(1)]
    assert machine.deadline is None
    assert machine.handle(m.Tick(), 99.0) == []


def test_the_second_stop_kills_at_once():
    machine = running(1)
    machine.handle(m.StopAsked(), 5.0)
    assert machine.handle(m.StopAsked(), 6.0) == [m.Kill(0)]
    assert machine.deadline is None
    assert machine.handle(m.Exited(0), 7.0) == [m.Release(0), m.Conclude(0, True, None)]
    assert machine.finished


def test_a_job_that_had_prepared_itself_just_before_it_heard_of_the_stop_does_not_run():
    machine = begun(1)
    machine.handle(m.StopAsked(), 0.0)
    assert machine.handle(m.Prepared(0, ONE), 0.0) == []
    assert machine.handle(m.Exited(0), 0.0) == [m.Conclude(0, True, None)]


# The loss of the fork server


def test_jobs_that_had_not_run_are_started_again_after_the_fork_server_was_lost_the_others_failed():
    machine = begun(2)
    machine.handle(m.Prepared(0, ONE), 0.0)
    machine.handle(m.LeaseGranted(0), 0.0)
    machine.handle(m.ServerLost(), 0.0)
    assert machine.handle(m.Exited(0), 0.0) == [
        m.Release(0),
        m.Conclude(0, False, "was ended because the fork server was killed"),
    ]
    assert machine.handle(m.Exited(1), 0.0) == [m.StartProcess(1)]
    machine.handle(m.Prepared(1, ONE), 0.0)
    assert machine.handle(m.LeaseGranted(1), 0.0) == [m.Go(1)]


def test_a_job_that_dies_with_the_fork_server_gives_up_its_place_in_line_lest_it_run_and_then_run_again():
    machine = begun(1)
    machine.handle(m.Prepared(0, ONE), 0.0)
    assert machine.handle(m.ServerLost(), 0.0) == [m.DropTicket(0)]
    with pytest.raises(IllegalTransitionError):
        machine.handle(m.LeaseGranted(0), 0.0)
    assert machine.handle(m.Exited(0), 0.0) == [m.StartProcess(0)]
    assert machine.handle(m.Prepared(0, ONE), 0.0) == [m.TakeTicket(0, ONE)]


def test_news_from_a_job_that_dies_with_the_fork_server_starts_nothing():
    machine = begun(1)
    machine.handle(m.ServerLost(), 0.0)
    assert machine.handle(m.Prepared(0, ONE), 0.0) == []


def test_nothing_is_started_again_once_the_user_wants_the_end():
    machine = begun(1)
    machine.handle(m.ServerLost(), 0.0)
    machine.handle(m.StopAsked(), 0.0)
    assert machine.handle(m.Exited(0), 0.0) == [m.Conclude(0, True, None)]
    assert machine.finished


# Defects of the loop


@pytest.mark.parametrize(
    ("stimulus", "complaint"),
    [
        (m.Exited(3), "job 3 is QUEUED"),
        (m.Prepared(3, ONE), "job 3 is QUEUED, expected one of: PREPARING"),
        (m.Prepared(0, ONE), "job 0 is RUNNING, expected one of: PREPARING"),
        (m.LeaseGranted(0), "job 0 is RUNNING"),
        (m.LeaseGranted(1), "job 1 is PREPARING"),
    ],
)
def test_what_cannot_happen_in_a_phase_raises_and_says_which(stimulus, complaint):
    machine = begun(4)
    machine.handle(m.Prepared(0, ONE), 0.0)
    machine.handle(m.LeaseGranted(0), 0.0)
    with pytest.raises(IllegalTransitionError, match=complaint):
        machine.handle(stimulus, 0.0)


def test_a_grant_to_a_job_whose_ticket_is_not_the_one_that_is_out_raises():
    machine = begun(2)
    machine.handle(m.Prepared(0, ONE), 0.0)
    machine.handle(m.Prepared(1, ONE), 0.0)
    with pytest.raises(IllegalTransitionError, match="the ticket out is 0's"):
        machine.handle(m.LeaseGranted(1), 0.0)


def test_a_job_does_not_end_twice():
    machine = begun(1)
    machine.handle(m.Exited(0), 0.0)
    with pytest.raises(IllegalTransitionError, match="job 0 is ENDED"):
        machine.handle(m.Exited(0), 0.0)


def test_a_job_that_failed_is_run_again_before_those_that_never_ran():
    machine = begun(3, ahead=1, preparing=1)
    machine.handle(m.Prepared(0, ONE), 0.0)
    assert machine.handle(m.LeaseGranted(0), 0.0) == [m.Go(0), m.StartProcess(1)]
    *_, conclusion = machine.handle(m.Exited(0, "was not lucky"), 0.0)
    assert conclusion == m.Conclude(0, False, "was not lucky")
    assert machine.handle(m.Retry(0), 0.0) == []
    machine.handle(m.Prepared(1, ONE), 0.0)
    assert machine.handle(m.LeaseGranted(1), 0.0) == [m.Go(1), m.StartProcess(0)]
    with pytest.raises(IllegalTransitionError):
        machine.handle(m.Retry(0), 0.0)


def test_a_conclusion_says_what_speaks_against_running_a_job_again():
    machine = begun(2)
    machine.handle(m.Prepared(0, Request(3), "for 3 devices, but the pool has 2"), 0.0)
    *_, conclusion = machine.handle(m.Exited(0), 0.0)
    assert conclusion.refused is Refusal.NEVER


LIMITED = Request(1, timeout=60.0)


@pytest.mark.parametrize(("length", "why"), [(60.0, Refusal.TOO_LATE), (59.0, Refusal.NEVER)])
def test_job_that_would_outlast_its_node_is_refused(length, why):
    machine = begun(1, term=Term(ends=60.0, length=length))
    assert machine.handle(m.Prepared(0, LIMITED), 1.0) == [m.Kill(0)]
    (conclusion,) = machine.handle(m.Exited(0), 2.0)
    assert conclusion.refused is why
    assert "its timeout of 1m 00s is longer than its node can run jobs" in conclusion.problem


def test_job_that_waits_for_devices_is_refused_when_it_becomes_too_late():
    machine = begun(2, term=Term(ends=100.0, length=100.0))
    assert machine.handle(m.Prepared(0, LIMITED), 0.0) == [m.TakeTicket(0, replace(LIMITED, timeout=75.0))]
    machine.handle(m.Prepared(1, ONE), 0.0)
    assert machine.handle(m.Tick(), 40.0) == []
    assert machine.handle(m.Tick(), 41.0) == [m.Kill(0), m.DropTicket(0), m.TakeTicket(1, ONE)]
    assert machine.handle(m.Tick(), 42.0) == []
    check_state(machine)
    (conclusion,) = machine.handle(m.Exited(0), 42.0)
    assert conclusion.refused is Refusal.TOO_LATE


@pytest.mark.parametrize("request_", [ONE, replace(LIMITED, timeout=5.0)])
def test_job_without_a_timeout_or_with_a_short_one_runs_on_a_node_that_ends(request_):
    machine = begun(1, term=Term(ends=60.0, length=60.0))
    assert isinstance(machine.handle(m.Prepared(0, request_), 50.0)[0], m.TakeTicket)
    assert machine.handle(m.LeaseGranted(0), 50.0) == [m.Go(0)]
    assert not any(isinstance(one, m.Kill) for one in machine.handle(m.Tick(), 54.0)), "jobs that run are left alone"


def test_a_job_that_wants_what_may_be_long_in_coming_goes_after_the_others_and_none_once_the_sweep_is_given_up():
    machine = begun(3, ahead=1, preparing=1)
    machine.handle(m.Prepared(0, ONE), 0.0)
    machine.handle(m.LeaseGranted(0), 0.0)
    machine.handle(m.Exited(0), 0.0)
    machine.handle(m.Retry(0, last=True), 0.0)
    machine.handle(m.Prepared(1, ONE), 0.0)
    assert machine.handle(m.LeaseGranted(1), 0.0) == [m.Go(1), m.StartProcess(2)]
    *_, conclusion = machine.handle(m.Exited(1), 0.0)
    machine.handle(m.GiveUp("was not run: no pool"), 0.0)
    assert not machine.takes_more
    with pytest.raises(IllegalTransitionError):
        machine.handle(m.Retry(conclusion.number), 0.0)


def test_a_machine_without_jobs_wants_as_many_as_can_run_and_be_prepared():
    machine = Machine(limits(preparing=2, at_once=8))
    assert machine.wanted == 2
    assert not machine.finished
    machine.handle(m.Arrived(5), 0.0)
    assert machine.wanted == 1


def test_one_job_that_waits_for_devices_is_ahead_enough_for_a_few():
    machine = Machine(limits(at_once=7))
    machine.handle(m.Arrived(0), 0.0)
    assert machine.handle(m.Prepared(0, ONE), 0.0) == [m.TakeTicket(0, ONE)]
    assert machine.wanted == 0
    machine.handle(m.LeaseGranted(0), 0.0)
    assert machine.wanted == 2


def test_where_many_run_two_are_ahead():
    machine = Machine(limits(at_once=8))
    machine.handle(m.Arrived(0), 0.0)
    machine.handle(m.Prepared(0, ONE), 0.0)
    assert machine.wanted == 1
    machine.handle(m.Arrived(1), 0.0)
    assert machine.wanted == 0


def test_with_all_devices_busy_one_more_job_is_wanted():
    machine = Machine(limits(at_once=1))
    machine.handle(m.Arrived(0), 0.0)
    machine.handle(m.Prepared(0, ONE), 0.0)
    machine.handle(m.LeaseGranted(0), 0.0)
    assert machine.wanted == 1
    assert machine.handle(m.Arrived(1), 0.0) == [m.StartProcess(1)]
    assert machine.wanted == 0


def test_the_sweep_is_over_when_no_more_jobs_arrive_and_the_last_has_ended():
    machine = Machine(limits())
    machine.handle(m.Arrived(0), 0.0)
    machine.handle(m.NoMore(), 0.0)
    assert not machine.finished
    machine.handle(m.Exited(0), 0.0)
    assert machine.finished


def test_a_running_job_that_is_cancelled_is_told_and_after_the_grace_period_killed():
    machine = running(1)
    assert machine.handle(m.Cancel(0, "was pruned"), 1.0) == [m.Terminate(0)]
    assert machine.handle(m.Cancel(0, "was pruned"), 2.0) == []
    assert machine.handle(m.Tick(), 10.9) == []
    assert machine.handle(m.Tick(), 11.0) == [m.Kill(0)]
    (*_, conclusion) = machine.handle(m.Exited(0), 12.0)
    assert conclusion == m.Conclude(0, stopped=False, problem="was pruned", cancelled=True)


def test_a_job_that_is_cancelled_before_it_runs_never_does():
    machine = begun(3, ahead=2)
    machine.handle(m.Prepared(0, ONE), 0.0)
    assert machine.handle(m.Cancel(0, "x"), 0.0)[:2] == [m.Kill(0), m.DropTicket(0)]
    assert machine.handle(m.Cancel(1, "x"), 0.0) == [m.Kill(1)]
    assert machine.handle(m.Prepared(1, ONE), 0.0) == [], "it was on the way"
    assert machine.handle(m.Cancel(2, "x"), 0.0) == [m.Conclude(2, stopped=False, problem="x", cancelled=True)]


def test_a_job_that_only_the_cap_keeps_waiting_is_known():
    machine = running(2, parallel=2)
    assert machine.capped is None, "no other job waits"
    machine = begun(2, parallel=1)
    machine.handle(m.Prepared(0, ONE), 0.0)
    assert machine.capped is None, "the first one's ticket is out"
    machine.handle(m.LeaseGranted(0), 0.0)
    assert machine.capped is None, "the second one is not prepared"
    machine.handle(m.Prepared(1, Request(2)), 0.0)
    assert machine.capped == Request(2)
    machine.handle(m.StopAsked(), 0.0)
    assert machine.capped is None


def test_without_a_cap_no_job_is_capped():
    machine = running(1)
    assert machine.capped is None
    machine = begun(2, without_devices=1)
    for number in (0, 1):
        machine.handle(m.Prepared(number, Request(0)), 0.0)
    assert machine.capped is None


def test_job_that_arrives_after_a_stop_is_concluded_at_once():
    machine = Machine(limits())
    machine.handle(m.StopAsked(), 0.0)
    assert machine.handle(m.Arrived(0), 1.0) == [m.Conclude(0, stopped=True, problem=None)]
    assert machine.finished


def test_job_that_arrives_after_giving_up_is_concluded_with_the_reason():
    machine = Machine(limits())
    machine.handle(m.GiveUp("was not run: no pool"), 0.0)
    assert machine.handle(m.Arrived(0), 1.0) == [m.Conclude(0, stopped=False, problem="was not run: no pool")]


def test_illegal_transition_raises_with_the_story_of_the_job():
    machine = begun(1)
    machine.handle(m.Prepared(0, ONE), 1.5)
    with pytest.raises(IllegalTransitionError) as caught:
        machine.handle(m.Prepared(0, ONE), 2.0)
    assert caught.value.stimulus == m.Prepared(0, ONE)
    assert [(step.time, step.after) for step in caught.value.story] == [(0.0, Phase.PREPARING), (1.5, Phase.PREPARED)]
    assert "1.500 PREPARING -> PREPARED, upon Prepared(number=0" in str(caught.value)
    assert caught.value.story == machine.story(0)


def test_story_spans_attempts_and_is_bounded():
    machine = begun(1)
    for _ in range(m.MAX_STORY):
        machine.handle(m.Exited(0), 0.0)
        machine.handle(m.Retry(0), 0.0)
    assert len(machine.story(0)) == m.MAX_STORY
    check_state(machine)


def test_state_that_contradicts_itself_is_found():
    machine = begun(2)
    machine._queue.append(0)
    with pytest.raises(AssertionError):
        check_state(machine)


# Throttling


HALF = Request.of(0.5)


def granted(machine: Machine, number: int, *devices: str) -> list[m.Instruction]:
    return machine.handle(m.LeaseGranted(number, frozenset(devices)), 0.0)


def prepared(jobs: int, request: Request = ONE) -> Machine:
    """All `jobs` are prepared, and the ticket of the first is out."""
    machine = begun(jobs, ahead=jobs, preparing=jobs, without_devices=jobs)
    for number in range(jobs):
        machine.handle(m.Prepared(number, request), 0.0)
    return machine


def test_paused_sweep_starts_nothing_until_it_is_continued():
    machine = begun(4, ahead=2, preparing=2)
    machine.handle(m.Prepared(0, ONE), 0.0)
    assert machine.handle(Throttle(paused=True), 0.0) == [m.DropTicket(0)]
    assert machine.handle(m.Prepared(1, Request(0)), 0.0) == []
    assert machine.handle(m.Exited(1), 0.0) == [m.Conclude(1, False, None)]
    assert not machine.finished
    assert machine.handle(Throttle(), 0.0) == [m.TakeTicket(0, ONE), m.StartProcess(2)]


def test_running_jobs_of_a_paused_sweep_continue_and_free_their_devices():
    machine = running(1)
    assert machine.handle(Throttle(paused=True), 0.0) == []
    assert machine.handle(m.Exited(0), 0.0) == [m.Release(0), m.Conclude(0, False, None)]
    assert machine.finished


def test_paused_sweep_asks_for_no_jobs_and_blames_no_cap():
    machine = Machine(limits(parallel=1))
    assert machine.wanted
    machine.handle(Throttle(paused=True), 0.0)
    assert not machine.wanted


def test_paused_sweep_can_be_stopped():
    machine = begun(2)
    machine.handle(m.Prepared(0, ONE), 0.0)
    machine.handle(Throttle(paused=True), 0.0)
    assert machine.handle(m.StopAsked(), 0.0) == [m.Kill(0), m.Kill(1)]


def test_no_more_devices_than_the_limit_are_asked_for():
    machine = prepared(3)
    assert granted(machine, 0, "A") == [m.Go(0), m.TakeTicket(1, ONE)]
    assert machine.handle(Throttle(devices=1), 0.0) == [m.DropTicket(1)]
    assert machine.handle(m.Exited(0), 0.0) == [m.Release(0), m.TakeTicket(1, ONE), m.Conclude(0, False, None)]
    assert granted(machine, 1, "B") == [m.Go(1)]
    assert machine.handle(Throttle(devices=2), 0.0) == [m.TakeTicket(2, ONE)]


def test_lower_limit_waits_until_fewer_devices_are_in_use():
    machine = prepared(3)
    granted(machine, 0, "A")
    granted(machine, 1, "B")
    assert machine.handle(Throttle(devices=1), 0.0) == [m.DropTicket(2)]
    assert machine.handle(m.Exited(0), 0.0) == [m.Release(0), m.Conclude(0, False, None)]
    assert machine.handle(m.Exited(1), 0.0) == [m.Release(1), m.TakeTicket(2, ONE), m.Conclude(1, False, None)]


def test_job_that_needs_more_than_the_limit_lets_smaller_ones_pass():
    machine = begun(2)
    machine.handle(Throttle(devices=1), 0.0)
    assert machine.handle(m.Prepared(0, Request(2)), 0.0) == []
    assert machine.handle(m.Prepared(1, ONE), 0.0) == [m.TakeTicket(1, ONE)]


def test_jobs_that_share_get_only_devices_in_use_at_the_limit():
    machine = prepared(3, HALF)
    machine.handle(Throttle(devices=1), 0.0)
    assert granted(machine, 0, "A") == [m.Go(0), m.TakeTicket(1, HALF, frozenset("A"))]
    assert granted(machine, 1, "A") == [m.Go(1), m.TakeTicket(2, HALF, frozenset("A"))]
    assert machine.handle(Throttle(devices=2), 0.0) == [m.DropTicket(2), m.TakeTicket(2, HALF)]


def test_restricted_ticket_is_renewed_when_no_device_is_in_use_any_more():
    machine = prepared(2, HALF)
    machine.handle(Throttle(devices=1), 0.0)
    granted(machine, 0, "A")
    assert machine.handle(m.Exited(0), 0.0) == [
        m.DropTicket(1),  # first: the released device might be granted to it
        m.Release(0),
        m.TakeTicket(1, HALF),
        m.Conclude(0, False, None),
    ]


def test_jobs_without_devices_run_at_any_limit():
    machine = begun(1)
    machine.handle(Throttle(devices=1), 0.0)
    assert machine.handle(m.Prepared(0, Request(0)), 0.0) == [m.Go(0)]
