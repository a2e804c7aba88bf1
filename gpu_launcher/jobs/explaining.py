"""Why somebody gets no devices now, in words that name who has them. Pure: a view of the pool goes in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from gpu_launcher.leases import PoolView, Ticket
from gpu_launcher.model import Device, Owner

MOST_REASONS = 3
MINE = "this program: release the lease first"


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a job gets no devices though this sweep's own jobs leave some."""

    reason: str
    """In words; empty if only this sweep's own jobs are in the way."""
    held_by_others: tuple[Device, ...]


def explain_wait(
    pool: PoolView,
    devices: tuple[Device, ...],
    own: Collection[str],
    ticket: Ticket | None,
    unavailable: Mapping[str, str],
    most: int = MOST_REASONS,
    mine: Collection[str] = (),
) -> Wait:
    """Who else holds, or is in line for, the devices that `ticket` waits for, or why they are `unavailable`.

    `own` are the ids of leases and tickets that are nobody else's; `mine` those of leases that the program has for
    other work, and which it alone can give back. At the `most` so many reasons are named. Without a
    ticket everybody who waits counts as being ahead.
    """
    held: dict[str, list[Device]] = {}
    for lease in pool.leases:
        if lease.id not in own:
            theirs = [device for device in devices if lease.uuids is None or device.uuid in lease.uuids]
            who = MINE if lease.id in mine else _name(lease.owner)
            held.setdefault(who, []).extend(theirs)
    parts = [f"{labels(dict.fromkeys(theirs))} held by {who}" for who, theirs in held.items() if theirs]
    parts += [f"{device.label} {unavailable[device.uuid]}" for device in devices if device.uuid in unavailable]
    uuids = {device.uuid for device in devices}
    for other in pool.tickets:  # in queue order
        if ticket is not None and other.id == ticket.id:
            break
        if other.id not in own and (other.candidates is None or not uuids.isdisjoint(other.candidates)):
            parts.append(f"{_name(other.owner)} is ahead in the queue")
    parts = list(dict.fromkeys(parts))
    everything = tuple(device for theirs in held.values() for device in theirs)
    more = [f"and {len(parts) - most} more"] if len(parts) > most else []
    outside = tuple(device for device in devices if device.uuid in unavailable)
    return Wait("; ".join(parts[:most] + more), tuple(dict.fromkeys((*everything, *outside))))


def _name(owner: Owner | None) -> str:
    return "somebody" if owner is None else f"{owner.user} ({owner.command})"


def labels(devices: Iterable[Device]) -> str:
    """What to call devices: `GPU 0, GPU 1`."""
    return ", ".join(device.label for device in devices)
