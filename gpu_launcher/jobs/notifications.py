"""Tells the user's hooks that a job has failed, or that the sweep is over. The head does this in its own loop.

A hook is a command that gets a JSON document on its standard input (`processes.hook_process`). Hooks for failures run
one after another, in the order of the failures, while the jobs continue. When the last job has ended, the results are
written and the nodes are given back, the rest of them have HOOK_SECONDS together; then the hook for the end of the
sweep runs. So a hook cannot delay jobs or hold devices, and it delays the end of the program by a bounded time. The
first problem of each hook becomes one line for the user, and the sweep ends as it would without hooks.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import shlex
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from types import TracebackType
from typing import Any

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import ManifestError, OptionError
from gpu_launcher.jobs.events import Outcome
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.manifest import read_manifest
from gpu_launcher.jobs.result_table import params_of, tabulate
from gpu_launcher.processes.hook_process import HookProcess
from gpu_launcher.processes.signals import StopSignals
from gpu_launcher.redaction import redact
from gpu_launcher.text import one_line
from gpu_launcher.wording import count, duration

_log = get_logger("jobs.notifications")

SCHEMA = 1
HOOK_SECONDS = 30.0
"""Maximum seconds that a hook may take, and that all hooks that still wait at the end of the sweep may take."""
KILL_SECONDS = 2.0
"""Seconds to wait for a killed hook at the end of the sweep."""
TICK_SECONDS = 0.125
"""Maximum seconds between two looks at a hook that runs at the end of the sweep."""
MAX_PENDING = 1000
"""Maximum number of failures that wait for their hook. More are not passed on."""
ON_END, ON_JOB_FAILURE = "on_end", "on_job_failure"


@dataclass(frozen=True, slots=True)
class Hooks:
    """The commands of the user's hooks. None for a hook that is not set."""

    on_end: tuple[str, ...] | None = None
    on_job_failure: tuple[str, ...] | None = None

    def __bool__(self) -> bool:
        return self.on_end is not None or self.on_job_failure is not None


def read_hook(option: str, value: object) -> tuple[str, ...] | None:
    """Read a hook: a list of words, or text that is split as a shell does. None for no hook. Raises OptionError."""
    if value is None:
        return None
    example = "give a command, such as 'notify-send sweep' or [python,notify.py]"
    if isinstance(value, str):
        try:
            words = shlex.split(value)
        except ValueError as error:
            raise OptionError(option, f"{value!r} cannot be split into words ({error}): {example}") from None
    elif isinstance(value, list) and all(type(word) in (str, int, float) for word in value):
        words = [str(word) for word in value]
    else:
        raise OptionError(option, f"{value!r} is not a command: {example}")
    if not words or not words[0]:
        raise OptionError(option, f"names no program: {example}")
    if any("\0" in word for word in words):
        raise OptionError(option, f"has a null character: {example}")
    return tuple(words)


class Notifier:
    """Runs the hooks of one sweep. A context manager: at its end, it runs the rest of them, and the hook for the end.

    The head calls `begin`, `job_failed`, `tick` and `conclude`. If it never calls `begin`, no hook runs.
    """

    def __init__(
        self,
        hooks: Hooks,
        directory: Path,
        command: str,
        *,
        spell: Callable[[str], str],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Run `hooks` for the sweep in `directory`. `command` is the command line of this program.

        `spell` returns an option's name as users write it. `tell` shows a line to the user when the sweep's display
        is closed.
        """
        self._hooks = hooks
        self._directory = directory
        self._command = command
        self._spell = spell
        self._tell = tell
        self._clock = clock
        self._began: float | None = None
        self._pending: deque[bytes] = deque()
        """Documents about jobs that failed."""
        self._running: tuple[str, HookProcess] | None = None
        self._descriptor: int | None = None
        """A descriptor of the running hook's process, if the kernel has such descriptors."""
        self._told: set[str] = set()
        """Hooks about which a line was shown."""
        self._lines: list[str] = []
        self._conclusion: dict[str, Any] | None = None
        self._stopped = False
        self.interrupted: Signals | None = None
        """The signal that came while hooks ran at the end of a sweep, if no signal had stopped the sweep before."""

    # While jobs run

    def begin(self) -> int:
        """Take note that the sweep begins. Return a descriptor that is readable when `tick` has something to do."""
        self._began = self._clock()
        self._selector = selectors.EpollSelector()
        return self._selector.fileno()

    def job_failed(self, job: Job, result: JobResult) -> None:
        """Pass on that a job failed and is not retried."""
        if self._hooks.on_job_failure is None:
            return
        if len(self._pending) >= MAX_PENDING:
            self._complain(ON_JOB_FAILURE, f"is too slow: some failures are not passed on ({MAX_PENDING} wait)")
            return
        self._pending.append(_encode(failure_document(self._directory, job, result)))

    def tick(self) -> list[str]:
        """Look after the running hook, and start the next. Return lines for the user. Never waits."""
        self._poll()
        if self._running is None and self._pending:
            assert self._hooks.on_job_failure is not None
            self._start(ON_JOB_FAILURE, self._hooks.on_job_failure, self._pending.popleft())
        lines, self._lines = self._lines, []
        return lines

    def conclude(self, reason: str, message: str | None, jobs: Mapping[Outcome, int], *, stopped: bool) -> None:
        """Take note of how the sweep ended.

        `reason` is as in the document, `jobs` counts jobs by outcome, and `stopped` says whether a signal ended it.
        """
        self._stopped = stopped
        self._conclusion = {
            "reason": reason,
            "message": None if message is None else one_line(message),
            "jobs": {outcome.value: jobs.get(outcome, 0) for outcome in Outcome},
        }

    # At the end

    def __enter__(self) -> Notifier:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._began is None:
            return
        seconds = self._clock() - self._began
        if self._conclusion is None:
            self.conclude("error", None if error is None else f"{type(error).__name__}: {error}", {}, stopped=False)
        try:
            with StopSignals() as signals:
                self._wait(signals, self._clock() + HOOK_SECONDS)
                if self._hooks.on_end is not None:
                    self._start(ON_END, self._hooks.on_end, self._ending(seconds))
                    self._wait(signals, self._clock() + HOOK_SECONDS)
        finally:
            if self._running is not None:  # a handler of another signal raised
                self._running[1].kill("was killed")
                self._forget()
            self._selector.close()
        if not self._stopped:
            self.interrupted = signals.last

    def _wait(self, signals: StopSignals, until: float) -> None:
        """Run the hooks that wait, until a time or a signal. Then kill the hook that runs, and drop the others."""
        with selectors.DefaultSelector() as selector:
            selector.register(signals.fileno(), selectors.EVENT_READ)
            selector.register(self._selector.fileno(), selectors.EVENT_READ)
            while self._running is not None or self._pending:
                if signals.take() and signals.last is not None:
                    self._drop(f"was killed because of {signals.last.name}")
                    break
                if self._clock() >= until:
                    self._drop(f"took longer than {duration(HOOK_SECONDS)} and was killed")
                    break
                self._show()
                if self._running is not None:
                    selector.select(TICK_SECONDS)
            if self._running is not None:
                self._await_end(selector)
        self._show()

    def _drop(self, why: str) -> None:
        """Kill the hook that runs, and drop the failures that wait for it."""
        if self._pending:
            why = f"{why}; {count(len(self._pending), 'failure')} not passed on"
            self._pending.clear()
        if self._running is not None:
            self._running[1].kill(why)

    def _await_end(self, selector: selectors.BaseSelector) -> None:
        """Wait for a hook that was killed. One that cannot be killed, as with `sudo`, is left alone."""
        until = self._clock() + KILL_SECONDS
        self._poll()
        while self._running is not None and self._clock() < until:
            selector.select(TICK_SECONDS)
            self._poll()
        if self._running is not None:
            hook, _ = self._running
            self._forget()
            self._complain(hook, "cannot be killed")

    def _show(self) -> None:
        for line in self.tick():
            self._tell(line)

    # Processes

    def _start(self, hook: str, command: tuple[str, ...], document: bytes) -> None:
        try:
            process = HookProcess(command, document, self._clock(), HOOK_SECONDS)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._complain(hook, f"cannot be run: {command[0]}: {why}")
            return
        self._running = hook, process
        try:
            self._descriptor = os.pidfd_open(process.pid)
        except OSError:  # a kernel or container without them; `tick` is called often anyway
            self._descriptor = None
        else:
            self._selector.register(self._descriptor, selectors.EVENT_READ)

    def _poll(self) -> None:
        if self._running is None:
            return
        hook, process = self._running
        if process.poll(self._clock()):
            self._forget()
            if process.problem is not None:
                self._complain(hook, process.problem)

    def _forget(self) -> None:
        """Close what is open for the hook that runs."""
        assert self._running is not None
        self._running[1].close()
        self._running = None
        if self._descriptor is not None:
            self._selector.unregister(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None

    def _complain(self, hook: str, problem: str) -> None:
        _log.warning("hook %s %s", hook, problem)
        if hook not in self._told:
            self._told.add(hook)
            self._lines.append(one_line(f"the command of {self._spell(hook)} {problem}"))

    # Documents

    def _ending(self, seconds: float) -> bytes:
        assert self._conclusion is not None
        return _encode(
            {
                "schema": SCHEMA,
                "event": "end",
                "directory": str(self._directory),
                "command": redact(self._command),
                **self._conclusion,
                "best": _best(self._directory),
                "duration": round(seconds, 3),
            }
        )


def failure_document(directory: Path, job: Job, result: JobResult) -> dict[str, Any]:
    """Return what the hook for failures is told about a job. Secrets in its parameters are hidden."""
    return {
        "schema": SCHEMA,
        "event": "job_failure",
        "sweep": str(directory),
        "number": result.number,
        "params": params_of(job.spec),
        "outcome": result.outcome.value,
        "cause": None if result.cause is None else result.cause.value,
        "message": None if result.message is None else one_line(result.message),
        "log": result.log,
        "directory": None if result.log is None else str(Path(result.log).parent),
        "node": next((device.node for device in result.devices if device.node), None),
        "devices": [device.label for device in result.devices],
        "attempts": result.attempts,
        "duration": None if result.duration is None else round(result.duration, 3),
    }


def _best(directory: Path) -> dict[str, Any] | None:
    """Return the best job of the sweep. None if it is not known which one that is."""
    try:
        table = tabulate(directory, read_manifest(directory))
    except (ManifestError, OSError):  # the line about results.csv says so
        return None
    if (row := table.best) is None:
        return None
    ((name, direction),) = table.directions.items()
    return {
        "number": row.number,
        "params": row.params,
        "value": row.values[name],
        "direction": direction,
        "directory": row.directory,
    }


def _encode(document: Mapping[str, Any]) -> bytes:
    """Write a document as JSON in ASCII. Numbers that JSON does not have become texts: `nan`, `inf`."""
    return json.dumps(_strict(document), allow_nan=False).encode()


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _strict(one) for name, one in value.items()}
    return [_strict(one) for one in value] if isinstance(value, (list, tuple)) else value
