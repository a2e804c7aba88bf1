"""Gets leases for all threads and event loops of a process from one request queue.

Theory of operation. Only the thread inside `guard` uses the queue. Each event loop with waiting tasks attends to the
queue itself, because no other thread knows whether that loop is stuck in the user's code. One of the waiting threads,
the leader, attends for all of them; the others sleep until they are woken or their time is over.

The garbage collector or a signal handler may interrupt the thread that has the guard anywhere, and may release leases
or leave the queue. In that case both only make a note (`_returned`, `_orphans`), and the guard acts on the notes when
it ends. Otherwise, signal handlers wait for the end of the guard.

Before a fork, every broker takes its guard, so that no child inherits a queue in the middle of a change. A child starts
with a queue of its own and shares the leases that its parent held at the fork.
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
from gpu_launcher.allocation.request_queue import PendingRequest, RequestQueue, closed_meanwhile
from gpu_launcher.allocation.waiters import LoopDriver, RequestHandle, TaskWaiter, ThreadWaiter, wait_readable
from gpu_launcher.errors import PoolDirectoryError
from gpu_launcher.leases import HeldLease
from gpu_launcher.model import Owner, Request
from gpu_launcher.processes.forking import in_internal_fork
from gpu_launcher.processes.signals import uninterrupted

T = TypeVar("T")


class LeaseBroker:
    """Gets leases for threads and tasks. Thread-safe. In a forked child, it starts again and keeps the held leases."""

    def __init__(
        self, open_queue: Callable[[Callable[[str], None]], RequestQueue], tell: Callable[[str], None]
    ) -> None:
        """Call `open_queue` for the first request, with a function that takes notices.

        `tell` gets these notices only after the guard is left, because it may run the user's code.
        """
        self._open_queue = open_queue
        self._tell = tell
        self.closed = False
        self._queue: RequestQueue | None = None
        self._out: set[HeldLease] = set()
        """Leases that the program holds."""
        self._begin()
        fork_hooks.register(self)

    def _begin(self) -> None:
        self._process = os.getpid()
        self.preparing = threading.Lock()
        """A lock for reading the devices, which is slow and happens once, before the queue is opened."""
        self._lock = threading.Lock()
        self._holder: int | None = None
        """The thread that holds the lock."""
        self._returned: deque[HeldLease] = deque()
        """Leases that the garbage collector or a signal handler released in the thread that held the lock."""
        self._orphans: deque[PendingRequest] = deque()
        """Requests to give up: their event loop is closed, or the thread that gave them up held the lock."""
        self._told: deque[str] = deque()
        self._leader: ThreadWaiter | None = None
        self._threads: list[ThreadWaiter] = []
        self._loops: dict[asyncio.AbstractEventLoop, LoopDriver] = {}

    # The guard

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Exclude all other threads from the queue. Signal handlers and notices are delayed until the block ends."""
        if os.getpid() != self._process:
            self.in_child()  # after a fork that did not run Python's hooks
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
            # Act on notes made in the meantime, unless another thread has taken the lock and will do so.
            if not (self._returned or self._orphans) or not self._lock.acquire(blocking=False):
                return
            self._holder = threading.get_ident()

    def _clear_up(self) -> None:
        while self._returned:
            self._take_back(self._returned.popleft())
        while self._orphans:
            orphan = self._orphans.popleft()
            if self._queue is not None:
                self._queue.leave(orphan)

    def queue(self) -> RequestQueue:
        """The queue, opened if necessary. Only within `guard`. Raises ValueError if the broker is closed."""
        if self.closed:
            raise ValueError("this pool is closed")
        if self._queue is None:
            self._queue = self._open_queue(self._told.append)
        return self._queue

    def _enter(self, request: Request, owner: Owner, limit: float, wake: Callable[[], None]) -> PendingRequest:
        queue = self.queue()
        try:
            return queue.enter(request, owner, wake, limit=limit)
        except PoolDirectoryError:
            if queue.idle:  # if the directory is created again, this queue would not notice
                self._shut()
            raise

    def _shut(self) -> None:
        if self._queue is not None:
            queue, self._queue = self._queue, None
            for driver in list(self._loops.values()):
                driver.stop()
            self._loops.clear()
            queue.close()

    # Getting leases

    def wait(self, request: Request, owner: Owner, limit: float, make: Callable[[HeldLease], T]) -> T:
        """Wait in this thread for at most `limit` seconds, and return the object that `make` creates for the lease.

        The object must have a finalizer that releases the lease. Raises LeaseTimeout, RequestError,
        PoolDirectoryError, ValueError if the pool is closed, and GpuLauncherError if it is closed during the wait.
        """
        waiter, handle = ThreadWaiter(), RequestHandle(self.leave)
        try:
            with self.guard():
                pending = handle.take(self._enter(request, owner, limit, waiter.wake))
                self.queue().claim(pending)
            if not pending.settled:
                try:
                    self._wait_in_thread(pending, waiter)
                finally:
                    self._end_wait(waiter)
            return self._hand_over(handle, make)
        except BaseException:
            handle.leave()
            raise

    def _wait_in_thread(self, pending: PendingRequest, waiter: ThreadWaiter) -> None:
        self._threads.append(waiter)
        while True:
            with self.guard():
                if pending.settled:
                    return
                queue = self.queue()
                if self._leader is None:
                    self._leader = waiter
                leads = self._leader is waiter
                pause = self._attend_or_pause(queue, pending, attend=leads)
                if pending.settled:
                    return
                if leads:
                    pause = min(pause, queue.patience)
                    descriptors = (*queue.descriptors, waiter.open_bell())
            if leads:
                wait_readable(descriptors, pause)
            else:
                waiter.sleep(pause)

    def _end_wait(self, waiter: ThreadWaiter) -> None:
        """Stop waiting; if this thread was the leader, let another one lead."""
        with self.guard():
            if waiter in self._threads:
                self._threads.remove(waiter)
            if self._leader is waiter:
                self._leader = None
                if self._threads:
                    self._threads[0].wake()
            waiter.close()

    async def wait_in_loop(self, request: Request, owner: Owner, limit: float, make: Callable[[HeldLease], T]) -> T:
        """Wait in this task, as `wait` does in a thread. If the task is cancelled, it leaves the queue at once."""
        waiter = TaskWaiter(asyncio.get_running_loop())
        handle = RequestHandle(self.leave)
        reference = weakref.ref(handle)
        try:
            with self.guard():
                pending = handle.take(self._enter(request, owner, limit, lambda: self._wake_task(waiter, reference())))
                self.queue().claim(pending)
            if not pending.settled:
                await self._wait_in_task(pending, waiter)
            return self._hand_over(handle, make)
        except BaseException:
            handle.leave()
            raise

    async def _wait_in_task(self, pending: PendingRequest, waiter: TaskWaiter) -> None:
        driver = None
        try:
            while True:
                with self.guard():
                    if pending.settled:
                        return
                    queue = self.queue()
                    if driver is None:
                        driver = self._driver(waiter.loop)
                        driver.begin(queue.descriptors)
                    pause = self._attend_or_pause(queue, pending, attend=False)
                    if pending.settled:
                        return
                await waiter.sleep(pause)
        finally:
            if driver is not None:
                with self.guard():
                    if driver.end() and self._loops.get(waiter.loop) is driver:
                        del self._loops[waiter.loop]

    def _attend_or_pause(self, queue: RequestQueue, pending: PendingRequest, *, attend: bool) -> float:
        """Attend if `attend` is true or the request's time is over. Return how many seconds to sleep."""
        left = queue.seconds_left(pending)
        if attend or left <= 0:
            queue.attend()
        return left if left > 0 else queue.patience

    def _driver(self, loop: asyncio.AbstractEventLoop) -> LoopDriver:
        for other in [other for other in self._loops if other.is_closed()]:
            del self._loops[other]
        if loop not in self._loops:
            self._loops[loop] = LoopDriver(loop, self.attend, lambda: self.patience)
        return self._loops[loop]

    def _wake_task(self, waiter: TaskWaiter, handle: RequestHandle | None) -> None:
        try:
            waiter.wake()
        except RuntimeError:  # the event loop is closed, so the task will never take the lease
            if handle is not None:
                self._orphans.append(handle.pending)

    def attend(self) -> None:
        """Attend to the queue, if there is one."""
        with self.guard():
            if self._queue is not None:
                self._queue.attend()

    @property
    def patience(self) -> float:
        """Seconds after which to call `attend` even if nothing happens."""
        queue = self._queue
        return 1.0 if queue is None else queue.patience

    def _hand_over(self, handle: RequestHandle, make: Callable[[HeldLease], T]) -> T:
        lease = handle.pending.result()
        with self.guard():
            if self.closed:
                raise closed_meanwhile()
            made = make(lease)
            self._out.add(lease)
            handle.forget()
        return made

    def leave(self, pending: PendingRequest) -> None:
        """Give up a request, or the lease that it got. Idempotent."""
        if self._holder == threading.get_ident() and self._process == os.getpid():
            self._orphans.append(pending)
            return
        with self.guard():
            if self._queue is not None:
                self._queue.leave(pending)

    # Releasing leases

    def give_back(self, lease: HeldLease) -> None:
        """Release a lease, and serve waiting requests of this process. Idempotent."""
        if self._holder == threading.get_ident() and self._process == os.getpid():
            self._returned.append(lease)
            return
        with self.guard():
            self._take_back(lease)

    def _take_back(self, lease: HeldLease) -> None:
        self._out.discard(lease)
        if self._queue is not None and self._queue.holds(lease):
            self._queue.release(lease)
        elif (descriptor := lease.detach()) >= 0:
            os.close(descriptor)  # a lease from the process that forked this one

    @property
    def in_use(self) -> bool:
        """Whether the queue is open."""
        return self._queue is not None

    def close(self) -> None:
        """Release all leases and close the queue. Idempotent."""
        with self.guard():
            self.closed = True
            out, self._out = self._out, set()
            self._shut()
            for lease in out:
                self._take_back(lease)

    # Forks

    def before_fork(self) -> bool:
        """Lock, so that the child inherits a consistent queue. Returns whether to call `after_fork`."""
        if self._holder == threading.get_ident():
            return False
        self._lock.acquire()
        self._holder = threading.get_ident()
        return True

    def after_fork(self) -> None:
        """Unlock. Called in the parent."""
        self._unlock()

    def in_child(self) -> None:
        """Start again in a forked child: drop all requests but keep the held leases, except in internal helpers."""
        self._process, self._holder = os.getpid(), threading.get_ident()
        queue, self._queue = self._queue, None
        keep = set() if in_internal_fork() else set(self._out)
        for waiter in self._threads:
            waiter.close()
        if queue is not None:
            queue.close_in_child(keep)
        for lease in self._out - keep:
            if (descriptor := lease.detach()) >= 0:  # a lease from before the parent's own fork
                os.close(descriptor)
        self._out = keep
        returned = self._returned
        self._begin()
        for lease in returned:
            self._take_back(lease)
