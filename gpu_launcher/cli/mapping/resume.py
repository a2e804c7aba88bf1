"""Resuming a map: which of its runs completed in earlier launches, and which did not.

One scan of `results.jsonl` and of the runs' directories finds both. It also writes the table with which the new launch
begins, beside the old one: exactly the runs that completed, each once. Runs that failed or were stopped will run again,
and a line that was cut off is left out. If the launcher died before it wrote the line of a run that completed, the
outcome in that run's directory makes up for it. The new table replaces the old one when the loop first asks for runs
(`MapRuns.receive`). A resumption that is refused before that changes nothing.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_launcher.cli.mapping.map_directory import MapDirectory
from gpu_launcher.cli.mapping.results import OUTCOME, is_row, lines, result_line
from gpu_launcher.cli.mapping.values import Params, digest, to_json
from gpu_launcher.errors import OptionError, UsageError
from gpu_launcher.jobs.manifest import devices_of
from gpu_launcher.safe_files import open_regular
from gpu_launcher.text import short_path


class EarlierRuns:
    """What earlier launches of a map did. Contains the indices of the runs that completed, at eight bytes each."""

    def __init__(self) -> None:
        self._digests = array("Q")
        """Of the parameters of each run that completed, else 0."""
        self.completed = 0
        """How many runs completed."""
        self.incomplete: set[int] = set()
        """Runs that have a result or a directory, and did not complete."""
        self.runs = 0
        """How many runs there were, at least."""

    def __contains__(self, index: int) -> bool:
        return index < len(self._digests) and self._digests[index] != 0

    def agrees(self, index: int, params: Params) -> bool:
        """Whether a run that completed had these parameters."""
        return self._digests[index] == digest(params)

    @classmethod
    def of(cls, directory: MapDirectory) -> EarlierRuns:
        """Those of a map. Raises OptionError if they cannot be read."""
        earlier = cls()
        for _ in earlier._scan(directory):
            pass
        return earlier

    @classmethod
    def to_resume(cls, directory: MapDirectory) -> EarlierRuns:
        """As `of`, and write the results of what completed to `directory.kept_results`.

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
        """Take note of a run; returns whether it completed."""
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
    """The line of the results for a run, made of what it left in its directory; None if that has no outcome."""
    found = _left_by(directory, index)
    return result_line(directory, index, **found) if "outcome" in found else None


def unwritable(directory: MapDirectory, error: OSError) -> UsageError:
    return UsageError(
        f"results cannot be written to {short_path(directory.path)} ({error.strerror}), so nothing was run: fix this, "
        "for example by making room, and run the command again"
    )


def _left_by(directory: MapDirectory, index: int) -> dict[str, Any]:
    """What a run left in its directory; empty if its outcome or its parameters cannot be read."""
    run = directory.run(index)
    outcome, params = run.read(), run.read_params()
    if outcome is None or params is None:
        return {}
    known = {name: value for name, value in outcome.items() if name in OUTCOME}
    left = {"attempts": run.attempts(), **known, "params": params}
    try:
        return left if is_row(result_line(directory, index, **{"outcome": "", **left})) else {}
    except TypeError:  # devices that are no list
        return {}
