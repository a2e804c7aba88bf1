"""The thread of an executor: it takes calls to the node, and what became of them to their futures.

Theory of operation. Everything that happens to a call happens in this thread; `submit`, `cancel` and the like only put
something into a queue and wake it. It waits on three kinds of descriptors:

    user's threads                  executor's thread                    node                      call's process
    submit ── _pending, _wake ──►                     ◄── Wanted ──
                                    pickles the call  ─── Offer, one end of a socket pair ──►  starts ──►
                                                      ◄──────────────── IsWanted? ─────────────────  has its devices
                                    future: running   ───────────────── True / False ────────────►   unpickles, calls
                                                      ◄── ReturnedValue, NoValue or PortableException ──
    result  ◄── callbacks ────────  future: done      ◄── Ended ──                  ◄── exits

The node asks for calls as it has room (`Wanted`), so a call that was not asked for can be cancelled here. One that was
offered can be cancelled until its process asks whether it is still wanted. What a process says travels past the node,
and is in the channel before the node says `Ended`: the thread empties the channel first, then concludes the call. A
call without an outcome when its process has ended died, and `Ended` says how. The node relays nothing that it would
have to unpickle, and does not wait for this thread, which may be in a callback of the user's for any time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass
from typing import Any

from gpu_launcher.errors import GpuLauncherError, JobError, JobTimeoutError, NodeDiedError, UnpicklableError
from gpu_launcher.executors.calls import CallOutcome, FunctionCall, IsWanted
from gpu_launcher.executors.transport import NoValue, ReturnedValue, pack
from gpu_launcher.jobs import remarks
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.node_client import RemoteLoop, busy, calling_back, harmless_thread
from gpu_launcher.jobs.node_messages import Closed, Ended, Remarked, Wanted
from gpu_launcher.processes import pickling
from gpu_launcher.processes.exceptions import PortableException, RemoteTraceback, describe
from gpu_launcher.processes.messages import ChannelClosedError, receive, send
from gpu_launcher.processes.unpicklable import found_at

AT_ONCE_SECONDS = 5.0
"""Seconds after which a call, the first of its executor, which has not begun could not begin at once."""


class BrokenPoolExecutor(GpuLauncherError, BrokenExecutor):
    """The executor can make no more calls, and those that it had not finished are lost. Make another one."""


@dataclass(slots=True)
class Submitted:
    """A call that nobody has been asked to make yet."""

    future: Future[Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class _Offered:
    """A call that the node has."""

    future: Future[Any]
    name: str
    """Of the function."""
    channel: socket.socket
    """To its process."""
    begun: bool = False
    """Whether it cannot be cancelled any more."""
    outcome: CallOutcome | None = None
    """What its process has said of it."""


class ExecutorThread:
    """Carries the calls of one executor, to which it has no reference: that may go when nobody has one any more."""

    _wake = -1

    def __init__(self, loop: RemoteLoop, *, may_fork: bool) -> None:
        """Start the thread. `loop` is open, and closed in the end; `may_fork`: it could fork calls, but is not to."""
        self._loop = loop
        self._may_fork = may_fork
        self._pending: deque[Submitted] = deque()
        self._offered: dict[int, _Offered] = {}
        self._by_channel: dict[int, int] = {}
        """The numbers of offered calls, by the descriptors of their channels."""
        self._poll = select.poll()
        self._cancelled: deque[int] = deque()
        """Offered calls that the user has cancelled."""
        self._wanted = 0
        """How many calls more the node would take now."""
        self._ready = False
        """Whether it has said so once."""
        self._flowing = False
        """Whether a call has begun, or waits for somebody else: what has not begun then, could not begin at once."""
        self._number = 0
        self._finishing = False
        self._cancel_by: float | None = None
        """When to cancel even what could perhaps begin at once, if what has not begun is to be cancelled."""
        self._exhausted = False
        self._stops = 0
        """How many times it was told to stop, of which the node knows `_stops_said`."""
        self._stops_said = 0
        self._remark = ""
        self._process = os.getpid()
        self.broken: str | None = None
        """Why no more calls can be made, if that is so."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="gpu-launcher-executor", daemon=True)
        self._thread.start()

    # From any thread, and from finalizers: none of these waits for a lock.

    def submit(self, call: Submitted) -> None:
        """Have it made, unless the executor is broken."""
        self._pending.append(call)
        self._notify()
        if self.broken is not None:  # perhaps since before the thread could see this one
            self._fail_pending(self.broken)

    def finish(self) -> None:
        """There will be no more calls; the thread ends when all have been made."""
        self._finishing = True
        self._notify()

    def cancel(self) -> None:
        """Cancel the calls that have not begun, and could not begin at once. There will be no more."""
        if self._cancel_by is None:
            self._cancel_by = time.monotonic() + AT_ONCE_SECONDS
        self.finish()

    def stop(self) -> None:
        """Interrupt the calls that run; again: kill them."""
        self._stops += 1
        self._notify()

    def cancelled(self, number: int) -> None:
        """A call that was offered is not wanted any more."""
        self._cancelled.append(number)
        self._notify()

    def join(self) -> None:
        """Wait for the end of the thread, unless this is it."""
        if self._process == os.getpid() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _notify(self) -> None:
        if self._process == os.getpid():  # a forked process has the descriptor as well
            with contextlib.suppress(OSError):  # closed: the thread has ended
                os.eventfd_write(self._wake, 1)

    def _next_pending(self) -> Submitted | None:
        try:
            return self._pending.popleft()
        except IndexError:
            return None

    def __del__(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)  # not before: by then it might be the number of another file

    # In the thread.

    def _run(self) -> None:
        with harmless_thread():
            problem = "the executor's thread ended unexpectedly"
            try:
                problem = self._serve()
            except GpuLauncherError as error:
                problem = str(error)
            finally:
                self.broken = problem
                self._fail_all(problem)
                self._loop.close()

    def _serve(self) -> str:
        """Carry until there is nothing more, or no way; returns why what is left is not carried."""
        self._poll.register(self._loop.fileno(), select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in self._poll.poll(self._patience())}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            for number in [self._by_channel[descriptor] for descriptor in ready & self._by_channel.keys()]:
                self._hear_call(number)
            if self._loop.fileno() in ready:
                message = self._loop.receive()
                if isinstance(message, Closed):
                    return self._why_closed(message)
                self._hear(message)
                del message  # it may have a value, of which the thread is not to be the last owner
            self._say()

    def _patience(self) -> float | None:
        """Milliseconds until there is something to do though nothing happens."""
        if self._cancel_by is None or all(call.begun for call in self._offered.values()):
            return None
        return max(0.0, self._cancel_by - time.monotonic()) * 1000

    def _hear(self, message: object) -> None:
        match message:
            case Wanted(count):
                self._wanted += count
                self._ready = True
            case Ended(result):
                self._conclude(result)
            case Remarked() as remark:
                self._flowing = self._flowing or remark.passing
                self._remark = remark.text
                with calling_back():
                    remarks.log(remark)

    def _hear_call(self, number: int) -> bool:
        """Take note of the next thing that a call's process says; whether there was any."""
        call = self._offered[number]
        try:
            message, _ = receive(call.channel, wait=False)
        except BlockingIOError:
            return False
        except ChannelClosedError:  # it has ended, and the node will say so
            self._forget(call)
            return False
        if isinstance(message, IsWanted):
            self._flowing = True
            if self._begin(number) is not None:
                _answer(call, True)
        else:
            call.outcome = message
        return True

    def _forget(self, call: _Offered) -> None:
        """Expect nothing more of its process."""
        if self._by_channel.pop(call.channel.fileno(), None) is not None:
            self._poll.unregister(call.channel)

    def _remove(self, number: int) -> None:
        call = self._offered.pop(number)
        self._forget(call)
        call.channel.close()

    def _say(self) -> None:
        while self._wanted and not self._stops and self._offer_one():
            self._wanted -= 1
        if self._cancel_by is not None and (self._ready or self._stops):  # what could run at once was offered
            self._cancel_pending()
            if self._flowing or self._stops or time.monotonic() >= self._cancel_by:
                self._cancel_offered()
        self._withdraw()
        while self._stops_said < self._stops:
            self._stops_said += 1
            self._loop.say(s.Stop())
        if self._finishing and not self._exhausted and not self._waiting():
            self._exhausted = True
            self._loop.say(s.Exhausted())

    def _cancel_pending(self) -> None:
        while (call := self._next_pending()) is not None:
            with calling_back():
                call.future.cancel()
            call.future.set_running_or_notify_cancel()

    def _cancel_offered(self) -> None:
        with calling_back():
            for call in list(self._offered.values()):
                if not call.begun:
                    call.future.cancel()

    def _withdraw(self) -> None:
        """Tell the node which calls are not wanted any more."""
        while self._cancelled:
            number = self._cancelled.popleft()
            if number in self._offered and self._begin(number) is None:
                self._loop.say(s.Withdrawn(number, "was cancelled"))

    def _begin(self, number: int) -> _Offered | None:
        """The call, which can no longer be cancelled; None if it was, and then it is forgotten."""
        call = self._offered.get(number)
        if call is not None and not call.begun:
            call.begun = call.future.set_running_or_notify_cancel()
            if not call.begun:
                _answer(call, False)
                self._remove(number)
                return None
        return call

    def _waiting(self) -> bool:
        """Whether calls are pending that nobody has cancelled."""
        while self._pending and self._pending[0].future.cancelled():
            self._pending.popleft().future.set_running_or_notify_cancel()
        return bool(self._pending)

    def _offer_one(self) -> bool:
        """Offer the next call that can be made; whether there was one."""
        while (call := self._next_pending()) is not None:
            if call.future.cancelled():
                call.future.set_running_or_notify_cancel()
            elif (job := self._job(call)) is not None:
                try:
                    channel = self._loop.offer_with_channel(job)
                except NodeDiedError:
                    self._pending.appendleft(call)
                    raise
                except OSError as error:  # too many open files
                    if call.future.set_running_or_notify_cancel():
                        with calling_back():
                            call.future.set_exception(self._not_handed_over(job.label, call, None, error))
                    self._unlink(job.number)
                    continue
                self._offered[job.number] = _Offered(call.future, job.label, channel)
                self._by_channel[channel.fileno()] = job.number
                self._poll.register(channel, select.POLLIN)
                call.future.add_done_callback(functools.partial(_note, weakref.ref(self), job.number))
                return True
        return False

    def _job(self, call: Submitted) -> Job | None:
        """As the node takes it. A call that cannot be handed over fails."""
        number, name = self._number, _name(call.function)
        self._number += 1
        directory = self._loop.directory
        made = (pickling.Afresh(call.function), call.args, call.kwargs)
        try:
            with busy():
                packed = pack(made, directory / f"{number}.call", self._loop.known)
        except BaseException as error:  # whatever the user's objects raise, to whoever waits for it
            if call.future.set_running_or_notify_cancel():
                with calling_back():
                    call.future.set_exception(self._not_handed_over(name, call, made, error))
            return None
        return Job(number, name, FunctionCall(packed, str(directory / f"{number}.value")))

    def _not_handed_over(self, name: str, call: Submitted, made: object, error: BaseException) -> BaseException:
        """What to raise for a call whose function and arguments could not be packed."""
        if isinstance(error, OSError):
            problem = f"{name}() was not called: its arguments could not be handed over: {describe(error)}"
            return _caused(GpuLauncherError(problem), error)
        parts = {name: call.function, "args": call.args, "kwargs": call.kwargs}
        problem = (
            f"{name}() cannot be called in another process: {describe(error)}{found_at(parts, self._loop.known)}. "
            "Remedy: pass what the argument can be made from (a path, a configuration), and make it in the call; let "
            "the function itself use no lock, no open file and no generator of this process."
        )
        if self._may_fork and pickling.can_dump(made, pickling.main_namespace()):
            problem += ' Or use start_method="fork": a forked call has the globals of this program already.'
        return _caused(UnpicklableError(problem), error)

    def _conclude(self, result: JobResult) -> None:
        while result.number in self._offered and self._hear_call(result.number):
            pass  # what its process had said and nobody has heard
        call = self._begin(result.number)
        if call is None:
            self._unlink(result.number)
            return
        with busy():
            # Without a report its process died after it had said what came of the call.
            value, error = _open(result, call.name, None if result.payload is None else call.outcome)
        self._remove(result.number)
        if error is not None:
            self._unlink(result.number)
        with calling_back():
            if error is None:
                call.future.set_result(value)
            else:
                call.future.set_exception(error)
            del call, value, error  # of which this thread may be the last owner

    def _unlink(self, number: int) -> None:
        """Remove what a call has left in files."""
        for left in (f"{number}.call", f"{number}.value"):
            (self._loop.directory / left).unlink(missing_ok=True)

    def _why_closed(self, closed: Closed) -> str:
        if closed.error is not None:
            return str(closed.error)
        if self._stops:
            return "the executor was stopped"
        return self._remark or "the process that makes the calls has ended"

    def _fail_all(self, problem: str) -> None:
        """Whoever waits for a call waits no longer."""
        for number in list(self._offered):
            if (call := self._begin(number)) is not None:
                self._remove(number)
                with calling_back():
                    call.future.set_exception(BrokenPoolExecutor(f"{call.name}() was not finished: {problem}"))
        self._fail_pending(problem)

    def _fail_pending(self, problem: str) -> None:
        while (call := self._next_pending()) is not None:
            if call.future.set_running_or_notify_cancel():
                name = _name(call.function)
                with calling_back():
                    call.future.set_exception(BrokenPoolExecutor(f"{name}() was not called: {problem}"))


def _note(owner: weakref.ref[ExecutorThread], number: int, future: Future[Any]) -> None:
    """A call that was offered is done: perhaps somebody has cancelled it."""
    if future.cancelled() and (this := owner()) is not None:
        this.cancelled(number)


def _answer(call: _Offered, wanted: bool) -> None:
    with contextlib.suppress(ChannelClosedError):  # its process has ended, and the node will say so
        send(call.channel, wanted)


def _open(result: JobResult, name: str, outcome: CallOutcome | None) -> tuple[Any, BaseException | None]:
    """What the call returned, or what to raise instead."""
    if isinstance(outcome, ReturnedValue):
        try:
            return outcome.value.unpack(on_cpu=True), None
        except BaseException as why:  # whatever the user's objects raise when they are unpickled
            problem = f"returned what cannot be unpickled in this process: {describe(why)}"
            return None, _caused(JobError(result.number, name, problem, None), why)
    error = _error(result, name, outcome)
    return None, error if outcome is None else _caused(error, RemoteTraceback(outcome.traceback))


def _error(result: JobResult, name: str, outcome: NoValue | PortableException | None) -> BaseException:
    """What to raise for a call without a value."""
    message = result.message or "was not made"
    if result.cause is Cause.TIMEOUT:
        return JobTimeoutError(result.number, name, message, None)
    if result.outcome is not Outcome.CANCELLED and isinstance(outcome, PortableException):
        try:
            return outcome.load()
        except LookupError as why:
            message = f"{message}. {why}"
    if isinstance(outcome, NoValue) and outcome.unpicklable:
        return UnpicklableError(f"{name}() {message}")
    return JobError(result.number, name, message, None)


def _caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def _name(function: Callable[..., Any]) -> str:
    """For messages, and for others who wait for devices."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__
