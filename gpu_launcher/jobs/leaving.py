"""What a sweep tells the user about leaving its terminal."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TextIO

from gpu_launcher.jobs.progress import PlainProgress, can_live, reads_from
from gpu_launcher.jobs.progress.interactive import Interactive
from gpu_launcher.processes.backgrounding import leave_terminal, obstacle
from gpu_launcher.safe_files import open_regular
from gpu_launcher.text import one_line, short_path

OUTPUT = "sweep.log"
"""Name of the file in the sweep's directory with the output of a detached sweep."""

SHELL_SAYS = "your shell reports it as stopped now; it continues at once, in the background"


def detached_text(name: str, directory: Path, pid: int) -> str:
    """Return the last lines on the terminal that a sweep leaves when it begins. They begin with `name`."""
    return "".join(f"[{name}] {line}\n" for line in _last_lines("detached", directory, pid))


def _last_lines(what: str, directory: Path, pid: int) -> list[str]:
    where = shlex.quote(short_path(directory))
    return [
        f"{what}: process {pid} continues the sweep, and writes to {short_path(directory / OUTPUT)}",
        f"to show it: gpu-launcher attach --dir {where}; to stop it: gpu-launcher stop --dir {where}",
    ]


def detached_directory(output: str, working_directory: Path) -> Path | None:
    """Return the directory of the sweep that a program has detached. None if its `output` does not say so.

    The program ran in `working_directory`.
    """
    line = r"^\[.*\] to show it: gpu-launcher attach --dir (.+); to stop it: gpu-launcher stop --dir \1$"
    try:
        (name,) = shlex.split((re.findall(line, output, re.MULTILINE) or [""])[-1])
    except ValueError:  # the line is not ours
        return None
    return working_directory / name


def leave_while_running(display: Interactive, directory: Path, option: str) -> PlainProgress | str:
    """Let this program continue without the terminal on which `display` shows its sweep.

    Returns the display that continues in the file `OUTPUT`, or a line that says why the program cannot leave. `option`
    is the one that detaches a sweep at its start. The caller must ignore SIGHUP afterwards.
    """
    why = obstacle()
    if why is None:
        try:
            output = open_regular(directory / OUTPUT, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                last = [*_last_lines("leaving this terminal", directory, os.getpid()), SHELL_SAYS]
                plain = display.give_way(last, partial(leave_terminal, 2, output))
            finally:
                os.close(output)
            if plain is not None:
                return plain
            why = "the shell did not take it back"
        except OSError as error:  # the file cannot be written, or no process can be started
            why = one_line(str(error))
    option = option if option.startswith("--") else f"{option}=true"
    return f"the sweep cannot leave this terminal: {why}. To leave it running, start it with {option}, or in tmux"


def over_ssh(stream: TextIO | None, environ: Mapping[str, str], option: str, *, reads: bool = False) -> list[str]:
    """Return a notice if the sweep is shown on a terminal that a lost connection closes, else nothing.

    `option` is how to detach the sweep. `reads` says whether the program reads the keyboard itself.
    """
    remote = environ.get("SSH_CONNECTION") or environ.get("SSH_TTY")
    kept = environ.get("TMUX") or environ.get("STY") or signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    if not remote or kept or not can_live(stream, environ):
        return []
    assert stream is not None
    key = "" if reads or not reads_from(stream.fileno()) or obstacle() is not None else "press d, or "
    return [f"the sweep ends when this connection does: to leave it running, {key}start it with {option}, or in tmux"]
