"""The sweeps below the directories that the server was given, each read as it grows.

A client names a sweep by an id that is made of its directory, never by a path.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST
from gpu_launcher.jobs.manifest import Entry, Manifest, ManifestReader, State
from gpu_launcher.jobs.node_devices import NodeDevice, nodes_of_running
from gpu_launcher.jobs.progress.estimate import time_left
from gpu_launcher.jobs.result_table import JobRow, ResultTable, result_row, tabulate
from gpu_launcher.jobs.sweep_finder import sweeps_below
from gpu_launcher.jobs.sweep_overview import DescribedSweep, describe
from gpu_launcher.json_data import Value
from gpu_launcher.web.charts import numeric_values
from gpu_launcher.web.failure_groups import FailureGroup, failure_groups
from gpu_launcher.web.fresh import FRESH_SECONDS, Fresh

SCAN_SECONDS = 5.0
"""Seconds for which the list of directories is used."""
FIRST_READ_BYTES = 2**19
"""Maximum number of bytes of a manifest that are read before its first page is answered: about a tenth of a second."""
MAX_READ_BYTES = 2 * 2**20
"""Maximum number of bytes that are read before another page is answered. That a part is missing is said there."""
MAX_KEPT_JOBS = 50_000
"""Maximum number of jobs that are kept in memory. Sweeps beyond that are read again when they are asked for."""
MAX_LISTED_SWEEPS = 200
"""Maximum number of sweeps in the list."""
LIST_SECONDS = 0.5
"""Seconds of reading after which a list of sweeps is answered. The rest of them is read for the next answer."""


@dataclass(frozen=True, slots=True)
class SweepSummary:
    """A sweep as a whole at one moment."""

    id: str
    directory: Path
    overview: DescribedSweep
    best: tuple[int, Value] | None
    """The number of the best job and its value, if it is known which one that is."""
    seconds_left: float | None
    """An estimate of the seconds until it ends. None if that cannot be said."""
    unread: bool
    """Whether the manifest has more than has been read so far."""

    @property
    def is_over(self) -> bool:
        return self.overview.state == "ended"

    @property
    def total(self) -> int:
        """How many jobs it has, or will have."""
        return max(sum(self.overview.jobs.values()), self.overview.total or 0)

    def count(self, state: State) -> int:
        return self.overview.jobs.get(state, 0)

    @property
    def done(self) -> int:
        """How many jobs have ended."""
        return self.total - self.count(State.WAITING) - self.count(State.RUNNING)


@dataclass(frozen=True, slots=True)
class SweepReading(SweepSummary):
    """A sweep with its jobs at one moment."""

    manifest: Manifest
    table: ResultTable
    failures: Sequence[FailureGroup]
    values: Sequence[str]
    """The names of the values that can be drawn."""
    resume: str | None
    """The command line that continues it, from any directory."""

    def summary(self) -> SweepSummary:
        """The same without the jobs, which take memory."""
        return SweepSummary(self.id, self.directory, self.overview, self.best, self.seconds_left, self.unread)


class SweepReader:
    """Reads one sweep as it grows."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory = directory
        self.id = id_of(directory)
        self._clock = clock
        self._lock = threading.Lock()
        self._reader = ManifestReader(directory)
        self._rows: dict[int, tuple[object, JobRow]] = {}
        self._latest: tuple[float, SweepReading] | None = None
        self._made_of: list[object] = []
        self._table: tuple[ResultTable, Sequence[FailureGroup], Sequence[str]] | None = None

    def read(self) -> SweepReading:
        """Return a reading that is at most about a second old, unless there is more to read. Raises ManifestError."""
        with self._lock:
            now = self._clock()
            if self._latest is None or self._latest[1].unread or now - self._latest[0] > FRESH_SECONDS:
                self._latest = now, self._read(MAX_READ_BYTES if self._reader.position else FIRST_READ_BYTES)
            return self._latest[1]

    def read_whole(self) -> SweepReading:
        """Return a reading of all that there is. Raises ManifestError."""
        with self._lock:
            return self._read(None)

    def _read(self, most: int | None) -> SweepReading:
        try:
            unread = self._reader.read(most)
            manifest = self._reader.manifest()
            keys = [manifest.directions, *map(_key, manifest.entries.values())]
            if self._table is None or keys != self._made_of:
                table = tabulate(self.directory, manifest, self._row)
                self._table = table, failure_groups(manifest.entries.values()), numeric_values(table)
                self._made_of = keys
        except OSError as error:
            raise ManifestError(f"{self.directory} cannot be read: {error.strerror}") from error
        except RecursionError as error:
            raise ManifestError(f"{self.directory} cannot be read: a parameter is nested too deeply") from error
        overview = describe(self.directory, manifest.entries.values())
        if overview is None:
            raise ManifestError(f"{self.directory} cannot be read")
        table, failures, values = self._table
        left = None if unread or overview.state == "ended" else _seconds_left(table, overview, time.time())
        about = self.id, self.directory, overview, _best(table), left, unread
        return SweepReading(*about, manifest, table, failures, values, self._reader.resume(None))

    @property
    def jobs(self) -> int:
        """Number of jobs that it keeps in memory."""
        return len(self._rows)

    def _row(self, entry: Entry) -> JobRow:
        """The row of a job, which is made again only if the job has changed."""
        key = _key(entry)
        known = self._rows.get(entry.number)
        if known is None or known[0] != key:
            known = self._rows[entry.number] = key, result_row(entry)
        return known[1]


def _key(entry: Entry) -> object:
    """A value that changes when the row of the job does."""
    return entry.number, entry.launch, entry.state, entry.attempts, entry.started, entry.ended, entry.retried


def _best(table: ResultTable) -> tuple[int, Value] | None:
    row = table.best
    return None if row is None else (row.number, row.values[next(iter(table.directions))])


def _seconds_left(table: ResultTable, overview: DescribedSweep, now: float) -> float | None:
    running = [max(0.0, now - row.started) for row in table if row.outcome == State.RUNNING.value and row.started]
    finished = [row.duration for row in table if row.outcome == State.COMPLETED.value and row.duration is not None]
    return time_left(finished, running, overview.jobs.get(State.WAITING, 0), len(running)) if running else None


class Catalogue:
    """Finds sweeps and keeps their readers."""

    def __init__(self, roots: Sequence[Path], clock: Callable[[], float] = time.monotonic) -> None:
        self.roots = tuple(root.absolute() for root in roots)
        self._clock = clock
        self._lock = threading.Lock()
        self._scanning = threading.Lock()
        self._found: dict[str, Path] = {}
        self._scanned: float | None = None
        self._open: OrderedDict[str, SweepReader] = OrderedDict()
        self._known: dict[str, _KnownSweep] = {}
        """What is known of the sweeps in the list."""
        self.nodes = Fresh(self._nodes, clock)
        """Returns the devices of other machines that the sweeps in the list have, as their heads say."""

    def directories(self, seconds: float = SCAN_SECONDS) -> dict[str, Path]:
        """Return the directories of the sweeps by id, the one that was written to last first.

        They are searched again if that was last done more than `seconds` ago.
        """
        with self._scanning:
            if self._scanned is None or self._clock() - self._scanned > seconds:
                self._found = {id_of(found): found for found in sweeps_below(*self.roots)}
                self._scanned = self._clock()
            return dict(self._found)

    def sweep(self, id: str) -> SweepReader:
        """Return the sweep with this id. Raises KeyError if there is none."""
        directory = self._found.get(id) or self.directories(FRESH_SECONDS)[id]
        with self._lock:
            if id not in self._open:
                self._open[id] = SweepReader(directory, self._clock)
            self._open.move_to_end(id)
            while len(self._open) > 1 and sum(sweep.jobs for sweep in self._open.values()) > MAX_KEPT_JOBS:
                self._open.popitem(last=False)
            return self._open[id]

    def _nodes(self) -> list[NodeDevice]:
        sweeps, _, _ = self.summaries()
        return nodes_of_running([sweep.directory for sweep in sweeps if not sweep.is_over])

    def summaries(self, most: int = MAX_LISTED_SWEEPS) -> tuple[list[SweepSummary], list[str], int]:
        """Summarise the sweeps that were written to last, running ones first.

        The second value says which cannot be read and why, and the third how many are to be read yet.
        """
        directories = dict(itertools.islice(self.directories().items(), most))
        known = self._known = {id: sweep for id, sweep in list(self._known.items()) if id in directories}
        until = self._clock() + LIST_SECONDS
        # The one that was read longest ago comes first, so one whose head does not answer does not keep out the others.
        for id in sorted(directories, key=lambda id: known[id].read if id in known else -math.inf):
            known[id] = self._look(id, directories[id], known.get(id))
            if self._clock() >= until:
                break
        listed = [known[id] for id in directories if id in known]
        found = [sweep.summary for sweep in listed if sweep.summary is not None]
        problems = [sweep.problem for sweep in listed if sweep.problem is not None]
        return sorted(found, key=lambda summary: summary.is_over), problems, len(directories) - len(listed)

    def _look(self, id: str, directory: Path, known: _KnownSweep | None) -> _KnownSweep:
        stamp = _stamp(directory)
        if known is not None and known.is_final and stamp is not None and known.stamp == stamp:
            return replace(known, read=self._clock())
        try:
            summary = self.sweep(id).read().summary()
        except KeyError:  # removed a moment ago
            return _KnownSweep(self._clock(), stamp)
        except ManifestError as error:
            return _KnownSweep(self._clock(), stamp, problem=str(error))
        return _KnownSweep(self._clock(), stamp, summary)


@dataclass(frozen=True, slots=True)
class _KnownSweep:
    """What is known of a sweep in the list."""

    read: float
    """When it was read."""
    stamp: object
    """The stamp of its manifest before it was read."""
    summary: SweepSummary | None = None
    problem: str | None = None
    """Why it cannot be read."""

    @property
    def is_final(self) -> bool:
        """Whether the summary holds until the stamp changes."""
        return self.summary is not None and self.summary.is_over and not self.summary.unread


def _stamp(directory: Path) -> object:
    """A value that changes when a sweep that has ended does. None if it cannot be read."""
    home = directory / DIRECTORY
    with suppress(OSError):
        status, files = (home / MANIFEST).stat(), home.stat()  # a launch writes a file there when it begins
        return status.st_ino, status.st_size, status.st_mtime_ns, files.st_mtime_ns
    return None


def id_of(directory: Path) -> str:
    """The id of a sweep in URLs. It stays the same when the server is started again."""
    return hashlib.sha256(str(directory.absolute()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
