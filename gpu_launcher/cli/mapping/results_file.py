"""A map's table of results: one line for each run, written as soon as the run ends."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from gpu_launcher.cli.mapping.map_directory import MAX_DIGITS, MapDirectory
from gpu_launcher.cli.mapping.values import Params, to_json
from gpu_launcher.json_data import load_object
from gpu_launcher.safe_files import open_regular, read_lines, write_whole

COLUMNS = ("index", "outcome", "exit_code", "duration", "devices", "attempts", "message")
"""The first columns of results.csv. Parameters and the command's output follow."""
OUTCOME = (*COLUMNS[1:], "output")
"""The fields of a results line that a run's `outcome.json` contains."""
PATHS = ("directory", "stdout", "stderr")
_INDEX = re.compile(rb'\{"index": ?([0-9]+),')
"""The beginning of a line that `result_line` has made."""
_FIELDS = {*COLUMNS, *PATHS, "params", "output"}


class ResultsFile:
    """`results.jsonl`, a map's journal. It has at most one line for a run, however often the run was started."""

    def __init__(self, path: Path) -> None:
        """Open the file to append to it, and create it if necessary. Raises OSError."""
        self._path = path
        self._descriptor = self._open()
        self._unwritten: list[bytes] = []
        """Lines that could not be written yet."""

    def _open(self) -> int:
        return open_regular(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def replace_by(self, path: Path) -> None:
        """Replace the table with the file `path`, and append to that from now on. Raises OSError."""
        path.replace(self._path)
        os.close(self._descriptor)
        self._descriptor = self._open()

    def drop(self, indices: Set[int], temporary: Path) -> None:
        """Remove the lines of these runs. Writes `temporary` on the way. Raises OSError."""
        self.flush()
        with open(open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as kept:
            for line in read_lines(self._path):
                begin = _INDEX.match(line)  # quicker than to read the JSON
                if begin is None or int(begin[1]) not in indices:
                    kept.write(line)
        self.replace_by(temporary)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line. Raises OSError if it cannot be written; the next call then retries."""
        self._unwritten.append(to_json(line).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write the lines that could not be written before. Raises OSError."""
        while self._unwritten:
            data = self._unwritten[0]
            written = os.write(self._descriptor, data)
            if written < len(data):  # the disk is full; a partial line would corrupt the next one
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
                os.write(self._descriptor, data)  # raises OSError with the reason
                continue
            self._unwritten.pop(0)

    def close(self) -> None:
        """Close the file. Does not flush."""
        os.close(self._descriptor)


def result_line(
    directory: MapDirectory,
    index: int,
    *,
    params: Params,
    outcome: str,
    exit_code: int | None = None,
    duration: float | None = None,
    devices: Any = (),
    attempts: int = 1,
    message: str | None = None,
    output: dict[str, Any] | None = None,
    **_: object,
) -> dict[str, Any]:
    """A line of the results, as documented in docs/map.md."""
    run = directory.run(index)
    return {
        "index": index,
        "params": params,
        "outcome": outcome,
        "exit_code": exit_code,
        "duration": duration,
        "devices": list(devices),
        "attempts": attempts,
        "message": message,
        "directory": str(run.path),
        "stdout": str(run.stdout),
        "stderr": str(run.stderr),
        "output": output,
    }


def write_outcome(directory: MapDirectory, line: Mapping[str, Any]) -> None:
    """Write a run's outcome into its directory, if that exists. Raises OSError."""
    run = directory.run(line["index"])
    if run.path.is_dir() and not run.path.is_symlink():
        content = {name: line[name] for name in OUTCOME}
        write_whole(run.outcome, f"{json.dumps(content)}\n".encode())


def write_table(directory: MapDirectory) -> None:
    """Write `results.csv`, with one column per parameter and output, like `pandas.json_normalize`. Raises OSError."""
    names: dict[str, None] = {}
    for line in lines(directory.results):
        names.update(dict.fromkeys(f"params.{name}" for name in line["params"]))
    said: dict[str, None] = {}
    for line in lines(directory.results):
        said.update(dict.fromkeys(f"output.{name}" for name in line["output"] or ()))
    temporary = directory.table.with_name("results.csv.tmp")
    descriptor = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.DictWriter(file, [*COLUMNS, *names, *said, *PATHS], restval="")
        table.writeheader()
        for line in lines(directory.results):
            row = {name: line[name] for name in (*COLUMNS, *PATHS)}
            row["devices"] = "; ".join(line["devices"])
            row |= {f"params.{name}": value for name, value in line["params"].items()}
            row |= {f"output.{name}": value for name, value in (line["output"] or {}).items()}
            table.writerow({name: _cell(value) for name, value in row.items()})
    temporary.replace(directory.table)


def _cell(value: object) -> object:
    if value is None:
        return ""
    return value if isinstance(value, (str, int, float)) and not isinstance(value, bool) else json.dumps(value)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the valid lines of a results file. A missing file has no lines."""
    try:
        for data in read_lines(path):
            try:
                line = load_object(data)
            except ValueError:
                continue
            if is_row(line):
                yield line
    except FileNotFoundError:
        return


def is_row(line: dict[str, Any]) -> bool:
    """Whether the values have the types that `result_line` produces and later code relies on."""
    return (
        line.keys() >= _FIELDS
        and type(line["index"]) is int
        and 0 <= line["index"] < 10**MAX_DIGITS
        and isinstance(line["params"], dict)
        and isinstance(line["output"], dict | None)
        and isinstance(line["devices"], list)
        and all(isinstance(device, str) for device in line["devices"])
    )
