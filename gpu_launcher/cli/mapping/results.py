"""The table of results: a line for each run that ended, as soon as it ended."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_launcher.cli.mapping.map_directory import MAX_DIGITS, MapDirectory
from gpu_launcher.cli.mapping.values import Params, to_json
from gpu_launcher.json_data import load_object
from gpu_launcher.safe_files import open_regular, read_lines, write_whole

COLUMNS = ("index", "outcome", "exit_code", "duration", "devices", "attempts", "message")
"""Of the table, before parameters and what the script said."""
OUTCOME = (*COLUMNS[1:], "output")
"""What a run's own outcome has of it."""
PATHS = ("directory", "stdout", "stderr")
_FIELDS = {*COLUMNS, *PATHS, "params", "output"}


class ResultsFile:
    """`results.jsonl`, the journal of a map: at any time at most one line for each run, however often that was run."""

    def __init__(self, path: Path) -> None:
        """Create the file, or append to it. Raises OSError."""
        self._path = path
        self._descriptor = self._open()
        self._unwritten: list[bytes] = []
        """Lines for which there was no room on the disk."""

    def _open(self) -> int:
        return open_regular(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def replace_by(self, path: Path) -> None:
        """Go on with the table in `path`, which takes the place of the old one. Raises OSError."""
        path.replace(self._path)
        os.close(self._descriptor)
        self._descriptor = self._open()

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line. Raises OSError if that fails: then the next call tries again."""
        self._unwritten.append(to_json(line).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        """Write what could not be written before. Raises OSError."""
        while self._unwritten:
            data = self._unwritten[0]
            written = os.write(self._descriptor, data)
            if written < len(data):  # the disk is full; half a line would spoil the next one
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
                os.write(self._descriptor, data)  # which says why
                continue
            self._unwritten.pop(0)

    def close(self) -> None:
        """Close the file."""
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
    """A line, as docs/map.md documents it."""
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
    """Leave in a run's directory what became of it, as far as that is not there. Raises OSError."""
    run = directory.run(line["index"])
    if run.path.is_dir() and not run.path.is_symlink():
        content = {name: line[name] for name in OUTCOME}
        write_whole(run.outcome, f"{json.dumps(content)}\n".encode())


def write_table(directory: MapDirectory) -> None:
    """`results.csv`: names and output in columns of their own, as `pandas.json_normalize` does. Raises OSError."""
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
    """Those that are whole."""
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
    """Whether each of its values is what `result_line` makes, so that nothing trips over it later."""
    return (
        line.keys() >= _FIELDS
        and type(line["index"]) is int
        and 0 <= line["index"] < 10**MAX_DIGITS
        and isinstance(line["params"], dict)
        and isinstance(line["output"], dict | None)
        and isinstance(line["devices"], list)
        and all(isinstance(device, str) for device in line["devices"])
    )
