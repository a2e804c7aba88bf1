"""Finds who uses a device: the leases with a share of it, their programs, and the leases of a process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_launcher.leases.file_format import LEASE_NAME
from gpu_launcher.leases.ledger import LeaseView, PoolView
from gpu_launcher.model import MILLIONTHS

if TYPE_CHECKING:
    from gpu_launcher.model import Device, Share


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """The share of a device that a lease holds. If it cannot be read, `share` is None and counts as everything."""

    lease: LeaseView
    share: Share | None

    @property
    def whole(self) -> bool:
        """Whether the lease holds the whole device."""
        return self.share is None or self.share.whole


def uses_of(device: Device, pool: PoolView) -> tuple[DeviceUse, ...]:
    """Return the uses of the device by leases, in the order of their grants."""
    return tuple(
        DeviceUse(lease, None if lease.shares is None else lease.shares[device.uuid])
        for lease in pool.leases
        if lease.shares is None or device.uuid in lease.shares
    )


def leased_memory(device: Device, holds: Iterable[DeviceUse]) -> int:
    """Return the device memory, in bytes, that `holds` account for. None of them may be whole.

    A fraction without declared memory counts as that fraction of the device's memory.
    """
    shares = [hold.share for hold in holds if hold.share]
    return sum(share.memory or (device.memory or 0) * share.millionths // MILLIONTHS for share in shares)


def owners_of(pool: PoolView, holds: Sequence[DeviceUse], exists: Callable[[int], bool]) -> set[int] | None:
    """Return the process ids of programs that hold leases or wait for them. Their descendants belong to the pool.

    `exists` says whether a process id exists. Returns None if an owner of one of `holds` is not visible, for example in
    a container, because it is then unknown who uses that device.
    """
    if any(hold.lease.owner is None or not exists(hold.lease.owner.pid) for hold in holds):
        return None
    owners = [lease.owner for lease in pool.leases] + [ticket.owner for ticket in pool.tickets]
    return {owner.pid for owner in owners if owner is not None}


def leases_of(pid: int) -> set[str]:
    """Return the ids of leases of which a process has a descriptor; empty if they are not visible. For display only."""
    found = set()
    with contextlib.suppress(OSError):  # the process has ended or belongs to another user
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if match := LEASE_NAME.fullmatch(descriptor.readlink().name):
                    found.add(match[1])
    return found
