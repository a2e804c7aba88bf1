"""Finds out which runs of a map completed in earlier launches, and which did not.

One scan reads `results.jsonl` and the runs' directories. To resume a map, it also writes a new table beside the old
one, with exactly the runs that completed, each once. Truncated lines are ignored. If the head died before it wrote the
line of a completed run, the line is made from the outcome in the run's directory. The new table replaces the old one
when the loop first asks for runs (`MapRuns.receive`). A resumption that is refused before then changes nothing.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_launcher.cli.mapping.map_directory import MapDirectory
from gpu_launcher.cli.mapping.results_file import OUTCOME, is_row, lines, result_line
from gpu_launcher.cli.mapping.values import Params, digest, to_json
from gpu_launcher.errors import OptionError, UsageError
from gpu_launcher.jobs.manifest import devices_of
from gpu_launcher.safe_files import open_regular
from gpu_launcher.text import short_path


class EarlierRuns:
    """The runs of a map's earlier launches, as a container of the indices of completed runs.

    It takes eight bytes for each run.
    """

    def __init__(self) -> None:
        self._digests = array("Q")
        """The digest of a completed run's parameters, by index; 0 for other runs."""
        self.completed = 0
        """Number of runs that completed."""
        self.incomplete: set[int] = set()
        """Indices of runs that have a result or a directory but did not complete."""
        self.runs = 0
        """Highest index seen plus 1: the map had at least this many runs."""

    def __contains__(self, index: int) -> bool:
        return index < len(self._digests) and self._digests[index] != 0

    def agrees(self, index: int, params: Params) -> bool:
        """Whether the completed run `index` had these parameters."""
        return self._digests[index] == digest(params)

    @classmethod
    def of(cls, directory: MapDirectory) -> EarlierRuns:
        """Scan a map's directory without changing it. Raises OptionError if it cannot be read."""
        earlier = cls()
        for _ in earlier._scan(directory):
            pass
        return earlier

    @classmethod
    def to_resume(cls, directory: MapDirectory) -> EarlierRuns:
        """Scan like `of`, and write the results of completed runs to `directory.kept_results`.

        Raises UsageError if they cannot be written.
        """
        earlier = cls()
        try:
            descriptor = open_regular(directory.kept_results, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            with open(descriptor, "w", encoding="utf-8") as kept:
                for line in earlier._scan(directory):
                    kept.write(to_json(line) + "\n")
        except OSError as error:
            raise unwritable(directory, error) from error
        return earlier

    def _scan(self, directory: MapDirectory) -> Iterator[dict[str, Any]]:
        """Yield the result of each run that completed."""
        unrecorded: dict[int, dict[str, Any]] = {}
        try:
            for line in lines(directory.results):
                if line["index"] not in self and self._note(line["index"], line):
                    yield line
            for index in directory.indices():
                if index not in self and self._note(index, found := _left_by(directory, index)):
                    unrecorded[index] = found
            devices = devices_of(directory.path, unrecorded) if unrecorded else {}
        except OSError as error:
            what = "" if error.filename is None else f": {short_path(Path(error.filename))}"
            problem = f"{short_path(directory.path)} cannot be read ({error.strerror}){what}"
            raise OptionError("resume", problem) from error
        for index, found in unrecorded.items():
            yield result_line(directory, index, **{"devices": devices.get(index, ()), **found})

    def _note(self, index: int, found: dict[str, Any]) -> bool:
        """Record a run and return whether it completed. `found` has the fields of its results line."""
        self.runs = max(self.runs, index + 1)
        if found.get("outcome") != "completed":
            self.incomplete.add(index)
            return False
        self._digests.extend([0] * (index + 1 - len(self._digests)))
        self._digests[index] = digest(found["params"])
        self.completed += 1
        self.incomplete.discard(index)
        return True


def last_result(directory: MapDirectory, index: int) -> dict[str, Any] | None:
    """The results line of a run, from the files in its directory; None if they have no valid outcome."""
    found = _left_by(directory, index)
    return result_line(directory, index, **found) if "outcome" in found else None


def unwritable(directory: MapDirectory, error: OSError) -> UsageError:
    return UsageError(
        f"results cannot be written to {short_path(directory.path)} ({error.strerror}), so nothing was run: fix this, "
        "for example by making room, and run the command again"
    )


def _left_by(directory: MapDirectory, index: int) -> dict[str, Any]:
    """The fields of a results line that a run's directory provides.

    Empty if the outcome or the parameters are missing or invalid. A run without an outcome counts as incomplete and
    runs again.
    """
    run = directory.run(index)
    outcome, params = run.read(), run.read_params()
    if outcome is None or params is None:
        return {}
    known = {name: value for name, value in outcome.items() if name in OUTCOME}
    left = {"attempts": run.attempts(), **known, "params": params}
    try:
        return left if is_row(result_line(directory, index, **{"outcome": "", **left})) else {}
    except TypeError:  # `devices` is not a list
        return {}
