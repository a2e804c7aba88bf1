"""A ledger in memory, for simulations. Several ledgers in one process stand for several processes.

A lease is the write end of a pipe. Like a real lease, it lives as long as any copy of its descriptor. The pool keeps
the read end, where the end of the lease shows as a hang-up. So test doubles pass descriptors on and close them as real
code does.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gpu_launcher.leases.grant_policy import (
    NO_PREFERENCE,
    DevicePreference,
    LeaseState,
    Snapshot,
    TicketState,
    grant,
    waits,
)
from gpu_launcher.leases.ledger import HeldLease, LeaseView, PoolView, Ticket, TicketView, demanded

if TYPE_CHECKING:
    from gpu_launcher.model import Device, Owner, Request


class MemoryPool:
    """The state that the `MemoryLedger`s of one pool share. Call `close` at the end."""

    def __init__(self) -> None:
        self._tickets: dict[str, TicketView] = {}
        self._leases: dict[str, tuple[LeaseView, LeaseState, int]] = {}
        self._ledgers: list[MemoryLedger] = []

    def close(self) -> None:
        """Close all ledgers and forget all leases."""
        for ledger in list(self._ledgers):
            ledger.close()
        for _, _, reader in self._leases.values():
            os.close(reader)
        self._leases.clear()


class MemoryLedger:
    """A `Ledger` on a `MemoryPool`. `close_in_child` has the effect that the death of its process would have."""

    poll_interval = 0.25

    def __init__(
        self,
        pool: MemoryPool,
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wall_clock` gives the times that views show; `clock` gives those that the policy compares."""
        self._pool = pool
        self._wall_clock = wall_clock
        self._clock = clock
        self._tickets: dict[str, Ticket] = {}
        self._leases: dict[str, HeldLease] = {}
        self._closed = False
        self._epoll = select.epoll()
        self._bell, self._ringer = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._ringer, False)
        self._epoll.register(self._bell, select.EPOLLIN)
        for _, _, reader in pool._leases.values():
            self._watch(reader)
        pool._ledgers.append(self)

    def enqueue(self, request: Request, candidates: Sequence[Device], owner: Owner) -> Ticket:
        self._check_open()
        demand = demanded(request, candidates)
        sequence = max((view.sequence for view in self._pool._tickets.values()), default=0) + 1
        ticket = Ticket(uuid.uuid4().hex, request, tuple(candidate.uuid for candidate in demand.candidates))
        self._tickets[ticket.id] = ticket
        self._pool._tickets[ticket.id] = TicketView(
            ticket.id, sequence, request.priority, demand, owner, since=self._wall_clock()
        )
        return ticket

    def claim(
        self, ticket: Ticket, unavailable: Iterable[str] = (), preference: DevicePreference = NO_PREFERENCE
    ) -> HeldLease | None:
        self._check_open()
        if ticket.id not in self._tickets:
            raise ValueError(f"ticket {ticket.id} is not waiting in this ledger")
        self._bury()
        view = self._pool._tickets[ticket.id]
        assert view.demand is not None
        seen = frozenset(unavailable).intersection(ticket.candidates)
        if seen != view.demand.unavailable:
            view = replace(view, demand=replace(view.demand, unavailable=seen))
            self._pool._tickets[ticket.id] = view
            self._ring()
        snapshot, now = self._snapshot(), self._clock()
        own = next(state for state in snapshot.tickets if state.id == ticket.id)
        queue = sorted(snapshot.tickets, key=lambda state: state.place)
        shares = grant(snapshot.leases, queue, own, now, preference)
        if shares is None:
            return None
        reader, writer = os.pipe()
        lease = HeldLease(uuid.uuid4().hex, shares, writer)
        self._leases[lease.id] = lease
        timeout = ticket.request.timeout
        ends = None if timeout is None else now + timeout
        state = LeaseState(lease.id, lease.shares, started=now, ends=ends)
        shown = LeaseView(lease.id, lease.shares, view.owner, self._wall_clock())
        self._pool._leases[lease.id] = shown, state, reader
        for ledger in self._pool._ledgers:
            ledger._watch(reader)
        self.cancel(ticket)
        return lease

    def cancel(self, ticket: Ticket) -> None:
        self._check_open()
        if self._tickets.pop(ticket.id, None):
            del self._pool._tickets[ticket.id]
            self._ring()

    def release(self, lease: HeldLease) -> None:
        self._check_open()
        if self._leases.pop(lease.id, None):
            os.close(lease.detach())

    def snapshot(self) -> PoolView:
        self._check_open()
        self._bury()
        snapshot = self._snapshot()
        leases = [
            replace(view, left=None if state.ends is None else state.ends - snapshot.now)
            for view, state, _ in self._pool._leases.values()
        ]
        reasons = waits(snapshot)
        tickets = sorted(self._pool._tickets.values(), key=lambda view: (-view.priority, view.sequence, view.id))
        return PoolView(
            tickets=tuple(replace(view, wait=reasons.get(view.id)) for view in tickets),
            leases=tuple(sorted(leases, key=lambda view: view.since or 0.0)),
            stale=0,
        )

    def fileno(self) -> int | None:
        return self._epoll.fileno()

    def drain(self) -> None:
        self._check_open()
        with contextlib.suppress(BlockingIOError):
            while os.read(self._bell, 4096):
                pass
        self._epoll.poll(0)

    def close(self) -> None:
        self.close_in_child()

    def close_in_child(self, keep: Collection[HeldLease] = ()) -> None:
        if self._closed:
            return
        self._closed = True
        self._pool._ledgers.remove(self)
        for id in self._tickets:
            del self._pool._tickets[id]
        self._ring()
        for lease in self._leases.values():
            if lease not in keep:
                os.close(lease.detach())
        self._tickets.clear()
        self._leases.clear()
        self._epoll.close()
        os.close(self._bell)
        os.close(self._ringer)

    def __enter__(self) -> MemoryLedger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this ledger is closed")

    def _snapshot(self) -> Snapshot:
        tickets = (
            TicketState(view.sequence, view.id, view.demand, view.priority) for view in self._pool._tickets.values()
        )
        leases = (state for _, state, _ in self._pool._leases.values())
        return Snapshot(tuple(leases), tuple(tickets), self._clock())

    def _watch(self, reader: int) -> None:
        """Watch for a hang-up. It is reported with any mask (epoll_ctl(2)), and only once because of EPOLLET."""
        self._epoll.register(reader, select.EPOLLHUP | select.EPOLLET)

    def _ring(self) -> None:
        for ledger in self._pool._ledgers:
            if ledger is not self:
                with contextlib.suppress(BlockingIOError):
                    os.write(ledger._ringer, b"!")

    def _bury(self) -> None:
        """Forget the leases whose last descriptor is closed."""
        for id, (_, _, reader) in list(self._pool._leases.items()):
            poll = select.poll()
            poll.register(reader, 0)
            if poll.poll(0):
                del self._pool._leases[id]
                os.close(reader)
