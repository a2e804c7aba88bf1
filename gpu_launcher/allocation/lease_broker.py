"""One waiting room, used by all threads and event loops of a process, and left in order by its forks.

Who attends to the room: each event loop with waiting tasks for itself, since no other knows whether it is stuck in the
user's code; of the threads that wait, one, the leader, for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from gpu_launcher.allocation import fork_hooks
from gpu_launcher.allocation.explain import describe_request
from gpu_launcher.allocation.request_queue import PendingRequest, RequestQueue, closed_meanwhile
from gpu_launcher.allocation.waiters import LoopDriver, RequestHandle, TaskWaiter, ThreadWaiter, wait_readable
from gpu_launcher.errors import LeaseTimeout, PoolDirectoryError
from gpu_launcher.leases import HeldLease
from gpu_launcher.model import Owner, Request
from gpu_launcher.processes.deferred_signals import uninterrupted
from gpu_launcher.processes.forking import in_internal_fork

LOOKING = 10.0
"""Seconds that a request waits, whatever its limit, for the first look at how the devices are doing."""
LOOKING_PAUSE = 0.05

T = TypeVar("T")


class LeaseBroker:
    """Gets leases for threads and tasks. Thread-safe; in a forked child it starts anew, and keeps what is out."""

    def __init__(self, open_room: Callable[[Callable[[str], None]], RequestQueue], tell: Callable[[str], None]) -> None:
        """`open_room` is called when the first lease is asked for, with what it is to tell people by; `tell` is called
        with that when the user's code may run again.
        """
        self._open_room = open_room
        self._tell = tell
        self.closed = False
        self._room: RequestQueue | None = None
        self._out: set[HeldLease] = set()
        """Leases that somebody has and has not given back."""
        self._begin()
        fork_hooks.register(self)

    def _begin(self) -> None:
        self._process = os.getpid()
        self.preparing = threading.Lock()
        """For what takes long and is to be done once before the room is opened."""
        self._lock = threading.Lock()
        self._holder: int | None = None
        """The thread that has the lock."""
        self._returned: deque[HeldLease] = deque()
        """What was given back by a thread that had the lock: by the garbage collector, or in a signal's handler."""
        self._orphans: deque[PendingRequest] = deque()
        """Whoever waits in vain: in an event loop that is closed, or where it could not be told at once."""
        self._told: deque[str] = deque()
        self._leader: ThreadWaiter | None = None
        self._sleepers: list[ThreadWaiter] = []
        self._loops: dict[asyncio.AbstractEventLoop, LoopDriver] = {}

    # Having the room to oneself

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Have the room to oneself. Signals' handlers wait, and what was told meanwhile is passed on afterwards."""
        if os.getpid() != self._process:
            self.in_child()  # of a fork that Python was not told of
        with uninterrupted() as signals:
            while not self._lock.acquire(timeout=0.1):
                signals.handle()
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._unlock()
        while self._told:
            self._tell(self._told.popleft())

    def _unlock(self) -> None:
        while True:
            try:
                self._clear_up()
            finally:
                self._holder = None
                self._lock.release()
            # What came between is nobody's business but ours, if nobody else has the lock by now.
            if not (self._returned or self._orphans) or not self._lock.acquire(blocking=False):
                return
            self._holder = threading.get_ident()

    def _clear_up(self) -> None:
        while self._returned:
            self._take_back(self._returned.popleft())
        while self._orphans:
            orphan = self._orphans.popleft()
            if self._room is not None:
                self._room.leave(orphan)

    def room(self) -> RequestQueue:
        """The room, opened if need be, for who has it to himself. Raises ValueError if it was closed for good."""
        if self.closed:
            raise ValueError("this pool is closed")
        if self._room is None:
            self._room = self._open_room(self._told.append)
        return self._room

    def _enter(self, request: Request, owner: Owner, wake: Callable[[], None]) -> PendingRequest:
        room = self.room()
        try:
            return room.enter(request, owner, wake)
        except PoolDirectoryError:
            if room.idle:  # the directory may be made anew, which this room would never believe
                self._shut()
            raise

    def _shut(self) -> None:
        if self._room is not None:
            room, self._room = self._room, None
            for driver in list(self._loops.values()):
                driver.stop()
            self._loops.clear()
            room.close()

    # Getting leases

    def wait(self, request: Request, owner: Owner, limit: float, make: Callable[[HeldLease], T]) -> T:
        """Wait in this thread, for `limit` seconds at the most. Returns what `make` makes of the lease, whose finalizer
        is to give it back.

        Raises LeaseTimeout, RequestError, PoolDirectoryError, ValueError if the pool is closed, and GpuLauncherError if
        it is closed meanwhile.
        """
        sleeper, place = ThreadWaiter(), RequestHandle(self.leave)
        try:
            with self.guard():
                waiter = place.take(self._enter(request, owner, sleeper.rouse))
            if not waiter.settled:
                try:
                    self._sleep(waiter, sleeper, limit)
                finally:
                    self._rise(sleeper)
            return self._handed_over(place, make)
        except BaseException:
            place.leave()
            raise

    def _sleep(self, waiter: PendingRequest, sleeper: ThreadWaiter, limit: float) -> None:
        self._sleepers.append(sleeper)
        while True:
            with self.guard():
                if waiter.settled:
                    return
                room = self.room()
                if self._leader is None:
                    self._leader = sleeper
                leads = self._leader is sleeper
                if leads or self._over(room, waiter, limit) is not None:
                    room.attend()
                if waiter.settled:
                    return
                self._check_time(room, waiter, limit)
                pause = self._pause(room, waiter, limit)
                if leads:
                    pause = min(pause, room.patience)
                    descriptors = (*room.descriptors, sleeper.open_bell())
            if leads:
                wait_readable(descriptors, pause)
            else:
                sleeper.sleep(pause)

    def _rise(self, sleeper: ThreadWaiter) -> None:
        """Somebody else may lead."""
        with self.guard():
            if sleeper in self._sleepers:
                self._sleepers.remove(sleeper)
            if self._leader is sleeper:
                self._leader = None
                if self._sleepers:
                    self._sleepers[0].rouse()
            sleeper.close()

    async def wait_in_loop(self, request: Request, owner: Owner, limit: float, make: Callable[[HeldLease], T]) -> T:
        """Wait in this task, as `wait` does in a thread. Cancelled, it gives its place back at once."""
        task = TaskWaiter(asyncio.get_running_loop())
        place = RequestHandle(self.leave)
        reference = weakref.ref(place)
        try:
            with self.guard():
                waiter = place.take(self._enter(request, owner, lambda: self._resume(task, reference())))
            if not waiter.settled:
                await self._rest(waiter, task, limit)
            return self._handed_over(place, make)
        except BaseException:
            place.leave()
            raise

    async def _rest(self, waiter: PendingRequest, task: TaskWaiter, limit: float) -> None:
        driver = None
        try:
            while True:
                with self.guard():
                    if waiter.settled:
                        return
                    room = self.room()
                    if driver is None:
                        driver = self._driver(task.loop)
                        driver.begin(room.descriptors)
                    if self._over(room, waiter, limit) is not None:
                        room.attend()
                        if waiter.settled:
                            return
                    self._check_time(room, waiter, limit)
                    pause = self._pause(room, waiter, limit)
                await task.sleep(pause)
        finally:
            if driver is not None:
                with self.guard():
                    if driver.end() and self._loops.get(task.loop) is driver:
                        del self._loops[task.loop]

    def _driver(self, loop: asyncio.AbstractEventLoop) -> LoopDriver:
        for other in [other for other in self._loops if other.is_closed()]:
            del self._loops[other]
        if loop not in self._loops:
            self._loops[loop] = LoopDriver(loop, self.attend, lambda: self.patience)
        return self._loops[loop]

    def _resume(self, task: TaskWaiter, place: RequestHandle | None) -> None:
        try:
            task.resume()
        except RuntimeError:  # its event loop is closed: nobody will come for it
            if place is not None:
                self._orphans.append(place.waiter)

    def attend(self) -> None:
        """Attend to the room, if there is one."""
        with self.guard():
            if self._room is not None:
                self._room.attend()

    @property
    def patience(self) -> float:
        """Seconds after which to `attend` though nothing calls."""
        room = self._room
        return 1.0 if room is None else room.patience

    def _over(self, room: RequestQueue, waiter: PendingRequest, limit: float) -> float | None:
        """How many seconds ago its time was up, if it is."""
        over = room.now() - waiter.since - limit
        return over if over >= 0 else None

    def _check_time(self, room: RequestQueue, waiter: PendingRequest, limit: float) -> None:
        if self._over(room, waiter, limit) is None or (not room.ready and room.now() - waiter.since < LOOKING):
            return
        raise LeaseTimeout(describe_request(waiter.request, room.devices), limit, room.explain(waiter.ticket))

    def _pause(self, room: RequestQueue, waiter: PendingRequest, limit: float) -> float:
        left = waiter.since + limit - room.now()
        return left if left > 0 else LOOKING_PAUSE

    def _handed_over(self, place: RequestHandle, make: Callable[[HeldLease], T]) -> T:
        waiter = place.waiter
        if waiter.error is not None:
            raise waiter.error
        assert waiter.lease is not None, "it is settled"
        with self.guard():
            if self.closed:
                raise closed_meanwhile()
            made = make(waiter.lease)
            self._out.add(waiter.lease)
            place.forget()
        return made

    def leave(self, waiter: PendingRequest) -> None:
        """Give up a place in line, or what was granted there. A second time does nothing."""
        if self._holder == threading.get_ident() and self._process == os.getpid():
            self._orphans.append(waiter)
            return
        with self.guard():
            if self._room is not None:
                self._room.leave(waiter)

    # Giving back

    def give_back(self, lease: HeldLease) -> None:
        """Give a lease back, and on to whoever waits for it in this process. A second time does nothing."""
        if self._holder == threading.get_ident() and self._process == os.getpid():
            self._returned.append(lease)
            return
        with self.guard():
            self._take_back(lease)

    def _take_back(self, lease: HeldLease) -> None:
        self._out.discard(lease)
        if self._room is not None and self._room.holds(lease):
            self._room.release(lease)
        elif (descriptor := lease.detach()) >= 0:
            os.close(descriptor)  # of the process that this one was forked from

    @property
    def in_use(self) -> bool:
        """Whether there is anything to close."""
        return self._room is not None

    def close(self) -> None:
        """Give back everything. A second time does nothing."""
        with self.guard():
            self.closed = True
            out, self._out = self._out, set()
            self._shut()
            for lease in out:
                self._take_back(lease)

    # Forks

    def before_fork(self) -> bool:
        """Nothing may be half-done in a child. Returns whether `after_fork` is to be called."""
        if self._holder == threading.get_ident():
            return False
        self._lock.acquire()
        self._holder = threading.get_ident()
        return True

    def after_fork(self) -> None:
        """In the parent, go on."""
        self._unlock()

    def in_child(self) -> None:
        """Be another process: wait for nothing, hold what is out, and open a room of its own when one is needed."""
        self._process, self._holder = os.getpid(), threading.get_ident()
        room, self._room = self._room, None
        keep = set() if in_internal_fork() else set(self._out)
        for sleeper in self._sleepers:
            sleeper.close()
        if room is not None:
            room.close_in_child(keep)
        for lease in self._out - keep:
            if (descriptor := lease.detach()) >= 0:  # of the process before the last
                os.close(descriptor)
        self._out = keep
        returned = self._returned
        self._begin()
        for lease in returned:
            self._take_back(lease)
