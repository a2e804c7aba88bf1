"""Explains why a request waits and who holds the devices. Pure: the view of the pool is an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from gpu_launcher.leases import PoolView, Ticket
from gpu_launcher.model import MILLIONTHS, Device, DeviceKind, Owner, Request
from gpu_launcher.sizes import show_memory
from gpu_launcher.text import middle_cut
from gpu_launcher.wording import device_names

MAX_REASONS = 3
MAX_COMMAND = 60
"""Maximum number of characters shown of a command."""
MINE = "this program: release the lease first"
OUTER = "this job itself until it ends: leave devices for the jobs that it starts, or start them with gpus=0"


@dataclass(frozen=True, slots=True)
class WaitReason:
    """The reason why a request waits, without its own program's leases."""

    reason: str
    """The reason in words; empty if only its own program is in the way."""
    held_by_others: tuple[Device, ...]


def explain_wait(
    pool: PoolView,
    devices: tuple[Device, ...],
    own: Collection[str],
    ticket: Ticket | None,
    unavailable: Mapping[str, str],
    most: int = MAX_REASONS,
    mine: Collection[str] = (),
    program: int | None = None,
) -> WaitReason:
    """Say who holds or waits earlier for the devices that `ticket` waits for, and why they are `unavailable`.

    Leases and tickets with ids in `own` are ignored. Leases with ids in `mine` are held by the program for other work.
    If `program` is itself a job, it got its lease from another process and cannot release it. At most `most` reasons
    are listed. Without a ticket, all waiting tickets count as ahead.
    """
    others = [lease for lease in pool.leases if lease.id not in own]
    jobs = Counter(_program(lease.owner) for lease in others)
    held: dict[str, list[Device]] = {}
    since: dict[str, float] = {}
    for lease in others:
        theirs = [device for device in devices if lease.uuids is None or device.uuid in lease.uuids]
        several = jobs[_program(lease.owner)] > 1
        who = _program(lease.owner) if several else _name(lease.owner)
        if lease.id in mine:
            given = program is not None and lease.owner is not None and lease.owner.pid != program
            who = OUTER if given else MINE
        held.setdefault(who, []).extend(theirs)
        if lease.since is not None and who not in (MINE, OUTER):
            since[who] = min(lease.since, since.get(who, lease.since))
    parts = [
        f"{device_names(device for device in devices if device in theirs)} held by {who}{_since(since.get(who))}"
        for who, theirs in held.items()
        if theirs
    ]
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
    return WaitReason("; ".join(parts[:most] + more), tuple(dict.fromkeys((*everything, *outside))))


def _name(owner: Owner | None) -> str:
    """Format a user and a command as `anna (train.py)`. Long commands are cut in the middle."""
    if owner is None:
        return "an unknown program"
    return f"{owner.user} ({middle_cut(owner.command, MAX_COMMAND)}{', suspended' if owner.suspended else ''})"


def _since(when: float | None) -> str:
    """Format a time of day. A duration would change the text every minute."""
    if when is None:
        return ""
    try:
        then = datetime.fromtimestamp(when)
    except (OverflowError, ValueError, OSError):  # another user may have written anything into the lease
        return ""
    today = then.date() == datetime.now().date()
    return f" since {then:%H:%M}" if today else f" since {then:%b %d %H:%M}"


def _program(owner: Owner | None) -> str:
    """Format a user and a program, without the job's number and overrides. All jobs of a sweep share it."""
    return _name(owner and replace(owner, command=owner.command.partition(" #")[0]))


def describe_request(request: Request, devices: Iterable[Device]) -> str:
    """Format a request in words: `2 GPUs`, `0.5 of a GPU`, `20 GiB of a GPU` or `1 CPU slot`."""
    kinds = {device.kind for device in devices}
    noun = "CPU slot" if kinds == {DeviceKind.CPU} else "GPU"
    memory = show_memory(request.share.memory) if request.share.memory else ""
    if request.share.whole:
        plain = f"{request.gpus} {noun}" + ("" if request.gpus == 1 else "s")
        return f"{plain} with {memory}" if memory else plain
    if not request.share.millionths:
        return f"{memory} of a {noun}"
    part = f"{request.share.millionths / MILLIONTHS:g} of a {noun}"
    return f"{part} with {memory}" if memory else part
