"""Moves a running program to the background of its shell, and out of its terminal.

A shell waits for the process that it started, and takes its terminal back when that process ends or stops. So the
program does what Ctrl-Z and `bg` do: it stops, and a helper continues it as soon as the shell has the terminal. Then it
does what nohup(1) does: its standard streams leave the terminal, and its caller ignores SIGHUP. It is still the same
process, so everything below it is as before.

It stays in the session of the shell, as a job in the background that `jobs`, `fg` and `kill` know. In a session of its
own it would survive no more than this, and `fg` would wait for its end without passing on Ctrl-C.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading

from gpu_launcher.debug_log import get_logger
from gpu_launcher.processes.forking import flush_all
from gpu_launcher.processes.linux import children_of_all, command_lines

_log = get_logger("processes.backgrounding")

SHELL_SECONDS = 10.0
"""Seconds within which the shell must have taken its terminal back."""
HELPER_SECONDS = 10.0
"""Seconds within which the helper must have started."""

# Fields of /proc/PID/stat after the command's name: state, parent, process group, session, terminal, foreground group.
_CONTINUE = """
import os, signal, sys, time
stopped, end = int(sys.argv[1]), time.monotonic() + float(sys.argv[2])
print("ready", flush=True)
while os.getppid() == stopped and time.monotonic() < end:
    fields = open(f"/proc/{stopped}/stat", errors="replace").read().rpartition(")")[2].split()
    if fields[0] in "Tt" and fields[2] != fields[5]:
        os.kill(stopped, signal.SIGCONT)  # and again until killed: Ctrl-Z, pressed meanwhile, stops it a second time
    time.sleep(0.01)
if os.getppid() == stopped:
    os.kill(stopped, signal.SIGCONT)
"""


def obstacle() -> str | None:
    """Return why a shell would not take its terminal back if this process stopped. None if it would."""
    here, parent = os.getpid(), os.getppid()
    try:
        # A parent outside of this PID namespace has process id 0.
        if parent == 0 or os.getsid(0) == here or os.getsid(parent) != os.getsid(0):
            return "no shell would use it then"
        if os.getpgid(parent) == os.getpgrp():
            waiting = (*command_lines([parent]), f"process {parent}")[0]
            return f"{waiting} waits for the sweep"
        others = [pid for pid in children_of_all().get(parent, ()) if pid != here and _group(pid) == os.getpgrp()]
    except ProcessLookupError:  # the parent has just ended
        return "no shell would use it then"
    return "the sweep is part of a pipeline" if others or os.getpgrp() != here else None


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:  # it has just ended
        return None


def leave_terminal(terminal: int, output: int, seconds: float = SHELL_SECONDS) -> bool:
    """Let the shell have the terminal of descriptor `terminal`, and write to descriptor `output` from now on.

    Returns whether the shell took the terminal within `seconds`. If not, nothing has changed. Call this in the main
    thread, in the foreground. The caller must ignore SIGHUP afterwards. Raises OSError if no helper can be started.
    """
    streams = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    # A thread that reads the terminal gets an error from then on. Otherwise it would stop this process again.
    before = signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    left = False
    try:
        flush_all(ignore_errors=True)
        _stop_until_shell_has_terminal(seconds)
        left = not _in_foreground(terminal)
        if left:
            for descriptor in streams:
                os.dup2(output if descriptor else nothing, descriptor)
            _log.info("process %d continues in the background", os.getpid())
    finally:
        os.close(nothing)
        if not left:
            signal.signal(signal.SIGTTIN, before)
    return left


def _stop_until_shell_has_terminal(seconds: float) -> None:
    """Stop this process, and return when it is continued: `seconds` later at the latest."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _CONTINUE, str(os.getpid()), str(seconds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C does not reach it
    ) as helper:
        try:
            _wait_until_ready(helper)
            handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            try:
                # To this thread: the call then returns only when the process is continued, whatever other threads do.
                signal.pthread_kill(threading.get_ident(), signal.SIGTSTP)
            finally:
                signal.signal(signal.SIGTSTP, handler)
        finally:
            helper.kill()


def _wait_until_ready(helper: subprocess.Popen[bytes]) -> None:
    """Wait until the helper runs: without it, this process would stay stopped. Raises OSError if it does not."""
    assert helper.stdout is not None
    ready = select.poll()  # select(2) fails for descriptors above 1023
    ready.register(helper.stdout, select.POLLIN)
    if not ready.poll(1000 * HELPER_SECONDS) or not helper.stdout.readline():
        raise OSError(f"{sys.executable} does not run the helper that would continue the sweep")


def _in_foreground(terminal: int) -> bool:
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:  # the terminal is gone
        return False
