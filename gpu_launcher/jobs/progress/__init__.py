"""What a person sees of a sweep: a live view on a terminal, plain lines elsewhere. Nothing here writes to stdout."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

from gpu_launcher.jobs.progress.plain import NAME, PlainProgress
from gpu_launcher.processes.keyboard import Keyboard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpu_launcher.jobs.events import Progress

__all__ = ["PlainProgress", "open_progress"]


def open_progress(
    stream: TextIO | None = None, environ: Mapping[str, str] = os.environ, *, name: str = NAME, reads: bool = False
) -> Progress:
    """The display that suits `stream` (default: `sys.stderr` as it is now), with `name` before each of its lines.

    A live view if the stream is a UTF-8 terminal that can move its cursor and this process has it in the foreground;
    plain lines otherwise, and wherever the environment says `TERM=dumb` or `CI`. rich is imported only for the former.
    No display starts a thread. The live view takes the keyboard, unless the program `reads` what is typed.
    """
    if stream is None:
        stream = sys.stderr
    if not _can_live(stream, environ):
        return PlainProgress(stream, name)
    from gpu_launcher.jobs.progress.live import LiveProgress

    return LiveProgress(stream, name=name, keyboard=None if reads else _keyboard(stream))


def _keyboard(stream: TextIO) -> Keyboard | None:
    try:
        return Keyboard(stream.fileno())
    except (OSError, ValueError):  # a stream of the program's own making
        return None


def _can_live(stream: TextIO | None, environ: Mapping[str, str]) -> bool:
    # sys.stderr is None where a program was started with it closed.
    if stream is None or stream.closed or not stream.isatty():
        return False
    if environ.get("TERM", "dumb") in ("", "dumb", "unknown"):
        return False
    if environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    if (stream.encoding or "").lower().replace("-", "") != "utf8":
        return False
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except OSError:  # a terminal that is not ours to control, such as another pty: then nobody else uses it
        return True
