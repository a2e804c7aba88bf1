"""The table of results: a line for each run that ended, as soon as it ended."""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpu_launcher.cli.mapping.place import MAX_DIGITS, Place
from gpu_launcher.cli.mapping.values import Params, digest, to_json
from gpu_launcher.jobs.manifest import devices_of
from gpu_launcher.json_data import load_object
from gpu_launcher.safe_files import open_regular, read_lines, write_whole

COLUMNS = ("index", "outcome", "exit_code", "duration", "devices", "attempts", "message")
"""Of the table, before parameters and what the script said."""
PATHS = ("directory", "stdout", "stderr")
_FIELDS = {*COLUMNS, *PATHS, "params", "output"}


class Results:
    """`results.jsonl`. At any time it has at most one line for each run, however often that was run."""

    def __init__(self, path: Path) -> None:
        """Begin the file, or go on with it. Raises OSError."""
        self._descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._unwritten: list[bytes] = []
        """Lines for which there was no room on the disk."""

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


class Completed:
    """Which runs have completed, and with which parameters: eight bytes for each."""

    def __init__(self) -> None:
        self._digests = array("Q")
        self.count = 0

    def add(self, index: int, params: Params) -> None:
        """Take note of one."""
        if index >= len(self._digests):
            self._digests.extend([0] * (index + 1 - len(self._digests)))
        self.count += not self._digests[index]
        self._digests[index] = digest(params)

    def __contains__(self, index: int) -> bool:
        return index < len(self._digests) and self._digests[index] != 0

    def agrees(self, index: int, params: Params) -> bool:
        """Whether it completed with these."""
        return self._digests[index] == digest(params)


def completed_before(place: Place) -> Completed:
    """What an earlier launch completed, by its results and the outcomes that its runs left."""
    completed = Completed()
    for line in lines(place.results):
        if _counts(line, completed):
            completed.add(line["index"], line["params"])
    for index in place.indices():
        if index not in completed and (found := _outcome(place, index)) is not None:
            completed.add(index, found["params"])
    return completed


def settle(place: Place) -> Completed:
    """Have the results list exactly the runs that completed in an earlier launch, each once. Raises OSError.

    What failed or was stopped will be run again, and what was being written has been cut off.
    """
    completed = Completed()
    kept = place.results.with_name("results.jsonl.tmp")
    with open(open_regular(kept, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w", encoding="utf-8") as file:
        for line in lines(place.results):
            if _counts(line, completed):
                completed.add(line["index"], line["params"])
                file.write(to_json(line) + "\n")
        lost = {}
        for index in place.indices():
            if index not in completed and (found := _outcome(place, index)) is not None:
                lost[index] = found
        devices = devices_of(place.path, lost) if lost else {}
        for index, found in lost.items():
            completed.add(index, found["params"])
            file.write(to_json(result_line(place, index, devices=devices.get(index, ()), **found)) + "\n")
    kept.replace(place.results)
    return completed


def _counts(line: dict[str, Any], completed: Completed) -> bool:
    return line.get("outcome") == "completed" and line["index"] not in completed


def _outcome(place: Place, index: int) -> dict[str, Any] | None:
    """What a run that completed has left."""
    run = place.run(index)
    outcome, params = run.read(), run.read_params()
    if outcome is None or params is None or outcome.get("outcome") != "completed":
        return None
    return {"attempts": run.attempts(), **outcome, "params": params}


def result_line(
    place: Place,
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
    run = place.run(index)
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


def write_outcome(place: Place, line: Mapping[str, Any]) -> None:
    """Leave in a run's directory what became of it, as far as that is not there. Raises OSError."""
    run = place.run(line["index"])
    if run.path.is_dir() and not run.path.is_symlink():
        left_out = ("index", "params", *PATHS)
        content = {name: value for name, value in line.items() if name not in left_out}
        write_whole(run.outcome, f"{json.dumps(content)}\n".encode())


def write_table(place: Place) -> None:
    """`results.csv`: names and output in columns of their own, as `pandas.json_normalize` does. Raises OSError."""
    names: dict[str, None] = {}
    for line in lines(place.results):
        names.update(dict.fromkeys(f"params.{name}" for name in line["params"]))
    said: dict[str, None] = {}
    for line in lines(place.results):
        said.update(dict.fromkeys(f"output.{name}" for name in line["output"] or ()))
    temporary = place.table.with_name("results.csv.tmp")
    descriptor = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.DictWriter(file, [*COLUMNS, *names, *said, *PATHS], restval="")
        table.writeheader()
        for line in lines(place.results):
            row = {name: line[name] for name in (*COLUMNS, *PATHS)}
            row["devices"] = "; ".join(line["devices"])
            row |= {f"params.{name}": value for name, value in line["params"].items()}
            row |= {f"output.{name}": value for name, value in (line["output"] or {}).items()}
            table.writerow({name: _cell(value) for name, value in row.items()})
    temporary.replace(place.table)


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
            if _is_row(line):
                yield line
    except FileNotFoundError:
        return


def _is_row(line: dict[str, Any]) -> bool:
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
