"""The results of a sweep as a table: a row for each job, with its parameters and the values that it returned. Pure,
except for the functions that read or write files.

Everything comes from the manifest (`jobs.manifest`), so grids, searches and maps are read in one way, and nothing is
unpickled. The manifest may be another user's: texts are escaped where they are shown.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from gpu_launcher.errors import ManifestError, OptionError, UnsupportedVersionError
from gpu_launcher.jobs.manifest import Entry, Manifest, State, read_chosen_sweep, read_manifest
from gpu_launcher.json_data import Value, Values
from gpu_launcher.redaction import redact
from gpu_launcher.safe_files import open_regular, write_whole
from gpu_launcher.text import CONTROL, short_path
from gpu_launcher.wording import job_name

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped, import-not-found, unused-ignore]

CSV = "results.csv"
FACTS = ("number", "outcome", "duration", "attempts", "peak_memory", "peak_device_memory")
"""The first columns. Parameters and values follow, and then PLACES."""
PLACES = ("devices", "node", "directory", "message")
MAX_SHOWN_NAMES = 20
"""Maximum number of columns that a message names."""

_TYPED = {"true": True, "false": False, "null": None}
_INTEGER = re.compile(r"[+-]?(?:0|[1-9](?:_?[0-9])*)", re.ASCII)
_FLOAT = re.compile(
    r"[+-]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|[0-9]+e[+-]?[0-9]+|inf|nan)", re.ASCII | re.IGNORECASE
)
_QUOTED = re.compile(r"'([^'\\]*)'|\"([^\"\\]*)\"")


@dataclass(frozen=True, slots=True)
class JobRow:
    """One job of a sweep, as its latest attempt left it. None stands for what is not known."""

    number: int
    outcome: str
    """`completed`, `failed`, `cancelled`, `pruned`, `lost`, or `running` or `waiting` while the sweep runs."""
    params: dict[str, Any]
    """All of its parameters or overrides, by name."""
    values: Values
    """What it returned, by name."""
    duration: float | None
    """Seconds."""
    attempts: int
    peak_memory: int | None
    """Most bytes of the host's memory that one of its processes had resident."""
    peak_device_memory: int | None
    """Most bytes that its processes were seen to use on one of its devices."""
    devices: tuple[str, ...]
    node: str | None
    """Name of the node that ran it, if the sweep ran on several."""
    directory: str | None
    message: str | None
    """Why it failed."""
    started: float | None
    """When it was started, in seconds since the epoch."""
    ended: float | None


@dataclass(frozen=True, slots=True)
class ResultColumn:
    """A column of the table."""

    name: str
    get: Callable[[JobRow], Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ResultTable(Sequence[JobRow]):
    """The jobs of a sweep: a sequence of rows, in the order of their numbers."""

    directory: Path
    rows: tuple[JobRow, ...]
    varying: tuple[str, ...]
    """Names of the parameters that differ between the jobs of the sweep."""
    value_names: tuple[str, ...]
    """Names of the values, in the order in which they first occur."""
    directions: Mapping[str, str] = field(default_factory=dict)
    """`minimize` or `maximize` for each value, by name. Empty if it is not known which ones are best."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> JobRow: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[JobRow, ...]: ...
    def __getitem__(self, index: int | slice) -> JobRow | tuple[JobRow, ...]:
        return self.rows[index]

    def __iter__(self) -> Iterator[JobRow]:
        return iter(self.rows)

    @property
    def best(self) -> JobRow | None:
        """The completed job with the best value. None if there are several values or it is not known what is best."""
        if len(self.directions) != 1:
            return None
        ((name, direction),) = self.directions.items()
        found = [row for row in self.rows if row.outcome == State.COMPLETED.value and _finite(row.values.get(name))]
        sign = 1.0 if direction == "minimize" else -1.0
        return min(found, key=lambda row: sign * float(row.values[name]), default=None)

    @property
    def param_columns(self) -> dict[str, ResultColumn]:
        """The columns of the parameters that differ. One whose name is taken is called `params.NAME`."""
        return self._columns("params", self.varying, {*FACTS, *PLACES})

    @property
    def value_columns(self) -> dict[str, ResultColumn]:
        """The columns of the values. One whose name is taken is called `values.NAME`."""
        return self._columns("values", self.value_names, {*FACTS, *PLACES, *self.param_columns})

    @staticmethod
    def _columns(kind: str, names: Sequence[str], taken: set[str]) -> dict[str, ResultColumn]:
        columns = [ResultColumn(f"{kind}.{name}" if name in taken else name, _item(kind, name)) for name in names]
        return {column.name: column for column in columns}

    @property
    def columns(self) -> list[ResultColumn]:
        """The columns: facts, the parameters that differ, values, places."""
        facts, places = ([ResultColumn(name, _fact(name)) for name in names] for names in (FACTS, PLACES))
        return [*facts, *self.param_columns.values(), *self.value_columns.values(), *places]

    def column(self, name: str, option: str) -> ResultColumn:
        """Return the column with this name. Raises OptionError, which names `option`, if there is none."""
        columns = {column.name: column for column in self.columns}
        if name not in columns:
            listed = [*columns][:MAX_SHOWN_NAMES]
            more = ", ..." if len(columns) > len(listed) else ""
            raise OptionError(option, f"there is no column {name!r}: choose from {', '.join(listed)}{more}")
        return columns[name]

    def sorted_by(self, name: str, option: str = "sort") -> ResultTable:
        """Sort by a column: the smallest first, or with `-NAME` the largest. What is missing or NaN comes last.

        Raises OptionError, which names `option`, if there is no such column.
        """
        falling = name.startswith("-") and name not in {column.name for column in self.columns}
        column = self.column(name[1:] if falling else name, option)
        keyed = [(key, row) for row in self.rows if (key := rank(column.get(row))) is not None]
        known = {row.number for _, row in keyed}
        ordered = [row for _, row in sorted(keyed, key=lambda pair: pair[0], reverse=falling)]
        return self._with([*ordered, *(row for row in self.rows if row.number not in known)])

    def top(self, count: int) -> ResultTable:
        """Keep the first rows."""
        return self._with(self.rows[:count])

    def where(self, keep: Callable[[JobRow], bool]) -> ResultTable:
        """Keep the rows for which `keep` returns true."""
        return self._with([row for row in self.rows if keep(row)])

    def best_first(self) -> ResultTable:
        """Sort by the value, the best first. Raises OptionError if it is not known which value is best."""
        if len(self.directions) == 1:
            ((name, direction),) = self.directions.items()
            shown = dict(zip(self.value_names, self.value_columns, strict=True))[name]
            return self.sorted_by(shown if direction == "minimize" else f"-{shown}")
        example = self.value_names[0] if self.value_names else "duration"
        several = len(self.value_names) > 1
        problem = f"the values are {', '.join(self.value_names)}" if several else "it is not known which value is best"
        remedy = f"give --sort {example} (lowest first) or --sort -{example} (highest first)"
        raise OptionError("top", f"{problem}: {remedy}")

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the rows as dictionaries with a value for each column."""
        columns = self.columns
        for row in self.rows:
            yield {column.name: column.get(row) for column in columns}

    def to_pandas(self) -> pd.DataFrame:
        """Return a pandas frame with these columns, indexed by the jobs' numbers.

        Raises UnsupportedVersionError if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise UnsupportedVersionError("pandas", None, "") from None
        names = [column.name for column in self.columns]
        return pd.DataFrame(list(self.records()), columns=names).set_index("number")

    def to_csv(self) -> str:
        """Return the table as CSV."""
        return csv_text([column.name for column in self.columns], (record.values() for record in self.records()))

    def _with(self, rows: Sequence[JobRow]) -> ResultTable:
        return ResultTable(self.directory, tuple(rows), self.varying, self.value_names, self.directions)


def load_results(directory: str | os.PathLike[str] | None = None) -> ResultTable:
    """Read the results of a sweep or a map: a sequence with a row for each job, and a `to_pandas` method.

    `directory` is the directory of the sweep, by default of the newest one below the working directory. Nothing is
    unpickled. Raises ManifestError if there is no such sweep.
    """
    return tabulate(*read_chosen_sweep(None if directory is None else Path(directory)))


def value_names(objectives: int) -> list[str]:
    """Return the names of the values of a job that returns one number for each of several objectives."""
    return ["value"] if objectives == 1 else [f"values_{place}" for place in range(objectives)]


def tabulate(directory: Path, manifest: Manifest, row_of: Callable[[Entry], JobRow] | None = None) -> ResultTable:
    """Make the table of the jobs of a sweep. `row_of` makes the rows, by default `result_row`."""
    rows = tuple(map(row_of or result_row, manifest.entries.values()))
    names = tuple(dict.fromkeys(chain.from_iterable(row.values for row in rows)))
    return ResultTable(directory, rows, _varying(rows), names, _directions_of(names, manifest))


def _directions_of(names: Sequence[str], manifest: Manifest) -> dict[str, str]:
    """Return the direction of each objective, by name. Empty if it is not known which value the directions are about.

    A search knows the names of its objectives. A grid has one direction, which is about the only value of its jobs.
    """
    objectives = manifest.objectives or (names if len(names) == 1 else ())
    if len(objectives) != len(manifest.directions) or not set(objectives) <= set(names):
        return {}
    return dict(zip(objectives, manifest.directions, strict=True))


def write_results(directory: Path, *, best_of: Container[int] = ()) -> tuple[list[str], list[str]]:
    """Write the table of a sweep that ended to `results.csv` in its directory, and return two lists of lines.

    The first names the best of the jobs with the numbers `best_of`, if it is known which one that is. The directory may
    have others, of an earlier sweep. The second says why the table could not be written.
    """
    try:
        table = tabulate(directory, read_manifest(directory))
    except (ManifestError, OSError) as error:
        return [], [f"no table of results: {error}"]
    problem = write_csv(table)
    best = []
    if (row := table._with([row for row in table if row.number in best_of]).best) is not None:
        ((name, _),) = table.directions.items()
        params = " ".join(f"{name}={shown(row.params[name])}" for name in table.varying if name in row.params)
        best = [f"best: {shown(row.values[name])}, {job_name(row.number, params)}"]
    return best, [] if problem is None else [problem]


def write_csv(table: ResultTable) -> str | None:
    """Write the table to `results.csv` in the sweep's directory. Return why that did not work, as a line."""
    file = table.directory / CSV
    data = table.to_csv().encode("utf-8", "backslashreplace")
    try:
        if _is_ours(file):
            write_whole(file, data)
            return None
        problem = "is not a table of results, so it was not overwritten"
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
    how = f"gpu-launcher results {shlex.quote(short_path(table.directory))} --csv"
    return f"{file} {problem}: to print the table: {how}"


def _is_ours(file: Path) -> bool:
    """Whether a file does not exist or was written by `write_csv`. Raises OSError."""
    head = ",".join(FACTS).encode()
    try:
        with open(open_regular(file), "rb") as opened:
            return opened.read(len(head)) == head
    except FileNotFoundError:
        return True


def csv_text(names: Sequence[str], rows: Iterator[Any]) -> str:
    """Return rows as CSV. Control characters in texts are replaced, because the table may be shown on a terminal."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow([_cell(name) for name in names])
    table.writerows([_cell(value) for value in row] for row in rows)
    return file.getvalue()


def shown(value: Any) -> str:
    """A parameter or a value as text."""
    if type(value) in (str, int):
        return str(value)
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _cell(value: Any) -> Any:
    if value is None or type(value) in (int, float):
        return value
    text = value if isinstance(value, str) else "; ".join(value) if isinstance(value, tuple) else json.dumps(value)
    return text if text.isprintable() else CONTROL.sub("?", text)


def result_row(entry: Entry) -> JobRow:
    """Return the row of a job."""
    # One that was cancelled before it had its devices may have been prepared, which uses memory and makes a directory.
    prepared_only = entry.state is State.CANCELLED and not entry.attempts
    directory = None if entry.log is None else os.path.dirname(entry.log)  # noqa: PTH120  (much quicker)
    return JobRow(
        entry.number,
        entry.state.value,
        params_of(entry.spec),
        _without_secrets(entry.figures.values),
        None if entry.seconds is None else round(entry.seconds, 3),
        entry.counted_attempts,
        None if prepared_only else entry.figures.peak_memory,
        None if prepared_only else entry.figures.peak_device_memory,
        entry.devices,
        entry.node or None,
        None if prepared_only else directory,
        entry.message,
        entry.started,
        entry.ended,
    )


def params_of(spec: object) -> dict[str, Any]:
    """Return the parameters of a job, by name, without secrets.

    `spec` is a list of Hydra's overrides, or a map's parameters.
    """
    if isinstance(spec, dict):
        return _without_secrets(spec)
    if not isinstance(spec, list):
        return {}
    return dict(_override(text) for text in spec if isinstance(text, str))


@lru_cache(maxsize=4096)
def _override(text: str) -> tuple[str, Any]:
    name, assigned, value = redact(text).partition("=")
    return name.lstrip("+"), typed(value) if assigned else None


def _without_secrets(named: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: redact(f"{name}={value}").removeprefix(f"{name}=") if isinstance(value, str) else value
        for name, value in named.items()
    }


def typed(text: str) -> Any:
    """Read the value of an override as Hydra does, if it is a number, a boolean, null or a quoted text."""
    if (lower := text.lower()) in _TYPED:
        return _TYPED[lower]
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= 300 else text
    if _FLOAT.fullmatch(text):
        return float(text)
    quoted = _QUOTED.fullmatch(text)
    return text if quoted is None else quoted[1] or quoted[2] or ""


def _varying(rows: Sequence[JobRow]) -> tuple[str, ...]:
    """The names of the parameters that differ between jobs. If there is one job: of all."""
    names = dict.fromkeys(chain.from_iterable(row.params for row in rows))
    if len(rows) < 2:
        return tuple(names)
    first = rows[0].params
    return tuple(
        name for name in names if any(row.params.get(name, _ABSENT) != first.get(name, _ABSENT) for row in rows)
    )


_ABSENT = object()


def _fact(name: str) -> Callable[[JobRow], Any]:
    return lambda row: getattr(row, name)


def _item(kind: str, name: str) -> Callable[[JobRow], Any]:
    return lambda row: getattr(row, kind).get(name)


def _finite(value: Value | None) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def rank(value: Any) -> tuple[int, Any] | None:
    """A key by which the values of a column are sorted: numbers before texts. None if the value is missing or NaN."""
    if value is None or value == () or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (int, float)):
        return 0, value
    return 1, value if isinstance(value, str) else json.dumps(value)
