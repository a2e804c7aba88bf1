"""What a ledger is: the queue of tickets and the leases of one pool, as one process sees and changes them.

Two implementations pass the same contract tests (`tests/contract`): `FileLedger`, shared by every process and user
of the machine, and `MemoryLedger`, its twin for simulations within one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gpu_launcher.errors import RequestError

if TYPE_CHECKING:
    from gpu_launcher.model import Device, Owner, Request


@dataclass(frozen=True, slots=True)
class Ticket:
    """A waiting request's place in the queue. Alive until it is claimed or cancelled, or its process ends."""

    id: str
    sequence: int
    candidates: tuple[str, ...]
    """UUIDs of the devices it may get, best first."""
    count: int
    """Number of whole devices."""


class Lease:
    """The right to use `uuids`, alive as long as any process has a copy of its descriptor.

    Pass `fileno()` on by inheritance or `SCM_RIGHTS` to whatever may use the devices. Never unlock it (`LOCK_UN`, and
    so no `fcntl.flock` on it at all): that frees the devices for every holder at once. Only close copies.
    """

    __slots__ = ("_descriptor", "id", "uuids")

    def __init__(self, id: str, uuids: tuple[str, ...], descriptor: int) -> None:
        self.id = id
        self.uuids = uuids
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return this process's descriptor (close-on-exec). Raises ValueError once the ledger has closed it."""
        if self._descriptor < 0:
            raise ValueError(f"lease {self.id} has been released")
        return self._descriptor

    def detach(self) -> int:
        """For ledgers only: take the descriptor out, or -1 if that was done before."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def __repr__(self) -> str:
        return f"Lease({self.id!r}, {self.uuids!r}, descriptor={self._descriptor})"


@dataclass(frozen=True, slots=True)
class TicketView:
    """A live ticket, for display. Everything but the place is unknown (None, or 0) where it cannot be read."""

    id: str
    sequence: int
    candidates: tuple[str, ...] | None
    count: int
    owner: Owner | None
    since: float | None
    """Wall-clock time of arrival, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class LeaseView:
    """A live lease, for display. `uuids` None: it cannot be read, and counts as holding every device."""

    id: str
    uuids: tuple[str, ...] | None
    owner: Owner | None
    since: float | None
    """Wall-clock time of the grant, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class PoolView:
    """All that lives in a pool, for display."""

    tickets: tuple[TicketView, ...]
    """In queue order."""
    leases: tuple[LeaseView, ...]
    """In the order of their grants."""
    stale: int
    """How many tickets and leases of dead processes were found and ignored."""


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
        """Take the last place in the queue for `request.gpus` of the `candidates` (best first).

        Raises RequestError if there are fewer candidates than that, ValueError if `request.gpus` is below 1 (a job
        without devices needs no lease), PoolDirectoryError if the pool directory has become unusable.
        """

    def claim(self, ticket: Ticket) -> Lease | None:
        """Turn the ticket into a lease if its turn has come; None if not yet.

        Raises ValueError if the ticket is not a waiting one of this ledger, PoolDirectoryError if the pool directory
        has become unusable; the ticket then keeps its place.
        """

    def cancel(self, ticket: Ticket) -> None:
        """Give up the place in the queue. A ticket that is no longer waiting is left alone."""

    def release(self, lease: Lease) -> None:
        """Close this process's descriptor. The devices are free when nobody has a copy of it any more.

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

    def close_in_child(self) -> None:
        """Close every descriptor, ask nothing, tell nobody: for a forked child, whose copies would keep its parent's
        tickets and leases alive. The parent's ledger goes on unharmed. The child may then open a ledger of its own.
        """


def validated(request: Request, candidates: Sequence[Device]) -> tuple[str, ...]:
    """Return the candidates' UUIDs, each once, or raise as `Ledger.enqueue` promises."""
    if request.gpus < 1:
        raise ValueError(f"a ticket is for at least 1 device, not {request.gpus}: a job without devices needs none")
    uuids = tuple(dict.fromkeys(device.uuid for device in candidates))
    if request.gpus > len(uuids):
        has = f"has {len(uuids)}" if uuids else "has none"
        raise RequestError(
            f"the request is for {request.gpus} devices, but the pool {has} that this program may use: "
            "ask for fewer (hydra.launcher.gpus) or allow more (hydra.launcher.devices)"
        )
    return uuids
