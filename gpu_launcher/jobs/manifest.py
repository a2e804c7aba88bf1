"""The manifest: the record of a sweep's jobs in its directory, from which the sweep can be resumed and inspected.

It has one line per event, each appended in one write (`jobs.recorder`). An incomplete line is ignored.

A job writes its report itself, so a finished job is known to have finished even if the head or the node is killed. The
format is private to gpu-launcher: read it with `gpu-launcher jobs DIR --json`, and the values that jobs returned with
`gpu_launcher.load_results`.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.alone import AloneCommand
from gpu_launcher.jobs.figures import NO_FIGURES, Figures
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST, Launch, launches_in
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.sweep_finder import chosen_sweep, newest_sweep
from gpu_launcher.json_data import Fields, load_object
from gpu_launcher.safe_files import MAX_LINE, open_regular
from gpu_launcher.text import one_line

FORMAT = 1
MAX_BYTES = 2**63
"""Maximum amount of memory that a job can have used."""
MAX_EXIT_CODE = 255
HEAD_BYTES = 128
"""Number of bytes by which a manifest is told from another one: its first line begins with the id of its launch."""
DIRECTIONS = ("minimize", "maximize")


class State(str, Enum):
    """The state of a job, as the manifest knows it."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PRUNED = "pruned"
    LOST = "lost"
    """The job was running or waiting when its launch died."""


@dataclass(slots=True)
class Entry:
    """One job, as its latest launch left it. Only `read` changes it."""

    number: int
    label: str
    spec: Any
    launch: str
    state: State = State.WAITING
    attempts: int = 0
    """Number of times it was started, over all launches."""
    moves: int = 0
    """How many of these starts were on nodes that were lost or ended before the job had a result."""
    devices: tuple[str, ...] = ()
    """Labels of the devices that its last attempt had."""
    node: str = ""
    """Name of the node that ran its last attempt, if the sweep ran on several."""
    started: float | None = None
    """When it was started, in wall-clock seconds since the epoch."""
    ended: float | None = None
    message: str | None = None
    """Why it failed."""
    log: str | None = None
    report: Path | None = None
    """File of its report, if there is one."""
    pid: int | None = None
    """Process id of its main process, while it runs."""
    retried: bool = False
    """Whether it failed, and was to be started again."""
    figures: Figures = NO_FIGURES

    @property
    def counted_attempts(self) -> int:
        """How many times it was started. Starts on nodes that were lost do not count: they use no retry."""
        return max(0, self.attempts - self.moves)

    @property
    def seconds(self) -> float | None:
        """How long the last attempt ran. None if it is running or its end was not recorded."""
        if self.started is None or self.ended is None:
            return None
        return max(0.0, self.ended - self.started)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is known about a sweep."""

    entries: dict[int, Entry]
    """Its jobs, by number."""
    directions: tuple[str, ...] = ()
    """For each value that jobs return, whether low or high ones are best, one of DIRECTIONS. Empty if not known."""
    objectives: tuple[str, ...] = ()
    """The names of the values that `directions` are about. Empty if not known."""
    exit_code: int | None = None
    """The exit code with which the last sweep in the directory ended its program. None if that is not recorded."""

    @property
    def is_search(self) -> bool:
        """Whether the jobs are trials of a search. Only a search records the names of its objectives."""
        return bool(self.objectives)


def manifest_size(directory: Path) -> int:
    """Return the number of bytes that are recorded about the sweep in `directory`."""
    try:
        return (directory / DIRECTORY / MANIFEST).stat().st_size
    except OSError:
        return 0


def read(directory: Path) -> dict[int, Entry]:
    """Read the jobs of the sweep in `directory`, by number. See `read_manifest`."""
    return read_manifest(directory).entries


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of the sweep in `directory`. It is empty if there is none.

    Raises ManifestError if a newer version wrote the manifest or if it cannot be read, and NotADirectoryError.
    """
    reader = ManifestReader(directory)
    reader.read()
    return reader.manifest()


def read_chosen_sweep(directory: Path | None) -> tuple[Path, Manifest]:
    """Return the directory of the sweep that the user chose, and its manifest, which has at least one job.

    Raises ManifestError if it is not the directory of a sweep, has no jobs, or cannot be read.
    """
    chosen = chosen_sweep(directory)
    try:
        manifest = read_manifest(chosen)
    except OSError as error:
        raise ManifestError(f"cannot read {chosen} ({error.strerror}): give a sweep's directory") from error
    if manifest.entries:
        return chosen, manifest
    if (chosen / DIRECTORY).is_dir():
        raise ManifestError(f"the sweep in {chosen} has no jobs")
    newest = newest_sweep(chosen)
    instead = "give the directory that hydra.sweep.dir named"
    instead = instead if newest is None else f"the newest sweep in it is {newest}"
    what = "is not the directory of a sweep" if chosen.exists() else "does not exist"
    raise ManifestError(f"{chosen} {what}: {instead}")


class ManifestReader:
    """Reads the manifest of a sweep as it grows: each line once."""

    def __init__(self, directory: Path) -> None:
        self._home = directory / DIRECTORY
        self._directory = directory
        self._launches: dict[str, Launch] = {}
        self._is_partial = False
        self._forget()

    def _forget(self) -> None:
        self._position = 0
        self._head = b""
        self._line_is_whole = True
        self._begin()

    def _begin(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._directions: tuple[str, ...] = ()
        self._objectives: tuple[str, ...] = ()
        self._exit_code: int | None = None
        self._resume: tuple[str, str] | None = None
        self.alone: dict[str, AloneCommand] = {}
        """See `alone_commands`."""

    @property
    def position(self) -> int:
        """How many bytes of the manifest have been read."""
        return self._position

    def resume(self, here: Path | None) -> str | None:
        """Return the command line that runs what the sweep has left, for a shell in `here`, or in any directory.

        See `how_to_resume`.
        """
        if self._resume is None:
            return None
        command, where = self._resume
        command = command if where == str(here) else f"cd {shlex.quote(where)} && {command}"
        return command if command.isprintable() else None

    def read(self, most: int | None = None) -> bool:
        """Read what has been added, or about the first `most` bytes of it. Return whether there is more.

        Raises ManifestError if a newer version wrote the manifest or if it cannot be read, and NotADirectoryError.
        """
        # First, because a launch that ends in the meantime has recorded the ends of its jobs before its own.
        self._launches = {launch.id: launch for launch in launches_in(self._directory)}
        self._is_partial = False
        file = self._home / MANIFEST
        try:
            with open(open_regular(file), "rb") as opened:
                # Each manifest begins with the id of a launch. The inode of one that was removed is often used again.
                head = os.pread(opened.fileno(), HEAD_BYTES, 0)
                if not head.startswith(self._head) or os.fstat(opened.fileno()).st_size < self._position:
                    self._forget()
                self._head = head
                opened.seek(self._position)
                self._is_partial = self._read(opened, None if most is None else self._position + most)
                return self._is_partial
        except FileNotFoundError:
            self._forget()
            return False
        except NotADirectoryError:
            raise
        except OSError as error:
            raise ManifestError(f"{file} cannot be read: {error.strerror}") from error

    def _read(self, opened: BinaryIO, end: int | None) -> bool:
        while end is None or self._position < end:
            line = opened.readline(MAX_LINE)
            ended = line.endswith(b"\n")
            if not ended and len(line) < MAX_LINE:  # the end, or a line that is being written
                return False
            if ended and self._line_is_whole and line != b"\n":
                self._take_line(line)
            self._position += len(line)
            self._line_is_whole = ended
        return True

    def _take_line(self, line: bytes) -> None:
        try:
            event = load_object(line)
            version = Fields(event).integer("format")
        except ValueError:
            return  # incomplete
        if version > FORMAT:
            raise ManifestError(f"{self._home / MANIFEST} was written by a newer version of gpu-launcher: use that")
        with suppress(ValueError):  # not written by this program
            if "begins" in event:
                self._begin()
            elif "directions" in event:
                self._directions, self._objectives = _directions(event)
            elif "exit_code" in event:
                self._exit_code = Fields(event).integer("exit_code", most=MAX_EXIT_CODE)
            else:
                self._exit_code = None  # something happened since
                if "resume" in event:
                    fields = Fields(event)
                    self._resume = fields.text("resume"), fields.text("directory")
                elif "alone" in event:
                    fields = Fields(event)
                    command = AloneCommand(fields.texts("pool"), fields.texts("alone"), fields.text("directory"))
                    self.alone[fields.text("launch")] = command
                else:
                    _take(event, self._entries)

    def manifest(self) -> Manifest:
        """Return what has been read, and what is known from reports and from the launches that live.

        If there is more to read, jobs whose end has not been read count as waiting or running.
        """
        entries = self._entries
        present = {file.name for file in os.scandir(self._home)} if entries else set()
        reports = {launch: ReportFiles(self._home, launch) for launch in {entry.launch for entry in entries.values()}}
        found = {}
        for number, entry in sorted(entries.items()):
            if reports[entry.launch].name(number) in present:
                entry.report = reports[entry.launch].path(number)
            if entry.state in (State.WAITING, State.RUNNING) and not self._is_partial:
                launch = self._launches.get(entry.launch)
                if launch is None or launch.is_alive is False:
                    entry = replace(entry)  # its end may have been recorded after what has been read
                    _lose(entry)
            found[number] = entry
        return Manifest(found, self._directions, self._objectives, self._exit_code)


def _lose(entry: Entry) -> None:
    """Take note that the job's launch died before it recorded the job's end. The job may have left its report."""
    entry.state, entry.pid = State.LOST, None
    if entry.report is None:
        return
    from gpu_launcher.jobs.reports import read_header  # `results` starts sooner if no job was lost

    if (found := read_header(entry.report)) is not None:
        entry.state = State.COMPLETED if found.ok else State.FAILED
        entry.message, entry.figures = found.message, Figures(found.values)


def how_to_resume(directory: Path) -> str | None:
    """Return the command line that runs what the sweep in `directory` has left, from here. None if it is not recorded.

    Anyone who can write to the directory may have written it. Raises what `read` raises.
    """
    reader = ManifestReader(directory)
    reader.read()
    return reader.resume(Path.cwd())


def alone_commands(directory: Path) -> dict[str, AloneCommand]:
    """Return the command line that runs a job alone, without what is the job's own, by the id of the job's launch.

    Anyone who can write to the directory may have written it. Raises what `read` raises.
    """
    reader = ManifestReader(directory)
    reader.read()
    return reader.alone


def devices_of(directory: Path, numbers: Container[int]) -> dict[int, tuple[str, ...]]:
    """Return the labels of the devices of these jobs' last attempts, by job number. Omits jobs without devices."""
    return {number: entry.devices for number, entry in read(directory).items() if number in numbers and entry.devices}


def _take(event: dict[str, Any], entries: dict[int, Entry]) -> None:
    """Apply an event to `entries`. Raises ValueError for an event that no version writes."""
    fields = Fields(event)
    launch, time = fields.text("launch", limit=64), fields.time("time")
    if not launch.isalnum():  # it becomes part of a file name
        raise ValueError("launch is not an id")
    if "planned" in event:
        for job in event["planned"] if isinstance(event["planned"], list) else ():
            _plan(job, launch, entries)
        return
    if "again" in event:
        for job in event["again"] if isinstance(event["again"], list) else ():
            _requeue(job, launch, entries)
        return
    if "described" in event:
        described = entries.get(fields.integer("described"))
        if described is not None and described.launch == launch:
            described.label, described.spec = one_line(fields.text("label")), event.get("spec")
        return
    started = "started" in event
    number = fields.integer("started" if started else "ended")
    entry = entries.get(number)
    if entry is None or entry.launch != launch:
        return  # from a launch that a later one has superseded
    log = fields.text_or_none("log")
    if started:
        attempts, devices = fields.integer("attempts"), fields.texts("devices")
        pid = fields.integer("pid") if event.get("pid") is not None else None
        entry.node = fields.text_or_none("node") or ""
        entry.state, entry.attempts, entry.devices, entry.pid = State.RUNNING, attempts, devices, pid
        entry.started, entry.ended, entry.message, entry.log = time, None, None, log
        entry.figures, entry.retried = NO_FIGURES, False
    else:
        was, state = entry.state, State(fields.text("outcome"))
        message, figures = fields.text_or_none("message"), _figures(fields)
        entry.state, entry.message, entry.figures, entry.pid = state, message, figures, None
        entry.ended, entry.log, entry.retried = time, log or entry.log, event.get("retried") is True
        if state is State.WAITING:  # its node was lost
            entry.moves += was is State.RUNNING
            entry.started, entry.ended, entry.devices, entry.node = None, None, (), ""


def _requeue(job: object, launch: str, entries: dict[int, Entry]) -> None:
    if not isinstance(job, list) or len(job) != 2:
        raise ValueError("a job that runs again is not a list of two")
    fields = Fields({"number": job[0], "log": job[1]})
    entry = entries.get(fields.integer("number"))
    if entry is None or entry.launch != launch:
        return
    entry.state, entry.message, entry.retried, entry.log = State.WAITING, None, False, fields.text_or_none("log")
    entry.started, entry.ended, entry.devices, entry.node, entry.figures = None, None, (), "", NO_FIGURES


def _figures(fields: Fields) -> Figures:
    return Figures(
        fields.values("values") if "values" in fields else {},
        fields.integer("peak_memory", 0, MAX_BYTES) if "peak_memory" in fields else None,
        fields.integer("peak_device_memory", 0, MAX_BYTES) if "peak_device_memory" in fields else None,
    )


def _directions(event: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the directions, and the names of the values that they are about. Raises ValueError."""
    fields = Fields(event)
    directions, objectives = fields.texts("directions"), fields.texts("objectives") if "objectives" in fields else ()
    if any(one not in DIRECTIONS for one in directions):
        raise ValueError("not a direction")
    if objectives and len(objectives) != len(directions):
        raise ValueError("not one direction for each objective")
    return directions, objectives


def _plan(job: object, launch: str, entries: dict[int, Entry]) -> None:
    if not isinstance(job, list) or len(job) != 4:
        raise ValueError("a planned job is not a list of four")
    fields = Fields({"number": job[0], "label": job[1], "attempts": job[3]})
    number = fields.integer("number")
    before = entries.get(number)
    entries[number] = Entry(
        number,
        one_line(fields.text("label")),
        job[2],
        launch,
        attempts=fields.integer("attempts"),
        moves=before.moves if before else 0,
        log=before.log if before else None,
    )
