"""Runs a command in place of this program, with its terminal and signals, and ends everything that it started.

    this program          in the shell's job: stands in for the command, passes signals on, ends as the command did
    ├── witness           in the shell's job: knows which signals were sent to the whole job
    └── supervisor        in its own session, so that a signal for the shell's job does not reach it
        └── the command   in the shell's job, as if the shell had started it

Supervisor and command hold the lease. Who watches whom:

- the kernel sends SIGKILL to the command when its supervisor ends;
- the supervisor, a subreaper, ends what the command leaves behind, and kills everything when this program ends;
- this program, also a subreaper, kills what a dead supervisor leaves behind;
- the witness gets SIGKILL when this program ends. Without a witness, signals for the whole job reach the command twice.

Not promised: if this program *and* the supervisor are killed at the same instant, processes that the command started
survive. They keep the devices if they inherited the lease's descriptor: forked processes do, children of Python's Popen
do not.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.errors import CommandError
from gpu_launcher.processes.command_channel import Word, channel, receive, send, use_devnull
from gpu_launcher.processes.command_supervisor import CommandSupervisor
from gpu_launcher.processes.command_witness import Witness
from gpu_launcher.processes.forking import fork_child
from gpu_launcher.processes.guard import end_descendants
from gpu_launcher.processes.linux import become_child_subreaper, children, may_be_stopped
from gpu_launcher.processes.signals import HARMLESS, STOPS, CommandSignals, ReceivedSignal

NOT_FOUND = 127
NOT_EXECUTABLE = 126


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The outcome of a command."""

    status: int | None
    """Status of the command as `os.waitpid` returns it; None if its supervisor was killed, which kills the command."""
    timed_out: bool = False


def fill_standard_descriptors() -> None:
    """Open /dev/null as stdin, stdout and stderr if they are closed, so that no other file gets their numbers.

    They are closed again in the command. Call this before this program opens anything.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, and is closed by exec


def check_command(name: str, path: str) -> None:
    """Raise CommandError if there is no executable program `name`. `path` is searched for it, like $PATH."""
    if not name:
        raise CommandError("''", "the command has no name", NOT_FOUND)
    if shutil.which(name, path=path) is not None:
        return
    places = [name] if "/" in name else [str(Path(part or ".") / name) for part in path.split(os.pathsep)]
    for place in places:
        if Path(place).is_dir():
            if "/" in name:
                raise CommandError(name, "is a directory, not a program", NOT_EXECUTABLE)
        elif Path(place).exists():
            problem = f"cannot be executed: it needs the permission (chmod +x {place}), or its interpreter before it"
            raise CommandError(name, problem, NOT_EXECUTABLE)
    if "/" in name:
        raise CommandError(name, "there is no such file", NOT_FOUND)
    raise CommandError(name, "no such program is found in $PATH", NOT_FOUND)


def run_command(
    command: Sequence[str],
    environment: Mapping[str, str],
    signals: CommandSignals,
    *,
    lease: int | None,
    timeout: float | None,
    grace: float,
    tell: Callable[[str], None],
    in_children: Callable[[], None] = lambda: None,
) -> CommandResult:
    """Run `command` and wait until it and everything that it started are gone.

    `lease` is a descriptor that the process tree gets. After `timeout` seconds everything gets SIGTERM, and `grace`
    seconds later SIGKILL; `tell` tells the user about this. `in_children` closes what forked processes must not keep
    open. This process must be single-threaded; it gives up its stdin and stdout. Raises CommandError.
    """
    before = frozenset(children())
    become_child_subreaper()
    here = os.getpid()
    ours, theirs = channel()

    def close_in_witness() -> None:
        ours.close()
        theirs.close()
        if lease is not None:
            os.close(lease)
        in_children()

    witness = Witness(signals, close_in_witness)
    for arrived in signals.read():  # signals that arrived before the command could start
        if arrived.signum not in HARMLESS | STOPS:
            witness.close()
            raise InterruptedBySignal(arrived.signum)

    def be_the_supervisor() -> None:
        ours.close()
        witness.close_in_child()
        in_children()
        CommandSupervisor(theirs, here, timeout, grace).run(command, environment, signals, lease)

    supervisor = fork_child(be_the_supervisor)
    theirs.close()
    try:
        return _Front(ours, supervisor, signals, witness, tell).wait(command[0])
    finally:
        witness.close()
        ours.close()
        os.waitpid(supervisor, 0)
        end_descendants(0.0, spare=before)  # there are some if the supervisor was killed


class InterruptedBySignal(Exception):
    """Raised when a signal ends this program before the command runs."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _Front:
    """Stands in for the command while it runs."""

    def __init__(
        self,
        channel: socket.socket,
        supervisor: int,
        signals: CommandSignals,
        witness: Witness,
        tell: Callable[[str], None],
    ) -> None:
        self._channel = channel
        self._supervisor = supervisor
        self._signals = signals
        self._witness = witness
        self._tell = tell
        self._command: int | None = None
        """Process id of the command; None until it runs."""
        self._suspended: int | None = None
        """Signal that stopped the command and must stop this program too; None if there is none."""
        self._timed_out = False

    def wait(self, name: str) -> CommandResult:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._signals.fileno(), select.POLLIN)
        while True:
            # Read all messages and signals before stopping: the command may already have continued.
            ready = {descriptor for descriptor, _ in poll.poll(None if self._suspended is None else 0)}
            if self._channel.fileno() in ready:
                message = receive(self._channel)
                if message is None:
                    return CommandResult(None, self._timed_out)
                if message[0] == Word.FAILED:
                    raise _why_not(name, message[1])
                if message[0] == Word.GONE:
                    return CommandResult(message[1], self._timed_out)
                self._take_note(*message)
            elif self._signals.fileno() in ready:
                for arrived in self._signals.read():
                    if self._is_to_be_passed_on(arrived):
                        self._pass_on(arrived.signum)
            elif self._suspended is not None:
                self._suspend(self._suspended)

    def _pass_on(self, signum: int) -> None:
        if signum == signal.SIGCONT:
            self._suspended = None
        send(self._channel, Word.PASS_ON, signum)

    def _suspend(self, signum: int) -> None:
        # Ctrl-Z right after fg stops this program at once, because `suspend` has not returned yet. The next fg then
        # continues both, but the news that the command was stopped is still to be read. If this program stopped again,
        # the shell would take back the terminal.
        continued = self._command is not None and not may_be_stopped(self._command)
        if continued or self._signals.suspend(signum, unless=self._channel):
            self._suspended = None

    def _take_note(self, kind: Word, number: int) -> None:
        if kind == Word.STARTED:
            self._command = number
            use_devnull(0, 1)
        elif kind == Word.STOPPED:
            self._suspended = number
        elif kind == Word.CONTINUED:
            self._suspended = None
        elif kind == Word.TIME_OVER:
            self._timed_out = True
            self._tell("the command's time is over: it gets SIGTERM")
        elif kind == Word.KILLED:
            self._tell(f"the command did not end within {number} s of SIGTERM: it is killed")

    def _is_to_be_passed_on(self, arrived: ReceivedSignal) -> bool:
        """Whether the command must be sent this signal, because it has not received the signal itself."""
        if arrived.signum == signal.SIGCHLD or arrived.sender == self._supervisor:
            return False
        if not self._shares_our_group():
            return True
        if arrived.by_kernel:  # the whole group has it, and a signal to this program alone may follow
            self._witness.forget(arrived.signum)
            return False
        return not self._witness.saw(arrived.signum)

    def _shares_our_group(self) -> bool:
        try:
            return self._command is None or os.getpgid(self._command) == os.getpgrp()
        except ProcessLookupError:
            return True


def _why_not(name: str, error: int) -> CommandError:
    if error == errno.ENOENT:
        if shutil.which(name) is not None:
            return CommandError(name, "the interpreter that its first line names is not there", NOT_EXECUTABLE)
        return CommandError(name, "there is no such program any more", NOT_FOUND)
    if error == errno.ENOEXEC:
        return CommandError(name, "is not a program: if it is a script, name its interpreter before it", NOT_EXECUTABLE)
    return CommandError(name, f"cannot be run: {os.strerror(error)}", NOT_EXECUTABLE)
