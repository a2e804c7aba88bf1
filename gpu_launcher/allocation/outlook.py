"""Says whether a pool could grant requests before they are made, and how many of them now. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpu_launcher.allocation.explain import explain_wait
from gpu_launcher.allocation.feasibility import refusal
from gpu_launcher.devices import combinable
from gpu_launcher.leases import PoolView
from gpu_launcher.leases.grant_policy import LeaseState, Snapshot, TicketState, decide
from gpu_launcher.leases.ledger import demanded
from gpu_launcher.model import MILLIONTHS, Device, Request


@dataclass(frozen=True, slots=True)
class Outlook:
    """What would happen to a number of equal requests at the end of the queue."""

    now: int
    """Number of the requests that would be granted now."""
    never: str | None = None
    """The reason why none could ever be granted. It continues `the request is`."""
    reason: str = ""
    """The reason why not all of them would be granted now: who holds or waits for the devices. May be empty."""


def foresee(
    request: Request, count: int, devices: tuple[Device, ...], pool: PoolView, unavailable: Mapping[str, str]
) -> Outlook:
    """Say what `count` equal requests for some of `devices` would get.

    `unavailable` says why a device is not granted now, by UUID; it continues `GPU 1 ...`.
    """
    if request.gpus == 0:
        return Outlook(count)
    if (never := refusal(request, devices)) is not None:
        return Outlook(0, never)
    demand = replace(demanded(request, combinable(devices, request.gpus)), unavailable=frozenset(unavailable))
    last = max((ticket.sequence for ticket in pool.tickets), default=0)
    ours = [TicketState(last + 1 + place, f"ours-{place}", demand, request.priority) for place in range(count)]
    theirs = [TicketState(one.sequence, one.id, one.demand, one.priority) for one in pool.tickets]
    leases = [LeaseState(one.id, one.shares, None, one.left) for one in pool.leases]
    granted = decide(Snapshot((*leases,), (*theirs, *ours)))
    now = sum(ticket.id in granted for ticket in ours)
    ahead = tuple(ticket for ticket in pool.tickets if ticket.priority >= request.priority)
    reason = "" if now == count else explain_wait(replace(pool, tickets=ahead), devices, (), None, unavailable).reason
    return Outlook(now, None, reason)


def device_share(request: Request, devices: tuple[Device, ...]) -> float:
    """The number of whole devices that a request takes. A share by memory counts as its largest part of any device."""
    millionths = [request.share.of(device.memory).millionths for device in devices]
    return request.gpus * max(millionths, default=request.share.millionths or MILLIONTHS) / MILLIONTHS
