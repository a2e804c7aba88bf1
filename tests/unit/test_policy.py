"""The policy by example."""

from __future__ import annotations

import time

from gpu_launcher.leases.policy import LeaseState, Snapshot, TicketState, decide


def ticket(sequence: int, candidates: str, count: int) -> TicketState:
    return TicketState(sequence, f"ticket {sequence}", tuple(candidates), count)


def test_an_empty_queue_grants_nothing():
    assert decide(Snapshot((), ())) == {}


def test_as_many_as_fit_are_granted_from_one_snapshot():
    snapshot = Snapshot((), (ticket(3, "ABCD", 1), ticket(1, "ABCD", 2), ticket(2, "ABCD", 1)))
    assert decide(snapshot) == {"ticket 1": ("A", "B"), "ticket 2": ("C",), "ticket 3": ("D",)}


def test_a_ticket_that_waits_reserves_all_that_it_could_use():
    snapshot = Snapshot((LeaseState("lease", ("A",)),), (ticket(1, "ABC", 3), ticket(2, "BC", 1), ticket(3, "CD", 1)))
    assert decide(snapshot) == {"ticket 3": ("D",)}


def test_of_equal_sequence_numbers_the_lower_id_comes_first():
    """They arise when a ticket's file was lost and written anew."""
    tied = (TicketState(1, "b", ("A",), 1), TicketState(1, "a", ("A",), 1))
    assert decide(Snapshot((), tied)) == {"a": ("A",)}


def test_a_candidate_that_is_named_twice_counts_once():
    assert decide(Snapshot((), (ticket(1, "AA", 2),))) == {}


def test_a_thousand_tickets_are_decided_quickly():
    """A guard against quadratic growth, not a benchmark."""
    snapshot = Snapshot((LeaseState("lease", ("A",)),), tuple(ticket(n, "ABCDEFGH", 8) for n in range(1000)))
    start = time.perf_counter()
    assert decide(snapshot) == {}
    assert time.perf_counter() - start < 0.5
