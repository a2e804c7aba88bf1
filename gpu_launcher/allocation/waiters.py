"""Helpers for waiting threads and tasks: handles to their requests, and ways to sleep until woken."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import threading
import weakref
from collections.abc import Callable

from gpu_launcher.allocation.request_queue import PendingRequest


class RequestHandle:
    """Owns a request, and gives it up when collected. So no request is lost if a second signal interrupts a cleanup."""

    def __init__(self, give_up: Callable[[PendingRequest], None]) -> None:
        """Call `give_up` with the request when `leave` is called or this object is collected."""
        self._requests: list[PendingRequest] = []
        self._give_up = give_up
        self._process = os.getpid()
        # __del__ is not used: it would swallow an exception from a signal handler, even with nothing to give up.
        self._finalizer = weakref.finalize(self, _leave, give_up, self._process, self._requests)
        self._finalizer.atexit = False

    @property
    def pending(self) -> PendingRequest:
        """The request. Only after `take`."""
        return self._requests[0]

    def take(self, pending: PendingRequest) -> PendingRequest:
        """Become responsible for a request, and return it."""
        self._requests.append(pending)
        return pending

    def leave(self) -> None:
        """Give up the request or the lease that it got."""
        _leave(self._give_up, self._process, self._requests)
        self.forget()

    def forget(self) -> None:
        """Stop being responsible for the request, because its lease has another owner."""
        self._finalizer.detach()


def _leave(give_up: Callable[[PendingRequest], None], process: int, requests: list[PendingRequest]) -> None:
    if os.getpid() == process:
        for pending in requests:
            give_up(pending)


class ThreadWaiter:
    """A waiting thread. It does not use threading.Event, whose lock can stay taken if a signal handler raises."""

    def __init__(self) -> None:
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self._bell: tuple[int, int] | None = None

    def open_bell(self) -> int:
        """A descriptor that becomes readable when the thread is woken. The leader polls it."""
        if self._bell is None:
            self._bell = os.pipe()
            os.set_blocking(self._bell[1], False)
        return self._bell[0]

    def sleep(self, seconds: float) -> None:
        """Sleep for at most `seconds`, or until `wake`."""
        self._asleep.acquire(timeout=-1 if seconds > threading.TIMEOUT_MAX else seconds)

    def wake(self) -> None:
        """End the sleep. Called by one thread at a time."""
        if self._asleep.locked():
            self._asleep.release()
        if self._bell is not None:
            with contextlib.suppress(BlockingIOError):
                os.write(self._bell[1], b"!")

    def close(self) -> None:
        if self._bell is not None:
            (reader, writer), self._bell = self._bell, None
            os.close(reader)
            os.close(writer)


def wait_readable(descriptors: tuple[int, ...], seconds: float) -> None:
    """Wait until one of `descriptors` is readable, for at most `seconds`."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll(math.ceil(seconds * 1000))


class TaskWaiter:
    """A waiting task."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._future: asyncio.Future[None] | None = None

    async def sleep(self, seconds: float) -> None:
        """Sleep for at most `seconds`, or until `wake`."""
        self._future = self.loop.create_future()
        timer = None if seconds == math.inf else self.loop.call_later(seconds, self._set)
        try:
            await self._future
        finally:
            self._future = None
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        """End the sleep, from any thread. Raises RuntimeError if the event loop is closed."""
        self.loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


class LoopDriver:
    """Attends to the queue from an event loop while tasks of that loop wait. Use it in the loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        attend: Callable[[], None],
        patience: Callable[[], float],
    ) -> None:
        """Call `attend` after `patience()` seconds, and whenever something is readable."""
        self._loop = loop
        self._attend_to_queue = attend
        self._patience = patience
        self._waiting = 0
        self._descriptors: tuple[int, ...] = ()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, descriptors: tuple[int, ...]) -> None:
        """Add a waiting task. For the first one, start to watch `descriptors`."""
        self._waiting += 1
        if self._waiting == 1:
            self._descriptors = descriptors
            for descriptor in self._descriptors:
                self._loop.add_reader(descriptor, self._attend)
            self._arm()

    def end(self) -> bool:
        """Remove a waiting task; return whether it was the last."""
        self._waiting -= 1
        if self._waiting == 0:
            self._stop()
        return self._waiting == 0

    def stop(self) -> None:
        """Stop, because the queue is closed. May be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, too
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._descriptors = ()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _attend(self) -> None:
        try:
            self._attend_to_queue()
        finally:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._patience(), self._attend) if self._descriptors else None
