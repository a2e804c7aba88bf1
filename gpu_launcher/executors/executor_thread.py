"""The thread of an executor: it passes calls to the node, and their outcomes to the futures.

Theory of operation. Everything that happens to a call happens in this thread; methods such as `submit` and `cancel`
only put something into a queue and wake the thread. It waits on three kinds of descriptors:

    user's threads                  executor's thread                    node                      call's process
    submit ── _pending, _wake ──►                     ◄── Wanted ──
                                    pickles the call  ─── Offer, one end of a socket pair ──►  starts ──►
                                                      ◄──────────────── IsWanted? ─────────────────  has its devices
                                    future: running   ─────────── function and arguments ────────►   unpickles, calls
                                                      ◄── ReturnedValue, NoValue or PortableException ──
    result  ◄── callbacks ────────  future: done      ◄── Ended ──                  ◄── exits

The node asks for calls when it has room (`Wanted`). Until then, a call can be cancelled here. A call that was offered
can be cancelled until its process asks whether it is still wanted. Messages of a process do not pass through the node,
and are in the channel before the node says `Ended`: the thread empties the channel first, then concludes the call. If
there is no outcome by then, the process died, and `Ended` says how. The node relays nothing that it would have to
unpickle. It does not wait for this thread, which may be in one of the user's callbacks for any time.

With several nodes, all this holds. A call that has asked whether it is wanted is not made again if its node is lost.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_launcher.errors import GpuLauncherError, JobError, JobTimeoutError, NodeDiedError, UnpicklableError
from gpu_launcher.executors.calls import CallOutcome, FunctionCall, IsWanted
from gpu_launcher.executors.process_channels import ProcessChannels
from gpu_launcher.executors.transport import NoValue, Payload, ReturnedValue, pack
from gpu_launcher.jobs import notice_log
from gpu_launcher.jobs import source as s
from gpu_launcher.jobs.events import GaveUp, JobWaiting, Notice, Outcome
from gpu_launcher.jobs.job import Cause, Job, JobResult
from gpu_launcher.jobs.node_client import RemoteLoop, busy, calling_back, harmless_thread
from gpu_launcher.jobs.node_messages import Closed, Ended, Wanted
from gpu_launcher.processes import pickling
from gpu_launcher.processes.exceptions import PortableException, RemoteTraceback, describe
from gpu_launcher.processes.unpicklable import found_at

if TYPE_CHECKING:
    from gpu_launcher.nodes.group_loop import GroupLoop

AT_ONCE_SECONDS = 5.0
"""Seconds that `cancel` waits for the executor's first call to begin. Later, the call did not begin at once."""


class BrokenPoolExecutor(GpuLauncherError, BrokenExecutor):
    """The executor cannot make calls any more, and unfinished calls are lost. Make a new executor."""


@dataclass(slots=True)
class Submitted:
    """A call that was submitted and has not been offered to the node yet."""

    future: Future[Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class _Offered:
    """A call that was offered to the node."""

    future: Future[Any]
    name: str
    """Name of the function."""
    packed: Payload
    """The function and its arguments."""
    begun: bool = False
    """Whether it can no longer be cancelled."""
    outcome: CallOutcome | None = None
    """The outcome, if its process has sent one."""


class ExecutorThread:
    """Carries the calls of one executor. It has no reference to the executor, so that an unused one is collected."""

    _wake = -1

    def __init__(self, loop: RemoteLoop | GroupLoop, *, may_fork: bool) -> None:
        """Start the thread.

        `loop` is open; the thread closes it at the end. `may_fork`: calls are spawned although they could be forked.
        """
        self._loop = loop
        self._may_fork = may_fork
        self._pending: deque[Submitted] = deque()
        self._offered: dict[int, _Offered] = {}
        self._channels = ProcessChannels(loop)
        self._cancelled: deque[int] = deque()
        """Numbers of offered calls that the user has cancelled."""
        self._wanted = 0
        """How many more calls the node wants now."""
        self._ready = False
        """Whether the node has asked for calls at least once."""
        self._flowing = False
        """Whether a call has got its devices, or waits for devices that others hold.

        Calls that have not begun by then could not begin at once, so `cancel` need not wait for them.
        """
        self._number = 0
        self._finishing = False
        """Whether no more calls will be submitted."""
        self._cancel_by: float | None = None
        """Time at which `cancel` stops waiting for calls to begin. None if it was not called."""
        self._exhausted = False
        """Whether the node was told that there are no more calls."""
        self._stops = 0
        """How many times `stop` was called."""
        self._stops_said = 0
        """How many of these stops the node was told about."""
        self._given_up = "the process that makes the calls has ended"
        """Why the node makes no more calls."""
        self._process = os.getpid()
        self.broken: str | None = None
        """Why no more calls can be made. None while they can."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="gpu-launcher-executor", daemon=True)
        self._thread.start()

    # These are called from any thread, and from finalizers, so none of them waits for a lock.

    def submit(self, call: Submitted) -> None:
        """Queue a call. If the executor is broken, the call fails."""
        self._pending.append(call)
        self._notify()
        if self.broken is not None:  # the thread may have ended before it saw this call
            self._fail_pending(self.broken)

    def finish(self) -> None:
        """Take no more calls. The thread ends when all calls have been made."""
        self._finishing = True
        self._notify()

    def cancel(self) -> None:
        """Take no more calls, and cancel those that have not begun and could not begin at once."""
        if self._cancel_by is None:
            self._cancel_by = time.monotonic() + AT_ONCE_SECONDS
        self.finish()

    def stop(self) -> None:
        """Interrupt the running calls. The second call kills them."""
        self._stops += 1
        self._notify()

    def cancelled(self, number: int) -> None:
        """Take note that the user has cancelled an offered call."""
        self._cancelled.append(number)
        self._notify()

    def join(self) -> None:
        """Wait until the thread has ended. Returns at once in the thread itself and in forks."""
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
            os.close(self._wake)  # not earlier: `_notify` might then write to another file with the same number

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
        """Carry calls until the run has ended. Returns why calls that are left are not made."""
        self._channels.poll.register(self._wake, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in self._channels.poll.poll(self._patience())}
            if self._wake in ready:
                os.eventfd_read(self._wake)
            numbers = self._channels.numbers
            for number in [numbers[descriptor] for descriptor in ready & numbers.keys()]:
                self._hear_call(number)
            self._loop.tick()
            for message in self._loop.receive_ready() if self._loop.fileno() in ready else ():
                if isinstance(message, Closed):
                    return self._why_closed(message)
                self._hear(message)
                del message  # the thread must not keep objects of the user alive
            self._say()

    def _patience(self) -> float | None:
        """Return the milliseconds until there is something to do even if no message arrives. None: never."""
        seconds = self._loop.tick_seconds
        if self._cancel_by is not None and not all(call.begun for call in self._offered.values()):
            seconds = min(seconds, max(0.0, self._cancel_by - time.monotonic()))
        return None if seconds == math.inf else seconds * 1000

    def _hear(self, message: object) -> None:
        match message:
            case Wanted(count):
                self._wanted += count
                self._ready = True
            case Ended(result):
                if result.left_behind:
                    with calling_back():
                        notice_log.log_left_behind(result)
                self._conclude(result)
            case Notice() | GaveUp() | JobWaiting():
                if isinstance(message, JobWaiting):
                    self._flowing = self._flowing or bool(message.reason)
                elif isinstance(message, GaveUp):
                    self._given_up = message.text
                with calling_back():
                    notice_log.log_event(message)

    def _hear_call(self, number: int) -> bool:
        """Handle the next message of a call's process. Returns whether there was one."""
        message = self._channels.receive(number)
        if isinstance(message, IsWanted):
            self._flowing = True
            if (call := self._begin(number)) is not None:
                self._hand_over(number, call)
        elif message is not None:
            self._offered[number].outcome = message
        return message is not None

    def _hand_over(self, number: int, call: _Offered) -> None:
        """Send a call's process the function and its arguments."""
        try:
            packed = call.packed if self._loop.shares_files else call.packed.without_file()
            call.packed = Payload(b"")  # it may be large
            self._channels.send(number, packed)
        except OSError as error:
            self._channels.send(number, None)
            self._remove(number)
            self._unlink(number)
            with calling_back():
                call.future.set_exception(_not_handed_over(call.name, error))

    def _remove(self, number: int) -> None:
        del self._offered[number]
        self._channels.close(number)

    def _say(self) -> None:
        """Send the node what it should know: calls that it wants, cancelled calls, stops, and the end of calls."""
        while self._wanted and not self._stops and self._offer_one():
            self._wanted -= 1
        if self._cancel_by is not None and (self._ready or self._stops):  # those that could run at once were offered
            self._cancel_pending()
            if self._flowing or self._stops or time.monotonic() >= self._cancel_by:
                self._cancel_offered()
        self._say_cancelled()
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

    def _say_cancelled(self) -> None:
        """Tell the node which calls were cancelled."""
        while self._cancelled:
            number = self._cancelled.popleft()
            if number in self._offered and self._begin(number) is None:
                self._loop.say(s.Cancel(number, "was cancelled"))

    def _begin(self, number: int) -> _Offered | None:
        """Return an offered call, which cannot be cancelled from now on. If it was cancelled, remove it instead."""
        call = self._offered.get(number)
        if call is not None and not call.begun:
            call.begun = call.future.set_running_or_notify_cancel()
            if not call.begun:
                self._channels.send(number, None)
                self._remove(number)
                return None
        return call

    def _waiting(self) -> bool:
        """Whether there are pending calls that were not cancelled."""
        while self._pending and self._pending[0].future.cancelled():
            self._pending.popleft().future.set_running_or_notify_cancel()
        return bool(self._pending)

    def _offer_one(self) -> bool:
        """Offer the next call that can be made. Returns whether there was one."""
        while (call := self._next_pending()) is not None:
            if call.future.cancelled():
                call.future.set_running_or_notify_cancel()
            elif (made := self._job(call)) is not None:
                job, packed = made
                try:
                    self._channels.offer(job)
                except NodeDiedError:
                    self._pending.appendleft(call)
                    raise
                except OSError as error:  # too many open files
                    if call.future.set_running_or_notify_cancel():
                        with calling_back():
                            call.future.set_exception(self._not_handed_over(job.label, call, None, error))
                    self._unlink(job.number)
                    continue
                self._offered[job.number] = _Offered(call.future, job.label, packed)
                call.future.add_done_callback(functools.partial(_note, weakref.ref(self), job.number))
                return True
        return False

    def _job(self, call: Submitted) -> tuple[Job, Payload] | None:
        """Make the job of a call, and pickle it. If the call cannot be pickled, it fails, and the result is None."""
        number, name = self._number, _name(call.function)
        self._number += 1
        directory = self._loop.directory
        made = (pickling.Afresh(call.function), call.args, call.kwargs)
        try:
            with busy():
                packed = pack(made, directory / f"{number}.call", self._loop.known)
        except BaseException as error:  # user objects may raise anything; it goes to the future
            if call.future.set_running_or_notify_cancel():
                with calling_back():
                    call.future.set_exception(self._not_handed_over(name, call, made, error))
            return None
        value = str(directory / f"{number}.value") if self._loop.shares_files else None
        return Job(number, name, FunctionCall(value)), packed

    def _not_handed_over(self, name: str, call: Submitted, made: object, error: BaseException) -> BaseException:
        """Make the exception for a call whose function and arguments could not be packed."""
        if isinstance(error, OSError):
            return _not_handed_over(name, error)
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
            pass  # messages that the process sent before it ended
        call = self._begin(result.number)
        if call is None:
            self._unlink(result.number)
            return
        with busy():
            # If there is no report, the process died after it had sent the outcome, which then does not count.
            value, error = _open(result, call.name, None if result.payload is None else call.outcome)
        self._remove(result.number)
        if error is not None:
            self._unlink(result.number)
        with calling_back():
            if error is None:
                call.future.set_result(value)
            else:
                call.future.set_exception(error)
            del call, value, error  # the thread must not keep objects of the user alive

    def _unlink(self, number: int) -> None:
        """Remove the files of a call."""
        for left in (f"{number}.call", f"{number}.value"):
            (self._loop.directory / left).unlink(missing_ok=True)

    def _why_closed(self, closed: Closed) -> str:
        if closed.error is not None:
            return str(closed.error)
        if self._stops:
            return "the executor was stopped"
        return self._given_up

    def _fail_all(self, problem: str) -> None:
        """Fail all calls that have not ended."""
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
    """Tell the thread if an offered call was cancelled. Called when its future is done."""
    if future.cancelled() and (this := owner()) is not None:
        this.cancelled(number)


def _open(result: JobResult, name: str, outcome: CallOutcome | None) -> tuple[Any, BaseException | None]:
    """Return the value of a call, or the exception to raise instead."""
    if isinstance(outcome, ReturnedValue):
        try:
            return outcome.value.unpack(on_cpu=True), None
        except BaseException as why:  # user objects may raise anything when they are unpickled
            problem = f"returned what cannot be unpickled in this process: {describe(why)}"
            return None, _caused(JobError(result.number, name, problem, None), why)
    error = _error(result, name, outcome)
    return None, error if outcome is None else _caused(error, RemoteTraceback(outcome.traceback))


def _error(result: JobResult, name: str, outcome: NoValue | PortableException | None) -> BaseException:
    """Make the exception for a call without a value."""
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


def _not_handed_over(name: str, error: OSError) -> BaseException:
    problem = f"{name}() was not called: its arguments could not be handed over: {describe(error)}"
    return _caused(GpuLauncherError(problem), error)


def _caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def _name(function: Callable[..., Any]) -> str:
    """Return the name of a function, for messages and for others who wait for devices."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__
