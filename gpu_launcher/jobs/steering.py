"""Steers a running sweep from another process, through the control socket of its head. See `jobs.control_socket`."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_launcher.errors import ManifestError, SteeringError
from gpu_launcher.jobs.control import (
    MAX_LINE,
    RANGES,
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
    check_answer,
    is_one,
    merged,
    named,
    ranges_of,
    read_answer,
    spell,
    without,
    write_request,
)
from gpu_launcher.jobs.control_socket import RETRY_SECONDS, connect
from gpu_launcher.jobs.directory import refuse_if_locked
from gpu_launcher.jobs.event_lines import read_line
from gpu_launcher.jobs.events import Event
from gpu_launcher.jobs.launches import DIRECTORY, Launch, launches_in, socket_of
from gpu_launcher.jobs.manifest import State, how_to_resume, read, read_manifest
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.jobs.sweep_finder import chosen_sweep, newest_sweep, running_sweep
from gpu_launcher.text import one_line, short_path
from gpu_launcher.users import user_name
from gpu_launcher.wording import count, duration

BEGIN_SECONDS = 2.0
"""Seconds after the start of a launch in which its head may not listen yet."""
ANSWER_SECONDS = 10.0
"""Maximum seconds to wait for an answer. A head answers at once, unless it is suspended."""
MAX_WATCHED_LINE = 2**24
"""Maximum number of bytes of a state or an event. A state names each job that runs."""


class Sweep:
    """A running sweep or map: what a person can do with it from another terminal or program.

    Each method returns a line that says what was done. It raises SteeringError if the sweep has ended, if it runs on
    another machine or belongs to another user, or if nothing could be done. The user of the sweep and root may steer
    it.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        """Steer the sweep in `directory`, by default the running one below the current directory that was started last.

        If none runs, this is about the one that was written to last. Raises SteeringError if there is no sweep.
        """
        try:
            found = chosen_sweep(running_sweep(Path()) if directory is None else Path(directory))
        except ManifestError as error:
            raise SteeringError(str(error)) from None
        self.directory = found.absolute()
        """The sweep's directory."""
        self._name = short_path(self.directory)
        try:
            (self.directory / DIRECTORY).stat()
        except PermissionError:
            raise self._not_yours() from None
        except OSError:
            newest = newest_sweep(self.directory)
            instead = "give the directory that hydra.sweep.dir or --dir named"
            instead = instead if newest is None else f"the newest sweep in it is {short_path(newest)}"
            what = "is not the directory of a sweep" if self.directory.exists() else "does not exist"
            raise SteeringError(f"{self._name} {what}: {instead}") from None

    def status(self, *, seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """Return how the sweep stands. Waits at most `seconds`.

        `stopping` is what stops it, or None. `paused` and `devices` are what `pause` and `limit` have set. `total` is
        the number of its jobs, if that is known, and `running` how many of them run. `ended` has the number of jobs
        that have ended, by outcome. `facts` are names and values of a search, such as the best value.
        """
        answer = self._ask(AskStatus(), seconds)
        return {name: value for name, value in answer.items() if name not in ("version", "ok")}

    def cancel(self, *jobs: int) -> str:
        """End these jobs if they run, and do not start them if they wait. They are not retried.

        A running job gets SIGTERM, and SIGKILL after the sweep's `grace`.
        """
        return self.cancel_ranges(ranges_of(jobs))

    def cancel_ranges(self, jobs: Ranges) -> str:
        """Cancel jobs by ranges of numbers."""
        answer = self._ask(CancelJobs(jobs))
        ending, dropped, already, coming = (_ranges(answer[name]) for name in RANGES[CancelJobs])
        parts = []
        if ending:
            parts.append(f"{spell(ending)} cancelled: SIGTERM now, SIGKILL after {duration(answer['grace'])}")
        if dropped:
            parts.append(f"{spell(dropped)} cancelled before the start")
        if already:
            was = "was" if is_one(already) else "were"
            parts.append(f"{spell(already)} {was} cancelled already, and may take {duration(answer['grace'])} to end")
        known = merged([*ending, *dropped, *already])
        return _line(parts, self._why_not(without(jobs, known), coming, any_cancelled=bool(parts)))

    def retry(self, *jobs: int, failed: bool = False) -> str:
        """Run jobs again that failed or were cancelled, in this sweep. With `failed`, all that have failed so far.

        Each job ends in one result, that of its last attempt.
        """
        return self.retry_ranges(None if failed else ranges_of(jobs))

    def retry_ranges(self, jobs: Ranges | None) -> str:
        """Retry jobs by ranges of numbers. None for all that have failed."""
        answer = self._ask(RetryJobs(jobs))
        if answer["over"]:
            raise self._ended("starts no more jobs")
        again, ahead, unfinished = (_ranges(answer[name]) for name in RANGES[RetryJobs])
        parts = []
        if again:
            parts.append(f"{spell(again)} {'runs' if is_one(again) else 'run'} again")
        if ahead:
            parts.append(f"{spell(ahead)} {'is' if is_one(ahead) else 'are'} not cancelled any more")
        return _line(parts, self._why_not_again(jobs, merged([*again, *ahead]), unfinished))

    def stop(self, *, now: bool = False) -> str:
        """End the sweep as Ctrl-C does: running jobs are interrupted, and killed after the sweep's `grace`.

        With `now`, they are killed at once. What did not complete can be resumed.
        """
        answer = self._ask(StopSweep(now))
        jobs = count(int(answer["running"]), "running job")
        if not answer["running"]:
            return f"{self._name} stops: no job is running"
        if now:
            return f"{self._name} stops: {jobs} killed"
        stops = "is stopping already" if answer["already"] else "stops"
        return f"{self._name} {stops}: {jobs} may take {duration(answer['grace'])} to end"

    def pause(self) -> str:
        """Start no more jobs until `resume`. Running jobs continue."""
        answer = self._ask(PauseSweep())
        is_paused = "is paused" if answer["changed"] else "is paused already"
        jobs = count(int(answer["running"]), "running job")
        return f"{self._name} {is_paused}: no job is started, and {jobs} may continue"

    def resume(self) -> str:
        """Start jobs again after `pause`."""
        return f"{self._name} {'continues' if self._ask(ContinueSweep())['changed'] else 'was not paused'}"

    def limit(self, devices: int | None) -> str:
        """Use at most this many devices from now on, over all machines. None for no limit.

        Running jobs continue. While more devices are in use, no job that needs one is started.
        """
        answer = self._ask(LimitDevices(devices))
        if devices is None:
            return f"{self._name} has no limit on devices from now on"
        jobs = count(int(answer["running"]), "job")
        return f"{self._name} uses at most {count(devices, 'device')} from now on; {jobs} running"

    def watch(self, *, seconds: float = ANSWER_SECONDS) -> Watch:
        """Return a connection that gets the state of the sweep, and then each event. Waits at most `seconds` for it."""
        connection, launch = self._connect(seconds)
        try:
            _, rest = self._hear(connection, WatchSweep(), launch, seconds)
            connection.setblocking(False)
        except BaseException:
            connection.close()
            raise
        return Watch(connection, rest, self._unknown)

    # How

    def _ask(self, request: Steering, seconds: float = ANSWER_SECONDS) -> Mapping[str, Any]:
        """Send a request to the head, and return its answer. Raises SteeringError."""
        connection, launch = self._connect(seconds)
        with connection:
            return self._hear(connection, request, launch, seconds)[0]

    def _connect(self, seconds: float) -> tuple[socket.socket, Launch]:
        """Connect to the head, and return its launch, too. Raises SteeringError."""
        home = self.directory / DIRECTORY
        try:
            os.scandir(home).close()
        except PermissionError:
            raise self._not_yours() from None
        except OSError as error:  # it was removed meanwhile
            raise SteeringError(f"{self._name} cannot be read: {error.strerror}") from error
        until = time.monotonic() + seconds
        while True:
            launches = launches_in(self.directory)
            for launch in launches:
                path = socket_of(launch.file)
                try:
                    connection = connect(path, seconds)
                except (FileNotFoundError, ConnectionRefusedError):
                    continue
                except PermissionError:
                    raise self._not_yours() from None
                except (BlockingIOError, TimeoutError):
                    raise self._does_not_answer(launch, seconds) from None
                except OSError as error:
                    raise SteeringError(f"{self._name} cannot be steered: {error.strerror}") from error
                return connection, launch
            if time.monotonic() >= until or not any(map(_begins, launches)):
                raise self._nothing_to_steer(launches)
            time.sleep(RETRY_SECONDS)

    def _hear(
        self, connection: socket.socket, request: Steering, launch: Launch, seconds: float
    ) -> tuple[Mapping[str, Any], bytes]:
        """Send a request. Returns the answer, and what arrived after it. Raises SteeringError."""
        until = time.monotonic() + seconds
        received = b""
        try:
            connection.sendall(write_request(request))
            while b"\n" not in received and len(received) <= MAX_LINE and time.monotonic() < until:
                if not (part := connection.recv(MAX_LINE)):
                    raise self._ended()
                received += part
        except TimeoutError:
            raise self._does_not_answer(launch, seconds) from None
        except OSError:  # it closed the connection
            raise self._ended() from None
        try:
            line, _, rest = received.partition(b"\n")
            answer = read_answer(line)
            if answer["ok"]:
                check_answer(request, answer)
        except ValueError:
            raise self._unknown() from None
        if not answer["ok"]:
            raise SteeringError(f"{self._name}: {one_line(str(answer.get('problem')))}")
        return answer, rest

    def _unknown(self) -> SteeringError:
        problem = "answers in a way that this gpu-launcher does not know: use the version with which it was started"
        return SteeringError(f"{self._name} {problem}")

    def _not_yours(self) -> SteeringError:
        try:
            owner = user_name(self.directory.stat().st_uid)
        except OSError:  # a directory above it is closed, too
            owner = "another user"
        who = "root" if owner == "root" else f"{owner} and root"
        return SteeringError(f"{self._name} belongs to {owner}: only {who} can steer it")

    def _does_not_answer(self, launch: Launch, seconds: float) -> SteeringError:
        return SteeringError(
            f"process {launch.pid} ({launch.command}), which runs {self._name}, has not answered for "
            f"{duration(seconds)}: it may be suspended (`kill -CONT {launch.pid}` continues it). The request may "
            "take effect then"
        )

    def _nothing_to_steer(self, launches: list[Launch]) -> SteeringError:
        for launch in launches:
            who = f"process {launch.pid} ({launch.command})"
            if launch.is_alive is None:
                return SteeringError(
                    f"{self._name} is run by {who} on {launch.host}, which cannot be reached from here: run this "
                    "command on that machine, or in the same container"
                )
            if launch.is_alive:
                return SteeringError(
                    f"{self._name} is run by {who}, which has no control socket: its directory is on a file system "
                    "without sockets, or it was started by an older version"
                )
        try:
            refuse_if_locked(
                self.directory, "try again in a moment: no jobs run before it begins or after it has ended"
            )
        except ManifestError as error:
            return SteeringError(str(error))
        return self._ended()

    def _ended(self, what: str = "has ended") -> SteeringError:
        command = None
        with suppress(ManifestError, OSError):
            if read_manifest(self.directory).exit_code != 0:
                command = self._command_for_the_rest()
        rest = "" if command is None else f"; to run the rest: {command}"
        return SteeringError(f"{self._name} {what}{rest}")

    def _command_for_the_rest(self) -> str | None:
        """Return the command that resumes the sweep. None if it is not recorded."""
        with suppress(ManifestError, OSError):
            return how_to_resume(self.directory)
        return None

    def _why_not(self, jobs: Ranges, coming: Ranges, *, any_cancelled: bool) -> str | None:
        """Say why these jobs were not cancelled, or None. `coming` are jobs without an entry."""
        if not jobs:
            return None
        entries = read(self.directory)
        over = {number: entry for number, entry in entries.items() if entry.ended is not None}
        if missing := without(jobs, ranges_of(over)):
            return self._has_no(missing, merged([*ranges_of(entries), *coming]))
        if any_cancelled:
            return None
        if not is_one(jobs):
            return f"{spell(jobs)} have ended already"
        ((first, _),) = jobs
        return f"job {first} has ended already: {over[first].state.value}"

    def _why_not_again(self, jobs: Ranges | None, again: Ranges, unfinished: Ranges) -> str | None:
        """Say why these jobs do not run again, or None. None of the jobs: all that have failed."""
        if jobs is None:
            return None if again else f"{self._name} has no job that has failed"
        entries = read(self.directory)
        left = without(jobs, merged([*again, *unfinished]))
        if missing := without(left, ranges_of(entries)):
            return self._has_no(missing, merged([*ranges_of(entries), *again, *unfinished]))
        if again:
            return None
        if unfinished:
            return f"{spell(unfinished)} {'has' if is_one(unfinished) else 'have'} not ended yet"
        done = ranges_of(
            number for number in named(left, entries) if entries[number].state in (State.COMPLETED, State.PRUNED)
        )
        if done == left:
            return f"{spell(done)} {'has' if is_one(done) else 'have'} completed: only other jobs can run again"
        return f"{spell(left)} ended in an earlier batch or launch of the sweep{self._how_later(left)}"

    def _how_later(self, jobs: Ranges) -> str:
        """Say how jobs can run again that this launch cannot run."""
        if (command := self._command_for_the_rest()) is not None:
            return f"; when it has ended, to run the rest: {command}"
        which = "it" if is_one(jobs) else "one of them"
        return f": `gpu-launcher rerun {jobs[0][0]}` prints the command that runs {which} alone"

    def _has_no(self, jobs: Ranges, has: Ranges) -> str:
        known = f"its {spell(has).removeprefix('jobs ')}" if has else "it has none yet"
        return f"{self._name} has no {spell(jobs)} ({known})"


def carry_out(sweep: Sweep, request: Steering) -> str:
    """Carry out what a person asks for on a screen, and return a line about it. Raises ValueError if that fails."""
    try:
        match request:
            case CancelJobs(jobs):
                return sweep.cancel_ranges(jobs)
            case RetryJobs(jobs):
                return sweep.retry_ranges(jobs)
            case PauseSweep():
                return sweep.pause()
            case ContinueSweep():
                return sweep.resume()
            case LimitDevices(devices):
                return sweep.limit(devices)
            case _:
                raise ValueError(f"no key asks for {type(request).__name__}")
    except SteeringError as error:
        raise ValueError(str(error)) from error


class Watch:
    """A connection to the head of a sweep, which sends its state and each event."""

    def __init__(self, connection: socket.socket, received: bytes, unknown: Callable[[], SteeringError]) -> None:
        """Read from `connection`, after `received`. `unknown` returns the error for what this version cannot read."""
        self._connection = connection
        self._received = received
        self._unknown = unknown
        self.is_over = False
        """Whether no more comes, because the sweep or its program has ended."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when `receive` has something to do."""
        return self._connection.fileno()

    def receive(self) -> list[SweepTally | Event]:
        """Return what has arrived. Never waits.

        A SweepTally is the sweep's present state. It replaces what came before. Raises SteeringError.
        """
        try:
            while part := self._connection.recv(MAX_LINE):
                self._received += part
                if len(self._received) > MAX_WATCHED_LINE:
                    break
            else:
                self.is_over = True
        except BlockingIOError:
            pass
        except OSError:
            self.is_over = True
        *lines, self._received = self._received.split(b"\n")
        try:
            if len(self._received) > MAX_WATCHED_LINE:
                raise ValueError("too long")
            return [read_line(line) for line in lines]
        except ValueError:
            raise self._unknown() from None

    def close(self) -> None:
        self._connection.close()


def _begins(launch: Launch) -> bool:
    """Whether the head of a launch may be about to listen. A launch is recorded a moment before that."""
    try:
        age = time.time() - launch.file.stat().st_mtime
    except OSError:  # it has just ended
        return False
    return launch.is_alive is True and age < BEGIN_SECONDS


def _line(done: list[str], problem: str | None) -> str:
    if problem is not None:
        raise SteeringError("; ".join([*done, problem]))
    return "; ".join(done)


def _ranges(value: object) -> Ranges:
    """Read ranges from an answer."""
    return tuple((int(first), int(last)) for first, last in value)  # type: ignore[attr-defined]
