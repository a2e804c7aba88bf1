"""The runs of a map, one at a time: a grid, the records of a file or pipe, or each record with the whole grid."""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_launcher.cli.mapping.grid import Grid
from gpu_launcher.cli.mapping.record_reader import Bad, Record, RecordReader
from gpu_launcher.cli.mapping.resume import EarlierRuns
from gpu_launcher.cli.mapping.template import Template
from gpu_launcher.cli.mapping.values import Params, words
from gpu_launcher.descriptors import is_readable
from gpu_launcher.errors import OptionError

CHUNK = 64 * 1024
STDIN = "-"
BAD_NAMED = 5
"""Maximum number of invalid lines that an error names."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run: its index and its parameters."""

    index: int
    params: Params


class Input:
    """The file or pipe that records come from. Reading never blocks."""

    def __init__(self, name: str) -> None:
        """Open the file or pipe `name`, or stdin for `-`. Raises OptionError."""
        self.name = "stdin" if name == STDIN else name
        try:
            # Without O_NONBLOCK, opening a FIFO would wait for a writer.
            self._descriptor = 0 if name == STDIN else os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            mode = os.fstat(self._descriptor).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(0, "it is a directory", name)
        except OSError as error:
            raise OptionError("from", f"{self.name} cannot be read: {error.strerror}") from error
        self.seekable = stat.S_ISREG(mode)
        self._begins = os.lseek(self._descriptor, 0, os.SEEK_CUR) if self.seekable else 0
        self.waits = not self.seekable and not _is_null(mode, self._descriptor)
        """Whether data may arrive later. If so, the descriptor becomes readable when it does."""

    def fileno(self) -> int:
        """The descriptor to watch if `waits` is true."""
        return self._descriptor

    def read(self) -> bytes | None:
        """Read some bytes: empty at the end, None if no data has arrived yet. Raises OptionError."""
        # The end of a pipe, or of a terminal that hung up, also counts as readable.
        if self.waits and not is_readable(self._descriptor):
            return None
        try:
            return os.read(self._descriptor, CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            raise OptionError("from", f"{self.name} cannot be read any more: {error.strerror}") from error

    def rewind(self) -> None:
        """Return to the position at which the input was opened. It is not 0 if stdin had been read before.

        Only for an input that is `seekable`.
        """
        os.lseek(self._descriptor, self._begins, os.SEEK_SET)


def _is_null(mode: int, descriptor: int) -> bool:
    """Whether it is a device that epoll(7) refuses, such as /dev/null."""
    if not stat.S_ISCHR(mode):
        return False
    with select.epoll() as epoll:
        try:
            epoll.register(descriptor, select.EPOLLIN)
        except PermissionError:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Survey:
    """The contents of a whole input."""

    runs: int
    lines: int
    """Number of invalid lines."""
    problems: list[str]
    """The problems of the first `BAD_NAMED` invalid lines."""


def changed(index: int) -> str:
    """The error message about a run that completed earlier with other parameters."""
    return (
        f"run {index} has completed with other parameters than it has now: the input is not what it was. Run it as a "
        "map of its own, with another --dir"
    )


class RunSequence:
    """Numbers the runs of a map and returns them in order.

    An invalid record uses up its numbers, so that the other runs keep theirs when the file is fixed.
    """

    def __init__(self, template: Template, grid: Grid, source: Input | None) -> None:
        self._template = template
        self._grid = grid
        self.source = source
        self.begin()

    def begin(self) -> None:
        """Start from the first run."""
        self._records = 0
        self._at = 0
        """Index of the next combination of the grid for the current record."""
        self._record: Record | None = None if self.source else Record(0, {})
        self._reader = RecordReader(of_csv=self.source is not None and self.source.name.lower().endswith(".csv"))
        self._read: Iterator[Record | Bad] = iter(())
        self._at_end = self._ended = self.source is None

    @property
    def total(self) -> int | None:
        """Number of runs; None if there is an input, because it would have to be read first."""
        return len(self._grid) if self.source is None else None

    @property
    def fixed(self) -> list[str] | None:
        """The parameters that all runs share, as texts; None if they are unknown."""
        if self.source is not None:
            return None
        return words({name: values[0] for name, values in self._grid.axes if len(values) == 1})

    @property
    def over(self) -> bool:
        """Whether `next` has returned all runs."""
        return self._ended and self._record is None

    def survey(self, earlier: EarlierRuns) -> Survey:
        """Read the whole input, which must be `seekable`, then start again from the first run.

        Raises OptionError if it cannot be read, or if a run that completed in `earlier` launches had other parameters.
        """
        assert self.source is not None
        runs, lines, bad = 0, 0, []
        while not self.over:
            found = self._next_record()
            if isinstance(found, Bad):
                lines += 1
                bad += [found.problem] if lines <= BAD_NAMED else []
            elif found is not None:
                for at in range(len(self._grid)) if earlier.completed else ():
                    self._compare(earlier, self._records * len(self._grid) + at, {**found.params, **self._grid[at]})
                runs += len(self._grid)
                self._records += 1
        self.source.rewind()
        self.begin()
        return Survey(runs, lines, bad)

    @staticmethod
    def _compare(earlier: EarlierRuns, index: int, params: Params) -> None:
        if index in earlier and not earlier.agrees(index, params):
            raise OptionError("from", changed(index))

    def next(self) -> Run | Bad | None:
        """The next run or invalid record; None if the input has none yet, or if all are `over`. Raises OptionError."""
        if self._record is None:
            found = self._next_record()
            if found is None or isinstance(found, Bad):
                return found
            self._record, self._at = found, 0
        record, at = self._record, self._at
        self._at += 1
        if self._at == len(self._grid):
            self._record = None
            self._records += 1
        return Run((self._records - (self._record is None)) * len(self._grid) + at, {**record.params, **self._grid[at]})

    def wait(self) -> None:
        """Wait until `next` may return a run."""
        if self.source is not None and self.source.waits:
            select.select([self.source], [], [])

    def _next_record(self) -> Record | Bad | None:
        while True:
            found = next(self._read, None)
            if found is not None:
                if isinstance(found, Record) and (problem := self._misfit(found)) is not None:
                    found = Bad(found.line, problem)
                if isinstance(found, Bad):
                    self._records += 1
                    self._ended = found.all
                    return replace(found, problem=f"{self.where(found)} {found.problem}")
                return found
            if self._at_end or self._ended or self.source is None:
                self._ended = True
                return None
            data = self.source.read()
            if data is None:
                return None
            self._at_end = not data
            self._read = self._reader.feed(data) if data else self._reader.end()

    def _misfit(self, record: Record) -> str | None:
        for name, _ in self._grid.axes:
            if name in record.params:
                return f"has {name}, which --param gives, too"
        # Checking the first combination is enough: all have the same names, and the grid's values were checked before.
        if problem := self._template.misfit({**record.params, **self._grid[0]}):
            return f"does not fit: {problem}"
        return None

    def where(self, bad: Bad) -> str:
        """The place of an invalid record, such as `params.jsonl, line 3,`."""
        name = self.source.name if self.source else ""
        return f"{Path(name).name}, line {bad.line},"
