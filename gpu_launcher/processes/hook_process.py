"""A user's command that is told something: a document on its standard input, a time limit, and nothing else of ours.

The command has a session of its own, so a terminal's Ctrl-C does not reach it, and it inherits no descriptor but its
three standard streams. Its standard input is a file in memory, so a command that does not read never delays anybody.
Of what it writes to stderr, the last line is kept; a command that writes more than a pipe holds waits for the next
`poll`. Nothing here waits.

Not promised: when the program that started the command is killed, the kernel kills the command, but not processes that
the command itself started.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

from gpu_launcher.processes.linux import dying_with_parent
from gpu_launcher.text import one_line
from gpu_launcher.wording import duration

MAX_READ = 65536
"""Maximum number of bytes that are read at once."""
MAX_READS = 16
"""Maximum number of reads in one `poll`."""
MAX_KEPT = 2000
"""Number of bytes that are kept of what the command writes."""
MAX_SHOWN = 200
"""Maximum number of characters of the command's last line that are shown."""


class HookProcess:
    """The process of a hook, and what it leaves behind in its process group."""

    def __init__(self, command: Sequence[str], document: bytes, now: float, seconds: float) -> None:
        """Start the command, which may take at most `seconds` from `now`. Raises OSError."""
        words = dying_with_parent(command, signal.SIGKILL)
        self._seconds = seconds
        self._deadline = now + seconds
        self._killed: str | None = None
        """Why we have killed it."""
        self._kept = b""
        self.problem: str | None = None
        """Why it failed, as a sentence without its subject. None while it runs and if it succeeded."""
        self._output, output = os.pipe2(os.O_CLOEXEC)
        try:
            os.set_blocking(self._output, False)
            with suppress(OSError):  # the user's limit on the memory of pipes
                fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, MAX_READ * MAX_READS)
            with open(os.memfd_create("hook", os.MFD_CLOEXEC), "w+b") as content:
                content.write(document)
                content.seek(0)
                self._process = subprocess.Popen(
                    words, stdin=content, stdout=subprocess.DEVNULL, stderr=output, start_new_session=True
                )
        except BaseException:
            os.close(self._output)
            raise
        finally:
            os.close(output)

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its process group."""
        return self._process.pid

    def kill(self, why: str) -> None:
        """Kill the command and its process group. `why` becomes the problem, unless it was killed before."""
        self._killed = self._killed or why
        self._kill_group()

    def close(self) -> None:
        """Close what is open for it. Called once, when it has ended or is left alone."""
        os.close(self._output)

    def _kill_group(self) -> None:
        # It is not permitted for a command such as `sudo`.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def poll(self, now: float) -> bool:
        """Return whether it has ended. Kills it at its time limit, and whatever it leaves behind at its end."""
        self._read()
        try:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            if ended:
                self._kill_group()  # the group's id stays in use until we reap the process
        except ChildProcessError:  # the user's program reaps all children itself
            ended = True
        if ended:
            self._read()
            self.problem = self._describe(self._process.wait())
        elif now >= self._deadline and self._killed is None:
            self.kill(f"took longer than {duration(self._seconds)} and was killed")
        return ended

    def _read(self) -> None:
        with suppress(BlockingIOError):
            for _ in range(MAX_READS):
                if not (part := os.read(self._output, MAX_READ)):
                    break
                self._kept = (self._kept + part)[-MAX_KEPT:]

    def _describe(self, status: int) -> str | None:
        if self._killed is not None:
            return self._killed
        if status == 0:
            return None
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
        lines = self._kept.decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"{how}: {one_line(last, MAX_SHOWN)}" if last else how
