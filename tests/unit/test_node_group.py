"""Several nodes with agents played by the tests: who gets which job, and what becomes of the jobs of a lost node."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import select
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.events import GaveUp, JobRetried, JobStarted, NodesChanged, Notice, Outcome, OutOfContact
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.job import Cause, Job, JobResult, Refusal
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Ended, Opened, ThrottleConfirmed, Wanted
from gpu_launcher.jobs.outcome import classify_exit, left_by, not_started
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.source import AllOffered, Cancel, Exhausted, Offer, Stop, Throttle
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.nodes import group_jobs, group_scaling, member, node_group, scaling
from gpu_launcher.nodes.agent_messages import (
    Beat,
    Bye,
    ChannelData,
    ChannelEnd,
    EndAgent,
    HostedProgram,
    Leaving,
    Loaded,
    OfferWithChannel,
    OutputData,
    OutputFile,
    OutputsBegin,
    OutputsEnd,
    Setup,
    StopOutputs,
    Timing,
    hello,
)
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.nodes.frames import FrameStream
from gpu_launcher.nodes.member import MAX_FAILURES, Member
from gpu_launcher.nodes.node_group import NodeGroup
from gpu_launcher.nodes.remote_node import RemoteNode
from gpu_launcher.processes.messages import INTERRUPTED, ChannelClosedError, Report, channel, receive, send
from tests.unit.test_remote_node import BRIDGE
from tests.waiting import until

TIMING = Timing(beat=0.05, quiet=1e6, silence=1e6, lost=1e6)
"""Nodes are lost when their agents say so. No test depends on the time."""


class Program:
    """What the jobs would run."""


class Agent:
    """A node's agent, played by the test."""

    def __init__(self, directory: Path, name: str, devices: int = 2) -> None:
        self.name = name
        self.devices = simulated_devices(devices)
        self.heard: list[Any] = []
        self.beats = 0
        self.confirms = True
        """Whether it takes note of throttles."""
        self._listener = socket.socket(socket.AF_UNIX)
        address = directory / f"{name}.socket"
        self._listener.bind(str(address))
        self._listener.listen()
        self._listener.settimeout(60)
        self.command = (sys.executable, "-S", "-c", BRIDGE, str(address))
        self._connections: list[tuple[socket.socket, FrameStream]] = []

    @property
    def stream(self) -> FrameStream:
        return self._connections[-1][1]

    def connect(self) -> None:
        """Accept the connection of the command."""
        connection, _ = self._listener.accept()
        descriptor = os.dup(connection.fileno())
        self._connections.append((connection, FrameStream(descriptor, descriptor)))

    @property
    def called(self) -> bool:
        """Whether the command was started and waits to be accepted."""
        return bool(select.select([self._listener], [], [], 0)[0])

    def listen(self) -> None:
        """Receive what the head has sent, unless one of the two has closed the connection."""
        messages: list[Any] = []
        if self._connections and self.stream.fileno() >= 0:
            with contextlib.suppress(ChannelClosedError):
                messages = self.stream.receive()
        for message in messages:
            if message == Beat():
                self.beats += 1
            else:
                self.heard.append(message)
            if isinstance(message, Throttle) and self.confirms:
                self.stream.send(ThrottleConfirmed())

    def take(self, kind: type) -> Any:
        """Return the next message of this kind. It is removed."""
        found = next(message for message in self.heard if isinstance(message, kind))
        self.heard.remove(found)
        return found

    def close(self) -> None:
        for connection, stream in self._connections:
            stream.close()
            connection.close()
        self._listener.close()


class Group:
    """A group of nodes, and what it tells the head."""

    def __init__(self, directory: Path, agents: dict[str, Agent]) -> None:
        self.agents = agents
        self.told: list[Any] = []
        self.directory = directory
        self.reports = ReportFiles(directory)
        self.node = NodeGroup(
            [NodeSpec(name, agent.command, elastic=True) for name, agent in agents.items()],
            lambda: pytest.fail("no node is on this machine"),
            HostedProgram(Program(), as_proposed),  # type: ignore[arg-type]
            directory,
            method="auto",
            option="start_method",
            arguments=["program"],
            imports_script=True,
            timing=TIMING,
        )

    def turn(self) -> None:
        """Let the group and the agents receive what has arrived."""
        self.told += self.node.receive_ready()
        self.node.tick()
        for agent in self.agents.values():
            agent.listen()

    def until(self, condition: Callable[[], object], what: str = "it did not happen") -> None:
        """Take turns until the condition is true."""

        def turned() -> object:
            self.turn()
            return condition()

        until(turned, what)

    def begin(self, *, private: bool = False, **options: Any) -> None:
        """Begin a run in which the pools of all nodes are open. `private`: they do not share the sweep's directory."""
        self.begin_run(**options)
        for agent in self.agents.values():
            self.open(agent, private=private)
        self.node.open()

    def begin_run(self, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "devices": None,
            "request": None,
            "max_parallel": None,
            "grace": 10.0,
            "pool_dir": None,
            "busy_memory": None,
            "device_environment": DeviceEnvironment(),
        }
        self.node.say(BeginRun(Options(**{**defaults, **options}), self.reports, "program", shown=True, listed=True))

    def open(self, agent: Agent, *, private: bool = False) -> None:
        """Let an agent load the program and open its pool."""
        agent.connect()
        agent.stream.greet()
        agent.stream.send(hello())
        self.until(lambda: any(isinstance(message, Setup) for message in agent.heard), "no program")
        agent.take(Setup)
        agent.stream.send(Loaded(False, private=private))
        self.until(lambda: any(isinstance(message, BeginRun) for message in agent.heard), "no run")
        agent.take(BeginRun)
        agent.stream.send(Opened(agent.devices, len(agent.devices), "fork"))
        self.until(lambda: self.node._members[agent.name].pool is not None, "it did not join")

    def says(self, name: str, *messages: object) -> None:
        """Let a node say something, and wait until the group knows."""
        node = self.node._members[name].node
        for message in messages:
            self.agents[name].stream.send(message)
        before = node._stream.received  # type: ignore[union-attr]
        self.until(lambda: node._stream.received > before)  # type: ignore[union-attr]

    def gets(self, name: str, number: int) -> Job:
        """Wait until a node is offered a job."""
        agent = self.agents[name]

        def offers() -> list[Offer]:
            return [one for one in agent.heard if isinstance(one, Offer) and one.job.number == number]

        self.until(offers, f"{name} is not offered job {number}")
        (offer,) = offers()
        agent.heard.remove(offer)
        return offer.job

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close()
        self.node.close()


Start = Callable[..., Group]


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a group of nodes: `start("a", "b")`. All have two devices, or `start(a=1, b=4)`."""
    monkeypatch.setattr(node_group, "LOOK_SECONDS", 0.0)  # each turn looks at all nodes
    groups: list[Group] = []
    directory = tmp_path_factory.mktemp("g")  # the path of a socket is short

    def start(*names: str, **devices: int) -> Group:
        sizes = {**dict.fromkeys(names, 2), **devices}
        groups.append(Group(directory, {name: Agent(directory, name, count) for name, count in sizes.items()}))
        return groups[-1]

    yield start
    for group in groups:
        group.close()


def test_signs_of_life_do_not_wait_for_the_file_system(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    stalled, over = threading.Event(), threading.Event()

    def utime(path: Path) -> None:
        stalled.set()
        over.wait(60)

    monkeypatch.setattr(os, "utime", utime)
    group = start("a")
    try:
        group.begin()
        assert stalled.wait(60)
        agent = group.agents["a"]
        agent.listen()
        before = agent.beats
        group.until(lambda: agent.beats > before + 10, "signs of life wait for the file system")
    finally:
        over.set()


def job(number: int = 0) -> Job:
    return Job(number, f"n={number}", None)


def started(number: int = 0) -> JobStarted:
    return JobStarted(0.0, number, f"n={number}", simulated_devices(1), f"{number}/job.log")


def dealt_to_a(group: Group) -> None:
    """Let node a have job 0, and node b ask for one."""
    group.says("a", Wanted(1))
    group.node.say(Offer(job()))
    group.gets("a", 0)
    group.says("b", Wanted(1))


def results(group: Group) -> list[JobResult]:
    return [message.result for message in group.told if isinstance(message, Ended)]


REPORTS = {
    Outcome.COMPLETED: Report(ok=True, message=None, payload=b"value"),
    Outcome.PRUNED: Report(ok=False, pruned=True, message="was pruned", payload=b"pruned"),
    Outcome.FAILED: Report(ok=False, message="raised OSError", payload=b"error", origin="line 7"),
}


@pytest.mark.parametrize("heard", ["start", "nothing"])
@pytest.mark.parametrize("outcome", REPORTS)
def test_job_that_ended_on_a_lost_node_is_concluded_from_its_report(start: Start, outcome: Outcome, heard: str) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    if heard == "start":
        group.says("a", started())
    group.reports.path(0).write_bytes(REPORTS[outcome].dump(0))
    group.says("a", Bye())
    group.until(lambda: results(group), "no result")
    (result,) = results(group)
    report = REPORTS[outcome]
    assert (result.outcome, result.payload, result.message) == (outcome, report.payload, report.message)
    assert (result.origin, result.attempts) == (report.origin, 1)
    assert result.devices == (simulated_devices(1) if heard == "start" else ())
    assert result.cause is (Cause.EXCEPTION if outcome is Outcome.FAILED else None)
    group.node.say(Offer(job(1)))
    group.gets("b", 1)
    assert not any(isinstance(message, Offer) for message in group.agents["b"].heard), "it is run again"
    assert [message.number for message in group.told if isinstance(message, JobStarted)] == [0]


def test_job_that_failed_on_a_lost_node_is_retried_elsewhere(start: Start) -> None:
    group = start("a", "b")
    group.begin(failures=FailurePolicy(retries=1, retry_on=frozenset(Cause)))
    dealt_to_a(group)
    group.says("a", started())
    group.reports.path(0).write_bytes(REPORTS[Outcome.FAILED].dump(0))
    group.says("a", Bye())
    again = group.gets("b", 0)
    assert (again.attempts_before, again.failed_before) == (1, 1)
    assert not group.reports.path(0).exists()
    (retried,) = (message for message in group.told if isinstance(message, JobRetried))
    assert (retried.attempt, retried.attempts, retried.message) == (2, 2, "raised OSError")
    assert results(group) == []


KILLED = Report(ok=False, message="was killed by SIGTERM", payload=b"error", killed=True)


@pytest.mark.parametrize("end", ["leaves", "lost"])
def test_job_whose_command_was_killed_with_its_node_runs_elsewhere(start: Start, end: str) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", started())
    group.reports.path(0).write_bytes(KILLED.dump(0))
    if end == "lost":
        group.says("a", Bye())
    else:
        outcome, cause = classify_exit(KILLED, unwanted=False, timed_out=False, device_lost=False, out_of_memory=False)
        result = JobResult(0, "n=0", outcome, KILLED.payload, KILLED.message, (), 1.0, None, cause)
        group.says("a", Leaving("got SIGTERM"), Ended(result))
    again = group.gets("b", 0)
    assert (again.attempts_before, again.failed_before) == (1, 0)
    assert not group.reports.path(0).exists()
    assert results(group) == []


def test_what_all_nodes_say_when_they_open_their_pools_is_shown_once(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    for name in "ab":
        group.says(name, Notice(0.0, "2 devices are simulated"), Notice(0.0, f"said by {name} alone"))
        group.says(name, Wanted(1), Notice(0.0, "GPU 0 is lost"))

        def texts(name: str = name) -> list[str]:
            told = [message.text for message in group.told if isinstance(message, Notice)]
            return [text for text in told if text.startswith(f"{name}: ")]

        group.until(lambda texts=texts, name=name: f"{name}: GPU 0 is lost" in texts())  # type: ignore[misc]
        alike = [f"{name}: 2 devices are simulated"] if name == "a" else []
        assert texts() == [*alike, f"{name}: said by {name} alone", f"{name}: GPU 0 is lost"]


def test_job_that_moves_takes_its_attempts_along(start: Start) -> None:
    group = start("a", "b", "c")
    group.begin(failures=FailurePolicy(retries=3))
    dealt_to_a(group)
    retried = JobRetried(0.0, 0, "n=0", 1.0, "was killed", None, attempt=2, attempts=4, failed=1)
    group.says("a", started(), retried, started(), Bye())
    moved = group.gets("b", 0)
    assert (moved.attempts_before, moved.failed_before) == (2, 1)
    group.says("c", Wanted(1))
    group.says("b", started(), Bye())
    moved = group.gets("c", 0)
    assert (moved.attempts_before, moved.failed_before) == (3, 1)


def test_attempt_that_does_not_count_uses_no_retry_after_a_move(start: Start) -> None:
    group = start("a", "b")
    group.begin(failures=FailurePolicy(retries=1))
    dealt_to_a(group)
    retried = JobRetried(0.0, 0, "n=0", 1.0, "ran out of learned memory", None, attempt=2, attempts=3, failed=0)
    group.says("a", started(), retried, started(), Bye())
    moved = group.gets("b", 0)
    assert (moved.attempts_before, moved.failed_before) == (2, 0)


def test_job_that_is_not_started_before_its_node_is_lost_has_no_attempt(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", Bye())
    moved = group.gets("b", 0)
    assert (moved.attempts_before, moved.failed_before) == (0, 0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lost nodes be started again at once."""
    plan = Member.plan_restart

    def at_once(member: Member) -> None:
        plan(member)
        member.start_at = 0.0

    monkeypatch.setattr(Member, "plan_restart", at_once)


def gave_up(group: Group) -> list[GaveUp]:
    return [message for message in group.told if isinstance(message, GaveUp)]


def test_node_that_gave_up_is_not_started_again(start: Start, impatient: None) -> None:
    group = start("a")
    group.begin()
    group.says("a", GaveUp(0.0, "was not run: the fork server was killed 5 times"), Closed())
    group.until(lambda: gave_up(group), "the head is not told that no node is left")
    assert not group.agents["a"].called


def run_at(group: Group, name: str, number: int, cause: Cause | None) -> None:
    """Offer a job to a node that runs it."""
    group.says(name, Wanted(1))
    group.node.say(Offer(job(number)))
    group.gets(name, number)
    outcome = Outcome.COMPLETED if cause is None else Outcome.FAILED
    group.says(
        name, started(number), Ended(JobResult(number, f"n={number}", outcome, None, None, (), 1.0, None, cause))
    )


@pytest.mark.parametrize("cause", [Cause.CRASH, Cause.DEVICE_LOST])
def test_node_on_which_jobs_crash_that_run_elsewhere_is_set_aside(start: Start, cause: Cause) -> None:
    group = start("a", "b")
    group.begin()
    for number in range(3):
        run_at(group, "a", number, cause)
    for number in (3, 4):
        run_at(group, "b", number, None)
    group.says("a", Wanted(2))
    for number in (5, 6):
        group.node.say(Offer(job(number)))
        group.gets("a", number)
    group.says("a", started(5))
    run_at(group, "b", 7, None)
    said = "node a is set aside: 3 jobs crashed there, and none completed"
    group.until(lambda: said in [one.text for one in group.told if isinstance(one, Notice)], "it is not set aside")
    heard = group.agents["a"].heard
    group.until(lambda: Exhausted() in heard, "its run does not end")
    assert [one for one in heard if isinstance(one, Cancel)] == [Cancel(6, "was not started", unstarted=True)]
    group.says("b", Wanted(2))
    crash = JobResult(5, "n=5", Outcome.FAILED, None, "crashed", (), 1.0, None, cause=Cause.CRASH)
    group.says("a", Ended(replace(crash, number=6, outcome=Outcome.CANCELLED, cause=None)), Ended(crash), Closed())
    assert {group.gets("b", number).failed_before for number in (5, 6)} == {0}
    assert not group.agents["a"].called
    assert len(results(group)) == 6


@pytest.mark.parametrize("instead", ["none completed elsewhere", "one completed there", "jobs raised"])
def test_node_on_which_jobs_may_have_crashed_by_their_own_fault_is_kept(start: Start, instead: str) -> None:
    group = start("a", "b")
    group.begin()
    if instead == "one completed there":
        run_at(group, "a", 6, None)
    for number in range(3):
        run_at(group, "a", number, Cause.EXCEPTION if instead == "jobs raised" else Cause.CRASH)
    for number in (3, 4, 5):
        run_at(group, "b", number, Cause.CRASH if instead == "none completed elsewhere" else None)
    run_at(group, "a", 7, None)


def returns(group: Group) -> None:
    """Let node a come back after it was lost."""
    group.until(lambda: group.agents["a"].called, "it is not started again")
    group.open(group.agents["a"])


def loses(group: Group, number: int) -> None:
    """Let node a start a job, and be lost."""
    group.says("a", Wanted(1))
    if group.node._jobs.dealer.job(number) is None:
        group.node.say(Offer(job(number)))
    group.gets("a", number)
    group.says("a", started(number), Bye())


def test_node_that_completes_nothing_is_set_aside(start: Start, impatient: None) -> None:
    group = start("a")
    group.begin()
    for _ in range(MAX_FAILURES):
        loses(group, 0)
        returns(group)
    loses(group, 0)
    group.until(lambda: gave_up(group), "the head is not told that no node is left")


def test_node_that_completes_jobs_is_started_again_and_again(start: Start, impatient: None) -> None:
    group = start("a")
    group.begin()
    for number in range(MAX_FAILURES + 2):
        group.says("a", Wanted(1))
        group.node.say(Offer(job(number)))
        group.gets("a", number)
        result = JobResult(number, f"n={number}", Outcome.COMPLETED, b"value", None, (), 1.0, None)
        group.says("a", started(number), Ended(result), Bye())
        returns(group)
    assert len(results(group)) == MAX_FAILURES + 2
    assert not gave_up(group)


def test_lost_job_waits_for_a_node_that_has_not_lost_it(start: Start, impatient: None) -> None:
    group = start("a", "b")
    group.begin()
    group.says("b", Wanted(1))
    group.node.say(Offer(job(1)))
    group.gets("b", 1)
    loses(group, 0)
    returns(group)
    group.says("a", Wanted(2))
    group.node.say(Offer(job(2)))
    group.gets("a", 2)
    assert not any(isinstance(message, Offer) for message in group.agents["a"].heard), "it is where it was lost"
    group.says("b", Leaving("got SIGTERM"))
    group.gets("a", 0)


@pytest.mark.parametrize("by", ["user", "failures"])
def test_stop_does_not_kill_jobs_that_a_leaving_node_has_interrupted(start: Start, by: str) -> None:
    group = start("a", "b")
    group.begin(failures=FailurePolicy(most=1))
    dealt_to_a(group)
    group.says("a", Leaving("got SIGTERM"))
    if by == "user":
        group.node.say(Stop())
    else:
        group.node.say(Offer(job(1)))
        group.gets("b", 1)
        result = JobResult(1, "n=1", Outcome.FAILED, b"error", "raised OSError", (), 1.0, None, Cause.EXCEPTION)
        group.says("b", Ended(result))
    group.until(lambda: Stop() in group.agents["b"].heard, "node b is not told to stop")
    group.node.say(Stop())
    group.until(lambda: group.agents["b"].heard.count(Stop()) == 2, "node b is not told again")
    group.until(lambda: Stop() in group.agents["a"].heard, "node a is not told at the second stop")
    assert group.agents["a"].heard.count(Stop()) == 1


def test_sweep_waits_for_a_node_that_was_lost_before_others_came(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_group, "FIRST_NODE_SECONDS", 0.0)
    group = start("a")
    group.begin_run()
    group.open(group.agents["a"])
    group.says("a", Bye())
    assert group.node.open().devices == ()
    returns(group)
    group.says("a", Wanted(1))
    group.node.say(Offer(job()))
    group.gets("a", 0)


def test_jobs_that_were_started_when_the_last_node_was_lost_are_not_said_not_to_have_run(start: Start) -> None:
    group = start("a")
    group.begin()
    group.says("a", Wanted(2))
    for number in range(2):
        group.node.say(Offer(job(number)))
        group.gets("a", number)
    group.says("a", started(0), GaveUp(0.0, "was not run: the fork server was killed 5 times"), Bye())
    group.until(lambda: Closed() in group.told, "the run does not end")
    (result,) = results(group)
    assert (result.number, result.outcome, result.cause) == (0, Outcome.FAILED, Cause.CRASH)
    assert result.message == "was ended because its node was lost, and no node is left"
    assert result.unsupervised, "a search does not queue it again"
    assert not any("elsewhere" in message.text for message in group.told if isinstance(message, NodesChanged))


def test_jobs_of_a_node_whose_connection_is_lost_are_out_of_contact_until_it_is_given_up(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> list[tuple[frozenset[str], frozenset[int]]]:
        return [(one.nodes, one.jobs) for one in group.told if isinstance(one, OutOfContact)]

    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", started())
    assert told() == []
    group.agents["a"].close()
    group.until(told, "it is not told")
    assert told() == [(frozenset("a"), frozenset([0]))]
    monkeypatch.setattr(group.node._members["a"].node, "_timing", Timing(lost=0))
    group.gets("b", 0)
    assert told() == [(frozenset("a"), frozenset([0])), (frozenset(), frozenset())]


def test_sign_of_nodes_stays_while_jobs_of_a_silent_node_may_run(start: Start) -> None:
    group = start("a")
    group.begin()
    group.says("a", Wanted(1))
    group.node.say(Offer(job()))
    group.gets("a", 0)
    group.says("a", started())
    group.agents["a"].close()
    group.until(lambda: group.node._members["a"].silent, "the connection is not lost")
    group.node.say(Stop())
    group.until(lambda: any(isinstance(message, Closed) for message in group.told), "the run does not end")
    group.node.close()
    assert group.node._signs is not None
    assert group.node._signs.file is not None
    assert group.node._signs.file.exists()


def test_stop_says_that_jobs_of_a_silent_node_may_run(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    group.says("a", Wanted(3))
    for number in range(3):
        group.node.say(Offer(job(number)))
        group.gets("a", number)
    group.says("a", replace(started(0), pid=os.getpid()), started(2))
    group.agents["a"].close()
    group.until(lambda: group.node._members["a"].silent, "the connection is not lost")
    (notice,) = (message for message in group.told if isinstance(message, Notice))
    assert "node a lost its connection: its 2 jobs may still run there for " in notice.text
    group.reports.path(2).write_bytes(REPORTS[Outcome.COMPLETED].dump(2))
    group.node.say(Stop())
    group.says("b", Closed(None, True))
    group.until(lambda: any(isinstance(message, Closed) for message in group.told), "the run does not end")
    pids = {message.pid for message in group.told if isinstance(message, JobStarted)}
    assert pids == {None}, "the process is one of another machine"
    runs, offered, done = results(group)
    assert (runs.outcome, runs.message) == (Outcome.CANCELLED, "may still run on a, which cannot be reached")
    assert runs.duration is not None
    assert offered.outcome is Outcome.CANCELLED
    assert offered.message == "may have been started on a, which cannot be reached"
    assert (done.outcome, done.payload) == (Outcome.COMPLETED, b"value")
    assert isinstance(group.told[-1], Closed)


@pytest.mark.parametrize("was_started", [False, True])
def test_job_that_is_not_started_in_time_goes_to_an_idle_node(
    start: Start, monkeypatch: pytest.MonkeyPatch, was_started: bool
) -> None:
    monkeypatch.setattr(group_jobs, "LATE_SECONDS", 0.0)
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.node.say(Exhausted())
    group.until(lambda: any(isinstance(one, Cancel) for one in group.agents["a"].heard), "it is not taken back")
    assert group.agents["a"].take(Cancel) == Cancel(0, "was not started", unstarted=True)
    result = not_started(job(), 1, "was not started", cancelled=True)
    if was_started:
        result = left_by(job(), REPORTS[Outcome.COMPLETED], started(), 1, unwanted=False)
        group.says("a", started())
    group.says("a", Ended(result))
    if was_started:
        group.until(lambda: results(group), "no result")
        assert results(group) == [result]
        return
    group.gets("b", 0)
    for _ in range(3):
        group.turn()
    assert not any(isinstance(one, Cancel) for one in group.agents["b"].heard), "it is taken back twice"
    assert results(group) == []


def refusal(name: str) -> Ended:
    result = not_started(job(), 1, f"cannot be run: its request is for more than {name} has")
    result = replace(result, refused=Refusal.NEVER)
    return Ended(result)


def test_job_that_one_node_can_never_run_goes_to_another(start: Start) -> None:
    group = start("a", "b", "c")
    group.begin()
    dealt_to_a(group)
    group.says("a", refusal("a"), Wanted(9))
    group.gets("b", 0)
    group.says("b", refusal("b"), Wanted(9))
    for _ in range(20):
        group.turn()
    assert results(group) == [], "node c may be able to run it"
    group.says("c", Wanted(1))
    group.gets("c", 0)
    group.says("c", refusal("c"))
    group.until(lambda: results(group), "no result")
    assert results(group)[0].message == "cannot be run: its request is for more than c has"


def test_job_that_only_a_lost_node_could_run_fails(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "MAX_FAILURES", 0)
    group = start("a", "b")
    group.begin()
    group.says("a", Wanted(1))
    group.node.say(Offer(job()))
    group.gets("a", 0)
    group.says("a", refusal("a"))
    for _ in range(20):
        group.turn()
    assert results(group) == []
    group.says("b", Bye())
    group.until(lambda: results(group), "no result")
    assert results(group)[0].message == "cannot be run: its request is for more than a has"


@pytest.mark.parametrize("message", [INTERRUPTED, "raised OSError"])
def test_job_that_its_lost_node_interrupted_is_moved(start: Start, message: str) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", started())
    group.reports.path(0).write_bytes(Report(False, message, b"error").dump(0))
    if message != INTERRUPTED:
        group.says("a", Leaving("got SIGTERM"))
    group.says("a", Bye())
    group.gets("b", 0)
    assert results(group) == []


def test_job_that_fails_because_its_node_interrupts_it_is_moved(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", started(), Leaving("got SIGTERM"))
    result = JobResult(0, "n=0", Outcome.FAILED, b"error", "raised OSError", (), 1.0, None, Cause.EXCEPTION)
    group.says("a", Ended(result))
    group.gets("b", 0)
    assert results(group) == []


def test_job_that_fails_while_its_node_starts_no_more_jobs_is_not_moved(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", started(), GaveUp(0.0, "was not run"))
    result = JobResult(0, "n=0", Outcome.FAILED, b"error", "raised OSError", (), 1.0, None, Cause.EXCEPTION)
    group.says("a", Ended(result))
    group.until(lambda: results(group), "no result")
    assert results(group) == [result]


def test_messages_of_one_node_do_not_make_the_group_look_at_all(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    group = start("a", "b", "c")
    group.begin()
    looks: list[str] = []
    tick = RemoteNode.tick

    def counted(node: RemoteNode) -> None:
        looks.append(node.name)
        tick(node)

    monkeypatch.setattr(RemoteNode, "tick", counted)
    monkeypatch.setattr(node_group, "LOOK_SECONDS", math.inf)  # it looks once more at most
    for number in range(20):
        group.says("a", Notice(0.0, f"hello {number}"))
    assert "a: hello 19" in [one.text for one in group.told if isinstance(one, Notice)]
    assert looks.count("a") >= 20, "what was read may have to be answered"
    assert looks.count("b") <= 1
    group.says("b", Bye())
    group.until(lambda: [one for one in group.told if isinstance(one, NodesChanged)], "its end was not noticed")


LOG = "job.log"
FILES = (OutputsBegin(0, "0", 4, LOG, 1), OutputFile(0, LOG, 0o644), OutputData(0, b"said"))
ENDED = Ended(JobResult(0, "n=0", Outcome.COMPLETED, None, None, (), 1.0, None))


def received(group: Group) -> list[str]:
    """The names of files that the head has of the outputs of jobs, in their places or not."""
    assert group.node._signs is not None
    return [path.name for path in group.directory.rglob("*") if path.is_file() and path != group.node._signs.file]


def test_result_of_a_job_follows_its_outputs(start: Start) -> None:
    group = start("a", "b")
    group.begin(private=True)
    dealt_to_a(group)
    report = (OutputFile(0, None, 0o644), OutputData(0, REPORTS[Outcome.COMPLETED].dump(0)), OutputsEnd(0, None, 0))
    group.says("a", started(), *FILES, *report, ENDED)
    group.until(lambda: results(group), "no result")
    (result,) = results(group)
    assert (result.outcome, result.payload) == (Outcome.COMPLETED, b"value")
    assert (group.directory / "0" / LOG).read_text() == "said"


@pytest.mark.parametrize(("outcome", "becomes"), [("PRUNED", "PRUNED"), ("COMPLETED", "FAILED")])
def test_only_a_job_that_was_ended_because_it_is_pruned_has_no_report(start: Start, outcome: str, becomes: str) -> None:
    group = start("a", "b")
    group.begin(private=True)
    dealt_to_a(group)
    group.says("a", started(), *FILES, OutputsEnd(0, None, 0), Ended(replace(ENDED.result, outcome=Outcome[outcome])))
    group.until(lambda: results(group), "no result")
    assert [result.outcome for result in results(group)] == [Outcome[becomes]]


def test_job_whose_node_dies_while_it_sends_outputs_runs_again(start: Start) -> None:
    group = start("a", "b")
    group.begin(private=True)
    dealt_to_a(group)
    group.says("a", started(), *FILES)
    group.until(lambda: LOG in received(group), "nothing arrives")
    assert not (group.directory / "0").exists()
    group.says("a", Bye())
    again = group.gets("b", 0)
    assert (again.attempts_before, again.failed_before) == (1, 0)
    assert results(group) == []
    assert received(group) == []


def test_outputs_of_a_job_that_is_elsewhere_are_ignored(start: Start) -> None:
    group = start("a", "b")
    group.begin(private=True)
    dealt_to_a(group)
    group.says("b", *FILES, OutputsEnd(0, None, 0), Notice(0.0, "sent"))
    group.until(lambda: any(isinstance(message, Notice) for message in group.told), "nothing arrives")
    assert received(group) == []


def test_job_whose_outputs_do_not_arrive_fails_and_others_continue(start: Start) -> None:
    group = start("a", "b")
    group.begin(private=True)
    dealt_to_a(group)
    group.says("a", started(), *FILES, OutputFile(0, "../evil", 0o644))
    group.until(lambda: StopOutputs(0) in group.agents["a"].heard, "the node is not told")
    group.says("a", OutputsEnd(0, None, 0), ENDED)
    group.until(lambda: results(group), "no result")
    (result,) = results(group)
    assert (result.outcome, result.cause, result.payload) == (Outcome.FAILED, Cause.EXCEPTION, None)
    assert result.message is not None
    assert result.message.startswith("completed, but its outputs could not be fetched: '../evil' is not a path")
    assert received(group) == []


def turn_often(group: Group) -> None:
    """Let the group do what it would do now."""
    for _ in range(20):
        group.turn()


@pytest.mark.usefixtures("impatient")
def test_refused_job_waits_for_the_only_node_that_can_run_it_while_that_node_will_come_back(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", refusal("a"), Wanted(9))
    group.gets("b", 0)
    killed = JobResult(0, "n=0", Outcome.FAILED, None, "was ended", (), 1.0, None, Cause.CRASH)
    group.says("b", started(), Leaving("got SIGTERM"), Ended(killed))
    turn_often(group)
    group.says("b", Closed(None, True))
    turn_often(group)
    assert results(group) == []


@pytest.mark.usefixtures("impatient")
def test_job_that_another_node_has_lost_is_taken_back_for_it_when_it_is_idle(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_jobs, "LATE_SECONDS", 0.0)
    group = start("a", "b")
    group.begin()
    loses(group, 0)
    group.says("b", Wanted(1))
    group.gets("b", 0)
    returns(group)
    group.says("a", Wanted(2))
    group.until(lambda: any(isinstance(one, Cancel) for one in group.agents["b"].heard), "it is not taken back")


@pytest.mark.usefixtures("impatient")
def test_lost_job_that_no_other_node_has_room_for_runs_where_it_was_lost(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_jobs, "LATE_SECONDS", 0.0)
    group = start("a", "b")
    group.begin()
    loses(group, 0)
    returns(group)
    group.says("a", Wanted(1))
    group.gets("a", 0)


@pytest.mark.usefixtures("impatient")
def test_job_that_is_kept_back_does_not_keep_others_from_idle_nodes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_jobs, "LATE_SECONDS", 0.0)
    group = start("a", "b")
    group.begin()
    group.says("b", Wanted(1))
    group.node.say(Offer(job(1)))
    group.gets("b", 1)
    loses(group, 0)
    returns(group)
    group.says("a", Wanted(2))
    group.until(lambda: any(isinstance(one, Cancel) for one in group.agents["b"].heard), "it is not taken back")


def test_job_that_ran_out_of_time_on_a_node_that_gave_up_has_failed(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    late = JobResult(0, "n=0", Outcome.FAILED, None, "ran longer than its timeout", (), 1.0, None, Cause.TIMEOUT)
    group.says("a", started(), GaveUp(0.0, "was not run"), Ended(late))
    group.until(lambda: results(group), "no result")
    assert results(group) == [late]


# Nodes that come and go


@pytest.fixture
def scale_soon(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it when the nodes that are not needed are to be given back, and those that jobs wait for asked for."""

    def soon() -> None:
        monkeypatch.setattr(group_scaling, "SCALE_SECONDS", 0.0)
        for name in ("IDLE_SECONDS", "WANTED_SECONDS", "RENEW_SECONDS"):
            monkeypatch.setattr(scaling, name, 0.0)

    return soon


def ends(group: Group, name: str) -> None:
    """Wait until a node is asked to end, and let it end."""
    agent = group.agents[name]
    group.until(lambda: EndAgent() in agent.heard, f"{name} is not asked to end")
    agent.heard.remove(EndAgent())
    agent.stream.send(Bye())


def changes(group: Group) -> list[str]:
    return [message.text for message in group.told if isinstance(message, (NodesChanged, Notice))]


def completed(number: int = 0) -> Ended:
    return Ended(JobResult(number, f"n={number}", Outcome.COMPLETED, b"value", None, (), 1.0, None))


def test_idle_node_is_given_back_and_asked_for_again_when_a_job_waits(
    start: Start, scale_soon: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.says("a", started())
    scale_soon()
    ends(group, "b")
    assert "node b is given back, because no job needs it now" in changes(group)
    group.node.say(Offer(job(1)))
    group.until(lambda: group.agents["b"].called, "it is not asked for again")
    monkeypatch.setattr(scaling, "IDLE_SECONDS", 1e6)
    group.open(group.agents["b"])
    group.says("b", Wanted(1))
    group.gets("b", 1)


def test_nothing_is_left_here_of_a_node_that_is_given_back(start: Start, scale_soon: Callable[[], None]) -> None:
    group = start("a", "b")
    group.begin(private=True)
    dealt_to_a(group)
    report = (OutputFile(0, None, 0o644), OutputData(0, REPORTS[Outcome.COMPLETED].dump(0)), OutputsEnd(0, None, 0))
    group.says("a", started(), *FILES, *report, ENDED)
    group.until(lambda: results(group), "no result")
    group.says("b", Wanted(1))
    group.node.say(Offer(job(1)))
    group.gets("b", 1)
    scale_soon()
    ends(group, "a")
    assert not list(group.directory.rglob("outputs-*"))


def test_run_ends_while_a_node_is_given_back(start: Start, scale_soon: Callable[[], None]) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.node.say(Exhausted())
    scale_soon()
    group.until(lambda: EndAgent() in group.agents["b"].heard)
    group.says("a", started(), completed())
    group.until(lambda: Exhausted() in group.agents["a"].heard)
    group.says("a", Closed())
    group.until(lambda: Closed(None, False) in group.told, "the run does not end")
    assert results(group)[0].outcome is Outcome.COMPLETED


def test_last_node_may_be_lost_while_another_is_given_back(start: Start, scale_soon: Callable[[], None]) -> None:
    group = start("a", "b")
    group.begin()
    dealt_to_a(group)
    group.node.say(Exhausted())
    scale_soon()
    ends(group, "b")
    group.says("a", GaveUp(0.0, "was not run"), Bye())
    group.until(lambda: group.agents["b"].called, "it is not asked for again")
    assert not gave_up(group)
    group.open(group.agents["b"])
    group.says("b", Wanted(1))
    group.gets("b", 0)


def test_node_that_is_still_in_the_queue_is_withdrawn_when_no_job_needs_it(
    start: Start, scale_soon: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_group, "LATECOMER_SECONDS", 0.0)
    group = start("a", "b")
    group.begin_run()
    group.open(group.agents["a"])
    group.node.open()
    group.agents["b"].connect()  # as if Slurm had started nothing yet
    group.says("a", Wanted(2))
    group.node.say(Offer(job()))
    group.node.say(Exhausted())
    group.gets("a", 0)
    scale_soon()
    node = group.node._members["b"].node
    group.until(lambda: node.command_ended, "its command still runs")  # type: ignore[union-attr]
    assert "node b is given back, because no job needs it now" in changes(group)


def too_late(number: int = 0) -> Ended:
    result = not_started(job(number), 1, "cannot be run: its timeout is longer than its node can run jobs")
    return Ended(replace(result, refused=Refusal.TOO_LATE))


def test_node_that_ends_too_soon_for_a_job_is_renewed(
    start: Start, impatient: None, scale_soon: Callable[[], None]
) -> None:
    group = start("a")
    group.begin()
    group.says("a", Wanted(1))
    group.node.say(Offer(job()))
    group.gets("a", 0)
    group.says("a", too_late(), Wanted(1))
    turn_often(group)
    assert results(group) == []
    scale_soon()
    ends(group, "a")
    returns(group)
    group.says("a", Wanted(1))
    assert group.gets("a", 0).attempts_before == 0


def test_node_that_ends_too_soon_for_many_jobs_finishes_its_jobs_and_is_renewed(
    start: Start, impatient: None, scale_soon: Callable[[], None]
) -> None:
    group = start("a")
    group.begin()
    group.says("a", Wanted(3))
    for number in range(3):
        group.node.say(Offer(job(number)))
        group.gets("a", number)
    scale_soon()
    group.says("a", started(0), too_late(1), too_late(2))
    group.until(lambda: any("ends too soon for jobs that wait" in text for text in changes(group)), "it is not said")
    group.says("a", Wanted(2))
    group.node.say(Offer(job(3)))
    turn_often(group)
    assert not any(isinstance(message, (Offer, EndAgent)) for message in group.agents["a"].heard)
    group.says("a", completed(0))
    ends(group, "a")
    returns(group)
    group.says("a", Wanted(3))
    for number in (1, 2, 3):
        group.gets("a", number)


def test_node_is_renewed_as_long_as_jobs_run_on_it_even_if_they_fail(
    start: Start, impatient: None, scale_soon: Callable[[], None]
) -> None:
    group = start("a")
    group.begin()
    scale_soon()
    for number in range(MAX_FAILURES + 2):
        group.says("a", Wanted(1))
        if number == 0:
            group.node.say(Offer(job(number)))
        group.gets("a", number)
        failed = JobResult(number, "", Outcome.FAILED, None, "timed out", (), 1.0, None, Cause.TIMEOUT)
        group.says("a", started(number), Ended(failed), Wanted(1))
        group.node.say(Offer(job(number + 1)))
        group.gets("a", number + 1)
        group.says("a", too_late(number + 1))
        ends(group, "a")
        returns(group)
    assert len(results(group)) == MAX_FAILURES + 2


def test_job_fails_if_no_node_that_lasts_long_enough_can_be_there(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "MAX_FAILURES", 0)
    group = start("a")
    group.begin()
    group.says("a", Wanted(1))
    group.node.say(Offer(job()))
    group.gets("a", 0)
    group.says("a", too_late())
    group.until(lambda: results(group), "no result")
    assert results(group)[0].message == too_late().result.message


def throttles(group: Group, name: str) -> list[Throttle]:
    return [message for message in group.agents[name].heard if isinstance(message, Throttle)]


def test_limit_on_devices_is_dealt_to_the_nodes(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    group.node.say(Throttle(devices=3))
    # As long as it is not known that b uses only one device, a gets only one.
    group.until(lambda: throttles(group, "a") == [Throttle(devices=1), Throttle(devices=2)], "node a is not limited")
    group.until(lambda: throttles(group, "b") == [Throttle(devices=1)], "node b is not limited")
    group.node.say(Throttle(paused=True, devices=3))
    group.until(lambda: throttles(group, "b")[1:] == [Throttle(paused=True, devices=1)], "node b is not paused")
    group.says("a", Bye())
    group.until(
        lambda: throttles(group, "b")[2:] == [Throttle(paused=True, devices=2)], "it gets no part of the other's"
    )
    group.node.say(Throttle())
    group.until(lambda: throttles(group, "b")[3:] == [Throttle()], "node b is not continued")


@pytest.mark.parametrize("confirms", [True, False])
def test_node_that_joins_a_limited_sweep_is_limited_and_takes_nothing_from_others(start: Start, confirms: bool) -> None:
    group = start("a", "b")
    group.agents["b"].confirms = confirms
    group.begin_run()
    group.open(group.agents["a"])
    group.node.open()
    group.node.say(Throttle(devices=3))
    group.until(lambda: throttles(group, "a") == [Throttle(devices=2)], "node a is not limited")
    group.open(group.agents["b"])
    group.until(lambda: throttles(group, "b")[-1:] == [Throttle(devices=1)], "node b is not limited")
    assert throttles(group, "a") == [Throttle(devices=2)]


def last_limit(group: Group, name: str) -> int | None:
    return throttles(group, name)[-1].devices


def run_on_both(group: Group) -> None:
    """Let job 0 run on node a, and jobs 1 and 2 on the two devices of node b."""
    for number, name in enumerate("abb"):
        group.says(name, Wanted(1))
        group.node.say(Offer(job(number)))
        group.gets(name, number)
        devices = (group.agents[name].devices[number // 2],)
        group.says(name, replace(started(number), devices=devices))


def test_node_gets_its_part_of_the_limit_when_the_others_have_confirmed_theirs(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    group.agents["b"].confirms = False
    group.node.say(Throttle(devices=2))
    group.until(lambda: throttles(group, "b") == [Throttle(devices=0)], "node b is not limited")
    group.until(lambda: throttles(group, "a") == [Throttle(devices=0)], "node a may use what b may be using")
    for _ in range(20):
        group.turn()
    assert last_limit(group, "a") == 0
    group.says("b", ThrottleConfirmed())
    group.until(lambda: last_limit(group, "a") == 2, "node a gets no part")


def test_node_gets_its_part_of_the_limit_when_jobs_on_others_have_ended(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    run_on_both(group)
    group.node.say(Throttle(devices=2))
    group.until(lambda: throttles(group, "b") == [Throttle(devices=0)], "node b is not limited")
    group.until(lambda: throttles(group, "a") == [Throttle(devices=0)], "more devices are in use")
    group.says("a", completed(0))
    for _ in range(20):
        group.turn()
    assert last_limit(group, "a") == 0
    group.says("b", completed(1))
    group.until(lambda: last_limit(group, "a") == 1, "node a gets nothing of what is free")
    group.says("b", completed(2))
    group.until(lambda: last_limit(group, "a") == 2, "node a gets nothing of what is free")
    assert last_limit(group, "b") == 0


def test_part_of_a_silent_node_goes_to_others_when_it_is_lost(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    group = start("a", "b")
    group.begin()
    run_on_both(group)
    group.agents["b"].confirms = False
    group.node.say(Throttle(devices=2))
    group.until(lambda: throttles(group, "a") and throttles(group, "b"), "the nodes are not limited")
    group.agents["b"].close()
    group.until(lambda: group.node._members["b"].silent, "the connection is not lost")
    for _ in range(20):
        group.turn()
    assert last_limit(group, "a") == 0
    monkeypatch.setattr(group.node._members["b"].node, "_timing", Timing(lost=0))
    group.until(lambda: last_limit(group, "a") == 2, "node a gets no part")


def test_node_without_work_leaves_its_part_of_the_limit_to_others(start: Start) -> None:
    group = start("a", "b")
    group.begin()
    group.says("b", Wanted(1))
    group.node.say(Offer(job(0)))
    group.gets("b", 0)
    group.says("b", replace(started(0), devices=group.agents["b"].devices[:1]))
    group.node.say(Throttle(devices=2))
    group.until(lambda: throttles(group, "a") and throttles(group, "b"), "the limit is not dealt")
    group.until(lambda: (last_limit(group, "a"), last_limit(group, "b")) == (1, 0), "the limit is not dealt")
    group.node.say(AllOffered())
    group.says("b", JobRetried(0.0, 0, "n=0", 1.0, "failed", None, 2, 2, 1))
    group.until(lambda: (last_limit(group, "a"), last_limit(group, "b")) == (0, 2), "node b cannot run its job again")
    group.node.say(Offer(job(1)))  # the user runs it again
    group.until(lambda: (last_limit(group, "a"), last_limit(group, "b")) == (2, 0), "node a cannot ask for it")
    group.says("a", Wanted(1))
    group.gets("a", 1)


def test_node_without_a_part_of_the_limit_takes_no_job_that_waits(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_jobs, "LATE_SECONDS", 0.0)
    group = start("a", "b")
    group.begin()
    group.node.say(Throttle(devices=2))
    group.until(lambda: throttles(group, "b") == [Throttle(devices=0)], "node b is not limited")
    dealt_to_a(group)
    for _ in range(20):
        group.turn()
    assert not any(isinstance(message, Cancel) for message in group.agents["a"].heard), "job 0 is taken back"
    group.node.say(Throttle())
    group.until(lambda: any(isinstance(message, Cancel) for message in group.agents["a"].heard), "it is not taken back")


# Channels


Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def both_ends() -> Iterator[Ends]:
    """A channel: the head's end, and the job's end."""
    ends = channel()
    with ends[0], ends[1]:
        yield ends


def offer_with_channel(group: Group, both_ends: Ends) -> None:
    group.node.say(Offer(job()), (both_ends[1].fileno(),))


def gets_with_channel(group: Group, name: str) -> int:
    """Wait until a node is offered job 0. Returns the number of its channel."""
    agent = group.agents[name]
    group.until(lambda: any(isinstance(one, OfferWithChannel) for one in agent.heard), "no offer")
    channel_number: int = agent.take(OfferWithChannel).channel
    return channel_number


def hears(group: Group, both_ends: Ends) -> None:
    """Wait until the head can hear something in a channel."""
    group.until(lambda: select.select([both_ends[0]], [], [], 0)[0], "nothing is delivered")


def data(number: int, message: object) -> ChannelData:
    return ChannelData(number, pickle.dumps(message), last=True)


def ended() -> Ended:
    return Ended(JobResult(0, "n=0", Outcome.COMPLETED, b"", None, simulated_devices(1), 1.0, None))


def test_job_that_has_said_nothing_moves_with_its_channel(start: Start, both_ends: Ends) -> None:
    group = start("a", "b")
    group.begin()
    group.says("a", Wanted(1))
    offer_with_channel(group, both_ends)
    gets_with_channel(group, "a")
    group.says("a", started())
    group.says("b", Wanted(1))
    group.says("a", Bye())
    there = gets_with_channel(group, "b")
    assert results(group) == []
    group.says("b", data(there, "hello"))
    hears(group, both_ends)
    assert receive(both_ends[0], wait=False)[0] == "hello"
    send(both_ends[0], "and you")
    group.until(lambda: any(isinstance(one, ChannelData) for one in group.agents["b"].heard), "no answer")
    assert pickle.loads(group.agents["b"].take(ChannelData).data) == "and you"


def test_job_that_has_said_something_is_lost_with_its_node(start: Start, both_ends: Ends) -> None:
    group = start("a", "b")
    group.begin()
    group.says("a", Wanted(1))
    offer_with_channel(group, both_ends)
    there = gets_with_channel(group, "a")
    group.says("b", Wanted(1))
    group.says("a", data(there, "hello"))  # before it is known that the job has been started
    group.says("a", Bye())
    group.until(lambda: results(group), "no result")
    (result,) = results(group)
    assert (result.outcome, result.cause) == (Outcome.FAILED, Cause.CRASH)
    assert result.message == "was lost with node a, which has ended"
    assert not any(isinstance(one, OfferWithChannel) for one in group.agents["b"].heard)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.CANCELLED])
def test_job_that_has_said_something_does_not_move_from_a_node_that_ends(
    start: Start, both_ends: Ends, outcome: Outcome
) -> None:
    group = start("a", "b")
    group.begin()
    group.says("a", Wanted(1))
    offer_with_channel(group, both_ends)
    there = gets_with_channel(group, "a")
    group.says("b", Wanted(1))
    group.says("a", started(), data(there, "hello"), Leaving("got SIGTERM"))
    said = replace(ended().result, outcome=outcome, message="was interrupted", payload=None)
    group.says("a", Ended(said), ChannelEnd(there))
    group.until(lambda: results(group), "no result")
    (result,) = results(group)
    assert (result.outcome, result.cause) == (Outcome.CANCELLED, None)
    assert result.message == "was ended on a, which got SIGTERM and ends"
    assert not any(isinstance(one, OfferWithChannel) for one in group.agents["b"].heard)


def test_end_of_a_job_waits_for_its_last_words(start: Start, both_ends: Ends) -> None:
    group = start("a")
    group.begin()
    group.says("a", Wanted(1))
    offer_with_channel(group, both_ends)
    there = gets_with_channel(group, "a")
    group.says("a", started(), ended(), Closed(None), data(there, "last words"))
    hears(group, both_ends)
    group.turn()
    assert results(group) == []
    assert not any(isinstance(message, Closed) for message in group.told)
    group.says("a", ChannelEnd(there))
    group.until(lambda: results(group), "no result")
    assert receive(both_ends[0], wait=False)[0] == "last words"
    with pytest.raises(BlockingIOError):
        receive(both_ends[0], wait=False)


def test_what_a_job_says_after_its_result_is_dropped(start: Start, both_ends: Ends) -> None:
    """A node that cannot be reached when the run is stopped may still be heard later."""
    group = start("a", "b")
    group.begin()
    group.says("a", Wanted(1))
    offer_with_channel(group, both_ends)
    there = gets_with_channel(group, "a")
    group.says("a", started(), data(there, "hello"), ended())
    hears(group, both_ends)
    group.node._jobs.conclude_unreachable(group.node._members["a"])
    group.until(lambda: results(group), "no result")
    group.says("a", data(there, "late"), ChannelEnd(there))
    group.turn()
    assert len(results(group)) == 1
    assert receive(both_ends[0], wait=False)[0] == "hello"
    with pytest.raises(BlockingIOError):
        receive(both_ends[0], wait=False)


def test_only_the_node_that_gets_a_job_relays_its_channel(start: Start, both_ends: Ends) -> None:
    """An offer may arrive when the run of a node that ends is over. The node is still there, but drops the offer."""
    group = start("a", "b")
    group.begin()
    group.says("a", Wanted(1))
    offer_with_channel(group, both_ends)
    gets_with_channel(group, "a")
    group.says("b", Wanted(1))
    group.says("a", Leaving("got SIGTERM"), Closed(None))
    gets_with_channel(group, "b")
    send(both_ends[0], "hello")
    group.until(lambda: any(isinstance(one, ChannelData) for one in group.agents["b"].heard), "b does not get it")
    assert not any(isinstance(one, ChannelData) for one in group.agents["a"].heard)


def test_a_stop_waits_for_a_node_that_is_not_heard_for_a_while_until_the_second_stop(start, monkeypatch):
    group = start("a")
    group.begin()
    group.says("a", Wanted(1))
    group.node.say(Offer(job()))
    group.gets("a", 0)
    group.says("a", started())
    group.node.say(Stop())
    group.turn()

    monkeypatch.setattr(group.node._members["a"].node, "_heard", -1e9)
    group.turn()
    assert not results(group)
    assert Closed not in map(type, group.told)

    group.node.say(Stop())
    group.turn()
    (result,) = results(group)
    assert result.outcome is Outcome.CANCELLED
    assert Closed in map(type, group.told)
