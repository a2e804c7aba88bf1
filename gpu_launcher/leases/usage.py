"""Who uses a device: the leases that have a share of it, the programs behind them, the leases of a process."""

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
    """What a lease has of a device. `share` None: the lease cannot be read, and counts as holding everything."""

    lease: LeaseView
    share: Share | None

    @property
    def whole(self) -> bool:
        """Whether it is all of the device."""
        return self.share is None or self.share.whole


def uses_of(device: Device, pool: PoolView) -> tuple[DeviceUse, ...]:
    """Return what each lease has of the device, in the order of their grants."""
    return tuple(
        DeviceUse(lease, None if lease.shares is None else lease.shares[device.uuid])
        for lease in pool.leases
        if lease.shares is None or device.uuid in lease.shares
    )


def leased_memory(device: Device, holds: Iterable[DeviceUse]) -> int:
    """Return the bytes of the device that `holds`, none of them whole, count for.

    A fraction without declared memory counts for that fraction of the device's.
    """
    shares = [hold.share for hold in holds if hold.share]
    return sum(share.memory or (device.memory or 0) * share.millionths // MILLIONTHS for share in shares)


def owners_of(pool: PoolView, holds: Sequence[DeviceUse], exists: Callable[[int], bool]) -> set[int] | None:
    """Return the pids of the programs that hold leases or wait for them; what descends from them is the pool's.

    `exists` says whether there is a process of that id. None if one that has one of `holds` is not to be seen from
    here, such as one in a container: then nothing can be said of who uses that device.
    """
    if any(hold.lease.owner is None or not exists(hold.lease.owner.pid) for hold in holds):
        return None
    owners = [lease.owner for lease in pool.leases] + [ticket.owner for ticket in pool.tickets]
    return {owner.pid for owner in owners if owner is not None}


def leases_of(pid: int) -> set[str]:
    """Ids of the leases of which the process has a descriptor; none where that cannot be seen. For display."""
    found = set()
    with contextlib.suppress(OSError):  # it has ended, or belongs to another user
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if match := LEASE_NAME.fullmatch(descriptor.readlink().name):
                    found.add(match[1])
    return found
