"""Displays of a sweep: a live view on a terminal, plain lines elsewhere. Nothing here writes to stdout."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, TextIO

from gpu_launcher.jobs.progress.plain import NAME, PlainProgress
from gpu_launcher.processes.keyboard import Keyboard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpu_launcher.jobs.progress.live import LiveProgress

__all__ = ["PlainProgress", "can_live", "open_progress", "reads_from"]


def open_progress(
    stream: TextIO | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    name: str = NAME,
    reads: bool = False,
    can_quit: bool = False,
) -> PlainProgress | LiveProgress:
    """Return the display that suits `stream` (default: the current `sys.stderr`). Its lines begin with `name`.

    The display is a live view if the stream is a UTF-8 terminal that can move its cursor, and this process is in its
    foreground. Otherwise, and with `TERM=dumb` or `CI` set, it prints plain lines. rich is imported only for the live
    view. No display starts a thread. The live view takes the keyboard unless `reads` says that the program reads it. It
    reads keys if stdin is the same terminal, in the main thread. `can_quit` is whether a key quits it.
    """
    if stream is None:
        stream = sys.stderr
    if not can_live(stream, environ):
        return PlainProgress(stream, name)
    from gpu_launcher.jobs.progress.live import LiveProgress

    return LiveProgress(stream, name=name, keyboard=None if reads else _keyboard(stream), can_quit=can_quit)


def _keyboard(stream: TextIO) -> Keyboard | None:
    try:
        return Keyboard(stream.fileno(), keys=reads_from(stream.fileno()))
    except (OSError, ValueError):  # a stream that the program created without a descriptor
        return None


def reads_from(terminal: int) -> bool:
    """Whether stdin is this terminal, and keys can be handled where signals are."""
    try:
        same = os.isatty(0) and os.fstat(0).st_rdev == os.fstat(terminal).st_rdev
    except OSError:  # stdin is closed
        return False
    return same and threading.current_thread() is threading.main_thread()


def can_live(stream: TextIO | None, environ: Mapping[str, str]) -> bool:
    """Whether a live view suits the stream. See `open_progress`."""
    # sys.stderr is None if a program was started with stderr closed.
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
    except OSError:  # not our controlling terminal, for example another pty: no other shell job uses it
        return True
