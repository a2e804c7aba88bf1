"""The manifest: the record of a sweep's jobs in its directory, from which the sweep can be resumed and inspected.

    <sweep directory>/.gpu_launcher/
        lock                  locked by all processes of the launch that runs jobs here (`jobs.directory`)
        manifest.jsonl        one line per event, each appended in one write; an incomplete line is ignored
        launch-<id>.json      names the program that runs jobs here; removed at the end
        launch-<id>.sock      that program's control socket (`jobs.control_socket`); removed at the end
        <number>.<id>.report  the report of a job of that launch

A job writes its report itself, so a finished job is known to have finished even if the head or the node is killed. The
format is private to gpu-launcher: read it with `gpu-launcher jobs DIR --json`, and the values that jobs returned with
`gpu_launcher.load_results`.
"""

from __future__ import annotations

import json
import os
import shlex
import time
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from gpu_launcher.errors import ManifestError, ReportError
from gpu_launcher.jobs.alone import AloneCommand
from gpu_launcher.jobs.events import Event, Figures, JobEnded, JobRetried, JobReturned, JobStarted, Outcome
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.job import Job, JobResult
from gpu_launcher.jobs.reports import ReportFiles, read_header, read_report
from gpu_launcher.json_data import Fields, load_object
from gpu_launcher.processes import rank_decisions
from gpu_launcher.safe_files import MAX_LINE, make_directories, open_regular, write_whole
from gpu_launcher.text import one_line

FORMAT = 1
MAX_BYTES = 2**63
"""Maximum amount of memory that a job can have used."""
MAX_LAUNCH_BYTES = 2**20
"""Maximum number of bytes read from a file that names a launch's program."""
MAX_EXIT_CODE = 255
DIRECTORY = ".gpu_launcher"
MANIFEST = "manifest.jsonl"
HEAD_BYTES = 128
"""Number of bytes by which a manifest is told from another one: its first line begins with the id of its launch."""
DIRECTIONS = ("minimize", "maximize")
MAX_PLANNED = 256
"""Maximum number of jobs in a line of the manifest. Readers ignore lines that are longer than `MAX_LINE`."""


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
    figures: Figures = Figures()  # noqa: RUF009  (frozen)

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


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch that has not recorded its end."""

    id: str
    file: Path
    pid: int
    host: str
    command: str
    is_alive: bool | None
    """Whether its program is alive. None if that cannot be known from here."""


class Recorder:
    """Records in the manifest what happens to the jobs of one launch."""

    def __init__(
        self,
        directory: Path,
        jobs: Sequence[Job],
        command: str,
        *,
        launch: str | None = None,
        how_to_resume: str = "",
        alone: AloneCommand | None = None,
        directions: Sequence[str] = (),
        objectives: Sequence[str] = (),
        anew: bool = False,
        warn: Callable[[str], None] = lambda text: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Record that this launch is to run `jobs` of the sweep in `directory`.

        `directions` and `objectives` are as for `Manifest`. With `anew`, this launch begins a sweep: the jobs that the
        manifest has belong to an earlier one, and are left out from now on.

        `launch` is the id of the launch, by default a new one. `how_to_resume` is the command line that runs what this
        launch leaves, from the working directory. Empty if there is none. `alone` is the command line that runs one
        job of this launch alone, without what is the job's own. If nothing can be written, `warn` is called once, and
        the jobs run anyway.
        """
        self.directory = directory / DIRECTORY
        self._reports = new_reports(directory) if launch is None else ReportFiles(self.directory, launch)
        self._id = self._reports.launch
        self._warn: Callable[[str], None] | None = warn
        self._wall_clock = wall_clock
        self._attempts = {job.number: job.attempts_before for job in jobs}
        self._file = self.directory / f"launch-{self._id}.json"
        self._process = os.getpid()
        make_directories(self.directory)
        # Reports of earlier launches. They are removed when the job completes again. Jobs from a source have none:
        # their reports are discarded when they end.
        earlier_jobs = read(directory) if jobs or anew else {}
        self._old = {number: entry.report for number, entry in earlier_jobs.items() if entry.report}
        for earlier in launches_in(directory):
            if earlier.is_alive is False:
                with suppress(OSError):
                    for left in self.directory.glob(f"*.{earlier.id}.trial"):
                        rank_decisions.withdraw(left)
                    socket_of(earlier.file).unlink(missing_ok=True)
                    earlier.file.unlink()
        identity = json.dumps({**ProcessIdentity.here().to_json(), "command": command})
        try:
            write_whole(self._file, identity.encode())
        except OSError as error:
            self._complain(error)
        if anew and earlier_jobs:
            self._append(begins=True)
            for number in self._old.keys() - self._attempts.keys():
                with suppress(OSError):
                    self._old.pop(number).unlink()
        if how_to_resume:
            self._append(resume=how_to_resume, directory=str(Path.cwd()))
        if alone is not None:
            self._append(alone=alone.words, pool=alone.pool, directory=alone.directory)
        if directions:
            self._append(directions=list(directions), objectives=list(objectives))
        self._plan(jobs)

    @property
    def socket(self) -> str:
        """Name of the control socket's file in `directory`."""
        return socket_of(self._file).name

    def add(self, job: Job) -> None:
        """Record another job that is to run."""
        self._attempts[job.number] = job.attempts_before
        self._plan([job])

    def requeue(self, jobs: Sequence[Job], logs: Mapping[int, str | None]) -> None:
        """Record that these jobs, which had ended, are to run again. `logs` are those of their last attempts."""
        for first in range(0, len(jobs), MAX_PLANNED):
            some = jobs[first : first + MAX_PLANNED]
            self._append(again=[[job.number, logs[job.number]] for job in some])
        for job in jobs:
            self._attempts[job.number] = job.attempts_before
            self.discard_report(job.number)

    def describe(self, number: int, label: str, spec: Any) -> None:
        """Record the label and the parameters of a job that has chosen them since it was added."""
        self._append(described=number, label=label, spec=spec)

    def _plan(self, jobs: Sequence[Job]) -> None:
        for first in range(0, len(jobs), MAX_PLANNED):
            some = jobs[first : first + MAX_PLANNED]
            self._append(planned=[[job.number, job.label, job.spec, self._attempts[job.number]] for job in some])

    def report_path(self, number: int) -> Path:
        """Return the path of a job's report."""
        return self._reports.path(number)

    def discard_report(self, number: int) -> None:
        """Remove a job's report, because the source has received it, or because the job runs again."""
        with suppress(OSError):
            self.report_path(number).unlink()

    def handle(self, event: Event) -> None:
        """Record an event, unless it is of interest only while the jobs run."""
        if isinstance(event, JobStarted):
            self._attempts[event.number] += 1
            devices = [device.label for device in event.devices]
            attempts = self._attempts[event.number]
            node = {"node": event.devices[0].node} if event.devices and event.devices[0].node else {}
            self._append(started=event.number, attempts=attempts, devices=devices, log=event.log, pid=event.pid, **node)
        elif isinstance(event, JobRetried):
            self._attempts[event.number] = event.attempt - 1  # an attempt that never ran counts, too
            self._append(ended=event.number, outcome="failed", message=event.message, log=event.log, retried=True)
        elif isinstance(event, JobReturned):
            self._append(ended=event.number, outcome=State.WAITING.value)
        elif isinstance(event, JobEnded):
            outcome = event.outcome.value
            self._attempts.pop(event.number, None)
            known = {"left_behind": event.left_behind, **asdict(event.figures)}
            known = {name: what for name, what in known.items() if what}
            self._append(ended=event.number, outcome=outcome, message=event.message, log=event.log, **known)
            old = self._old.pop(event.number, None)
            if old is not None and event.outcome is Outcome.COMPLETED:
                with suppress(OSError):
                    old.unlink()

    def close(self) -> None:
        """Record that this launch is over."""
        if os.getpid() == self._process:
            with suppress(OSError):
                self._file.unlink()

    def _append(self, **event: Any) -> None:
        line = json.dumps({"format": FORMAT, "launch": self._id, "time": self._wall_clock(), **event})
        try:
            _append_line(self.directory / MANIFEST, line, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if self._warn is not None:
            self._warn(f"cannot write down how the jobs end, so that resuming would run them again: {error}")
            self._warn = None


def record_end(directory: Path, exit_code: int) -> None:
    """Record that the sweep in `directory` ended its program with this exit code.

    Does nothing if no sweep has begun, or if nothing can be written.
    """
    manifest = directory / DIRECTORY / MANIFEST
    line = json.dumps({"format": FORMAT, "time": time.time(), "exit_code": exit_code})
    with suppress(OSError):
        _append_line(manifest, line, os.O_WRONLY | os.O_APPEND)


def manifest_size(directory: Path) -> int:
    """Return the number of bytes that are recorded about the sweep in `directory`."""
    try:
        return (directory / DIRECTORY / MANIFEST).stat().st_size
    except OSError:
        return 0


def _append_line(manifest: Path, line: str, flags: int) -> None:
    """Append a line in one write. Raises OSError."""
    descriptor = open_regular(manifest, flags)
    try:
        # Begin a new line: the last one may be incomplete. Empty lines are ignored.
        data = f"\n{line}\n".encode()
        if os.write(descriptor, data) != len(data):
            raise OSError("no space left")
    finally:
        os.close(descriptor)


def socket_of(launch: Path) -> Path:
    """Return the path of a launch's control socket. `launch` is the file that names the launch's program."""
    return launch.with_suffix(".sock")


def new_reports(directory: Path) -> ReportFiles:
    """Return the files for the reports of a new launch of the sweep in `directory`."""
    return ReportFiles(directory / DIRECTORY, uuid.uuid4().hex[:12])


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
    if entry.report is not None and (found := read_header(entry.report)) is not None:
        entry.state = State.COMPLETED if found.ok else State.FAILED
        entry.message, entry.figures = found.message, Figures(found.values)


def launches_in(directory: Path) -> list[Launch]:
    """Return the launches in `directory` that have not recorded their end."""
    found = []
    for file in sorted((directory / DIRECTORY).glob("launch-*.json")):
        try:
            with open(open_regular(file), "rb") as opened:
                owner = os.fstat(opened.fileno()).st_uid
                content = load_object(opened.read(MAX_LAUNCH_BYTES))
            identity = ProcessIdentity.from_json(content)
            command = one_line(Fields(content).text("command"))
        except (OSError, ValueError):
            continue  # not written by a launch
        id = file.stem.removeprefix("launch-")
        found.append(Launch(id, file, identity.pid, identity.host, command, identity.is_alive(owner)))
    return found


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


def finished_before(jobs: Sequence[Job], entries: Mapping[int, Entry]) -> tuple[dict[int, JobResult], dict[int, str]]:
    """Return the results of those `jobs` that completed in an earlier launch with the same overrides.

    The second value says why existing results are not used, by job number.
    """
    found, skipped = {}, {}
    for job in jobs:
        entry = entries.get(job.number)
        if entry is None or entry.spec != job.spec or entry.state is not State.COMPLETED or entry.report is None:
            continue
        try:
            report = read_report(entry.report)
        except FileNotFoundError:
            continue
        except ReportError as error:
            skipped[job.number] = str(error)
            continue
        if not report.ok:
            continue
        ran = entry.ended - entry.started if entry.ended and entry.started else None
        found[job.number] = JobResult(
            job.number, job.label, Outcome.COMPLETED, report.payload, None, (), ran, entry.log, attempts=entry.attempts
        )
    return found, skipped


def devices_of(directory: Path, numbers: Container[int]) -> dict[int, tuple[str, ...]]:
    """Return the labels of the devices of these jobs' last attempts, by job number. Omits jobs without devices."""
    return {number: entry.devices for number, entry in read(directory).items() if number in numbers and entry.devices}


def refuse_if_running(directory: Path, remedy: str) -> None:
    """Raise ManifestError if another program runs jobs in this directory, or may do so. `remedy` says what to do."""
    for launch in launches_in(directory):
        who = f"process {launch.pid} ({launch.command})"
        if launch.is_alive:
            raise ManifestError(f"{directory} is being run by {who}: {remedy}")
        if launch.is_alive is None:
            raise ManifestError(
                f"{directory} may still be run by {who} of {launch.host}, which cannot be seen from here: "
                f"if it has ended, remove {launch.file}"
            )


def _take(event: dict[str, Any], entries: dict[int, Entry]) -> None:
    """Apply an event to `entries`. Raises ValueError for an event that no version writes."""
    fields = Fields(event)
    launch, time = fields.text("launch", limit=64), fields.time("time")
    if not launch.isalnum():  # it becomes part of a file name
        raise ValueError("launch is not an id")
    if "planned" in fields:
        for job in event["planned"] if isinstance(event["planned"], list) else ():
            _plan(job, launch, entries)
        return
    if "again" in fields:
        for job in event["again"] if isinstance(event["again"], list) else ():
            _requeue(job, launch, entries)
        return
    if "described" in fields:
        described = entries.get(fields.integer("described"))
        if described is not None and described.launch == launch:
            described.label, described.spec = one_line(fields.text("label")), event.get("spec")
        return
    started = "started" in fields
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
        entry.figures, entry.retried = Figures(), False
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
    entry.started, entry.ended, entry.devices, entry.node, entry.figures = None, None, (), "", Figures()


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
