"""How a sweep ended: with which exit code, or that its program was killed.

An entry point records the exit code with which the sweep ends the program (`recorder.record_end`), and releases the
directory when the program ends. A program that was killed does not release it. Not promised: what the program itself
does after the sweep does not change the exit code.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.errors import ManifestError, SteeringError
from gpu_launcher.jobs.directory import holder_of, summary
from gpu_launcher.jobs.launches import launches_in
from gpu_launcher.jobs.manifest import State, how_to_resume, manifest_size, read_manifest
from gpu_launcher.jobs.recorder import record_end
from gpu_launcher.text import one_line, short_path


@dataclass(slots=True)
class ExitCode:
    """The exit code with which a program will end."""

    value: int = 0


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sweep ended."""

    exit_code: int
    killed: bool
    """Whether its program was killed, so that it has shown no summary."""
    text: str
    """A line for the user."""


@contextmanager
def recorded_end(directory: Path) -> Iterator[ExitCode]:
    """Record the end of the block, which is the last thing that the sweep in `directory` does.

    The exit code is that of the exception that leaves the block, or else the one that the block sets, by default 0. If
    nothing was recorded about jobs before an exception, the sweep was refused, and the record of an earlier one stays.
    """
    code, before = ExitCode(), manifest_size(directory)
    try:
        yield code
    except BaseException as error:
        if manifest_size(directory) != before:
            record_end(directory, exit_code_of(error))
        raise
    record_end(directory, code.value)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a program that ends with this exception."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        code = 0 if error.code is None else error.code
        return code & 255 if isinstance(code, int) else 1
    return 1


def ending_of(directory: Path) -> Ending | None:
    """Return how the sweep in `directory` ended. None if it has not ended.

    Raises SteeringError if that cannot be known from here, and ManifestError.
    """
    killed = None
    launches = launches_in(directory)
    for one in (holder_of(directory), *launches):
        if one is not None and one.is_alive is None:
            raise SteeringError(
                f"{short_path(directory)} is run by process {one.pid} ({one.command}) on {one.host}, which cannot be "
                "reached from here: run this command on that machine, or in the same container"
            )
        if one is not None and one.is_alive:
            return None
        killed = killed or one
    manifest = read_manifest(directory)
    states = [entry.state for entry in manifest.entries.values()]
    jobs = summary(manifest.entries) if states else "it ended before it had jobs"
    if killed is not None:
        how = f"has ended: process {killed.pid} ({killed.command}) was killed, or crashed"
        return Ending(1, True, one_line(f"{short_path(directory)} {how}. {jobs}{_rest(directory)}"))
    code = manifest.exit_code
    if code is None:  # an older version does not record it
        code = int(not states or any(state is not State.COMPLETED for state in states))
    rest = _rest(directory) if code else ""
    return Ending(code, False, one_line(f"{short_path(directory)} has ended with exit code {code}. {jobs}{rest}"))


def _rest(directory: Path) -> str:
    command = None
    with suppress(ManifestError, OSError):
        command = how_to_resume(directory)
    return "" if command is None else f"; to run the rest: {command}"
