"""The plain display of a sweep: one line per event, for pipes, log files and continuous integration."""

from __future__ import annotations

from typing import TextIO

from gpu_launcher.jobs.events import (
    Event,
    JobEnded,
    JobRetried,
    JobsRequeued,
    JobStarted,
    JobWaiting,
    NodesChanged,
    Notice,
    Outcome,
    StopRequested,
    SweepEnded,
    SweepStarted,
    Throttled,
)
from gpu_launcher.jobs.progress.log_window import log_tail
from gpu_launcher.jobs.progress.stream import Output
from gpu_launcher.jobs.progress.tally import SweepTally, failure, retry
from gpu_launcher.model import DeviceKind
from gpu_launcher.text import one_line
from gpu_launcher.wording import count, device_counts, device_names, duration, job_name

NAME = "gpu_pool"
"""Prefix of a sweep's lines: the launcher's name in Hydra."""


class PlainProgress:
    """Writes one line per event and flushes it at once. The format is stable, so that users can search the lines.

    Jobs that did not start because of a stop have no line; the closing summary counts them.
    """

    def __init__(self, stream: TextIO | None, name: str = NAME) -> None:
        self._name = name
        self._output = Output(stream)
        self._tally = SweepTally()
        self._last_wait: tuple[int, str] | None = None
        self._summed_up = False

    def handle(self, event: Event) -> None:
        self._tally.take(event)
        match event:
            case SweepStarted():
                self._say(opening(event))
            case Notice() | NodesChanged() | Throttled() | JobsRequeued():
                self._say(one_line(event.text))
            case JobWaiting():
                self._waiting(event)
            case JobStarted():
                where = f" on {device_names(event.devices)}" if event.devices else ""
                log = f", log: {one_line(event.log)}" if event.log else ""
                self._say(f"{job_name(event.number, event.label)} started{where}{log}")
            case JobEnded():
                self._ended(event)
            case JobRetried():
                self._say(retry(event))
            case StopRequested():
                self._say(stopping(event, event.running, event.grace))
            case SweepEnded():
                self._sum_up()

    def tick(self, now: float) -> None:
        self._tally.advance(now)

    def join(self, tally: SweepTally) -> None:
        """Show a sweep that runs already, from its present state. Its events follow."""
        self._tally = tally
        self._say(present(tally))

    def leave(self, text: str) -> None:
        """Show a last line instead of a summary, because the sweep continues without this display."""
        self._summed_up = True
        self._say(text)

    def close(self) -> None:
        self._sum_up()

    def _waiting(self, event: JobWaiting) -> None:
        wait = (event.number, event.reason)
        if wait != self._last_wait:
            self._last_wait = wait
            if event.reason:
                self._say(waits(event))

    def _ended(self, event: JobEnded) -> None:
        done = f" ({self._tally.done}/{self._tally.total} done)"
        if event.outcome is Outcome.FAILED:
            same = self._tally.same
            self._say(failure(event, done, same), *log_quote(event, self._tally))
            if hint := self._tally.all_alike():
                self._say(hint)
        elif event.duration is not None:
            name = job_name(event.number, event.label)
            self._say(f"{name} {ENDS[event.outcome]} {duration(event.duration)}{done}")

    def _sum_up(self) -> None:
        if not self._summed_up and self._tally.started_at is not None:
            self._summed_up = True
            self._say(*self._tally.summary())

    def _say(self, line: str, *more: str) -> None:
        self._output.write("".join(f"{text}\n" for text in (f"[{self._name}] {line}", *more)))


ENDS = {
    Outcome.COMPLETED: "completed in",
    Outcome.PRUNED: "pruned after",
    Outcome.CANCELLED: "cancelled after",
}


def opening(event: SweepStarted) -> str:
    """Format the first line: `8 jobs on 4 GPUs (NVIDIA H100 80GB HBM3), at most 2 at a time`."""
    names = {device.name for device in event.devices}
    gpus = all(device.kind is DeviceKind.GPU for device in event.devices)
    name = f" ({one_line(names.pop())})" if gpus and len(names) == 1 else ""
    cap = f", at most {event.parallel} at a time" if event.parallel is not None else ""
    jobs = "jobs" if event.total is None else count(event.total, "job")
    return f"{jobs} on {device_counts(event.devices)}{name}{cap}"


def present(tally: SweepTally) -> str:
    """Format the state of a sweep that runs already: `8 jobs on 4 GPUs: 3 done, 4 running, 1 waiting`."""
    counts = ((tally.done, "done"), (len(tally.running), "running"), (tally.waiting, "waiting"))
    known = ", ".join(f"{number} {word}" for number, word in counts if number)
    first = opening(SweepStarted(tally.now, tally.total or None, tally.devices, None))
    return f"{first}: {known}" if known else first


def waits(event: JobWaiting) -> str:
    """Format a wait: `waits for 2 GPUs: GPU 0-3 held by anna (train.py); job 4 (lr=0.1)`.

    The job comes last because a narrow terminal cuts off the end.
    """
    wanted = f" for {event.wanted}" if event.wanted else ""
    return f"waits{wanted}: {one_line(event.reason)}; {job_name(event.number, event.label)}"


def stopping(event: StopRequested, running: int, seconds: float) -> str:
    """Format a stop. `running` and `seconds` are the current numbers, because a live view counts both down."""
    stopping = "stopping" if event.signal.startswith("SIG") else f"stopping after {event.signal}"
    if running == 0:
        return stopping
    jobs = count(running, "job")
    if event.forced:
        return f"{stopping}: killing {jobs}"
    # A sweep that was stopped from elsewhere may be detached, where no Ctrl-C reaches it.
    faster = "`gpu-launcher stop --now`" if event.signal.startswith("`gpu-launcher") else "Ctrl-C again"
    return f"{stopping}: waiting up to {duration(seconds, tenths=False)} for {jobs} ({faster} to kill them)"


def log_quote(event: JobEnded, tally: SweepTally) -> list[str]:
    """Return the end of a failed job's log, indented. Empty if the log of a similar failure was already shown."""
    if tally.same is not None or not tally.failures.tells_more(event):
        return []
    return [f"    | {line}".rstrip() for line in log_tail(event.log)]
