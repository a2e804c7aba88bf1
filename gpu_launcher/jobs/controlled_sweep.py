"""A running sweep as other programs see it: they watch it and send requests through its control socket.

Theory of operation. Whatever happens is an event, and `show` is the one place through which it passes: to the
manifest, to the tally and to those who watch. So the tally has the state with which requests are answered. What a
request changes about jobs that run is a statement for what runs them, such as `Cancel`. Jobs that do not run are known
to the subclass alone.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import replace

from gpu_launcher.debug_log import get_logger
from gpu_launcher.jobs.control import (
    MAX_RANGES,
    Answer,
    AskStatus,
    CancelJobs,
    ContinueSweep,
    LimitDevices,
    PauseSweep,
    Ranges,
    RetryJobs,
    Steering,
    StopSweep,
    WatchSweep,
    merged,
    name_of,
    named,
    ranges_of,
    spell,
)
from gpu_launcher.jobs.control_socket import open_control
from gpu_launcher.jobs.event_lines import write_event, write_state
from gpu_launcher.jobs.events import Event, Notice, StopRequested, Throttled
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.jobs.source import UNTHROTTLED, Cancel, Stop, Throttle
from gpu_launcher.wording import count

_log = get_logger("jobs.controlled_sweep")


class ControlledSweep(ABC):
    """The state of a running sweep, and what requests do to it."""

    def __init__(self, recorder: Recorder, total: int | None, grace: float) -> None:
        """Open the control socket. `total` is the number of jobs, if it is known."""
        self._recorder = recorder
        self._total = total
        self._grace = grace
        self._tally = SweepTally()
        self._control = open_control(recorder.directory, recorder.socket)
        self._cancelled: set[int] = set()
        """Jobs that requests have cancelled, and that have not ended."""
        self._stopping: str | None = None
        """What stopped the sweep: the name of a signal, or text such as "3 failures". None if it was not stopped."""
        self.throttle = UNTHROTTLED
        """How much may run."""

    def fileno(self) -> int | None:
        """Return a descriptor that is readable when `serve` has something to do. None if there is no socket."""
        return None if self._control is None else self._control.fileno()

    def serve(self) -> None:
        """Carry out the requests that have arrived at the socket. Never waits."""
        if self._control is not None:
            self._control.serve(lambda one: self._carry_out(one, f"`gpu-launcher {name_of(one)}`"), self._state)

    def close(self) -> None:
        """Close the control socket."""
        if self._control is not None:
            self._control.close()

    def _state(self) -> bytes:
        self._tally.advance(time.monotonic())
        return write_state(self._tally)

    def show(self, event: Event) -> None:
        """Record an event, and tell those who watch."""
        if isinstance(event, StopRequested):
            self._stopping = self._stopping or event.signal
        self._recorder.handle(event)
        self._tally.take(event)
        if self._control is not None and self._control.is_watched:
            self._control.publish(write_event(event))

    # Requests

    def _carry_out(self, request: Steering, by: str) -> Answer:
        """Carry out a request. Raises ValueError if that is not possible, with a message for the sender.

        `by` says to the user where the request comes from.
        """
        match request:
            case AskStatus():
                return self._status()
            case WatchSweep():  # the control socket answers it
                return {}
            case CancelJobs(jobs):
                return self._cancel(jobs, by)
            case RetryJobs(jobs):
                return self._retry(jobs, by)
            case StopSweep(now):
                return self._stop_by_request(by, now=now)
            case PauseSweep():
                return self._change(replace(self.throttle, paused=True), "no job is started", by)
            case ContinueSweep():
                return self._change(replace(self.throttle, paused=False), "jobs are started again", by)
            case LimitDevices(devices):
                limit = "no limit on devices" if devices is None else f"at most {count(devices, 'device')}"
                return self._change(replace(self.throttle, devices=devices), limit, by)

    def _status(self) -> Answer:
        return {
            "stopping": self._stopping,
            "paused": self.throttle.paused,
            "devices": self.throttle.devices,
            "total": self._total,
            "running": len(self._tally.running),
            "ended": {outcome.value: number for outcome, number in self._tally.ended.items() if number},
            "facts": self._tally.facts,
        }

    def _cancel(self, jobs: Ranges, by: str) -> Answer:
        """End those of these jobs that run, and conclude those that wait."""
        already = named(jobs, self._cancelled)
        ending = self._withdraw(named(jobs, self._tally.running), by)
        dropped = self._drop(jobs, by)
        if ending or dropped:
            self._announce(Notice(time.monotonic(), f"{spell(merged([*ending, *dropped]))} cancelled by {by}"))
        return {
            "ending": ending[:MAX_RANGES],
            "dropped": dropped[:MAX_RANGES],
            "already": ranges_of(already)[:MAX_RANGES],
            "coming": self._coming(),
            "grace": self._grace,
        }

    def _withdraw(self, jobs: Collection[int], by: str) -> Ranges:
        """Tell what runs the jobs that these are no longer wanted. Returns those that were wanted until now."""
        wanted = [number for number in jobs if number not in self._cancelled]
        for number in wanted:
            self._cancelled.add(number)
            self._tell(Cancel(number, f"was cancelled by {by}"))
        return ranges_of(wanted)

    def _stop_by_request(self, by: str, *, now: bool) -> Answer:
        already = self._stopping is not None
        for _ in range(now + (not already)):
            self._stop(by.replace("stop", "stop --now") if now else by)
        return {"already": already, "running": len(self._tally.running), "grace": self._grace}

    def _stop(self, why: str) -> None:
        """Interrupt the running jobs. The second call kills them."""
        self._tell(Stop())
        self._announce(self._stop_requested(why))

    def _stop_requested(self, why: str) -> StopRequested:
        forced = self._stopping is not None
        _log.info("stop because of %s%s", why, ", for the second time" if forced else "")
        return StopRequested(time.monotonic(), len(self._tally.running), self._grace, forced, why)

    def _change(self, throttle: Throttle, what: str, by: str) -> Answer:
        """Change how much may run. `what` says so to the user."""
        if self._stopping is not None:
            raise ValueError("it is stopping, so no more jobs are started")
        changed = throttle != self.throttle
        if changed:
            self._set_throttle(throttle, f"{what} from now on, because of {by}")
        running = len(self._tally.running)
        return {"changed": changed, "paused": throttle.paused, "devices": throttle.devices, "running": running}

    def _set_throttle(self, throttle: Throttle, text: str) -> None:
        self.throttle = throttle
        self._tell(throttle)
        self._announce(Throttled(time.monotonic(), throttle.paused, throttle.devices, text))

    # What differs

    @abstractmethod
    def _tell(self, statement: Cancel | Stop | Throttle) -> None:
        """Tell what runs the jobs what to do."""

    @abstractmethod
    def _retry(self, jobs: Ranges | None, by: str) -> Answer:
        """Run those of these jobs again that did not complete. None: all that failed. Raises ValueError."""

    def _announce(self, event: Notice | StopRequested | Throttled) -> None:
        """Show what a request has done."""
        self.show(event)

    def _drop(self, jobs: Ranges, by: str) -> Ranges:
        """Cancel those of these jobs that do not run and have not ended, and return them."""
        return ()

    def _coming(self) -> Ranges:
        """Return the numbers of jobs that are not known yet and may come."""
        return ()
