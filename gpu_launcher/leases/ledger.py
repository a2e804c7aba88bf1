"""What a ledger is: the queue of tickets and the leases of one pool, as one process sees and changes them.

`FileLedger` is shared by every process and user of the machine. The tests have another implementation, in memory, for
simulations within one process; both pass the same contract tests.
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
    """UUIDs of the devices it may get, best first."""


class HeldLease:
    """The right to use `shares` of devices, alive as long as any process has a copy of its descriptor.

    Pass `fileno()` on by inheritance or `SCM_RIGHTS` to whatever may use the devices. Never unlock it (`LOCK_UN`, and
    so no `fcntl.flock` on it at all): that frees the devices for every holder at once. Only close copies.
    """

    __slots__ = ("_descriptor", "id", "shares")

    def __init__(self, id: str, shares: Mapping[str, Share], descriptor: int) -> None:
        self.id = id
        self.shares = dict(shares)
        """By device UUID, in the order in which the job should see them."""
        self._descriptor = descriptor

    @property
    def uuids(self) -> tuple[str, ...]:
        """The devices, in the order in which the job should see them."""
        return tuple(self.shares)

    def fileno(self) -> int:
        """Return this process's descriptor (close-on-exec). Raises ValueError once the ledger has closed it."""
        if self._descriptor < 0:
            raise ValueError(f"lease {self.id} has been released")
        return self._descriptor

    @property
    def held(self) -> bool:
        """Whether this process has a descriptor of it."""
        return self._descriptor >= 0

    def detach(self) -> int:
        """For ledgers, and for who kept it in a child: take the descriptor out, or -1 if that was done before."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raise TypeError: a copy would close a descriptor that by then may be the number of another file."""
        raise TypeError(f"lease {self.id} cannot be copied or pickled: it is as good as its descriptor")

    def __repr__(self) -> str:
        return f"HeldLease({self.id!r}, {self.uuids!r}, descriptor={self._descriptor})"


@dataclass(frozen=True, slots=True)
class TicketView:
    """A live ticket, for display. Where it cannot be read, only its place and priority are known."""

    id: str
    sequence: int
    priority: int
    demand: Demand | None
    owner: Owner | None
    since: float | None
    """Wall-clock time of arrival, in seconds since the epoch."""
    wait: Wait | None = None
    """Why it waits; None if it does not: its process is about to take its devices."""

    @property
    def candidates(self) -> tuple[str, ...] | None:
        """UUIDs of the devices it may get, best first."""
        return tuple(candidate.uuid for candidate in self.demand.candidates) if self.demand else None


@dataclass(frozen=True, slots=True)
class LeaseView:
    """A live lease, for display. `shares` None: it cannot be read, and counts as holding every device."""

    id: str
    shares: Mapping[str, Share] | None
    """By device UUID."""
    owner: Owner | None
    since: float | None
    """Wall-clock time of the grant, in seconds since the epoch."""
    left: float | None = None
    """Seconds until its devices should be free at the latest, by its declared time limit; negative if overdue."""

    @property
    def uuids(self) -> tuple[str, ...] | None:
        """The devices."""
        return None if self.shares is None else tuple(self.shares)


@dataclass(frozen=True, slots=True)
class UnreadableFile:
    """A live file of the pool that cannot be read."""

    name: str
    """In the queue directory."""
    user: str
    """Whose file it is."""
    problem: str
    lease: bool
    """Whether it may be a lease, and so counts as holding everything; a ticket is passed by."""


@dataclass(frozen=True, slots=True)
class PoolView:
    """All that lives in a pool, for display."""

    tickets: tuple[TicketView, ...]
    """In queue order."""
    leases: tuple[LeaseView, ...]
    """In the order of their grants."""
    stale: int
    """How many tickets and leases of dead processes were found and ignored."""
    elsewhere: tuple[str, ...] = ()
    """Names of other machines whose files lie in the pool directory; whether they live cannot be seen from here."""
    unreadable: tuple[UnreadableFile, ...] = ()
    excessive: tuple[str, ...] = ()
    """Users with so many files in the pool that some of them do not count."""


def describe_wait(pool: PoolView, ticket: TicketView, label: Callable[[str], str]) -> str:
    """Say why a ticket of the view waits, in words. `label` names a device by its UUID."""
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
    return "somebody" if owner is None else owner.user


class Ledger(Protocol):
    """One process's access to a pool. Not thread-safe: use it from one thread.

    A loop that waits for devices selects on `fileno()` for reading with a timeout of at most `poll_interval` seconds,
    calls `drain()` when it is readable, then `claim()` for its tickets in queue order. Changes that this process makes
    itself need not be announced to it: after `release` or `cancel`, claim at once.
    """

    @property
    def poll_interval(self) -> float:
        """Seconds after which to call `claim` again though `fileno()` is silent. Changes; read it for every wait.

        Short after a change was announced, because a lock vanishes a moment after the announcement of its end, then
        longer with every claim in vain.
        """

    def enqueue(self, request: Request, candidates: Sequence[Device], owner: Owner) -> Ticket:
        """Take the last place of its priority in the queue for `request.gpus` of the `candidates` (best first).

        Raises RequestError if too few of the candidates could ever give what is asked of them (see `refusal`),
        ValueError if `request.gpus` is 0 (a job without devices needs no lease), PoolDirectoryError if the pool
        directory has become unusable.
        """

    def claim(
        self, ticket: Ticket, unavailable: Iterable[str] = (), preference: DevicePreference = NO_PREFERENCE
    ) -> HeldLease | None:
        """Turn the ticket into a lease if its turn has come; None if not yet. Does not block for long.

        `unavailable` are UUIDs of devices that are not to be granted now: in use by processes outside the pool, or
        broken. The ticket keeps its place in the queue; others see the reason. `preference` says which devices the job
        would like best of those that are free for it.

        Raises ValueError if the ticket is not a waiting one of this ledger, PoolDirectoryError if the pool directory
        has become unusable; the ticket then keeps its place.
        """

    def cancel(self, ticket: Ticket) -> None:
        """Give up the place in the queue. A ticket that is no longer waiting is left alone."""

    def release(self, lease: HeldLease) -> None:
        """Close this process's descriptor. The devices are free when no process has a copy of it any more.

        A lease that was released before is left alone.
        """

    def snapshot(self) -> PoolView:
        """Read the pool, for display."""

    def fileno(self) -> int | None:
        """A descriptor that becomes readable when something may have become free; None: use `poll_interval` alone."""

    def drain(self) -> None:
        """Make `fileno()` silent until the next change. Does not block."""

    def close(self) -> None:
        """Cancel all tickets, release all leases, close all descriptors. In a forked child: `close_in_child`."""

    def close_in_child(self, keep: Collection[HeldLease] = ()) -> None:
        """Close every descriptor, without a word to the pool: for a forked child, whose copies would keep its parent's
        tickets and leases alive. The parent's ledger is unharmed. The child may then open a ledger of its own.

        The leases to `keep` it holds as its parent does; closing what they `detach` is the child's business then.
        """


def demanded(request: Request, candidates: Sequence[Device]) -> Demand:
    """Return what a ticket is for, or raise as `Ledger.enqueue` promises."""
    if request.gpus < 1:
        raise ValueError(f"a ticket is for at least 1 device, not {request.gpus}: a job without devices needs none")
    if problem := refusal(request, candidates):
        raise RequestError(f"the request is {problem}")
    return Demand(request, _candidates(candidates))


def refusal(request: Request, devices: Sequence[Device]) -> str | None:
    """Say what is wrong with a request that these devices could never grant, as `for 5 devices, but ...`."""
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
