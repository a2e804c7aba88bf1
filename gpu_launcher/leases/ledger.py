"""The interface of a ledger: the tickets and leases of one pool, as one process sees and changes them.

Every process and user of the machine shares the pool of `FileLedger`. The tests have another implementation, in memory,
for simulations within one process. Both pass the same contract tests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, Protocol, SupportsIndex

from gpu_launcher.errors import RequestError
from gpu_launcher.leases.grant_policy import NO_PREFERENCE, Candidate, Demand, DevicePreference, Wait
from gpu_launcher.wording import device_names, join_labels

if TYPE_CHECKING:
    from gpu_launcher.model import Device, Owner, Request, Share


@dataclass(frozen=True, slots=True)
class Ticket:
    """A waiting request's place in the queue. Alive until it is claimed or cancelled, or its process ends."""

    id: str
    request: Request
    candidates: tuple[str, ...]
    """UUIDs of the devices that it may get, best first."""


class HeldLease:
    """The right to use `shares` of devices, alive as long as any process has a copy of its descriptor.

    Every process that may use the devices must get `fileno()`, by inheritance or `SCM_RIGHTS`. Never call
    `fcntl.flock` on it: unlocking (`LOCK_UN`) frees the devices for all holders at once. Only close copies.
    """

    __slots__ = ("_descriptor", "id", "shares")

    def __init__(self, id: str, shares: Mapping[str, Share], descriptor: int) -> None:
        self.id = id
        self.shares = dict(shares)
        """The shares by device UUID, in the order in which the job should see the devices."""
        self._descriptor = descriptor

    @property
    def uuids(self) -> tuple[str, ...]:
        """UUIDs of the devices, in the order in which the job should see them."""
        return tuple(self.shares)

    def fileno(self) -> int:
        """Return this process's descriptor, which is close-on-exec. Raises ValueError once the ledger has closed it."""
        if self._descriptor < 0:
            raise ValueError(f"lease {self.id} has been released")
        return self._descriptor

    @property
    def held(self) -> bool:
        """Whether this process has a descriptor of the lease."""
        return self._descriptor >= 0

    def detach(self) -> int:
        """Return the descriptor and forget it; return -1 if that was done before.

        Only for ledgers, and for code that kept the lease in a forked child.
        """
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raise TypeError: a copy could close the descriptor when its number already belongs to another file."""
        raise TypeError(f"lease {self.id} cannot be copied or pickled: it is as good as its descriptor")

    def __repr__(self) -> str:
        return f"HeldLease({self.id!r}, {self.uuids!r}, descriptor={self._descriptor})"


@dataclass(frozen=True, slots=True)
class TicketView:
    """A live ticket, for display. If it cannot be read, only its place and priority are known."""

    id: str
    sequence: int
    priority: int
    demand: Demand | None
    owner: Owner | None
    since: float | None
    """Wall-clock time of arrival, in seconds since the epoch."""
    wait: Wait | None = None
    """The reason why it waits; None if its process is about to take its devices."""

    @property
    def candidates(self) -> tuple[str, ...] | None:
        """UUIDs of the devices that it may get, best first."""
        return tuple(candidate.uuid for candidate in self.demand.candidates) if self.demand else None


@dataclass(frozen=True, slots=True)
class LeaseView:
    """A live lease, for display. If it cannot be read, `shares` is None and it counts as holding every device."""

    id: str
    shares: Mapping[str, Share] | None
    """The shares, by device UUID."""
    owner: Owner | None
    since: float | None
    """Wall-clock time of the grant, in seconds since the epoch."""
    left: float | None = None
    """Seconds until its devices should be free at the latest, by its declared time limit; negative if overdue."""

    @property
    def uuids(self) -> tuple[str, ...] | None:
        """UUIDs of the devices; None if the lease cannot be read."""
        return None if self.shares is None else tuple(self.shares)


@dataclass(frozen=True, slots=True)
class UnreadableFile:
    """A live file of the pool that cannot be read."""

    name: str
    """The file's name in the queue directory."""
    user: str
    """The file's owner."""
    problem: str
    lease: bool
    """Whether it may be a lease, which counts as holding everything. A ticket is ignored."""


@dataclass(frozen=True, slots=True)
class PoolView:
    """The live tickets and leases of a pool, for display."""

    tickets: tuple[TicketView, ...]
    """The tickets in queue order."""
    leases: tuple[LeaseView, ...]
    """The leases in the order of their grants."""
    stale: int
    """Number of ignored tickets and leases of dead processes."""
    elsewhere: tuple[str, ...] = ()
    """Names of other machines with files in the pool directory. This machine cannot see whether those are live."""
    unreadable: tuple[UnreadableFile, ...] = ()
    excessive: tuple[str, ...] = ()
    """Users with too many files in the pool, some of which therefore do not count."""


def describe_wait(pool: PoolView, ticket: TicketView, label: Callable[[str], str]) -> str:
    """Say in words why a ticket of the view waits. `label` converts a UUID to the device's name."""
    wait = ticket.wait
    if wait is None:
        return "its turn has come"
    if wait.unreadable:
        named = [f"{entry.name}, a file of {entry.user}" for entry in pool.unreadable if entry.lease]
        return f"a lease that cannot be read may hold everything: {_listed(named)}"
    owners = {lease.id: lease.owner for lease in pool.leases} | {other.id: other.owner for other in pool.tickets}
    numbers = {view.id: number for number, view in enumerate(pool.tickets, 1)}
    parts = []
    if wait.missing > 0:
        parts.append(f"waits for {wait.missing} more of {join_labels(map(label, ticket.candidates or ()))}")
    if wait.unavailable:
        parts.append(f"{join_labels(map(label, wait.unavailable))} in use outside the pool, or broken")
    if wait.staggered:
        parts.append(f"a job has only just started on {join_labels(map(label, wait.staggered))}")
    if wait.behind:
        parts.append(f"behind {_listed(f'{_who(owners[id])} #{numbers[id]}' for id in wait.behind)}")
    if wait.leases:
        parts.append(f"held by {_listed(dict.fromkeys(_who(owners[id]) for id in wait.leases))}")
    return "; ".join(parts)


_MOST_NAMED = 4


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = [f"{len(listed) - _MOST_NAMED} more"] if len(listed) > _MOST_NAMED else []
    return ", ".join(listed[:_MOST_NAMED] + more)


def _who(owner: Owner | None) -> str:
    return "an unknown program" if owner is None else owner.user


class Ledger(Protocol):
    """One process's access to a pool. Not thread-safe: use it from one thread.

    A loop that waits for devices selects on `fileno()` for reading with a timeout of at most `poll_interval` seconds,
    calls `drain()` when it is readable, then calls `claim()` for its tickets in queue order. Changes by this process
    itself may not be announced to it: after `release` or `cancel`, claim at once.
    """

    @property
    def poll_interval(self) -> float:
        """Seconds after which to call `claim` again even if `fileno()` is silent. Read it before every wait.

        It is short after an announced change, because a lock disappears a moment after its end is announced. It grows
        with every unsuccessful claim.
        """

    def enqueue(self, request: Request, candidates: Sequence[Device], owner: Owner) -> Ticket:
        """Take the last place of its priority in the queue for `request.gpus` of the `candidates` (best first).

        Raises RequestError if too few of the candidates could ever satisfy the request (see `refusal`), ValueError if
        `request.gpus` is 0 (a job without devices needs no lease), PoolDirectoryError if the pool directory has become
        unusable.
        """

    def claim(
        self, ticket: Ticket, unavailable: Iterable[str] = (), preference: DevicePreference = NO_PREFERENCE
    ) -> HeldLease | None:
        """Turn the ticket into a lease if its turn has come; return None if not. Does not block for long.

        `unavailable` are UUIDs of devices that must not be granted now, because they are in use outside the pool or
        broken. The ticket keeps its place in the queue, and others see the reason. `preference` says which free devices
        are best for the job.

        Raises ValueError if the ticket does not wait in this ledger. Raises PoolDirectoryError if the pool directory
        has become unusable; the ticket then keeps its place.
        """

    def cancel(self, ticket: Ticket) -> None:
        """Give up the place in the queue. A ticket that no longer waits is ignored."""

    def release(self, lease: HeldLease) -> None:
        """Close this process's descriptor. The devices are free when no process has a copy of it.

        A lease that was already released is ignored.
        """

    def snapshot(self) -> PoolView:
        """Read the pool, for display."""

    def fileno(self) -> int | None:
        """A descriptor that becomes readable when devices may have become free; None to use `poll_interval` alone."""

    def drain(self) -> None:
        """Make `fileno()` silent until the next change. Does not block."""

    def close(self) -> None:
        """Cancel all tickets, release all leases, close all descriptors. In a forked child: `close_in_child`."""

    def close_in_child(self, keep: Collection[HeldLease] = ()) -> None:
        """Close every descriptor without changing the pool. Called in a forked child.

        The child's copies would otherwise keep its parent's tickets and leases alive. The parent's ledger is not
        affected. The child may then open its own ledger. It shares the leases to `keep` with its parent, and must close
        the descriptors that they `detach`.
        """


def demanded(request: Request, candidates: Sequence[Device]) -> Demand:
    """Return the demand of a ticket for `request`. Raises the errors that `Ledger.enqueue` documents."""
    if request.gpus < 1:
        raise ValueError(f"a ticket is for at least 1 device, not {request.gpus}: a job without devices needs none")
    if problem := refusal(request, candidates):
        raise RequestError(f"the request is {problem}")
    return Demand(request, _candidates(candidates))


def refusal(request: Request, devices: Sequence[Device]) -> str | None:
    """Say why these devices could never satisfy a request, as `for 5 devices, but ...`; None if they could."""
    candidates = _candidates(devices)
    able = [candidate for candidate in candidates if candidate.share(request) is not None]
    if request.gpus <= len(able):
        return None
    wanted = "1 device" if request.gpus == 1 else f"{request.gpus} devices"
    if request.gpus > len(candidates):
        has = f"has {len(candidates)}" if candidates else "has none"
        return f"for {wanted}, but the pool {has} that this program may use: ask for fewer or allow more devices"
    memory = request.share.memory
    small = [device for device in devices if device.memory is not None and device.memory < memory]
    if len(small) == len(devices):
        largest = max(device.memory or 0 for device in devices)
        return f"for {_gib(memory)} of memory, but the largest device has {_gib(largest)}: ask for less"
    reasons, remedies = [], ["ask for fewer devices"] if request.gpus > 1 else []
    if small:
        reasons.append(f"{device_names(small)} with less than {_gib(memory)} of memory")
        remedies.append("ask for less memory")
    if exclusive := [device.label for device in devices if device.exclusive and device not in small]:
        reasons.append(f"{join_labels(exclusive)} in compute mode EXCLUSIVE_PROCESS, which only one process may use")
        remedies.append("ask for whole devices")
    return (
        f"for {wanted}, but only {len(able)} of {len(candidates)} could give what it needs ({'; '.join(reasons)}): "
        f"{', '.join(remedies)}, or allow more devices"
    )


def _candidates(devices: Sequence[Device]) -> tuple[Candidate, ...]:
    unique = {device.uuid: device for device in devices}
    return tuple(Candidate(device.uuid, device.memory, device.exclusive) for device in unique.values())


def _gib(memory: int) -> str:
    return f"{memory / 2**30:.4g} GiB"
