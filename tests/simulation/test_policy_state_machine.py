"""Random histories of a pool: what the policy and the ledger in memory do is what a slow, obvious model says."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
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

from gpu_launcher.leases import Lease, MemoryLedger, MemoryPool, Ticket
from gpu_launcher.leases.policy import LeaseState, Snapshot, TicketState, decide
from gpu_launcher.model import Device, DeviceKind, Owner, Request

UUIDS = tuple("ABCDE")
OWNER = Owner(pid=1, user="ada", command="train.py")


def device(uuid: str) -> Device:
    return Device(uuid=uuid, index=UUIDS.index(uuid), name="simulated", kind=DeviceKind.SIMULATED)


@st.composite
def requests(draw: st.DrawFn) -> tuple[tuple[str, ...], int]:
    candidates = draw(st.lists(st.sampled_from(UUIDS), min_size=1, unique=True))
    return tuple(candidates), draw(st.integers(1, len(candidates)))


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    held = draw(st.lists(st.sampled_from(UUIDS), unique=True, max_size=4))
    cut = draw(st.integers(0, len(held)))
    leases = [LeaseState(f"lease {n}", tuple(part)) for n, part in enumerate((held[:cut], held[cut:])) if part]
    wanted = draw(st.lists(requests(), max_size=6))
    sequences = draw(st.lists(st.integers(1, 99), min_size=len(wanted), max_size=len(wanted)))
    tickets = [
        TicketState(sequence, f"ticket {n}", candidates, count)
        for n, (sequence, (candidates, count)) in enumerate(zip(sequences, wanted, strict=True))
    ]
    return Snapshot(tuple(leases), tuple(tickets))


def expected(snapshot: Snapshot) -> dict[str, set[str]]:
    """The rule itself, in words: of its candidates, a ticket may have what no lease holds, no earlier ticket is
    being given and no earlier ticket is waiting for; it gets the ones it likes best, if they are enough."""
    held = {uuid for lease in snapshot.leases for uuid in lease.uuids}
    queue = sorted(snapshot.tickets, key=lambda ticket: (ticket.sequence, ticket.id))
    answer: dict[str, set[str]] = {}
    for place, ticket in enumerate(queue):
        may_have = []
        for uuid in ticket.candidates:
            given = any(uuid in answer.get(earlier.id, ()) for earlier in queue[:place])
            awaited = any(uuid in earlier.candidates and earlier.id not in answer for earlier in queue[:place])
            if uuid not in held and not given and not awaited:
                may_have.append(uuid)
        if len(may_have) >= ticket.count:
            answer[ticket.id] = set(may_have[: ticket.count])
    return answer


@given(snapshots())
def test_the_policy_does_what_the_model_says(snapshot: Snapshot) -> None:
    assert {id: set(uuids) for id, uuids in decide(snapshot).items()} == expected(snapshot)


@given(snapshots())
def test_a_grant_is_whole_and_no_device_is_granted_twice(snapshot: Snapshot) -> None:
    grants = decide(snapshot)
    tickets = {ticket.id: ticket for ticket in snapshot.tickets}
    held = [uuid for lease in snapshot.leases for uuid in lease.uuids]
    given = [uuid for uuids in grants.values() for uuid in uuids]
    assert len(set(held + given)) == len(held) + len(given)
    for id, uuids in grants.items():
        assert len(uuids) == tickets[id].count
        assert set(uuids) <= set(tickets[id].candidates)


@given(snapshots(), st.randoms(use_true_random=False))
def test_the_order_in_which_files_are_listed_changes_nothing(snapshot: Snapshot, random) -> None:
    leases, tickets = list(snapshot.leases), list(snapshot.tickets)
    random.shuffle(leases)
    random.shuffle(tickets)
    assert decide(Snapshot(tuple(leases), tuple(tickets))) == decide(snapshot)


@given(snapshots(), st.permutations(UUIDS))
def test_the_names_of_the_devices_change_nothing(snapshot: Snapshot, others: list[str]) -> None:
    name = dict(zip(UUIDS, others, strict=True))
    renamed = Snapshot(
        tuple(LeaseState(lease.id, tuple(name[uuid] for uuid in lease.uuids)) for lease in snapshot.leases),
        tuple(
            TicketState(t.sequence, t.id, tuple(name[uuid] for uuid in t.candidates), t.count) for t in snapshot.tickets
        ),
    )
    grants = {id: tuple(name[uuid] for uuid in uuids) for id, uuids in decide(snapshot).items()}
    assert decide(renamed) == grants


@given(snapshots(), requests())
def test_a_later_ticket_never_changes_what_the_earlier_ones_get(snapshot: Snapshot, late) -> None:
    later = TicketState(100, "later", *late)
    grants = decide(Snapshot(snapshot.leases, (*snapshot.tickets, later)))
    grants.pop("later", None)
    assert grants == decide(snapshot)


@given(snapshots(), requests())
def test_a_lease_given_to_a_later_ticket_never_delays_an_earlier_one(snapshot: Snapshot, late) -> None:
    """Whatever the leases of now give back, the earlier ones are served as if the later one had never come."""
    grant = decide(Snapshot(snapshot.leases, (*snapshot.tickets, TicketState(100, "later", *late)))).get("later")
    if grant is None:
        return
    given = decide(snapshot)
    waiting = tuple(ticket for ticket in snapshot.tickets if ticket.id not in given)
    leases = (*snapshot.leases, *(LeaseState(id, uuids) for id, uuids in given.items()))
    for kept in itertools.chain.from_iterable(itertools.combinations(leases, n) for n in range(len(leases) + 1)):
        without = decide(Snapshot(kept, waiting))
        passed = decide(Snapshot((*kept, LeaseState("later", grant)), waiting))
        first = min(waiting, key=lambda ticket: (ticket.sequence, ticket.id), default=None)
        if first is not None:
            assert passed.get(first.id) == without.get(first.id)
        assert set(passed) == set(without)


@given(snapshots(), st.randoms(use_true_random=False))
def test_what_is_decided_is_the_same_whoever_acts_first(snapshot: Snapshot, random) -> None:
    grants = decide(snapshot)
    order = list(grants)
    random.shuffle(order)
    leases, tickets = snapshot.leases, snapshot.tickets
    for id in order:
        assert decide(Snapshot(leases, tickets))[id] == grants[id]
        leases = (*leases, LeaseState(id, grants[id]))
        tickets = tuple(ticket for ticket in tickets if ticket.id != id)
    assert decide(Snapshot(leases, tickets)) == {}


@given(snapshots())
def test_nobody_starves(snapshot: Snapshot) -> None:
    """The first in the queue gets its devices as soon as they are free, so each round of jobs serves at least one."""
    tickets = snapshot.tickets
    while tickets:
        grants = decide(Snapshot((), tickets))
        assert min(tickets, key=lambda ticket: (ticket.sequence, ticket.id)).id in grants
        tickets = tuple(ticket for ticket in tickets if ticket.id not in grants)


@given(snapshots())
def test_while_a_lease_cannot_be_read_nothing_is_granted(snapshot: Snapshot) -> None:
    assert decide(Snapshot((*snapshot.leases, LeaseState("?", None)), snapshot.tickets)) == {}


@given(snapshots())
def test_a_ticket_that_cannot_be_read_holds_up_only_those_behind_it(snapshot: Snapshot) -> None:
    unreadable = TicketState(50, "", candidates=None, count=0)
    earlier = tuple(ticket for ticket in snapshot.tickets if ticket.sequence < 50)
    grants = decide(Snapshot(snapshot.leases, (unreadable, *snapshot.tickets)))
    assert grants == decide(Snapshot(snapshot.leases, earlier))


class PoolHistory(RuleBasedStateMachine):
    """Processes come, ask, claim, pass descriptors on, release and die in any order."""

    processes = Bundle("processes")
    tickets = Bundle("tickets")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.pool = MemoryPool()
        self.waiting: list[tuple[Ticket, MemoryLedger]] = []
        self.held: list[tuple[Lease, MemoryLedger]] = []
        self.dead: set[int] = set()

    @initialize(target=processes)
    def begin(self):
        return multiple(MemoryLedger(self.pool), MemoryLedger(self.pool))

    @rule(target=processes)
    def start(self) -> MemoryLedger:
        return MemoryLedger(self.pool)

    @rule(target=tickets, ledger=processes, wanted=requests())
    def enqueue(self, ledger: MemoryLedger, wanted):
        if id(ledger) in self.dead:
            return multiple()
        candidates, count = wanted
        ticket = ledger.enqueue(Request(count), [device(uuid) for uuid in candidates], OWNER)
        assert all(ticket.sequence > earlier.sequence for earlier, _ in self.waiting)
        self.waiting.append((ticket, ledger))
        return ticket, ledger

    @rule(target=leases, one=tickets)
    def claim(self, one):
        if one not in self.waiting:
            return multiple()
        ticket, ledger = one
        should = expected(self.snapshot()).get(ticket.id)
        lease = ledger.claim(ticket)
        assert (set(lease.uuids) if lease else None) == should
        if lease is None:
            return multiple()
        self.waiting.remove(one)
        self.held.append((lease, ledger))
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
            tuple(LeaseState(lease.id, lease.uuids) for lease, _ in self.held),
            tuple(TicketState(t.sequence, t.id, t.candidates, t.count) for t, _ in self.waiting),
        )

    @invariant()
    def no_device_is_held_twice(self) -> None:
        held = [uuid for lease, _ in self.held for uuid in lease.uuids]
        assert len(held) == len(set(held))

    @invariant()
    def the_view_shows_what_lives(self) -> None:
        with MemoryLedger(self.pool) as observer:
            view = observer.snapshot()
        assert [ticket.id for ticket in view.tickets] == [ticket.id for ticket, _ in self.waiting]
        assert {lease.id for lease in view.leases} == {lease.id for lease, _ in self.held}

    def teardown(self) -> None:
        self.pool.close()


TestPoolHistory = PoolHistory.TestCase
TestPoolHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
