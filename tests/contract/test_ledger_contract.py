"""What every ledger promises, whichever way it keeps its books."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from gpu_launcher.errors import RequestError
from gpu_launcher.leases import DevicePreference, describe_wait, refusal
from gpu_launcher.model import WHOLE, Request, Share
from tests.descriptors import open_descriptors


def test_a_lone_ticket_gets_its_first_candidates_in_its_order(process, devices, owner):
    ledger = process()
    ticket = ledger.enqueue(Request(2), [devices[3], devices[1], devices[0]], owner)
    lease = ledger.claim(ticket)
    assert lease.uuids == ("SIMULATED-3", "SIMULATED-1")


def test_no_device_is_in_two_leases(process, devices, owner):
    ledgers = [process() for _ in range(3)]
    tickets = [ledger.enqueue(Request(2), devices, owner) for ledger in ledgers]
    leases = [ledger.claim(ticket) for ledger, ticket in zip(ledgers, tickets, strict=True)]
    assert leases[2] is None
    assert sorted(leases[0].uuids + leases[1].uuids) == [device.uuid for device in devices]


def test_a_request_gets_all_of_its_devices_or_none(process, devices, owner):
    ledger = process()
    small = ledger.claim(ledger.enqueue(Request(1), devices, owner))
    large = ledger.enqueue(Request(4), devices, owner)
    assert ledger.claim(large) is None
    ledger.release(small)
    assert len(ledger.claim(large).uuids) == 4


def test_tickets_are_granted_in_order_of_arrival_across_processes(process, devices, owner):
    first, second = process(), process()
    tickets = [(ledger, ledger.enqueue(Request(4), devices, owner)) for ledger in (first, second, first, second)]
    for turn, (ledger, ticket) in enumerate(tickets):
        for other, later in tickets[turn + 1 :]:
            assert other.claim(later) is None
        ledger.release(ledger.claim(ticket))


def test_a_small_request_does_not_pass_a_large_one_onto_its_candidates(process, devices, owner):
    ledger = process()
    held = ledger.claim(ledger.enqueue(Request(1), devices, owner))
    large = ledger.enqueue(Request(4), devices, owner)
    small = ledger.enqueue(Request(1), devices, owner)
    assert ledger.claim(small) is None
    ledger.release(held)
    assert ledger.claim(small) is None
    assert ledger.claim(large) is not None


def test_a_later_request_passes_onto_devices_that_the_earlier_cannot_use(process, devices, owner):
    ledger = process()
    ledger.claim(ledger.enqueue(Request(1), devices[:1], owner))
    ledger.enqueue(Request(2), devices[:2], owner)
    later = ledger.enqueue(Request(1), devices[1:3], owner)
    assert ledger.claim(later).uuids == ("SIMULATED-2",)


def test_released_devices_can_be_claimed_at_once(process, devices, owner):
    first, second = process(), process()
    lease = first.claim(first.enqueue(Request(4), devices, owner))
    ticket = second.enqueue(Request(4), devices, owner)
    assert second.claim(ticket) is None
    first.release(lease)
    assert second.claim(ticket) is not None


def test_a_copy_of_the_descriptor_keeps_the_devices_leased(process, devices, owner):
    ledger, other = process(), process()
    lease = ledger.claim(ledger.enqueue(Request(2), devices, owner))
    copy = os.dup(lease.fileno())
    ledger.release(lease)
    ticket = other.enqueue(Request(4), devices, owner)
    assert other.claim(ticket) is None
    assert [view.uuids for view in ledger.snapshot().leases] == [lease.uuids]
    os.close(copy)
    assert len(other.claim(ticket).uuids) == 4


def test_the_death_of_a_process_frees_its_leases(process, devices, owner):
    victim, survivor = process(), process()
    victim.claim(victim.enqueue(Request(4), devices, owner))
    ticket = survivor.enqueue(Request(4), devices, owner)
    assert survivor.claim(ticket) is None
    victim.close_in_child()
    assert survivor.claim(ticket) is not None


def test_the_death_of_a_process_takes_its_tickets_out_of_the_queue(process, devices, owner):
    victim, survivor = process(), process()
    victim.enqueue(Request(4), devices, owner)
    ticket = survivor.enqueue(Request(1), devices, owner)
    assert survivor.claim(ticket) is None
    victim.close_in_child()
    assert survivor.claim(ticket) is not None


def test_a_job_that_outlives_its_launcher_keeps_its_devices(process, devices, owner):
    victim, survivor = process(), process()
    copy = os.dup(victim.claim(victim.enqueue(Request(4), devices, owner)).fileno())
    victim.close_in_child()
    ticket = survivor.enqueue(Request(1), devices, owner)
    assert survivor.claim(ticket) is None
    os.close(copy)
    assert survivor.claim(ticket) is not None


def test_closing_a_ledger_gives_up_everything(process, devices, owner):
    first, second = process(), process()
    first.claim(first.enqueue(Request(1), devices, owner))
    first.enqueue(Request(4), devices, owner)
    first.close()
    first.close()
    assert len(second.claim(second.enqueue(Request(4), devices, owner)).uuids) == 4
    with pytest.raises(ValueError, match="closed"):
        first.snapshot()


def test_a_cancelled_ticket_no_longer_holds_anybody_up(process, devices, owner):
    ledger, other = process(), process()
    lease = ledger.claim(ledger.enqueue(Request(1), devices, owner))
    large = ledger.enqueue(Request(4), devices, owner)
    small = other.enqueue(Request(1), devices, owner)
    assert other.claim(small) is None
    ledger.cancel(large)
    ledger.cancel(large)
    assert other.claim(small) is not None
    with pytest.raises(ValueError, match="not waiting"):
        ledger.claim(large)
    ledger.release(lease)


def test_a_ticket_is_claimed_once_and_only_where_it_was_taken(process, devices, owner):
    ledger, other = process(), process()
    ticket = ledger.enqueue(Request(1), devices, owner)
    with pytest.raises(ValueError, match="not waiting"):
        other.claim(ticket)
    assert ledger.claim(ticket) is not None
    with pytest.raises(ValueError, match="not waiting"):
        ledger.claim(ticket)


def test_a_request_for_more_than_there_is_says_how_many_there_are(process, devices, owner):
    ledger = process()
    with pytest.raises(RequestError, match="for 5 devices, but the pool has 4"):
        ledger.enqueue(Request(5), devices, owner)
    with pytest.raises(RequestError, match="has 1 "):
        ledger.enqueue(Request(2), [devices[0], devices[0]], owner)
    with pytest.raises(RequestError, match="has none"):
        ledger.enqueue(Request(1), [], owner)
    assert ledger.snapshot().tickets == ()


def test_a_request_without_devices_is_the_callers_mistake(process, devices, owner):
    with pytest.raises(ValueError, match="at least 1"):
        process().enqueue(Request(0), devices, owner)


def test_a_released_lease_has_no_descriptor_and_may_be_released_again(process, devices, owner):
    ledger = process()
    lease = ledger.claim(ledger.enqueue(Request(1), devices, owner))
    assert not os.get_inheritable(lease.fileno())
    ledger.release(lease)
    ledger.release(lease)
    with pytest.raises(ValueError, match="released"):
        lease.fileno()


def test_the_view_names_who_holds_and_who_waits_in_order(process, devices, owner):
    ledger, other = process(), process()
    lease = ledger.claim(ledger.enqueue(Request(3), devices, owner))
    tickets = [one.enqueue(Request(2), devices[1:], owner) for one in (other, ledger, other)]
    view = process().snapshot()
    assert [ticket.id for ticket in view.tickets] == [ticket.id for ticket in tickets]
    assert {ticket.candidates for ticket in view.tickets} == {("SIMULATED-1", "SIMULATED-2", "SIMULATED-3")}
    assert {(view.demand.request, view.owner, view.since) for view in view.tickets} == {(Request(2), owner, 1234.5)}
    (held,) = view.leases
    assert (held.id, held.uuids, held.owner, held.since) == (lease.id, lease.uuids, owner, 1234.5)
    assert view.stale == 0


def test_jobs_share_a_device_as_long_as_their_shares_fit(process, devices, owner):
    first, second = process(), process()
    third = Request.of(1 / 3, 30 << 30)
    leases = [ledger.claim(ledger.enqueue(third, devices[:1], owner)) for ledger in (first, second)]
    assert [lease.shares for lease in leases] == [{"SIMULATED-0": Share(333_333, 30 << 30)}] * 2
    too_much_memory = first.enqueue(third, devices[:1], owner)
    assert first.claim(too_much_memory) is None
    first.cancel(too_much_memory)
    assert second.claim(second.enqueue(Request.of(1 / 3), devices[:1], owner)) is not None
    assert first.claim(first.enqueue(Request.of(0.01), devices[:1], owner)) is None


def test_by_memory_alone_jobs_share_a_device_as_long_as_there_is_memory(process, devices, owner):
    ledger = process()
    request = Request.of(None, 20 << 30)
    leases = [ledger.claim(ledger.enqueue(request, devices[:1], owner)) for _ in range(4)]
    assert {lease.shares["SIMULATED-0"] for lease in leases} == {Share(250_000, 20 << 30)}
    waiting = ledger.enqueue(request, devices[:1], owner)
    assert ledger.claim(waiting) is None
    ledger.release(leases[2])
    assert ledger.claim(waiting) is not None


def test_higher_priorities_are_served_first_but_take_nothing_away(process, devices, owner):
    ledger, other = process(), process()
    held = ledger.claim(ledger.enqueue(Request(4, priority=-7), devices, owner))
    low = ledger.enqueue(Request(4), devices, owner)
    high = other.enqueue(Request(4, priority=3), devices, owner)
    assert other.claim(high) is None
    assert [(view.id, view.priority) for view in ledger.snapshot().tickets] == [(high.id, 3), (low.id, 0)]
    ledger.release(held)
    assert ledger.claim(low) is None
    assert other.claim(high) is not None


def test_a_short_job_passes_a_large_one_that_cannot_start_before_it_ends(process, devices, owner):
    ledger, other = process(), process()
    ledger.claim(ledger.enqueue(Request(3, timeout=60.0), devices, owner))
    process.now += 10
    ledger.enqueue(Request(4), devices, owner)
    long, short = (other.enqueue(Request(1, timeout=seconds), devices, owner) for seconds in (50.5, 50.0))
    assert other.claim(long) is None
    assert other.claim(short).uuids == ("SIMULATED-3",)
    assert [view.left for view in other.snapshot().leases] == [50.0, 50.0]


def test_starts_on_one_device_are_spaced_out(process, devices, owner):
    ledger = process()
    request = Request.of(0.25, stagger=5.0)
    assert ledger.claim(ledger.enqueue(request, devices[:1], owner)) is not None
    second = ledger.enqueue(request, devices[:1], owner)
    process.now += 4
    assert ledger.claim(second) is None
    process.now += 1
    assert ledger.claim(second) is not None


def test_what_a_process_sees_in_use_by_others_it_does_not_get_until_it_is_free(process, devices, owner):
    ledger, other = process(), process()
    ticket = ledger.enqueue(Request(1), devices[:2], owner)
    assert ledger.claim(ticket, {"SIMULATED-0", "SIMULATED-1", "some other device"}) is None
    (view,) = other.snapshot().tickets
    assert view.wait.unavailable == ("SIMULATED-0", "SIMULATED-1")
    later = other.enqueue(Request(2), devices[:2], owner)
    assert other.claim(later) is not None
    assert ledger.claim(ticket, {"SIMULATED-0"}) is None


def test_a_ticket_keeps_its_place_while_its_devices_are_in_use_by_others(process, devices, owner):
    ledger, other = process(), process()
    ticket = ledger.enqueue(Request(1), devices[:2], owner)
    later = other.enqueue(Request(1), devices[:2], owner)
    assert ledger.claim(ticket, {"SIMULATED-0", "SIMULATED-1"}) is None
    assert ledger.claim(ticket, {"SIMULATED-1"}).uuids == ("SIMULATED-0",)
    assert other.claim(later, {"SIMULATED-1"}) is None
    assert other.claim(later).uuids == ("SIMULATED-1",)


def test_the_others_keep_nothing_for_a_process_that_it_does_not_want(process, devices, owner):
    """It would take device 0; now that it sees somebody else there, it is device 1 that it gets."""
    ledger, other = process(), process()
    first = ledger.enqueue(Request(1), devices[:3], owner)
    second = ledger.enqueue(Request(3), devices[:3], owner)
    third = other.enqueue(Request(1), devices[1:], owner)
    assert other.claim(third).uuids == ("SIMULATED-3",)
    other.claim(other.enqueue(Request(1), devices[:1], owner))
    assert ledger.claim(first, {"SIMULATED-0"}).uuids == ("SIMULATED-1",)
    assert ledger.claim(second) is None


def test_the_claimant_says_which_of_the_free_devices_it_likes(process, devices, owner):
    ledger = process()
    near = {frozenset({"SIMULATED-1", "SIMULATED-3"})}
    preference = DevicePreference(closeness=lambda one, two: frozenset({one, two}) in near)
    assert ledger.claim(ledger.enqueue(Request(2), devices, owner), (), preference).uuids == (
        "SIMULATED-1",
        "SIMULATED-3",
    )
    preference = DevicePreference(ranking=("SIMULATED-3", "SIMULATED-2"))
    assert ledger.claim(ledger.enqueue(Request(1), devices, owner), (), preference).uuids == ("SIMULATED-2",)


def test_the_view_says_why_each_ticket_waits(process, devices, owner):
    ledger, other = process(), process()
    ledger.claim(ledger.enqueue(Request(2), devices, owner))
    tickets = [
        other.enqueue(Request(4), devices, owner),
        other.enqueue(Request(1), devices[:1], owner),
        other.enqueue(Request(1), devices[3:], owner),
    ]
    other.claim(tickets[0], {"SIMULATED-2"})
    other.claim(tickets[2], {"SIMULATED-3"})
    process.now += 1
    view = ledger.snapshot()
    assert [describe_wait(view, ticket, lambda uuid: f"GPU {uuid[-1]}") for ticket in view.tickets] == [
        f"waits for 3 more of GPU 0-3; GPU 2 in use outside the pool, or broken; held by {owner.user}",
        f"waits for 1 more of GPU 0; held by {owner.user}",
        "waits for 1 more of GPU 3; GPU 3 in use outside the pool, or broken",
    ]
    other.claim(tickets[0])
    view = ledger.snapshot()
    assert describe_wait(view, view.tickets[1], str) == (
        f"waits for 1 more of SIMULATED-0; behind {owner.user} #1; held by {owner.user}"
    )


def test_a_request_that_could_never_be_granted_is_refused_and_says_why(process, devices, owner):
    devices[0] = replace(devices[0], exclusive=True)
    for request, problem in (
        (Request.of(None, 81 << 30), "for 81 GiB of memory, but the largest device has 80 GiB"),
        (Request(4, Share(500_000)), "only 3 of 4 could give what it needs .simulated GPU 0 in compute mode EXCLUSIVE"),
    ):
        with pytest.raises(RequestError, match=problem):
            process().enqueue(request, devices, owner)
    assert refusal(Request(4), devices) is None
    ledger = process()
    assert ledger.claim(ledger.enqueue(Request.of(0.5), devices, owner)).uuids == ("SIMULATED-1",)
    assert ledger.claim(ledger.enqueue(Request(1), devices, owner)).shares == {"SIMULATED-0": WHOLE}


@pytest.mark.parametrize("way", ["release", "copy closed", "cancel", "claim", "death"])
def test_whoever_waits_is_woken_when_something_may_have_become_free(process, devices, owner, readable, way):
    ledger, waiting = process(), process()
    lease = ledger.claim(ledger.enqueue(Request(1), devices, owner))
    copy = os.dup(lease.fileno())
    if way == "copy closed":
        ledger.release(lease)
    ticket = ledger.enqueue(Request(1), devices, owner)
    waiting.drain()
    assert not readable(waiting)
    if way == "release":
        os.close(copy)
        ledger.release(lease)
    elif way == "copy closed":
        os.close(copy)
    elif way == "cancel":
        ledger.cancel(ticket)
    elif way == "claim":
        ledger.claim(ticket)
    else:
        ledger.close_in_child()
    assert readable(waiting, timeout=100)
    waiting.drain()
    assert not readable(waiting)
    if way in ("cancel", "claim", "death"):
        os.close(copy)


def test_arrivals_and_claims_in_vain_wake_nobody(process, devices, owner, readable):
    ledgers = [process() for _ in range(3)]
    ledgers[0].claim(ledgers[0].enqueue(Request(4), devices, owner))
    for ledger in ledgers:
        ledger.drain()
    tickets = [ledger.enqueue(Request(1), devices, owner) for ledger in ledgers]
    for _ in range(3):
        for ledger, ticket in zip(ledgers, tickets, strict=True):
            assert ledger.claim(ticket) is None
            ledger.snapshot()
    assert not any(readable(ledger) for ledger in ledgers)
    assert all(ledger.poll_interval > 0 for ledger in ledgers)


def test_no_descriptor_is_leaked(process, devices, owner):
    before = open_descriptors()
    ledger, other = process(), process()
    for _ in range(20):
        lease = ledger.claim(ledger.enqueue(Request(4), devices, owner))
        ticket = other.enqueue(Request(1), devices, owner)
        assert other.claim(ticket) is None
        ledger.release(lease)
        other.release(other.claim(ticket))
        other.cancel(other.enqueue(Request(1), devices, owner))
    ledger.close()
    other.snapshot()
    other.close()
    assert open_descriptors() <= before
