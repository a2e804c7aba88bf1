"""The policy by example."""

from __future__ import annotations

import time

import pytest

from gpu_launcher.leases.grant_policy import (
    Candidate,
    Demand,
    DevicePreference,
    LeaseState,
    Snapshot,
    TicketState,
    Wait,
    decide,
    grant,
    waits,
)
from gpu_launcher.model import MILLIONTHS, WHOLE, Request, Share


def ticket(sequence: int, candidates: str, request: Request | int, *, priority=0, memory=80, unavailable=""):
    wanted = Request(request) if isinstance(request, int) else request
    able = tuple(Candidate(uuid, memory) for uuid in candidates)
    return TicketState(sequence, f"ticket {sequence}", Demand(wanted, able, frozenset(unavailable)), priority)


def lease(uuids: str, share: Share = WHOLE, *, started: float | None = None, ends: float | None = None) -> LeaseState:
    return LeaseState(f"lease on {uuids}", dict.fromkeys(uuids, share), started, ends)


def granted(*parts: LeaseState | TicketState, now: float = 0.0) -> dict[str, str]:
    return {id: "".join(shares) for id, shares in decide(snapshot(*parts, now=now)).items()}


def snapshot(*parts: LeaseState | TicketState, now: float = 0.0) -> Snapshot:
    leases = tuple(part for part in parts if isinstance(part, LeaseState))
    return Snapshot(leases, tuple(part for part in parts if isinstance(part, TicketState)), now)


HALF, THIRD = Request.of(0.5), Request.of(1 / 3)


def test_an_empty_queue_grants_nothing():
    assert granted() == {}


def test_as_many_as_fit_are_granted_from_one_snapshot():
    parts = (ticket(3, "ABCD", 1), ticket(1, "ABCD", 2), ticket(2, "ABCD", 1))
    assert granted(*parts) == {"ticket 1": "AB", "ticket 2": "C", "ticket 3": "D"}


def test_a_ticket_that_waits_reserves_all_that_it_could_use():
    assert granted(lease("A"), ticket(1, "ABC", 3), ticket(2, "BC", 1), ticket(3, "CD", 1)) == {"ticket 3": "D"}


def test_of_equal_sequence_numbers_the_lower_id_comes_first():
    """They arise when a ticket's file was lost and written anew."""
    demand = Demand(Request(1), (Candidate("A"),))
    assert granted(TicketState(1, "b", demand), TicketState(1, "a", demand)) == {"a": "A"}


def test_a_candidate_that_is_named_twice_counts_once():
    assert granted(ticket(1, "AA", 2)) == {}


def test_the_higher_priority_goes_first_whenever_it_came():
    parts = (ticket(1, "A", 1, priority=-1), ticket(2, "A", 1), ticket(3, "A", 1, priority=5), ticket(4, "A", 1))
    assert granted(*parts) == {"ticket 3": "A"}
    assert granted(*parts[:2], parts[3]) == {"ticket 2": "A"}


def test_fractions_share_a_device_until_it_is_full():
    assert granted(*(ticket(n, "A", THIRD) for n in range(4))) == {f"ticket {n}": "A" for n in range(3)}
    assert granted(lease("A", HALF.share), ticket(1, "A", Request.of(0.51))) == {}


def test_a_whole_device_is_a_device_without_leases():
    assert granted(lease("A", Share(1)), ticket(1, "A", 1)) == {}
    assert granted(lease("A", Share(1)), ticket(1, "AB", 1)) == {"ticket 1": "B"}


def test_declared_memory_must_fit_though_the_fractions_do():
    quarter = Request.of(0.25, 50)
    assert granted(ticket(1, "A", quarter), ticket(2, "A", quarter)) == {"ticket 1": "A"}
    assert granted(ticket(1, "A", quarter), ticket(2, "A", Request.of(0.25, 30))) == {"ticket 1": "A", "ticket 2": "A"}


def test_by_memory_alone_as_many_share_a_device_as_have_room():
    request = Request.of(None, 20)
    assert len(granted(*(ticket(n, "A", request) for n in range(9)))) == 4
    assert granted(lease("A"), ticket(1, "A", request)) == {}
    assert granted(lease("A", HALF.share), *(ticket(n, "A", request) for n in range(9))).keys() == {
        "ticket 0",
        "ticket 1",
    }


def test_devices_that_do_not_report_their_memory_are_packed_by_count():
    request = Request.of(None, 20)
    parts = (ticket(1, "AB", request, memory=None), ticket(2, "AB", request, memory=None))
    assert decide(snapshot(*parts)) == {"ticket 1": {"A": WHOLE}, "ticket 2": {"B": WHOLE}}


def test_a_device_that_is_too_small_is_nothing_to_wait_for():
    small = Demand(Request.of(None, 60), (Candidate("A", 40), Candidate("B", 80)))
    assert granted(lease("B"), TicketState(1, "large", small), ticket(2, "A", 1)) == {"ticket 2": "A"}


def test_devices_of_exclusive_compute_mode_take_whole_shares_only():
    for request, found in ((HALF, "B"), (Request(1), "A")):
        demand = Demand(request, (Candidate("A", 80, exclusive=True), Candidate("B", 80)))
        assert granted(TicketState(1, "one", demand)) == {"one": found}


def test_fractions_go_where_the_least_is_left_so_that_whole_devices_stay_whole():
    held = (lease("B", Share(MILLIONTHS // 4)), lease("C", HALF.share))
    assert granted(*held, ticket(1, "ABC", HALF)) == {"ticket 1": "C"}
    assert granted(*held, ticket(1, "ABC", Request.of(0.6))) == {"ticket 1": "B"}
    assert granted(*held, ticket(1, "ABC", Request.of(0.8))) == {"ticket 1": "A"}


TIMED = Request(1, timeout=50.0)


def test_a_short_job_passes_where_it_is_over_before_the_one_it_passes_could_start():
    held, large = lease("A", ends=50.0), ticket(1, "AB", 2)
    assert granted(held, large, ticket(2, "B", TIMED)) == {"ticket 2": "B"}
    assert granted(held, large, ticket(2, "B", TIMED), now=1.0) == {}
    assert granted(held, large, ticket(2, "B", 1)) == {}


def test_a_lease_without_a_time_limit_may_end_at_any_moment():
    short = ticket(2, "B", TIMED)
    assert granted(lease("A"), ticket(1, "AB", 2), short) == {}
    assert granted(lease("A", ends=-1.0), ticket(1, "AB", 2), short) == {}
    # But it puts nothing forward that waits for another one as well.
    assert granted(lease("A", ends=50.0), lease("C"), ticket(1, "ABC", 3), short) == {"ticket 2": "B"}
    assert granted(lease("A", ends=50.0), lease("C"), ticket(1, "ABC", 2), short) == {}


def test_a_short_job_waits_if_it_would_hold_up_any_of_those_it_passes():
    parts = (lease("A", ends=99.0), ticket(1, "AB", 2), ticket(3, "B", TIMED))
    assert granted(*parts) == {"ticket 3": "B"}
    assert granted(*parts, lease("C", ends=49.0), ticket(2, "CB", 1)) == {}
    # But this one has to wait for B as long as the first one.
    assert granted(*parts, lease("C", ends=49.0), ticket(2, "CB", 2)) == {"ticket 3": "B"}


def test_who_waits_behind_the_first_is_passed_as_well():
    """Though all that the first one reserves is held, by leases that may end at any moment."""
    held = (lease("BC"), lease("D", ends=50.0))
    assert granted(*held, ticket(1, "BCD", 3), ticket(2, "AB", 2), ticket(3, "A", TIMED)) == {"ticket 3": "A"}
    assert granted(*held, ticket(1, "BC", 2), ticket(2, "AB", 2), ticket(3, "A", TIMED)) == {}


def test_what_passes_takes_no_more_than_it_can_give_back_in_time():
    """The one granted first may take the device any time later, so it puts off nothing."""
    assert granted(ticket(1, "A", TIMED), ticket(2, "AB", 2), ticket(3, "B", Request(1, timeout=10.0))) == {
        "ticket 1": "A"
    }


def test_starts_on_a_shared_device_are_spaced_out():
    request = Request.of(0.25, stagger=5.0)
    held = lease("A", HALF.share, started=10.0)
    assert granted(held, ticket(1, "A", request), now=14.9) == {}
    assert granted(held, ticket(1, "A", request), now=15.0) == {"ticket 1": "A"}
    assert granted(held, ticket(1, "AB", request), now=11.0) == {"ticket 1": "B"}
    assert granted(ticket(1, "A", request), ticket(2, "A", request), now=11.0) == {"ticket 1": "A"}
    assert granted(held, ticket(1, "A", Request.of(0.25)), now=11.0) == {"ticket 1": "A"}


def test_what_is_not_to_be_had_is_not_granted_and_not_kept_for_whom_it_would_not_help():
    assert granted(ticket(1, "AB", 1, unavailable="A"), ticket(2, "AB", 1, unavailable="A")) == {"ticket 1": "B"}
    assert granted(ticket(1, "AB", 2, unavailable="A"), ticket(2, "AB", 1, unavailable="A")) == {"ticket 2": "B"}
    # It would help the first one if the lease ended, so both are kept for it.
    parts = (lease("B"), ticket(1, "ABC", 2, unavailable="A"), ticket(2, "ABC", 1))
    assert granted(*parts) == {}


def grant_own(own: TicketState, preference: DevicePreference, *parts: LeaseState) -> str:
    found = grant(parts, [own], own, 0.0, preference)
    return "".join(found or ())


def test_a_claimant_chooses_among_what_is_free_for_it():
    own = ticket(1, "ABCD", 1)
    assert grant_own(own, DevicePreference(ranking=("C", "B"))) == "C"
    assert grant_own(own, DevicePreference(ranking=("C", "B")), lease("C")) == "B"
    assert grant_own(own, DevicePreference(ranking=("C", "B")), lease("BC")) == "A"
    assert grant_own(ticket(1, "ABCD", HALF), DevicePreference(ranking=("C",)), lease("B", HALF.share)) == "B"


@pytest.mark.parametrize("many", [False, True], ids=["all sets compared", "grown"])
def test_several_devices_are_the_best_connected_ones(many, monkeypatch):
    if many:
        monkeypatch.setattr("gpu_launcher.leases.grant_policy.MAX_SETS", 0)
    pairs = {frozenset("AC"): 3, frozenset("BD"): 3, frozenset("AB"): 2}

    def closeness(one: str, two: str) -> int:
        return pairs.get(frozenset((one, two)), 1)

    preference = DevicePreference(closeness=closeness)
    assert grant_own(ticket(1, "ABCD", 2), preference) == "AC"
    assert grant_own(ticket(1, "ABCD", 2), DevicePreference(ranking=tuple("BDAC"), closeness=closeness)) == "BD"
    assert grant_own(ticket(1, "ABCD", 2), preference, lease("C")) == "BD"
    assert grant_own(ticket(1, "ABCD", 2), preference, lease("CD")) == "AB"
    assert sorted(grant_own(ticket(1, "ABCD", 3), preference)) == sorted("ABC")
    assert grant_own(ticket(1, "ABCD", 4), preference) == "ABCD"


def test_the_queue_is_read_only_as_far_as_it_matters():
    def queue():
        yield ticket(1, "ABC", 3)
        pytest.fail("all is reserved by now")

    assert grant([lease("A")], queue(), ticket(9, "BC", 1), 0.0) is None
    assert grant([lease("A")], iter(()), ticket(9, "A", 1), 0.0) is None


def test_why_a_ticket_waits():
    parts = (
        lease("A"),
        ticket(1, "ABC", 3),
        ticket(2, "BCD", 1),
        ticket(3, "DE", 1, unavailable="E"),
        ticket(4, "E", 1, unavailable="E"),
        ticket(5, "AFG", 2),
    )
    assert waits(snapshot(*parts)) == {
        "ticket 1": Wait(1, leases=("lease on A",)),
        "ticket 3": Wait(1, behind=("ticket 2",), unavailable=("E",)),
        "ticket 4": Wait(1, behind=("ticket 3",), unavailable=("E",)),
    }
    assert waits(snapshot(LeaseState("?", None), ticket(1, "A", 1))) == {"ticket 1": Wait(1, unreadable=True)}


def test_a_thousand_tickets_are_decided_quickly():
    """A guard against quadratic growth, not a benchmark."""
    parts = snapshot(lease("A"), *(ticket(n, "ABCDEFGH", 8) for n in range(1000)))
    start = time.process_time()
    assert decide(parts) == {}
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("gpus", "memory", "count", "share"),
    [
        (0, None, 0, WHOLE),
        (3, None, 3, WHOLE),
        (2.0, None, 2, WHOLE),
        (1, 20, 1, Share(MILLIONTHS, 20)),
        (0.57, None, 1, Share(570_000)),
        (1 / 6, None, 1, Share(166_666)),
        (0.5, 20, 1, Share(500_000, 20)),
        (None, 20, 1, Share(0, 20)),
        (1e-9, None, 1, Share(1)),
    ],
)
def test_a_request_is_made_from_the_numbers_that_people_write(gpus, memory, count, share):
    assert Request.of(gpus, memory) == Request(count, share)


@pytest.mark.parametrize(
    ("gpus", "memory"), [(1.5, None), (-1, None), (-0.5, None), (None, None), (0, 20), (1, 0), (float("nan"), None)]
)
def test_what_is_no_request_cannot_be_made(gpus, memory):
    with pytest.raises(ValueError):  # noqa: PT011
        Request.of(gpus, memory)


@pytest.mark.parametrize(
    "fields", [{"timeout": 0.0}, {"stagger": -1.0}, {"priority": 10**6}, {"timeout": float("inf")}]
)
def test_what_is_no_condition_cannot_be_made(fields):
    with pytest.raises(ValueError):  # noqa: PT011
        Request(1, **fields)
