"""Who gets what now: a pure function of a snapshot of the pool.

Every waiting process runs it on the same snapshot and acts only on what it says about its own tickets, so it must
be deterministic: equal snapshots give equal grants, in whatever order leases and tickets are listed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LeaseState:
    """A live lease. `uuids` None: it cannot be read, so it may hold anything, and counts as holding everything."""

    id: str
    uuids: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class TicketState:
    """A live ticket. `candidates` None: it cannot be read, so it may want anything; its owner knows better."""

    sequence: int
    """Place in the queue: lower is earlier. The id breaks ties."""
    id: str
    candidates: tuple[str, ...] | None
    """UUIDs of the devices it may get, best first."""
    count: int
    """Number of whole devices, at least 1."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The live leases and tickets of a pool at one moment, in any order."""

    leases: tuple[LeaseState, ...]
    tickets: tuple[TicketState, ...]


def decide(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    """Return the device UUIDs that can be granted now, by ticket id, in queue order.

    - All of a ticket's devices or none: the first `count` of its candidates that are free.
    - A ticket that has to wait reserves all of its candidates, so a later one passes it only onto devices that the
      earlier one cannot use: passing never delays, and nobody starves.
    - Granted tickets may take their devices in any order and at any time: what is decided for the others stays as it
      is.
    """
    unavailable: set[str] = set()
    for lease in snapshot.leases:
        if lease.uuids is None:
            return {}
        unavailable.update(lease.uuids)
    grants: dict[str, tuple[str, ...]] = {}
    for ticket in sorted(snapshot.tickets, key=lambda ticket: (ticket.sequence, ticket.id)):
        if ticket.candidates is None:
            break
        free = [uuid for uuid in dict.fromkeys(ticket.candidates) if uuid not in unavailable]
        if len(free) >= ticket.count:
            grants[ticket.id] = tuple(free[: ticket.count])
            unavailable.update(grants[ticket.id])
        else:
            unavailable.update(ticket.candidates)
    return grants
