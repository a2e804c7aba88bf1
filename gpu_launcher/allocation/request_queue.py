"""The queue of one process's requests for leases: their tickets, their claims, and why they wait.

Theory of operation. Requests of many threads, tasks or jobs wait at once. The queue has no thread of its own. Each
request has a ticket in the pool's ledger. A waiter calls `attend` when one of `descriptors` is readable, and after
`patience` seconds in any case. One call serves all requests of the queue, so one caller at a time is enough. `attend`
reads what is new in the ledger and from the device monitor, has the devices measured again if the last measurement is
too old, claims leases in the order of the machine-wide queue, fails requests whose time limit is over, and says whom
the others wait for. It never blocks for long, because another process measures the devices and an unsuccessful claim
needs no lock.

Nothing is granted before the first measurement, because programs outside the pool may use the devices. If the driver
stops answering later, grants continue; otherwise a defect that jobs may never notice would stop the pool.

A request ends with `lease` or `error` set and one call of `wake`. That call comes from inside `attend`, `claim` or
`release`, so it must not use the queue; it only makes a note or wakes a thread.
"""

from __future__ import annotations

import math
import os
import resource
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.allocation.device_watch import DeviceWatch
from gpu_launcher.allocation.explain import WaitReason, describe_request, explain_wait
from gpu_launcher.allocation.feasibility import refusal
from gpu_launcher.descriptors import is_readable
from gpu_launcher.devices import Links, combinable
from gpu_launcher.devices.monitor import ConditionMonitor
from gpu_launcher.errors import GpuLauncherError, LeaseTimeout, PoolDirectoryError, RequestError
from gpu_launcher.leases import HeldLease, Ledger, PoolView, Ticket, leases_of
from gpu_launcher.model import Device, Owner, Request

EXPLAIN_SECONDS = 1.0
"""Seconds that a request waits before the reason is announced, and seconds between two checks of the reason."""
FRESH_SECONDS = 2.0
"""Seconds for which a measurement is valid. After that, devices are measured again before one is granted."""
UNANSWERED_SECONDS = 3.0
"""Seconds without an answer from the driver after which devices that were measured before are granted anyway."""
FIRST_LOOK_SECONDS = 30.0
"""Seconds that a request waits for the first measurement of the devices, even if its own limit is shorter."""
NOT_READY_POLL = 0.05
"""Seconds between two calls of `attend` until the devices are measured. An answer is noticed at once."""
UNUSABLE_SECONDS = 60.0
"""Seconds for which the pool directory may be unusable before requests fail."""
SAME_VIEW_SECONDS = 0.25
"""Seconds for which one snapshot of the pool explains the waits of all requests."""
SPARE_DESCRIPTORS = 32
"""File descriptors that tickets leave free for the rest of the program."""
ALL_REASONS = 64
"""Maximum number of reasons in a complete explanation."""

Kind = tuple[Request, tuple[str, ...]]
"""Grouping key: if the policy refuses a request, it also refuses later requests of the same kind."""


@dataclass(eq=False, slots=True)
class PendingRequest:
    """A request in the queue. Exactly one of `lease` and `error` is set when `wake` has been called."""

    request: Request
    owner: Owner
    candidates: tuple[Device, ...]
    """The devices that it may get, best first."""
    since: float
    limit: float
    """Time limit in seconds, counted from `since`. The request fails after it."""
    wake: Callable[[], None]
    explain: Callable[[WaitReason], None] | None
    outlasts: Callable[[], bool] | None
    place: tuple[int, int]
    """Sort key: the order in which the machine-wide queue serves this process's requests."""
    kind: Kind
    ticket: Ticket | None = None
    """Its ticket; None if it could not get one because the pool directory is unusable."""
    lease: HeldLease | None = None
    error: GpuLauncherError | None = None

    @property
    def settled(self) -> bool:
        """Whether it has a lease or an error."""
        return self.lease is not None or self.error is not None

    def result(self) -> HeldLease:
        """The lease of a settled request. Raises its error."""
        if self.error is not None:
            raise self.error
        assert self.lease is not None, "it is settled"
        return self.lease


class RequestQueue:
    """Gets leases of `devices` for the requests of one process. Not thread-safe; only for the process that creates it.

    Call `attend` when one of `descriptors` is readable, and after `patience` seconds in any case.
    """

    def __init__(
        self,
        devices: tuple[Device, ...],
        ledger: Ledger,
        *,
        busy_memory: int | None,
        tell: Callable[[str], None],
        clock: Callable[[], float],
        links: Links | None = None,
        monitor: ConditionMonitor | None = None,
        program: int | None = None,
        on_fault: Callable[[Device, str], None] = lambda device, fault: None,
    ) -> None:
        """Open the queue. Closing it also closes `ledger` and `monitor`.

        `busy_memory` is as for `gpu_launcher.devices.why_busy`. `tell` gets one line when the pool directory is
        unusable, and when the reason why a request without `explain` waits is known or changes. `links` are those that
        `gpu_launcher.allocation.device_watch.links_among` finds. `program` is the process for which the requests are
        made; it may itself hold leases that are in the way. `on_fault` is called once for each device that is set aside
        because it is broken.
        """
        self.devices = devices
        self._ledger = ledger
        self.watch = DeviceWatch(
            devices,
            ledger.snapshot,
            launcher=os.getpid() if program is None else program,
            monitor=monitor or ConditionMonitor(devices),
            busy_memory=busy_memory,
            links=links,
            on_fault=on_fault,
        )
        self._tell = tell
        self._clock = clock
        self._program = program
        self._pending: dict[tuple[int, int], PendingRequest] = {}
        """The waiting requests, by place."""
        self._kinds: Counter[Kind] = Counter()
        """The number of pending requests of each kind."""
        self._arrivals = 0
        self._leases: dict[str, HeldLease] = {}
        self._explain_at = -math.inf
        self._explained: dict[Kind, WaitReason] = {}
        self._unusable_since: float | None = None
        """The time when the pool directory became unusable; None while it is usable."""
        self._view: tuple[float, PoolView, frozenset[str]] | None = None
        self._stale_since: float | None = None
        """The time when requests began to wait for a new measurement of the devices; None if none is needed."""
        self._looked_at = -math.inf

    def now(self) -> float:
        """The current time in seconds, on the clock of `PendingRequest.since`."""
        return self._clock()

    # Waiting

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Descriptors. One of them becomes readable when it is time to `attend`."""
        descriptor = self._ledger.fileno()
        return (self.watch.fileno(),) if descriptor is None else (self.watch.fileno(), descriptor)

    @property
    def patience(self) -> float:
        """Seconds after which to `attend` even if no descriptor is readable."""
        return min(self._ledger.poll_interval, EXPLAIN_SECONDS) if self.ready else NOT_READY_POLL

    @property
    def idle(self) -> bool:
        """Whether no request waits and no lease is held."""
        return not self._pending and not self._leases

    @property
    def waits(self) -> bool:
        """Whether a request waits."""
        return bool(self._pending)

    @property
    def ready(self) -> bool:
        """Whether the devices' state is known well enough to grant leases."""
        now = self._clock()
        unanswered = self._stale_since is not None and now - self._stale_since > UNANSWERED_SECONDS
        return self._fresh(now) or (self.watch.ready and unanswered)

    def enter(
        self,
        request: Request,
        owner: Owner,
        wake: Callable[[], None] = lambda: None,
        *,
        limit: float = math.inf,
        explain: Callable[[WaitReason], None] | None = None,
        outlasts: Callable[[], bool] | None = None,
        among: Container[str] | None = None,
    ) -> PendingRequest:
        """Take a ticket. Call `claim` to get the lease at once if it is available.

        `among`, if given, has the UUIDs of the devices that may be granted.

        The request fails with LeaseTimeout after `limit` seconds. `explain`, if given, replaces `tell`: it gets the
        reason for the wait after a moment, and again whenever it changes. A request with `outlasts` is accepted even if
        the pool directory is unusable now, and waits for it without a limit as long as `outlasts()` is true.

        Raises RequestError if these devices can never satisfy the request, PoolDirectoryError, and GpuLauncherError if
        this process is running out of file descriptors because too many requests wait.
        """
        if problem := self.refusal(request, among):
            raise RequestError(f"the request is {problem}")
        _check_descriptors(len(self._pending))
        candidates = combinable(self._devices_among(among), request.gpus)
        kind = (request, tuple(device.uuid for device in candidates))
        pending = PendingRequest(
            request, owner, candidates, self._clock(), limit, wake, explain, outlasts, (0, 0), kind
        )
        self._arrivals += 1
        try:
            self._take_ticket(pending)
        except PoolDirectoryError as error:
            if outlasts is None:
                raise
            self._note_unusable(error)
        pending.place = (-(pending.ticket.request if pending.ticket else request).priority, self._arrivals)
        self._pending[pending.place] = pending
        self._kinds[kind] += 1
        if explain is not None:
            self._explained.pop(kind, None)
        self._look()
        return pending

    def claim(self, pending: PendingRequest) -> None:
        """Get the lease if it is available now, without attending to the other requests."""
        if self.ready and self._kinds[pending.kind] == 1:
            self._claim([pending])

    def attend(self) -> None:
        """Claim leases, fail expired requests, measure the devices if necessary, and say whom requests wait for."""
        self._hear()
        if not self._pending:
            self.watch.look(self._clock(), waiting=False)
            return
        self._look()
        if self.ready:
            self._claim([self._pending[place] for place in sorted(self._pending)])
        self._expire()
        self._explain()

    def seconds_left(self, pending: PendingRequest) -> float:
        """Seconds until the request's time limit; not positive if it is over."""
        return pending.since + pending.limit - self._clock()

    def leave(self, pending: PendingRequest) -> None:
        """Give up a request, or release the lease that it got."""
        if self._pending.get(pending.place) is pending:
            self._remove(pending)
        if pending.lease is not None:
            self.release(pending.lease)

    def release(self, lease: HeldLease) -> None:
        """Release devices, and serve requests of this queue that wait for them."""
        if self._leases.pop(lease.id, None) is None:
            return
        self._ledger.release(lease)
        self.watch.released(lease.uuids, self._clock())
        if self._pending:
            self.attend()

    def holds(self, lease: HeldLease) -> bool:
        """Whether the lease belongs to this queue and has not been released."""
        return lease.id in self._leases

    # Questions

    def refusal(self, request: Request, among: Container[str] | None = None) -> str | None:
        """The reason why these devices could never satisfy a request, continuing `the request is`; else None.

        `among`, if given, has the UUIDs of those that count.
        """
        return refusal(request, self._devices_among(among))

    def _devices_among(self, uuids: Container[str] | None) -> tuple[Device, ...]:
        return self.devices if uuids is None else tuple(device for device in self.devices if device.uuid in uuids)

    def refusal_now(self, request: Request) -> str | None:
        """Like `refusal`, but without the devices that are broken now."""
        faults = self.watch.faults
        return refusal(request, tuple(device for device in self.devices if device.uuid not in faults))

    def idle_devices(self) -> list[Device]:
        """The devices that have no leases and could be granted now; none if the pool is unusable."""
        try:
            leases = self._ledger.snapshot().leases
        except PoolDirectoryError:
            return []
        if any(lease.uuids is None for lease in leases):
            return []
        taken = {uuid for lease in leases for uuid in lease.uuids or ()} | set(self.watch.unavailable)
        return [device for device in self.devices if device.uuid not in taken]

    def look(self) -> int | None:
        """Start a measurement if needed; return a descriptor to wait on for its result, or None if that is known."""
        self._hear()
        self._look()
        return None if self.ready else self.watch.fileno()

    def snapshot(self) -> PoolView:
        """Read the pool, for display. Raises PoolDirectoryError."""
        return self._ledger.snapshot()

    # Ending

    def close(self) -> None:
        """Fail all requests and release all leases."""
        self._fail(self._pending.values(), closed_meanwhile())
        self._leases.clear()
        self._ledger.close()
        self.watch.close()

    def close_in_child(self, keep: Iterable[HeldLease] = ()) -> None:
        """Drop everything that belongs to the parent, except the leases to `keep`. Called in a forked child."""
        self._ledger.close_in_child(list(keep))
        self.watch.close_in_child()
        self._pending.clear()
        self._kinds.clear()
        self._leases.clear()

    # Inside

    def _hear(self) -> None:
        self.watch.receive()
        descriptor = self._ledger.fileno()
        if descriptor is not None and is_readable(descriptor):
            self._ledger.drain()
            if self.watch.unavailable:
                # The job that ended may have looked like a program outside the pool.
                self.watch.look_again(self._clock())

    def _look(self) -> None:
        now = self._clock()
        if self._fresh(now):
            self._stale_since = None
            self.watch.look(now, waiting=True)
        else:
            if self._stale_since is None or now - self._looked_at > FRESH_SECONDS:  # no request waited in the meantime
                self._stale_since = now
            self.watch.look_again(now)
        self._looked_at = now

    def _fresh(self, now: float) -> bool:
        return self.watch.seen is not None and now - self.watch.seen <= FRESH_SECONDS

    def _take_ticket(self, pending: PendingRequest) -> Ticket:
        if pending.ticket is None:
            pending.ticket = self._ledger.enqueue(pending.request, pending.candidates, pending.owner)
        return pending.ticket

    def _claim(self, requests: Iterable[PendingRequest]) -> None:
        refused = set()
        for pending in requests:
            if pending.kind in refused:
                continue
            try:
                ticket = self._take_ticket(pending)
                lease = self._ledger.claim(ticket, self.watch.unavailable, self.watch.preference)
            except PoolDirectoryError as error:
                self._note_unusable(error)
                return
            self._unusable_since = None
            if lease is None:
                refused.add(pending.kind)
            else:
                pending.ticket = None
                self._remove(pending)
                self._leases[lease.id] = lease
                pending.lease = lease
                pending.wake()

    def _remove(self, pending: PendingRequest) -> None:
        del self._pending[pending.place]
        self._kinds[pending.kind] -= 1
        if not self._kinds[pending.kind]:
            del self._kinds[pending.kind]
        if pending.ticket is not None:
            self._ledger.cancel(pending.ticket)

    def _note_unusable(self, error: PoolDirectoryError) -> None:
        now = self._clock()
        if self._unusable_since is None:
            self._unusable_since = now
            self._tell(f"{error}. Running jobs continue; requests for devices wait until this is fixed")
        elif now - self._unusable_since > UNUSABLE_SECONDS:
            self._fail([one for one in self._pending.values() if one.outlasts is None or not one.outlasts()], error)
            if not self._pending:
                self._unusable_since = None

    def _fail(self, requests: Iterable[PendingRequest], error: GpuLauncherError) -> None:
        for pending in list(requests):
            self._remove(pending)
            pending.error = error
            pending.wake()

    def _expire(self) -> None:
        """Fail the requests whose time is over. The first measurement may take longer than their limits."""
        now = self._clock()
        for pending in [one for one in self._pending.values() if now - one.since >= one.limit]:
            if self.ready or now - pending.since >= FIRST_LOOK_SECONDS:
                wanted = describe_request(pending.request, self.devices)
                try:
                    error: GpuLauncherError = LeaseTimeout(wanted, pending.limit, self._full_reason(pending))
                except PoolDirectoryError as unusable:
                    error = unusable
                self._fail([pending], error)

    def _explain(self) -> None:
        """Say whom the first request of each kind waits for, unless it waits only for this process itself."""
        now = self._clock()
        if now < self._explain_at:
            return
        self._explain_at = now + EXPLAIN_SECONDS
        own = self._leases.keys() | {one.ticket.id for one in self._pending.values() if one.ticket is not None}
        mine = set() if self._program is None else leases_of(self._program)
        first: dict[Kind, PendingRequest] = {}
        for place in sorted(self._pending):
            first.setdefault(self._pending[place].kind, self._pending[place])
        self._explained = {kind: reason for kind, reason in self._explained.items() if kind in first}
        for kind, pending in first.items():
            if now - pending.since < EXPLAIN_SECONDS or pending.ticket is None:
                continue
            try:
                view = self._seen(pending.ticket)
            except PoolDirectoryError:
                return  # the next claim reports it
            reason = explain_wait(
                view, pending.candidates, own, pending.ticket, self.watch.unavailable, mine=mine, program=self._program
            )
            if reason != self._explained.get(kind, WaitReason("", ())):
                if pending.explain is not None:
                    pending.explain(reason)
                elif reason.reason:
                    self._tell(f"waiting for {describe_request(pending.request, self.devices)}: {reason.reason}")
            self._explained[kind] = reason

    def _full_reason(self, pending: PendingRequest) -> str:
        """Say who holds or waits earlier for the devices that a request waits for, including this process."""
        if not self.ready:
            return "it is not known yet how the devices are doing: the driver has not answered"
        if pending.ticket is None:
            return "the pool directory is unusable"
        view, mine = self._seen(pending.ticket), self._leases.keys()
        unavailable = self.watch.unavailable
        reason = explain_wait(view, pending.candidates, (), pending.ticket, unavailable, ALL_REASONS, mine=mine)
        return reason.reason or "they have just become free"

    def _seen(self, ticket: Ticket) -> PoolView:
        """A snapshot of the pool that has the ticket and is recent enough for explanations."""
        now = self._clock()
        if self._view is None or now - self._view[0] > SAME_VIEW_SECONDS or ticket.id not in self._view[2]:
            view = self._ledger.snapshot()
            self._view = now, view, frozenset(waiting.id for waiting in view.tickets)
        return self._view[1]


def closed_meanwhile() -> GpuLauncherError:
    """The error of requests that wait when the queue is closed."""
    return GpuLauncherError("the pool was closed while this waited for a lease of it")


def _check_descriptors(waiting: int) -> None:
    """Raise GpuLauncherError if the process is running out of file descriptors.

    A ticket is an open file. If tickets used all descriptors, none of them could become a lease.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or waiting < most // 4:
        return
    if len(list(Path("/proc/self/fd").iterdir())) > most - SPARE_DESCRIPTORS:
        raise GpuLauncherError(
            f"too much waits for leases at once: each is an open file, and this program may have {most} of them: "
            "raise that limit (`ulimit -n`), or let fewer wait at the same time"
        )
