"""Random histories of one sweep: whatever happens in whatever order, the machine keeps its promises."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_launcher.jobs import machine as m
from gpu_launcher.jobs.machine import IllegalTransitionError, Limits, Machine, Phase
from gpu_launcher.jobs.source import Throttle
from gpu_launcher.model import Request
from tests.machine_state import check_state

MOST_JOBS = 8


class Histories(RuleBasedStateMachine):
    """Plays the loop: does what the machine says, and tells it what may happen to processes and tickets.

    Knows of each job only what a loop knows: whether it has a process, a ticket, devices, a conclusion.
    """

    @initialize(
        jobs=st.integers(0, MOST_JOBS),
        devices=st.integers(1, 3),
        parallel=st.none() | st.integers(1, 3),
        without_devices=st.integers(1, 3),
        ahead=st.integers(1, 4),
        preparing=st.integers(1, 3),
        grace=st.sampled_from([0.0, 5.0]),
        more=st.booleans(),
    )
    def begin(self, jobs, devices, parallel, without_devices, ahead, preparing, grace, more):
        self.devices = devices
        self.limits = Limits(parallel, without_devices, ahead, preparing, grace, at_once=devices)
        self.jobs = list(range(jobs))
        self.machine = Machine(self.limits)
        self.more = True
        """Whether others may arrive."""
        self.cancelled: dict[int, float] = {}
        """Jobs that nobody wants any more, and since when."""
        self.now = 0.0
        self.processes: dict[int, str] = {}
        """Jobs with a process, and whether it is `preparing`, `prepared` or `running`."""
        self.dying: set[int] = set()
        """Those whose fork server is gone, or that have been killed."""
        self.requests: dict[int, int] = {}
        self.ticket: int | None = None
        self.starts: Counter[int] = Counter()
        self.runs: Counter[int] = Counter()
        self.held: set[int] = set()
        self.released: Counter[int] = Counter()
        self.concluded: Counter[int] = Counter()
        self.lost: set[int] = set()
        """Jobs that a lost server may have queued again."""
        self.stopped_at: float | None = None
        self.kill_at: float | None = None
        self.given_up = False
        self.throttle = Throttle()
        self.granting: int | None = None
        for number in self.jobs:
            self.follow(m.Arrived(number))
        if not more:
            self.no_more_will_arrive()

    def follow(self, stimulus):
        for instruction in self.machine.handle(stimulus, self.now):
            getattr(self, f"do_{type(instruction).__name__}")(instruction)

    # What the machine may say

    def do_StartProcess(self, instruction):
        number = instruction.number
        assert self.stopped_at is None, "nothing starts after a stop"
        assert not self.given_up
        assert number not in self.processes
        assert not self.concluded[number]
        assert number not in self.cancelled
        assert not self.starts[number] or number in self.lost, "only what a server lost is started again"
        assert not self.runs[number], "what has run is not started again"
        self.lost.discard(number)
        self.starts[number] += 1
        self.requests.pop(number, None)
        self.processes[number] = "preparing"

    def do_TakeTicket(self, instruction):
        assert self.stopped_at is None
        assert self.ticket is None, "one ticket at a time"
        assert self.processes[instruction.number] == "prepared"
        assert instruction.number not in self.dying
        assert instruction.request == Request(self.requests[instruction.number])
        assert 1 <= instruction.request.gpus <= self.devices
        assert not self.throttle.paused
        used = sum(self.requests[number] for number in self.held)
        assert self.throttle.devices is None or used + instruction.request.gpus <= self.throttle.devices
        self.ticket = instruction.number

    def do_DropTicket(self, instruction):
        assert self.ticket == instruction.number
        self.ticket = None

    def do_Go(self, instruction):
        number = instruction.number
        assert self.stopped_at is None, "nothing runs after a stop"
        assert not self.given_up
        assert not self.throttle.paused or self.granting == number
        assert self.processes[number] == "prepared"
        assert number not in self.dying
        self.processes[number] = "running"
        self.runs[number] += 1
        assert self.runs[number] == 1, "no job runs twice"
        if self.requests[number]:
            assert number in self.held

    def do_Interrupt(self, instruction):
        assert self.stopped_at == self.now
        assert self.processes[instruction.number] == "running"

    def do_Kill(self, instruction):
        self.dying.add(instruction.number)
        assert instruction.number in self.processes
        too_much = self.requests.get(instruction.number, 0) > self.devices
        reason = too_much or self.stopped_at is not None or self.given_up or instruction.number in self.cancelled
        assert reason, "nobody is killed without a reason"
        if self.stopped_at is None and instruction.number not in self.cancelled:
            assert self.processes[instruction.number] != "running", "what runs goes on"

    def do_Terminate(self, instruction):
        assert self.cancelled[instruction.number] == self.now
        assert self.processes[instruction.number] == "running"

    def do_Release(self, instruction):
        self.released[instruction.number] += 1
        assert instruction.number in self.held
        self.held.remove(instruction.number)

    def do_Conclude(self, instruction):
        number = instruction.number
        self.concluded[number] += 1
        assert number not in self.processes
        assert number not in self.held, "devices are free before results are read"
        assert instruction.stopped == (self.stopped_at is not None)
        if self.given_up and not self.runs[number] and self.stopped_at is None:
            assert instruction.problem is not None
        assert instruction.cancelled == (number in self.cancelled)
        unusual = self.given_up or number in self.cancelled
        if self.requests.get(number, 0) > self.devices and instruction.problem is not None and not unusual:
            assert instruction.problem == "cannot be run: its request is too large"

    # What may happen

    @precondition(lambda self: self.machine.wanted > 0 and len(self.jobs) < 2 * MOST_JOBS)
    @rule()
    def a_job_arrives(self):
        number = len(self.jobs)
        self.jobs.append(number)
        self.follow(m.Arrived(number))

    @precondition(lambda self: self.more)
    @rule()
    def no_more_will_arrive(self):
        self.more = False
        self.follow(m.NoMore())
        assert self.machine.wanted == 0

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def a_job_is_not_wanted_any_more(self, data):
        number = data.draw(st.sampled_from(self.jobs))
        if not self.concluded[number]:
            self.cancelled.setdefault(number, self.now)
        self.follow(m.Cancel(number, "is not wanted"))

    @precondition(lambda self: "preparing" in self.processes.values())
    @rule(data=st.data(), gpus=st.integers(0, 4))
    def a_job_is_prepared(self, data, gpus):
        number = data.draw(st.sampled_from(sorted(n for n, phase in self.processes.items() if phase == "preparing")))
        self.processes[number] = "prepared"
        self.requests[number] = gpus
        self.follow(m.Prepared(number, Request(gpus), "too large" if gpus > self.devices else None))

    @precondition(lambda self: self.ticket is not None)
    @rule()
    def the_ticket_is_granted(self):
        number, self.ticket = self.ticket, None
        self.held.add(number)
        self.granting = number
        self.follow(m.LeaseGranted(number, frozenset(f"{number}.{place}" for place in range(self.requests[number]))))
        self.granting = None

    @precondition(lambda self: self.processes)
    @rule(data=st.data())
    def a_job_ends(self, data):
        self.ends(data.draw(st.sampled_from(sorted(self.processes))))

    @precondition(lambda self: self.dying & self.processes.keys())
    @rule()
    def what_is_dying_dies(self):
        for number in sorted(self.dying & self.processes.keys()):
            if number in self.processes and number in self.dying:
                self.ends(number)

    def ends(self, number, problem=None):
        del self.processes[number]
        self.dying.discard(number)
        self.follow(m.Exited(number, problem))

    @rule(paused=st.booleans(), devices=st.none() | st.integers(1, 3))
    def the_user_throttles(self, paused, devices):
        self.throttle = Throttle(paused, devices)
        self.follow(self.throttle)

    @rule()
    def the_fork_server_is_killed(self):
        self.dying |= self.processes.keys()
        self.lost |= {number for number, phase in self.processes.items() if phase != "running"}
        self.follow(m.ServerLost())

    @precondition(lambda self: "preparing" in self.processes.values())
    @rule(data=st.data())
    def a_job_cannot_be_started(self, data):
        number = data.draw(st.sampled_from(sorted(n for n, phase in self.processes.items() if phase == "preparing")))
        self.ends(number, "too many open files")

    @rule()
    def the_loop_gives_up(self):
        self.given_up = True
        self.follow(m.GiveUp("was not run"))
        if self.stopped_at is None:
            assert all(phase == "running" or n in self.dying for n, phase in self.processes.items())

    @rule()
    def the_user_wants_to_stop(self):
        if self.stopped_at is None:
            self.stopped_at = self.now
            self.follow(m.StopAsked())
            self.kill_at = self.now + self.limits.grace
            assert self.machine.deadline <= self.kill_at
        else:
            self.kill_at = None
            self.follow(m.StopAsked())
            assert self.dying == self.processes.keys(), "the second stop spares nobody"

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.follow(m.Tick())
        if self.kill_at is not None and self.now >= self.kill_at:
            self.kill_at = None
            assert self.dying == self.processes.keys(), "the end of the grace period spares nobody"
        late = {
            n for n, since in self.cancelled.items() if n in self.processes and self.now >= since + self.limits.grace
        }
        self.follow(m.Tick())  # what is due together with the end of the grace period
        assert late <= self.dying

    @rule(number=st.integers(0, MOST_JOBS - 1), kind=st.sampled_from(["prepared", "granted", "exited"]))
    def what_cannot_happen_raises_and_changes_nothing(self, number, kind):
        assume(number in self.jobs)
        phase = self.processes.get(number)
        possible = {"prepared": phase == "preparing", "granted": self.ticket == number, "exited": phase is not None}
        assume(not possible[kind])
        stimulus = {
            "prepared": m.Prepared(number, Request(1)),
            "granted": m.LeaseGranted(number),
            "exited": m.Exited(number),
        }
        with pytest.raises(IllegalTransitionError):
            self.machine.handle(stimulus[kind], self.now)

    # What always holds

    @invariant()
    def no_more_happens_at_once_than_the_limits_allow(self):
        phases = Counter(self.processes.values())
        running = [number for number, phase in self.processes.items() if phase == "running"]
        waiting = self.ticket is not None
        if self.limits.parallel is not None:
            assert len(running) + waiting <= self.limits.parallel
        assert sum(self.requests[number] == 0 for number in running) <= self.limits.without_devices
        assert phases["preparing"] + phases["prepared"] <= self.limits.ahead
        assert phases["preparing"] <= self.limits.preparing

    @invariant()
    def the_state_is_consistent(self):
        check_state(self.machine)

    @invariant()
    def the_machine_knows_what_is_going_on(self):
        for number in self.jobs:
            phase = self.machine.phase(number)
            if number in self.processes:
                assert phase.name.lower() == self.processes[number]
            else:
                assert phase is (Phase.ENDED if self.concluded[number] else Phase.QUEUED)
        assert self.machine.running() == sorted(n for n, phase in self.processes.items() if phase == "running")
        assert self.machine.stopping == (self.stopped_at is not None)

    @invariant()
    def more_jobs_are_wanted_while_none_waits_and_not_more_than_can_run(self):
        phases = Counter(self.processes.values())
        if self.machine.wanted:
            assert self.more
            assert not phases["prepared"], "of so few devices"
            assert self.machine.wanted <= max(1, self.devices - phases["running"] - phases["preparing"])

    @invariant()
    def devices_are_held_by_those_who_run_and_by_nobody_else(self):
        assert self.held == {n for n, phase in self.processes.items() if phase == "running" and self.requests[n] > 0}

    @invariant()
    def every_job_is_concluded_at_most_once_and_the_end_is_when_all_are(self):
        assert all(count == 1 for count in self.concluded.values())
        coming = self.more and self.stopped_at is None and not self.given_up
        assert self.machine.finished == (len(self.concluded) == len(self.jobs) and not coming)

    @invariant()
    def nothing_waits_for_nothing(self):
        """Unless the sweep is at its end, something is under way that will move it on."""
        if self.throttle.paused:
            return
        if not self.machine.finished and not self.processes and not self.machine.wanted:
            raise AssertionError("jobs are queued, and nobody starts them")
        healthy = {n for n, phase in self.processes.items() if n not in self.dying}
        most = self.devices if self.throttle.devices is None else self.throttle.devices
        prepared = {n for n in healthy if self.processes[n] == "prepared" and self.requests[n] <= most}
        moving = self.ticket is not None or self.dying or any(self.processes[n] == "running" for n in healthy)
        still = self.stopped_at is None and not self.given_up
        if prepared and not moving and "preparing" not in self.processes.values() and still:
            raise AssertionError(f"jobs {prepared} wait for nothing")

    def teardown(self):
        """Play the history to its end, in which every job ends."""
        if self.more:
            self.no_more_will_arrive()
        self.the_user_throttles(False, None)
        for _ in range(20 * MOST_JOBS):
            if self.machine.finished:
                break
            if self.ticket is not None:
                self.the_ticket_is_granted()
            elif preparing := [n for n in self.processes if self.processes[n] == "preparing" and n not in self.dying]:
                self.processes[preparing[0]] = "prepared"
                self.requests[preparing[0]] = 1
                self.follow(m.Prepared(preparing[0], Request(1)))
            else:
                self.ends(min(self.processes))
        assert self.machine.finished
        assert self.concluded == Counter(self.jobs)
        assert not self.held
        assert self.ticket is None
        assert all(self.released[n] == (self.runs[n] > 0 and self.requests[n] > 0) for n in self.jobs)


# On a busy machine, old versions of Hypothesis take the time that others take from them for a fault of the test.
Histories.TestCase.settings = settings(
    max_examples=300, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
Histories.TestCase.pytestmark = [pytest.mark.timeout(900)]
TestHistories = Histories.TestCase
