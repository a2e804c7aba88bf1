"""Where requests of one process wait for their leases: tickets, claims, and whom to tell why nothing comes.

The room has no thread and never blocks for long. Whoever waits in it attends to it: a thread in `poll`, an event loop,
a command. All of them may, as long as only one does at a time; whoever attends does so for all.
"""

from __future__ import annotations

import math
import os
import resource
import select
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from gpu_launcher.allocation.device_watch import DeviceWatch
from gpu_launcher.allocation.explain import describe_request, explain_wait
from gpu_launcher.allocation.feasibility import refusal
from gpu_launcher.devices import ConditionMonitor, Links, combinable
from gpu_launcher.errors import GpuLauncherError, PoolDirectoryError, RequestError
from gpu_launcher.leases import HeldLease, Ledger, PoolView, Ticket
from gpu_launcher.model import Device, Owner, Request

MOMENT = 1.0
"""Seconds after which it is said for whom somebody waits, and between two looks at that."""
FRESH = 2.0
"""Seconds for which it is good what was seen of the devices. After that they are looked at before one is granted."""
UNHEARD = 3.0
"""Seconds after which devices that were seen before are granted though nobody answers how they are now."""
UNREADY = 0.05
"""Seconds between two looks at whether that time is over; an answer is heard at once."""
BEARING = 60.0
"""Seconds for which an unusable pool directory may be mended before those who wait are told."""
SAME_VIEW = 0.25
"""Seconds for which one look into the pool answers all who ask why they wait."""
SPARE = 32
"""Descriptors that tickets leave to everything else."""
EVERYTHING = 64
"""Reasons that a complete explanation names."""


Kind = tuple[Request, tuple[str, ...]]


@dataclass(eq=False, slots=True)
class PendingRequest:
    """A request that waits. Exactly one of `lease` and `error` is set when `wake` has been called."""

    request: Request
    owner: Owner
    wake: Callable[[], None]
    """Called once, by whoever attends; must return at once, and must not use the room."""
    ticket: Ticket
    since: float
    lease: HeldLease | None = None
    error: GpuLauncherError | None = None
    _place: tuple[int, int] = field(default=(0, 0))

    @property
    def settled(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.lease is not None or self.error is not None

    @property
    def kind(self) -> Kind:
        """Of tickets alike in this, a later one is not granted where an earlier one is not."""
        return self.ticket.request, self.ticket.candidates


class RequestQueue:
    """Gets leases of `devices` for many requests of one process. Not thread-safe; belongs to the process that made it.

    Whoever waits calls `attend` when one of `descriptors` is readable, and after `patience` seconds in any case.
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
    ) -> None:
        """Open the room. It closes `ledger` and `monitor` when it is closed.

        `busy_memory` is as `gpu_launcher.devices.why_busy` takes it. `tell` gets one line when somebody has waited for
        others for more than a moment, and whenever the reason changes. `links` are as
        `gpu_launcher.allocation.device_watch.links_among` finds them.
        """
        self.devices = devices
        self._ledger = ledger
        self._watch = DeviceWatch(
            devices,
            ledger.snapshot,
            launcher=os.getpid(),
            monitor=monitor or ConditionMonitor(devices),
            busy_memory=busy_memory,
            links=links,
        )
        self._tell = tell
        self._clock = clock
        self._waiters: dict[str, PendingRequest] = {}
        """By ticket's id, in the order of their arrival."""
        self._kinds: Counter[Kind] = Counter()
        """How many wait of each kind."""
        self._arrivals = 0
        self._leases: dict[str, HeldLease] = {}
        self._explain_at = -math.inf
        self._told: dict[Kind, str] = {}
        self._trouble_since: float | None = None
        self._view: tuple[float, PoolView, frozenset[str]] | None = None
        self._stale_since: float | None = None
        """Since when it is waited for a fresh look at the devices."""

    def now(self) -> float:
        """Seconds, on the clock of `PendingRequest.since`."""
        return self._clock()

    # Waiting

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Readable when it is time to `attend`."""
        descriptor = self._ledger.fileno()
        return (self._watch.fileno(),) if descriptor is None else (self._watch.fileno(), descriptor)

    @property
    def patience(self) -> float:
        """Seconds after which to `attend` though nothing calls."""
        return min(self._ledger.poll_interval, MOMENT) if self.ready else UNREADY

    @property
    def idle(self) -> bool:
        """Whether nobody waits and nothing is held."""
        return not self._waiters and not self._leases

    @property
    def ready(self) -> bool:
        """Whether it is known how the devices are; nothing is granted before."""
        now = self._clock()
        unheard = self._stale_since is not None and now - self._stale_since > UNHEARD
        return self._fresh(now) or (self._watch.ready and unheard)

    def enter(self, request: Request, owner: Owner, wake: Callable[[], None]) -> PendingRequest:
        """Take a ticket, and the lease at once if it is to be had.

        Raises RequestError for what these devices could never give, PoolDirectoryError, and GpuLauncherError if so many
        wait that this process has hardly a descriptor left.
        """
        if problem := refusal(request, self.devices):
            raise RequestError(f"the request is {problem}")
        candidates = combinable(self.devices, request.gpus)
        _check_descriptors(len(self._waiters))
        ticket = self._ledger.enqueue(request, candidates, owner)
        waiter = PendingRequest(request, owner, wake, ticket, self._clock())
        self._arrivals += 1
        waiter._place = (-ticket.request.priority, self._arrivals)
        first = not self._kinds[waiter.kind]
        if not self._waiters:
            self._stale_since = None
        self._waiters[ticket.id] = waiter
        self._kinds[waiter.kind] += 1
        self._look()
        if first and self.ready:
            self._try([waiter])
        return waiter

    def attend(self) -> None:
        """Give leases to those whose turn has come, and say for whom the others wait."""
        self._hear()
        if not self._waiters:
            return
        self._look()
        if self.ready:
            self._try(sorted(self._waiters.values(), key=lambda waiter: waiter._place))
        self._explain()

    def leave(self, waiter: PendingRequest) -> None:
        """Give up the place in line, or give back what it was given."""
        if waiter.ticket.id in self._waiters:
            self._strike(waiter)
            self._ledger.cancel(waiter.ticket)
        if waiter.lease is not None:
            self.release(waiter.lease)

    def release(self, lease: HeldLease) -> None:
        """Give devices back, and on to whoever waits for them here."""
        if self._leases.pop(lease.id, None) is None:
            return
        self._ledger.release(lease)
        self._watch.released(lease.uuids, self._clock())
        if self._waiters:
            self.attend()

    def holds(self, lease: HeldLease) -> bool:
        """Whether it is one of this room's, and not given back."""
        return lease.id in self._leases

    # Seeing

    def look(self) -> int | None:
        """Have the devices looked at; returns a descriptor to wait on for the answer, None if there is one already."""
        self._hear()
        self._look()
        return None if self.ready else self._watch.fileno()

    def snapshot(self) -> PoolView:
        """Read the pool, for display. Raises PoolDirectoryError."""
        return self._ledger.snapshot()

    @property
    def watch(self) -> DeviceWatch:
        """What is known of the devices."""
        return self._watch

    def explain(self, ticket: Ticket) -> str:
        """Who has, or is in line for, the devices that somebody waits for, this process included."""
        if not self.ready:
            return "it is not known yet how the devices are doing: the driver has not answered"
        view = self._seen(ticket)
        unavailable = self._watch.unavailable
        wait = explain_wait(view, self._of(ticket), (), ticket, unavailable, EVERYTHING, mine=self._leases.keys())
        return wait.reason or "they have just become free"

    def stop_watching(self) -> None:
        """Nobody will enter any more. What was granted stays granted."""
        self._watch.close()

    def close(self) -> None:
        """Tell all who wait that there is nothing to wait for, and give back everything."""
        self._fail(closed_meanwhile())
        self._leases.clear()
        self._ledger.close()
        self._watch.close()

    def close_in_child(self, keep: Iterable[HeldLease] = ()) -> None:
        """In a forked process: drop what belongs to the parent, but for the leases to `keep`."""
        self._ledger.close_in_child(list(keep))
        self._watch.close_in_child()
        self._waiters.clear()
        self._kinds.clear()
        self._leases.clear()

    # Inside

    def _hear(self) -> None:
        self._watch.receive()
        descriptor = self._ledger.fileno()
        if descriptor is not None and _readable(descriptor):
            self._ledger.drain()
            if self._watch.unavailable:
                # What ended may have been what looked like a stranger.
                self._watch.look_again(self._clock())

    def _look(self) -> None:
        now = self._clock()
        if self._fresh(now):
            self._stale_since = None
            self._watch.look(now, waiting=True)
        else:
            if self._stale_since is None:
                self._stale_since = now
            self._watch.look_again(now)

    def _fresh(self, now: float) -> bool:
        return self._watch.seen is not None and now - self._watch.seen <= FRESH

    def _try(self, waiters: Iterable[PendingRequest]) -> None:
        in_vain = set()
        for waiter in waiters:
            if waiter.kind in in_vain:
                continue
            try:
                lease = self._ledger.claim(waiter.ticket, self._watch.unavailable, self._watch.preference)
            except PoolDirectoryError as error:
                self._bear(error)
                return
            self._trouble_since = None
            if lease is None:
                in_vain.add(waiter.kind)
            else:
                self._strike(waiter)
                self._leases[lease.id] = lease
                waiter.lease = lease
                waiter.wake()

    def _strike(self, waiter: PendingRequest) -> None:
        """It waits no more."""
        del self._waiters[waiter.ticket.id]
        self._kinds[waiter.kind] -= 1
        if not self._kinds[waiter.kind]:
            del self._kinds[waiter.kind]

    def _bear(self, error: PoolDirectoryError) -> None:
        now = self._clock()
        if self._trouble_since is None:
            self._trouble_since = now
            self._tell(f"{error}. What waits for devices waits for that to be mended")
        elif now - self._trouble_since > BEARING:
            self._trouble_since = None
            self._fail(error)

    def _fail(self, error: GpuLauncherError) -> None:
        for waiter in list(self._waiters.values()):
            self._strike(waiter)
            self._ledger.cancel(waiter.ticket)
            waiter.error = error
            waiter.wake()

    def _explain(self) -> None:
        """Say for whom the first of each kind of request waits, if that is not this process itself."""
        now = self._clock()
        if now < self._explain_at:
            return
        self._explain_at = now + MOMENT
        own = self._leases.keys() | self._waiters.keys()
        first: dict[Kind, PendingRequest] = {}
        for waiter in sorted(self._waiters.values(), key=lambda waiter: waiter._place):
            first.setdefault(waiter.kind, waiter)
        self._told = {kind: text for kind, text in self._told.items() if kind in first}
        for kind, waiter in first.items():
            if now - waiter.since < MOMENT:
                continue
            try:
                view = self._seen(waiter.ticket)
            except PoolDirectoryError:
                return  # which is told when somebody tries to claim
            wait = explain_wait(view, self._of(waiter.ticket), own, waiter.ticket, self._watch.unavailable)
            if wait.reason and wait.reason != self._told.get(kind):
                self._tell(f"waiting for {describe_request(waiter.request, self.devices)}: {wait.reason}")
            self._told[kind] = wait.reason

    def _seen(self, ticket: Ticket) -> PoolView:
        """A view of the pool that has the ticket, as new as explanations need it."""
        now = self._clock()
        if self._view is None or now - self._view[0] > SAME_VIEW or ticket.id not in self._view[2]:
            view = self._ledger.snapshot()
            self._view = now, view, frozenset(waiting.id for waiting in view.tickets)
        return self._view[1]

    def _of(self, ticket: Ticket) -> tuple[Device, ...]:
        return tuple(device for device in self.devices if device.uuid in ticket.candidates)


def closed_meanwhile() -> GpuLauncherError:
    """What those are told who wait when the room is closed."""
    return GpuLauncherError("the pool was closed while this waited for a lease of it")


def _check_descriptors(waiting: int) -> None:
    """A ticket is an open file. If they took all descriptors, none of them could become a lease."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY or waiting < most // 4:
        return
    if len(list(Path("/proc/self/fd").iterdir())) > most - SPARE:
        raise GpuLauncherError(
            f"too much waits for leases at once: each is an open file, and this program may have {most} of them: "
            "raise that limit (`ulimit -n`), or let fewer wait at the same time"
        )


def _readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
