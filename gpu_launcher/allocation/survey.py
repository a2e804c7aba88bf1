"""A survey of the devices and the pool at one moment, for commands and programs. Pure: readings are arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from gpu_launcher.devices import Condition, GpuProcess, UnusableGpu, foreign_processes, simulated_devices, why_busy
from gpu_launcher.devices.cpu import cpu_slots
from gpu_launcher.leases import DeviceUse, PoolView, describe_wait, leased_memory, owners_of, uses_of
from gpu_launcher.model import MILLIONTHS, Device, DeviceKind, Owner, Request, Share
from gpu_launcher.text import read_digits
from gpu_launcher.wording import join_labels

if TYPE_CHECKING:
    from pathlib import Path

EMPTY = PoolView(tickets=(), leases=(), stale=0)
MAX_INDEX = 9999


class DeviceState(str, Enum):
    """Whether a device can be granted now."""

    FREE = "free"
    PARTLY_HELD = "partly held"
    """It has leases, and has room for more."""
    HELD = "held"
    BUSY = "busy"
    """A program outside the pool uses it, so no more of it is granted."""
    SET_ASIDE = "set aside"
    """It is broken, or its settings make it unavailable to jobs."""


@dataclass(frozen=True, slots=True)
class Found:
    """The devices to show, and other facts about the machine."""

    devices: tuple[Device, ...]
    unusable: tuple[UnusableGpu, ...] = ()
    """GPUs that are shown as set aside."""
    known: Mapping[str, Device] = field(default_factory=dict)
    """All devices of the machine by UUID, shown or not."""
    notices: tuple[str, ...] = ()
    only: bool = False
    """Whether the user named devices. Other devices are then hidden, even if they are held."""

    @property
    def measured(self) -> tuple[Device, ...]:
        """The devices whose condition is shown."""
        others = [] if self.only else [device for device in self.known.values() if device not in self.devices]
        return (*self.devices, *others)


@dataclass(frozen=True, slots=True)
class PoolSeen:
    """The pool directory and its contents."""

    directory: Path
    view: PoolView | None
    """The pool's contents; None if the directory does not exist yet."""


@dataclass(frozen=True, slots=True)
class DeviceSeen:
    device: Device
    state: DeviceState
    condition: Condition | None = None
    holds: tuple[DeviceUse, ...] = ()
    reason: str | None = None
    """The reason why no more of it is granted, if it is busy or set aside. It continues `GPU 1 ...`."""
    strangers: tuple[GpuProcess, ...] = ()
    """Compute processes on the device that provably do not belong to the pool."""


@dataclass(frozen=True, slots=True)
class PoolSurvey:
    time: float
    """Wall-clock seconds since the epoch."""
    machine: str
    pool: PoolSeen
    devices: tuple[DeviceSeen, ...]
    notices: tuple[str, ...] = ()
    """Notices for the reader, one line each."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The labels of the devices of the machine and of the pool, by UUID."""

    @property
    def view(self) -> PoolView:
        return self.pool.view or EMPTY

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reason why each ticket waits, in queue order."""
        return tuple(describe_wait(self.view, ticket, self.label) for ticket in self.view.tickets)

    def label(self, uuid: str) -> str:
        return self.labels.get(uuid) or label(device_of(uuid))


def take_survey(
    found: Found,
    conditions: Iterable[Condition],
    pool: PoolSeen,
    *,
    time: float,
    machine: str,
    exists: Callable[[int], bool],
    busy_memory: int | None,
    notices: Sequence[str] = (),
) -> PoolSurvey:
    """Make a survey from readings.

    `exists` says whether a process id is visible from here. `busy_memory` is as for `why_busy`.
    """
    view = pool.view or EMPTY
    doing = {condition.uuid: condition for condition in conditions}

    def look_at(device: Device) -> DeviceSeen:
        return _look_at(device, doing.get(device.uuid), view, exists, busy_memory)

    broken = {gpu.uuid: _device_of(gpu) for gpu in found.unusable if gpu.uuid}
    held = {uuid for lease in view.leases for uuid in lease.shares or ()}
    wanted = {uuid for ticket in view.tickets for uuid in ticket.candidates or ()}
    unseen = sorted((held | wanted) - {device.uuid for device in found.devices} - broken.keys())
    known = {**found.known, **broken}
    seen = [look_at(device) for device in found.devices]
    seen += [_set_aside(gpu, view) for gpu in found.unusable]
    if not found.only:
        others = [known.get(uuid) or device_of(uuid) for uuid in unseen]
        seen += [look_at(device) for device in others]
        seen.sort(key=lambda one: _place(one.device))
    labels = {uuid: label(device) for uuid, device in known.items()}
    not_shown = [labels.get(uuid) or label(device_of(uuid)) for uuid in unseen if uuid in held and found.only]
    return PoolSurvey(
        time=time,
        machine=machine,
        pool=pool,
        devices=tuple(seen),
        notices=(*found.notices, *notices, *_about(view, not_shown)),
        labels=labels,
    )


def device_of(uuid: str) -> Device:
    """A device that is known only by its UUID, because this process does not see or simulate it."""
    kind, _, number = uuid.partition("-")
    if (index := read_digits(number, MAX_INDEX)) is not None:
        if kind == "SIMULATED":
            return simulated_devices(index + 1)[-1]
        if kind == "CPU":
            return cpu_slots(index + 1)[-1]
    return Device(uuid, -1, "", DeviceKind.MIG if kind == "MIG" else DeviceKind.GPU)


def label(device: Device) -> str:
    """The label of a device, or the beginning of its UUID if its index is unknown."""
    return device.label if device.index >= 0 else device.uuid[:12]


def _place(device: Device) -> tuple[int, int, int, str]:
    """Sort key: GPUs with their MIG instances, then simulated GPUs, then CPU slots, then devices of unknown index."""
    kinds = {DeviceKind.GPU: 0, DeviceKind.MIG: 0, DeviceKind.SIMULATED: 1, DeviceKind.CPU: 2}
    kind = kinds[device.kind] if device.index >= 0 else 3
    return kind, device.index, -1 if device.instance is None else device.instance, device.uuid


def _look_at(
    device: Device,
    condition: Condition | None,
    view: PoolView,
    exists: Callable[[int], bool],
    busy_memory: int | None,
) -> DeviceSeen:
    holds = uses_of(device, view)
    whole = any(hold.whole for hold in holds)
    full = whole or sum(hold.share.millionths for hold in holds if hold.share) >= MILLIONTHS
    state = DeviceState.HELD if full else DeviceState.PARTLY_HELD if holds else DeviceState.FREE
    if condition is None:
        return DeviceSeen(device, state, condition, holds)
    owners = owners_of(view, holds, exists)
    strangers = foreign_processes(condition, owners)
    reason = condition.fault
    if reason is not None:
        state = DeviceState.SET_ASIDE
    elif not whole:
        leased = leased_memory(device, holds)
        reason = why_busy(condition, owners=owners, leased=leased, leases=len(holds), busy_memory=busy_memory)
        state = state if reason is None else DeviceState.BUSY
    return DeviceSeen(device, state, condition, holds, reason, strangers)


def _set_aside(gpu: UnusableGpu, view: PoolView) -> DeviceSeen:
    device = _device_of(gpu)
    return DeviceSeen(device, DeviceState.SET_ASIDE, holds=uses_of(device, view), reason=gpu.reason)


def _device_of(gpu: UnusableGpu) -> Device:
    return Device(gpu.uuid or f"GPU-at-{gpu.index}", gpu.index, "", DeviceKind.GPU)


def _about(view: PoolView, not_shown: Sequence[str]) -> Iterator[str]:
    for entry in view.unreadable:
        effect = "every device counts as held until it ends" if entry.lease else "it has no place in the queue"
        yield (
            f"a {'lease' if entry.lease else 'ticket'} in the pool cannot be read: {effect} "
            f"({entry.name}, a file of {entry.user}: {entry.problem})"
        )
    for user in view.excessive:
        yield f"{user} has too many files in the pool: some of them are ignored"
    if view.elsewhere:
        yield (
            f"files of other machines lie in the pool directory ({', '.join(view.elsewhere)}): whether their jobs "
            "live cannot be seen from here; each machine needs a pool directory of its own"
        )
    if not_shown:
        devices = "1 more device is" if len(not_shown) == 1 else f"{len(not_shown)} more devices are"
        yield f"{devices} held in this pool: {join_labels(not_shown)}; --devices auto shows all"


@dataclass(frozen=True, slots=True)
class LeaseSeen:
    """A live lease of any program."""

    owner: Owner | None
    """The holder; None if the lease cannot be read. It then counts as holding everything."""
    devices: tuple[Device, ...]
    shares: tuple[Share, ...]
    """The share of each device, in the order of `devices`."""
    since: float | None
    """Time of the grant, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class WaitSeen:
    """A place in the queue."""

    owner: Owner | None
    """The waiting user and process; None if the ticket cannot be read."""
    request: Request | None
    since: float | None
    """Time of arrival, in seconds since the epoch."""
    reason: str
    """The reason why it waits."""


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """The pool at one moment."""

    time: float
    """Seconds since the epoch."""
    devices: tuple[DeviceSeen, ...]
    """The pool's devices, each with `device`, `state` and `holds`, and with `reason` if it is unavailable."""
    leases: tuple[LeaseSeen, ...]
    """The leases of all programs of the machine, in the order of their grants."""
    queue: tuple[WaitSeen, ...]
    """The waiting requests, in queue order."""


def snapshot_of(survey: PoolSurvey, known: dict[str, Device]) -> PoolSnapshot:
    """Convert a survey to the types of the Python interface. `known` holds devices by UUID."""
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
