"""Writes to stdout and stderr, which may fail: full disks, pipes without a reader, closed terminals."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

from gpu_launcher.text import one_line


def tell(text: str) -> None:
    """Print a message for the user on stderr. If stderr cannot be written, the message is lost."""
    if sys.stderr is not None:  # None if it was closed; print would use stdout
        with contextlib.suppress(OSError):
            lines = [one_line(line) for line in text.split("\n")]
            print(
                printable("\n".join(["gpu-launcher: " + lines[0], *lines[1:]]), sys.stderr), file=sys.stderr, flush=True
            )


def printable(text: str, stream: TextIO | None) -> str:
    """Escape the characters that `stream` cannot encode."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def print_if_possible(text: str) -> None:
    """Print a line on stdout that may be lost, because it can also be found elsewhere."""
    try:
        print(printable(text, sys.stdout), flush=True)
    except OSError as error:
        _silence(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            tell(_unwritable(error))


def lost(*, probed: bool = False) -> list[TextIO]:
    """Flush stdout and stderr; return those that fail, after directing them to /dev/null.

    A failure of stdout is reported on stderr, except for a pipe whose reader is gone, such as one to `head`. The data
    of an earlier failure may no longer be buffered; with `probed`, a newline is written to detect the failure.
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
    """Direct a stream to /dev/null. Otherwise Python would flush it at exit, fail, and exit with code 120."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
