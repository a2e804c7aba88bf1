"""Continues a program in a process without a terminal, while the process that the user's shell waits for ends.

    shell ── the process that the user started: shows the output until the program has begun its work, then ends
               └── its fork: the program continues here, in a session of its own, with its output in a file

The first process forks before the program has state that cannot be forked. Until the output is redirected, both write
to the terminal and get its Ctrl-C, so errors in options appear as usual. If the fork ends before it has begun its work,
the first process ends with the same exit code; otherwise with 0, even if the work is over already. It runs no exit
handlers: they belong to the fork.

The program is not started again from `sys.orig_argv`: that would repeat the imports and all that the program does
before its sweep, and is impossible if it came from a pipe or has changed its directory. The price is that a program in
which other threads run or CUDA is initialised cannot be forked, and is refused.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from gpu_launcher.debug_log import get_logger
from gpu_launcher.errors import OptionError
from gpu_launcher.processes.forking import flush_all, tqdm_monitors_paused
from gpu_launcher.processes.linux import cuda_in_use, other_threads
from gpu_launcher.processes.signals import uninterrupted
from gpu_launcher.safe_files import open_regular

_log = get_logger("processes.detaching")

LOOK_SECONDS = 0.02
"""Seconds between two looks of one process at what the other does."""
_FORKED, _CONTINUES, _REDIRECTED, _BEGUN = range(4)
"""What the byte that both processes share says."""


class Detachment:
    """The fork's part: what it tells the process from which it was forked."""

    def __init__(self, shared: mmap.mmap) -> None:
        self._shared = shared

    def redirect(self, output: Path, *, keeps_stdin: bool = False) -> None:
        """Leave the terminal: begin a session, and append to the file `output` from now on. Raises OSError."""
        opened = open_regular(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        flush_all(ignore_errors=True)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.setsid()
        if not keeps_stdin:
            os.dup2(nothing, 0)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        os.close(opened)
        os.close(nothing)
        self._shared[0] = _REDIRECTED
        _log.info("process %d continues in a session of its own, with its output in %s", os.getpid(), output)

    def begun(self) -> None:
        """Let the first process end, because the work has begun."""
        self._shared[0] = _BEGUN


def continue_detached(output: Path, last_lines: Callable[[int], str]) -> Detachment:
    """Fork this process, and return in the fork, which will append to the file `output`.

    This process ends here. When the fork's work has begun, it shows what `last_lines` returns for the process id of the
    fork. Raises OptionError in this process if it cannot be forked.
    """
    if (unsafe := cuda_in_use()) is not None:
        raise _refused(unsafe)
    shared = mmap.mmap(-1, 1)  # has no descriptor that other processes could keep open
    before = output.stat().st_size if output.exists() else 0
    flush_all(ignore_errors=True)
    here = os.getpid()
    with tqdm_monitors_paused(), uninterrupted() as signals:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about threads, which are counted below
            pid = os.fork()
        if pid == 0:
            signals.end_in_child()
            while shared[0] == _FORKED:
                if os.getppid() != here:
                    os._exit(1)
                time.sleep(LOOK_SECONDS / 10)
        else:
            # Right after the fork: OpenBLAS and similar libraries end their threads for a fork.
            names = other_threads()
    if pid == 0:
        return Detachment(shared)
    if names:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise _refused(f"{len(names)} other thread(s) run in this program ({', '.join(sorted(set(names)))})")
    return _stand_in(pid, shared, output, before, last_lines)


def _refused(why: str) -> OptionError:
    return OptionError("detach", f"{why}, so it cannot continue in another process: use nohup or tmux instead")


def _stand_in(pid: int, shared: mmap.mmap, output: Path, shown: int, last_lines: Callable[[int], str]) -> NoReturn:
    """Show what the fork writes to `output` after the first `shown` bytes until it has begun its work. Then end."""

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGTERM or shared[0] >= _REDIRECTED:  # before, the fork gets the terminal's Ctrl-C itself
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, pass_on)
    shared[0] = _CONTINUES
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        state = shared[0]  # after the look at the fork, so that it is what the fork last said if it has ended
        if state >= _REDIRECTED:
            shown = _show(output, shown)
        if state == _BEGUN:
            with suppress(OSError):
                os.write(2, last_lines(pid).encode("utf-8", "backslashreplace"))
            os._exit(0)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        time.sleep(LOOK_SECONDS)


def _show(output: Path, shown: int) -> int:
    """Copy to stderr what `output` has after `shown` bytes. Return how many bytes it has."""
    with suppress(OSError), open(open_regular(output), "rb") as file:
        file.seek(shown)
        while part := file.read(2**16):
            shown += len(part)
            os.write(2, part)
    return shown
