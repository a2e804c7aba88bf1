"""stdout and stderr where they cannot be written to: a full disk, a pipe that nobody reads, a terminal that is gone."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

from gpu_launcher.text import one_line


def tell(text: str) -> None:
    """Print a line for people on stderr. Where that cannot be written to, the exit code has to do."""
    if sys.stderr is not None:  # it was closed; print would take stdout
        with contextlib.suppress(OSError):
            lines = [one_line(line) for line in text.split("\n")]
            print(
                printable("\n".join(["gpu-launcher: " + lines[0], *lines[1:]]), sys.stderr), file=sys.stderr, flush=True
            )


def printable(text: str, stream: TextIO | None) -> str:
    """Text with escapes for the characters that `stream` cannot have."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def print_if_possible(text: str) -> None:
    """Print a line on stdout that says nothing which is not to be found elsewhere."""
    try:
        print(printable(text, sys.stdout), flush=True)
    except OSError as error:
        _silence(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            tell(_unwritable(error))


def lost(*, probed: bool = False) -> list[TextIO]:
    """Which of stdout and stderr something was written to that cannot arrive. Then nothing more of it is tried.

    Says so on stderr, but of a pipe that nobody reads any more, such as one to `head`. What failed before may be in no
    buffer any more: `probed`, the end of a line is written to find out.
    """
    text = "\n" if probed else ""
    errors = {stream: error for stream in (sys.stdout, sys.stderr) if (error := _write(stream, text)) is not None}
    for stream in errors:
        _silence(stream)
    problem = errors.get(sys.stdout)
    if problem is not None and not isinstance(problem, BrokenPipeError):
        tell(_unwritable(problem))
    return list(errors)


def _unwritable(error: OSError) -> str:
    return f"stdout cannot be written to: {error.strerror}"


def _write(stream: TextIO | None, text: str) -> OSError | None:
    try:
        if stream is not None and not stream.closed:
            stream.write(text)
            stream.flush()
    except OSError as error:
        return error
    return None


def _silence(stream: TextIO) -> None:
    """Or Python tries once more at its end, and exits with 120 whatever the exit code was."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
