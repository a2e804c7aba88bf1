"""Which nodes are given back and asked for again, as a pure function of what is known about them and the time."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_launcher.nodes.scaling import (
    IDLE_SECONDS,
    RENEW_SECONDS,
    WANTED_SECONDS,
    Acquire,
    Drain,
    NodeState,
    Presence,
    Renew,
    Rest,
    Scaler,
)

RESTING, STARTING, OPEN = Presence.RESTING, Presence.STARTING, Presence.OPEN


def steps(scaler: Scaler, *nodes: NodeState, at: float) -> set[object]:
    return set(scaler.decide(nodes, at))


def test_idle_node_is_given_back_after_a_minute_unless_it_is_the_last():
    busy, idle = NodeState("busy", OPEN, jobs=1, at_once=1), NodeState("idle", OPEN, at_once=1)
    scaler = Scaler()
    assert steps(scaler, busy, idle, at=0.0) == set()
    assert steps(scaler, busy, idle, at=IDLE_SECONDS - 1) == set()
    assert steps(scaler, busy, idle, at=IDLE_SECONDS) == {Rest("idle")}
    assert steps(scaler, idle, at=IDLE_SECONDS) == set(), "it is the last"


def test_node_that_had_a_job_meanwhile_is_not_given_back():
    busy, node = NodeState("busy", OPEN, jobs=1), NodeState("a", OPEN)
    scaler = Scaler()
    scaler.decide([busy, node], 0.0)
    scaler.decide([busy, replace(node, jobs=1)], IDLE_SECONDS - 1)
    assert steps(scaler, busy, node, at=IDLE_SECONDS) == set()


def test_node_that_came_back_meanwhile_is_not_given_back():
    busy, node = NodeState("busy", OPEN, jobs=1), NodeState("a", OPEN)
    scaler = Scaler()
    scaler.decide([busy, node], 0.0)
    scaler.decide([busy], 1.0)
    assert steps(scaler, busy, node, at=IDLE_SECONDS) == set()


def test_other_machines_than_allocations_are_kept():
    scaler = Scaler()
    nodes = [NodeState("busy", OPEN, jobs=1), NodeState("ssh", OPEN, elastic=False)]
    scaler.decide(nodes, 0.0)
    assert scaler.decide(nodes, 1000 * IDLE_SECONDS) == []


def test_all_allocations_are_given_back_while_another_machine_is_there():
    scaler = Scaler()
    nodes = [NodeState("local", OPEN, elastic=False), NodeState("a", OPEN), NodeState("b", OPEN)]
    scaler.decide(nodes, 0.0)
    assert steps(scaler, *nodes, at=IDLE_SECONDS) == {Rest("a"), Rest("b")}


def test_requests_in_the_queue_are_withdrawn_when_no_job_needs_them():
    scaler = Scaler()
    one = NodeState("busy", OPEN, jobs=4, at_once=4)
    queued = [NodeState(name, STARTING, waiting=5) for name in "abc"]
    scaler.decide([one, *queued], 0.0)
    assert steps(scaler, one, *queued, at=IDLE_SECONDS) == {Rest("c")}, "two nodes can run five jobs"
    queued = [replace(node, waiting=math.inf) for node in queued]
    assert steps(scaler, one, *queued, at=2 * IDLE_SECONDS) == set()


def test_as_many_nodes_are_asked_for_as_jobs_wait_for():
    scaler = Scaler()
    nodes = [NodeState("busy", OPEN, jobs=4, at_once=4), NodeState("a", STARTING, waiting=9)]
    nodes += [NodeState(name, RESTING, waiting=9, at_once=4) for name in "bcd"]
    assert steps(scaler, *nodes, at=0.0) == set()
    scaler.decide(nodes, WANTED_SECONDS)
    assert steps(scaler, *nodes, at=2 * WANTED_SECONDS) == {Acquire("b"), Acquire("c")}


def test_node_that_ends_too_soon_is_renewed_when_it_is_idle():
    scaler = Scaler()
    node = NodeState("a", OPEN, at_once=4, jobs=1, too_late=1)
    assert steps(scaler, node, at=0.0) == set(), "it can run other jobs"
    node = replace(node, jobs=0)
    assert steps(scaler, node, at=1.0) == set()
    assert steps(scaler, node, at=1.0 + RENEW_SECONDS) == {Renew("a")}


def test_node_that_ends_too_soon_for_many_jobs_gets_no_more_and_is_renewed():
    scaler = Scaler()
    node = NodeState("a", OPEN, at_once=2, jobs=1, too_late=2)
    assert steps(scaler, node, at=0.0) == {Drain("a")}
    node = replace(node, draining=True)
    assert steps(scaler, node, at=1.0) == set()
    assert steps(scaler, replace(node, jobs=0, too_late=0), at=2.0) == {Renew("a")}


names = st.sampled_from("abcde")
states = st.builds(
    NodeState,
    names,
    st.sampled_from(Presence),
    elastic=st.booleans(),
    jobs=st.integers(0, 3),
    at_once=st.integers(0, 4),
    waiting=st.one_of(st.integers(0, 20), st.just(math.inf)),
    too_late=st.integers(0, 5),
    draining=st.booleans(),
)
clusters = st.lists(states, max_size=5, unique_by=lambda node: node.name)


@settings(max_examples=50)
@given(st.lists(st.tuples(clusters, st.floats(0, 100)), max_size=20))
def test_no_node_with_jobs_is_given_back_and_one_is_always_kept(history):
    scaler, now = Scaler(), 0.0
    idle: dict[str, float] = {}
    for nodes, seconds in history:
        now += seconds
        decided = scaler.decide(nodes, now)
        assert len({step.name for step in decided}) == len(decided), "at most one step for each node"
        known = {node.name: node for node in nodes}
        idle = {name: idle.get(name, now) for name, node in known.items() if node.presence is OPEN and node.jobs == 0}
        for step in decided:
            node = known[step.name]
            if isinstance(step, Acquire):
                assert node.presence is RESTING
                assert node.waiting > 0
            elif isinstance(step, Drain):
                assert node.presence is OPEN
            elif isinstance(step, Renew):
                assert node.presence is OPEN
                assert node.jobs == 0
            elif node.presence is OPEN:
                assert node.elastic
                assert now - idle[step.name] >= IDLE_SECONDS
            else:
                assert node.elastic
                assert node.presence is STARTING
        rested = {step.name for step in decided if isinstance(step, Rest)}
        present = {node.name for node in nodes if node.presence is not RESTING}
        assert not rested or rested < present


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.integers(0, 25),
    st.lists(st.sampled_from(Presence), min_size=5, max_size=5),
)
def test_with_jobs_that_do_not_change_nodes_settle_at_what_the_jobs_need(sizes, jobs, at_first):
    """Nodes that are asked for stay in the queue, so that exactly the requests follow from the jobs that wait."""
    here = {f"node-{number}": presence for number, presence in zip(range(len(sizes)), at_first, strict=False)}
    here = {name: STARTING if presence is OPEN else presence for name, presence in here.items()}
    at_once = dict(zip(here, sizes, strict=True))
    scaler, now, last = Scaler(), 0.0, -1.0
    while now < 6 * IDLE_SECONDS:
        nodes = [NodeState("ssh", OPEN, elastic=False, jobs=1)]
        nodes += [NodeState(name, where, at_once=at_once[name], waiting=jobs) for name, where in here.items()]
        for step in scaler.decide(nodes, now):
            here[step.name] = STARTING if isinstance(step, Acquire) else RESTING
            last = now
        now += 2.0
    assert last < 4 * IDLE_SECONDS, "it never settles"
    queued = [at_once[name] for name, where in here.items() if where is STARTING]
    assert sum(queued) >= min(jobs, sum(sizes)), "too few are asked for"
    assert all(sum(queued) - one < jobs or one < max(queued) for one in queued), "more are asked for than jobs need"
