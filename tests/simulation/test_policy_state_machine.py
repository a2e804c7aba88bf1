"""Random histories of a pool: what the policy and the ledger in memory do is what a slow, obvious model says.

GPU_LAUNCHER_HISTORIES says how many, over all tests of this file together. With many, as in `make matrix`, they come
from plain random numbers instead of Hypothesis, which takes much longer, but makes what it finds small.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from gpu_launcher.errors import RequestError
from gpu_launcher.leases import DevicePreference, HeldLease, Ticket
from gpu_launcher.leases.grant_policy import Candidate, Demand, LeaseState, Snapshot, TicketState, decide, grant, waits
from gpu_launcher.model import MILLIONTHS, WHOLE, Device, DeviceKind, Owner, Request, Share
from tests.memory_ledger import MemoryLedger, MemoryPool

HISTORIES = int(os.environ.get("GPU_LAUNCHER_HISTORIES", "1500"))
MANY = 5000
"""From how many histories on Hypothesis is not used."""
pytestmark = pytest.mark.timeout(120 + HISTORIES // 10)

UUIDS = tuple("ABCDE")
OWNER = Owner(pid=1, user="ada", command="train.py")
NOW = 100.0
GIB = 1 << 30


def share_of_histories(part: float):
    """How often Hypothesis tries something that makes up this part of all histories."""
    return settings(
        max_examples=max(50, int(HISTORIES * part)), deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


def histories(part: float) -> Callable[[Callable[[Random], None]], Callable[..., None]]:
    """Check this part of all histories: each is what a function makes of random numbers."""

    def decorate(check: Callable[[Random], None]) -> Callable[..., None]:
        if HISTORIES < MANY:
            return share_of_histories(part)(given(st.randoms(use_true_random=False))(check))

        def test() -> None:
            for seed in range(int(HISTORIES * part)):
                try:
                    check(Random(seed))
                except Exception as error:
                    raise AssertionError(f"{check.__name__} fails with Random({seed})") from error

        test.__name__ = check.__name__
        test.__doc__ = check.__doc__
        return test

    return decorate


def random_machine(chance: Random) -> tuple[Candidate, ...]:
    """What a machine's devices are like."""
    return tuple(
        Candidate(uuid, chance.choice([None, 16 * GIB, 80 * GIB]), chance.choice([False, False, False, True]))
        for uuid in UUIDS
    )


def random_share(chance: Random) -> Share:
    kind = chance.randint(0, 3)
    if kind < 2:
        return WHOLE
    if kind == 2:
        part = chance.choice([0.2, 0.25, 1 / 3, 0.5, 0.7])
        return Request.of(part, chance.choice([None, None, 4 * GIB, 10 * GIB, 30 * GIB])).share
    return Share(0, chance.choice([4, 10, 16, 40]) * GIB)


def random_uuids(chance: Random) -> frozenset[str]:
    """At most two."""
    return frozenset(chance.sample(UUIDS, chance.randint(0, 2)))


def random_demand(chance: Random, machine: tuple[Candidate, ...], *, unavailable: bool = True, timed=None) -> Demand:
    """`timed`: the time limits to choose from, and then nothing is staggered."""
    candidates = tuple(chance.sample(machine, chance.randint(1, len(machine))))
    request = Request(
        chance.randint(1, len(candidates)),
        random_share(chance),
        timeout=chance.choice(timed or [None, 5.0, 10.0, 20.0, 40.0]),
        stagger=0.0 if timed else chance.choice([0.0, 0.0, 8.0]),
    )
    out = random_uuids(chance) if unavailable else frozenset()
    return Demand(request, candidates, out & {candidate.uuid for candidate in candidates})


def random_leases(chance: Random, machine: tuple[Candidate, ...]) -> list[LeaseState]:
    """Such as fit together."""
    found: list[LeaseState] = []
    for number in range(chance.randint(0, 5)):
        demand = random_demand(chance, machine, unavailable=False)
        fitting = [one for one in demand.candidates if fits(one, demand.request, held_on(one.uuid, found))]
        if len(fitting) >= demand.request.gpus:
            held = {one.uuid: one.share(demand.request) for one in fitting[: demand.request.gpus]}
            started = chance.choice([None, 85.0, 95.0, 100.0, 1000.0])
            ends = chance.choice([None, 95.0, 100.0, 105.0, 110.0, 120.0])
            found.append(LeaseState(f"lease {number}", held, started, ends))
    return found


def random_snapshot(chance: Random, *, plain: bool = False) -> Snapshot:
    """`plain`: whole devices, no time limits. The effect of others depends on who acts first."""
    machine = random_machine(chance)
    tickets = []
    for number in range(chance.randint(0, 6)):
        demand = random_demand(chance, machine)
        request = replace(demand.request, priority=chance.choice([-1, 0, 0, 2]))
        request = Request(request.gpus, priority=request.priority) if plain else request
        demand = replace(demand, request=request)
        tickets.append(TicketState(chance.randint(1, 9), f"ticket {number}", demand, request.priority))
    return Snapshot(tuple(random_leases(chance, machine)), tuple(tickets), NOW)


def permutation(chance: Random) -> list[str]:
    return chance.sample(UUIDS, len(UUIDS))


def held_on(uuid: str, leases: Sequence[LeaseState]) -> list[Share]:
    return [lease.shares[uuid] for lease in leases if uuid in lease.shares]


def fits(candidate: Candidate, request: Request, others: list[Share]) -> bool:
    """Part of a device is to be had if all parts of it are no more than the device."""
    share = request.share
    if candidate.memory is None:
        parts, memory = share.millionths or MILLIONTHS, 0
    else:
        parts, memory = share.millionths or share.memory * MILLIONTHS // candidate.memory, share.memory
    if candidate.exclusive and parts < MILLIONTHS:
        return False
    return parts + sum(other.millionths for other in others) <= MILLIONTHS and (
        candidate.memory is None or memory + sum(other.memory for other in others) <= candidate.memory
    )


def in_queue_order(snapshot: Snapshot) -> list[TicketState]:
    return sorted(snapshot.tickets, key=lambda ticket: (-ticket.priority, ticket.sequence, ticket.id))


def could_start(ticket: TicketState, snapshot: Snapshot, before: dict[str, tuple[TicketState, float]]) -> float:
    """The first moment at which there is room for it: trying them all.

    Leases of which the end is not known count as ended, and so do all that have not begun yet. `before` are the
    tickets that wait in front of it, and when they could start: before the first of those that want a device, it does
    not start there, unless it is over by then.
    """
    request = ticket.demand.request
    known = [lease for lease in snapshot.leases if lease.ends is not None and lease.ends > snapshot.now]
    for moment in sorted({snapshot.now, *(lease.ends for lease in known)}):
        left = [lease for lease in known if lease.ends > moment]
        able = []
        for one in ticket.demand.candidates:
            awaited = [start for earlier, start in before.values() if wants(earlier, one.uuid)]
            passed = is_over(request, snapshot, awaited) or min(awaited, default=moment) <= moment
            if passed and fits(one, request, held_on(one.uuid, left)):
                able.append(one)
        if len(able) >= request.gpus:
            return moment
    raise AssertionError("it fits into an empty pool")


def wants(ticket: TicketState, uuid: str) -> bool:
    return any(one.uuid == uuid and fits(one, ticket.demand.request, []) for one in ticket.demand.candidates)


def is_over(request: Request, snapshot: Snapshot, starts: list[float]) -> bool:
    """Whether it would be over, if it started now, when any of those start."""
    return request.timeout is not None and all(snapshot.now + request.timeout <= start for start in starts)


def expected(snapshot: Snapshot) -> dict[str, list[str]]:
    """The rule itself, in words.

    Of its candidates, a ticket may have those that have room, are available, where no job has only just started (if it
    minds), and that no earlier ticket waits for, or no longer by the time by which it is over. It gets all it asks
    for, if these are enough: parts of devices where the least is left, whole devices as it likes them.
    """
    answer: dict[str, list[str]] = {}
    taken = list(snapshot.leases)
    waiting: dict[str, tuple[TicketState, float]] = {}
    for ticket in in_queue_order(snapshot):
        demand, request = ticket.demand, ticket.demand.request
        may_have = []
        for one in demand.candidates:
            room = fits(one, request, held_on(one.uuid, taken))
            starts = [lease.started for lease in taken if one.uuid in lease.shares and lease.started is not None]
            just_started = request.stagger and starts and 0 <= snapshot.now - max(starts) < request.stagger
            awaited = [start for earlier, start in waiting.values() if wants(earlier, one.uuid)]
            over = is_over(request, snapshot, awaited)
            if room and not just_started and one.uuid not in demand.unavailable and (not awaited or over):
                may_have.append(one)
        helped_by_the_pool = [
            one for one in demand.candidates if fits(one, request, []) and one.uuid not in demand.unavailable
        ]
        if len(may_have) >= request.gpus:
            granted = {one.uuid: one.share(request) for one in may_have}
            if any(share.millionths < MILLIONTHS for share in granted.values()):
                left = {
                    uuid: MILLIONTHS - share.millionths - sum(other.millionths for other in held_on(uuid, taken))
                    for uuid, share in granted.items()
                }
                may_have.sort(key=lambda one: left[one.uuid])
            answer[ticket.id] = [one.uuid for one in may_have[: request.gpus]]
            taken.append(
                LeaseState(ticket.id, {uuid: granted[uuid] for uuid in answer[ticket.id]}, started=snapshot.now)
            )
        elif len(helped_by_the_pool) >= request.gpus:
            waiting[ticket.id] = ticket, could_start(ticket, snapshot, waiting)
    return answer


def listed(grants) -> dict[str, list[str]]:
    return {id: list(found) for id, found in grants.items()}


@histories(0.36)
def test_the_policy_does_what_the_model_says(chance: Random) -> None:
    snapshot = random_snapshot(chance)
    assert listed(decide(snapshot)) == expected(snapshot)


@histories(0.05)
def test_each_process_finds_for_itself_what_all_find_together(chance: Random) -> None:
    snapshot = random_snapshot(chance)
    grants = decide(snapshot)
    queue = in_queue_order(snapshot)
    for ticket in queue:
        assert grant(snapshot.leases, queue, ticket, snapshot.now) == grants.get(ticket.id)


@histories(0.1)
def test_grants_are_whole_and_no_device_gives_more_than_it_has(chance: Random) -> None:
    snapshot = random_snapshot(chance)
    grants = dict(decide(snapshot))
    if snapshot.tickets:
        first = in_queue_order(snapshot)[0]
        preference = DevicePreference(tuple(permutation(chance)), lambda one, two: (ord(one) * ord(two)) % 5)
        if (found := grant(snapshot.leases, [first], first, snapshot.now, preference)) is not None:
            grants = {first.id: found}
    tickets = {ticket.id: ticket.demand for ticket in snapshot.tickets}
    for id, found in grants.items():
        assert len(found) == tickets[id].request.gpus
        assert set(found) <= {candidate.uuid for candidate in tickets[id].candidates} - tickets[id].unavailable
    everything = [*snapshot.leases, *(LeaseState(id, found) for id, found in grants.items())]
    memory = {one.uuid: one.memory for ticket in snapshot.tickets for one in ticket.demand.candidates}
    for uuid, total in memory.items():
        held = held_on(uuid, everything)
        assert sum(share.millionths for share in held) <= MILLIONTHS
        assert total is None or sum(share.memory for share in held) <= total
        assert len(held) == 1 or not any(share.millionths == MILLIONTHS for share in held)


@histories(0.03)
def test_the_order_in_which_files_are_listed_changes_nothing(chance: Random) -> None:
    snapshot = random_snapshot(chance)
    leases, tickets = list(snapshot.leases), list(snapshot.tickets)
    chance.shuffle(leases)
    chance.shuffle(tickets)
    shuffled = Snapshot(tuple(leases), tuple(tickets), snapshot.now)
    assert list(decide(shuffled).items()) == list(decide(snapshot).items())
    assert waits(shuffled) == waits(snapshot)


@histories(0.03)
def test_the_names_of_the_devices_change_nothing(chance: Random) -> None:
    snapshot = random_snapshot(chance)
    name = dict(zip(UUIDS, permutation(chance), strict=True))

    def renamed(ticket: TicketState) -> TicketState:
        candidates = tuple(replace(one, uuid=name[one.uuid]) for one in ticket.demand.candidates)
        unavailable = frozenset(name[uuid] for uuid in ticket.demand.unavailable)
        return replace(ticket, demand=Demand(ticket.demand.request, candidates, unavailable))

    leases = tuple(
        replace(lease, shares={name[uuid]: share for uuid, share in lease.shares.items()}) for lease in snapshot.leases
    )
    grants = decide(Snapshot(leases, tuple(map(renamed, snapshot.tickets)), snapshot.now))
    assert listed(grants) == {id: [name[uuid] for uuid in found] for id, found in listed(decide(snapshot)).items()}


@histories(0.03)
def test_a_later_ticket_never_changes_what_the_earlier_ones_get(chance: Random) -> None:
    snapshot = random_snapshot(chance)
    late = random_demand(chance, random_machine(chance))
    later = TicketState(100, "later", late, priority=-5)
    grants = decide(replace(snapshot, tickets=(*snapshot.tickets, later)))
    grants.pop("later", None)
    assert grants == decide(snapshot)


@histories(0.03)
def test_what_is_decided_is_the_same_whoever_acts_first(chance: Random) -> None:
    snapshot = random_snapshot(chance, plain=True)
    grants = decide(snapshot)
    order = list(grants)
    chance.shuffle(order)
    leases, tickets = snapshot.leases, snapshot.tickets
    for id in order:
        assert decide(Snapshot(leases, tickets, snapshot.now))[id] == grants[id]
        leases = (*leases, LeaseState(id, grants[id], started=snapshot.now))
        tickets = tuple(ticket for ticket in tickets if ticket.id != id)
    assert decide(Snapshot(leases, tickets, snapshot.now)) == {}


@histories(0.03)
def test_nobody_starves(chance: Random) -> None:
    """The first that can be helped gets its devices as soon as they are free, so each round serves at least one."""
    snapshot = random_snapshot(chance)
    tickets = tuple(
        ticket
        for ticket in snapshot.tickets
        if sum(
            one.uuid not in ticket.demand.unavailable and fits(one, ticket.demand.request, [])
            for one in ticket.demand.candidates
        )
        >= ticket.demand.request.gpus
    )
    while tickets:
        round = Snapshot((), tickets, snapshot.now)
        grants = decide(round)
        assert in_queue_order(round)[0].id in grants
        tickets = tuple(ticket for ticket in tickets if ticket.id not in grants)


@histories(0.02)
def test_while_a_lease_cannot_be_read_nothing_is_granted(chance: Random) -> None:
    snapshot = random_snapshot(chance)
    unreadable = replace(snapshot, leases=(*snapshot.leases, LeaseState("?", None)))
    assert decide(unreadable) == {}
    assert all(wait.unreadable for wait in waits(unreadable).values())


@histories(0.02)
def test_a_ticket_that_cannot_be_read_holds_up_only_those_behind_it(chance: Random) -> None:
    snapshot = random_snapshot(chance)
    unreadable = TicketState(5, "", demand=None)
    earlier = tuple(ticket for ticket in snapshot.tickets if ticket.place < unreadable.place)
    grants = decide(replace(snapshot, tickets=(unreadable, *snapshot.tickets)))
    assert grants == decide(replace(snapshot, tickets=earlier))


@histories(0.03)
def test_whoever_is_not_granted_is_told_why(chance: Random) -> None:
    snapshot = random_snapshot(chance)
    grants, reasons = decide(snapshot), waits(snapshot)
    assert grants.keys() | reasons.keys() == {ticket.id for ticket in snapshot.tickets}
    assert not grants.keys() & reasons.keys()
    demand = {ticket.id: ticket.demand for ticket in snapshot.tickets}
    for id, wait in reasons.items():
        too_small = any(one.share(demand[id].request) is None for one in demand[id].candidates)
        assert wait.missing > 0
        assert wait.leases or wait.behind or wait.unavailable or wait.staggered or too_small


# Whole histories, to the end: who starts when.


@dataclass(frozen=True)
class Arrival:
    """A job: when it comes, what it wants, and how long it takes, which its time limit need not say."""

    time: float
    demand: Demand
    duration: float


def random_world(chance: Random) -> tuple[list[tuple[LeaseState, float]], list[Arrival]]:
    """Leases with the times of their ends, declared or not, and jobs in the order of their arrival."""
    machine = random_machine(chance)
    held = []
    for lease in random_leases(chance, machine):
        end = NOW + chance.randint(1, 30)
        held.append((replace(lease, started=None, ends=chance.choice([None, end, end])), end))
    jobs, time = [], NOW
    for _ in range(chance.randint(1, 7)):
        time += chance.choice([0.0, 0.0, 0.0, 1.0, 7.0])
        duration = float(chance.randint(1, 25))
        demand = random_demand(chance, machine, unavailable=False, timed=[None, duration, duration])
        if sum(one.share(demand.request) is not None for one in demand.candidates) >= demand.request.gpus:
            jobs.append(Arrival(time, demand, duration))
    return held, jobs


def starts(held: list[tuple[LeaseState, float]], jobs: list[Arrival]) -> list[float]:
    """When each job starts if all that can be granted is granted at once."""
    running = list(held)
    waiting = [(job, TicketState(number, f"{number}", job.demand)) for number, job in enumerate(jobs, 1)]
    started: dict[str, float] = {}
    now = NOW
    while waiting:
        running = [(lease, end) for lease, end in running if end > now]
        here = [(job, ticket) for job, ticket in waiting if job.time <= now]
        grants = decide(Snapshot(tuple(lease for lease, _ in running), tuple(ticket for _, ticket in here), now))
        for job, ticket in here:
            if ticket.id in grants:
                timeout = job.demand.request.timeout
                ends = None if timeout is None else now + timeout
                running.append((LeaseState(ticket.id, grants[ticket.id], now, ends), now + job.duration))
                started[ticket.id] = now
                waiting.remove((job, ticket))
                break  # the others look again, at what is there now
        else:
            later = [end for _, end in running] + [job.time for job, _ in waiting if job.time > now]
            now = min(later)
    return [started[f"{number}"] for number in range(1, len(jobs) + 1)]


@histories(0.2)
def test_a_job_starts_when_it_would_if_no_later_job_had_come(chance: Random) -> None:
    """So backfill delays nobody, nor does anything else that passes."""
    held, jobs = random_world(chance)
    together = starts(held, jobs)
    for number in range(1, len(jobs) + 1):
        assert together[number - 1] == starts(held, jobs[:number])[number - 1]


@histories(0.05)
def test_the_first_job_starts_by_the_declared_ends_though_others_pass_and_all_end_early(chance: Random) -> None:
    held, jobs = random_world(chance)
    if not jobs:
        return
    latest = starts(held, jobs[:1])[0]
    early = [(lease, end if lease.ends is None else NOW + chance.randint(0, int(end - NOW))) for lease, end in held]
    shorter = [
        job if job.demand.request.timeout is None else replace(job, duration=chance.randint(1, int(job.duration)))
        for job in jobs
    ]
    assert starts(early, shorter)[0] <= latest


randoms = st.randoms(use_true_random=False)


class PoolHistory(RuleBasedStateMachine):
    """Processes come, ask, claim, see devices in use by others, pass descriptors on, release and die in any order."""

    processes = Bundle("processes")
    tickets = Bundle("tickets")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.pool = MemoryPool()
        self.waiting: list[tuple[Ticket, MemoryLedger]] = []
        self.states: dict[str, TicketState] = {}
        self.held: list[tuple[HeldLease, MemoryLedger]] = []
        self.held_states: dict[str, LeaseState] = {}
        self.dead: set[int] = set()
        self.arrivals = itertools.count(1)

    def open(self) -> MemoryLedger:
        return MemoryLedger(self.pool, clock=lambda: self.now)

    @initialize(target=processes, chance=randoms)
    def begin(self, chance: Random):
        self.machine = random_machine(chance)
        return multiple(self.open(), self.open())

    @rule(target=processes)
    def start(self) -> MemoryLedger:
        return self.open()

    @rule(seconds=st.sampled_from([0.5, 5.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=tickets, ledger=processes, chance=randoms, priority=st.sampled_from([0, 0, 0, 1, -1]))
    def enqueue(self, ledger: MemoryLedger, chance: Random, priority: int):
        if id(ledger) in self.dead:
            return multiple()
        demand = random_demand(chance, self.machine, unavailable=False)
        request = replace(demand.request, priority=priority)
        devices = [
            Device(
                one.uuid, UUIDS.index(one.uuid), "simulated", DeviceKind.SIMULATED, one.memory, exclusive=one.exclusive
            )
            for one in demand.candidates
        ]
        try:
            ticket = ledger.enqueue(request, devices, OWNER)
        except RequestError:
            able = [one for one in demand.candidates if fits(one, request, [])]
            assert len(able) < request.gpus
            return multiple()
        state = TicketState(next(self.arrivals), ticket.id, replace(demand, request=request), priority)
        self.states[ticket.id] = state
        self.waiting.append((ticket, ledger))
        return ticket, ledger

    @rule(
        target=leases, one=tickets, unavailable=st.just(frozenset()) | st.frozensets(st.sampled_from(UUIDS), max_size=2)
    )
    def claim(self, one, unavailable):
        if one not in self.waiting:
            return multiple()
        ticket, ledger = one
        demand = replace(self.states[ticket.id].demand, unavailable=unavailable & set(ticket.candidates))
        self.states[ticket.id] = replace(self.states[ticket.id], demand=demand)
        should = expected(self.snapshot()).get(ticket.id)
        lease = ledger.claim(ticket, unavailable)
        assert (list(lease.uuids) if lease else None) == should
        if lease is None:
            return multiple()
        self.waiting.remove(one)
        self.held.append((lease, ledger))
        timeout = ticket.request.timeout
        ends = None if timeout is None else self.now + timeout
        self.held_states[lease.id] = LeaseState(lease.id, lease.shares, self.now, ends)
        return lease, ledger

    @rule(one=consumes(tickets))
    def cancel(self, one) -> None:
        if one in self.waiting:
            self.waiting.remove(one)
            one[1].cancel(one[0])

    @rule(one=consumes(leases))
    def release(self, one) -> None:
        if one in self.held:
            self.held.remove(one)
            one[1].release(one[0])

    @precondition(lambda self: len(self.dead) < 5)
    @rule(ledger=consumes(processes))
    def die(self, ledger: MemoryLedger) -> None:
        self.dead.add(id(ledger))
        self.waiting = [one for one in self.waiting if one[1] is not ledger]
        self.held = [one for one in self.held if one[1] is not ledger]
        ledger.close_in_child()

    def snapshot(self) -> Snapshot:
        return Snapshot(
            tuple(self.held_states[lease.id] for lease, _ in self.held),
            tuple(self.states[ticket.id] for ticket, _ in self.waiting),
            self.now,
        )

    @invariant()
    def no_device_gives_more_than_it_has(self) -> None:
        for one in getattr(self, "machine", ()):
            held = [lease.shares[one.uuid] for lease, _ in self.held if one.uuid in lease.shares]
            assert sum(share.millionths for share in held) <= MILLIONTHS
            assert one.memory is None or sum(share.memory for share in held) <= one.memory

    @invariant()
    def the_view_shows_what_lives(self) -> None:
        with self.open() as observer:
            view = observer.snapshot()
        assert [ticket.id for ticket in view.tickets] == [ticket.id for ticket in in_queue_order(self.snapshot())]
        assert {lease.id for lease in view.leases} == {lease.id for lease, _ in self.held}
        grants = expected(self.snapshot())
        assert {ticket.id for ticket in view.tickets if ticket.wait is None} == grants.keys()

    def teardown(self) -> None:
        self.pool.close()


TestPoolHistory = PoolHistory.TestCase
TestPoolHistory.settings = settings(share_of_histories(0.02), stateful_step_count=40)
