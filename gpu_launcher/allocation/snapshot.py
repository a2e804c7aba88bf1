"""What there is to see of a pool, for programs."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_launcher.allocation.survey import DeviceSeen, PoolSurvey, device_of
from gpu_launcher.model import Device, Owner, Request, Share


@dataclass(frozen=True, slots=True)
class LeaseSeen:
    """A live lease, of whichever program."""

    owner: Owner | None
    """None where it cannot be read; it then counts as holding everything."""
    devices: tuple[Device, ...]
    shares: tuple[Share, ...]
    """What it has of each of the devices."""
    since: float | None
    """When it was granted, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class WaitSeen:
    """A place in the queue."""

    owner: Owner | None
    """None where it cannot be read."""
    request: Request | None
    since: float | None
    """When it arrived, in seconds since the epoch."""
    reason: str
    """Why it waits."""


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """The pool at one moment."""

    time: float
    """Seconds since the epoch."""
    devices: tuple[DeviceSeen, ...]
    """Those that the pool was made for: each with its `device`, `state`, `holds`, and the `reason` if it is out."""
    leases: tuple[LeaseSeen, ...]
    """Of all programs of the machine, in the order of their grants."""
    queue: tuple[WaitSeen, ...]
    """In the order in which they are served."""


def snapshot_of(survey: PoolSurvey, known: dict[str, Device]) -> PoolSnapshot:
    """What a survey says, in the words of the Python interface. `known` are devices by UUID."""
    view = survey.view
    return PoolSnapshot(
        time=survey.time,
        devices=survey.devices,
        leases=tuple(
            LeaseSeen(
                owner=lease.owner,
                devices=tuple(known.get(uuid) or device_of(uuid) for uuid in lease.shares or ()),
                shares=tuple((lease.shares or {}).values()),
                since=lease.since,
            )
            for lease in view.leases
        ),
        queue=tuple(
            WaitSeen(ticket.owner, ticket.demand.request if ticket.demand else None, ticket.since, reason)
            for ticket, reason in zip(view.tickets, survey.reasons, strict=True)
        ),
    )
