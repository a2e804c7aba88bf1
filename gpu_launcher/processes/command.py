"""Running a command in the place of this program, with its terminal and signals, and ending all that it started.

    this program          in the shell's job: stands for the command, passes signals on, ends as the command did
    ├── witness           in the shell's job, too: says which signals were sent to the whole job
    └── supervisor        a session of its own, so that a signal for the shell's job does not reach it
        └── the command   in the shell's job, as if the shell had started it

Supervisor and command have the lease. Who watches whom:

- the command gets SIGKILL from the kernel when its supervisor ends;
- the supervisor, a subreaper, ends what the command leaves, and kills all when this program ends;
- this program, a subreaper as well, kills what a dead supervisor leaves;
- the witness gets SIGKILL when this program ends. Without it, signals for the whole job reach the command twice.

Not promised: if this program *and* the supervisor are killed at the same instant, what the command started lives on.
It keeps the devices if it inherited the lease's descriptor, as forked processes do and those of Python's Popen do not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gpu_launcher.errors import GpuLauncherError
from gpu_launcher.processes.guard import end_descendants
from gpu_launcher.processes.linux import become_child_subreaper, children, descendants, die_with_parent
from gpu_launcher.processes.signals import HARMLESS, STOPS, Arrived, CommandSignals, SignalDescriptor
from gpu_launcher.processes.tree import ProcessTree

NOT_FOUND = 127
NOT_EXECUTABLE = 126
TOGETHER = 0.3
"""Seconds after a signal for the whole job in which another one of its kind for this program alone means the same:
timeout(1), for one, sends both."""
WITNESS = 0.05
"""Seconds that the witness may take to say that it got a signal, too."""

_MESSAGE = struct.Struct("=ci")
# What this program says: pass on a signal.
_PASS_ON = b"p"
# What the supervisor says: the command runs (process id), could not be run (error number), was stopped (signal), goes
# on, is being ended because its time is over, is killed, is gone with all that it started (status).
_STARTED, _FAILED, _STOPPED, _CONTINUED, _TIME_OVER, _KILLED, _GONE = (bytes([byte]) for byte in b"sfzctkg")

_ENDS_IT_ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class CommandError(GpuLauncherError):
    """A command that cannot be run. `code` is what a shell would exit with: NOT_FOUND or NOT_EXECUTABLE."""

    def __init__(self, command: str, problem: str, code: int) -> None:
        super().__init__(command, problem, code)
        self.command = command
        self.problem = problem
        self.code = code

    def __str__(self) -> str:
        return f"{self.command}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a command."""

    status: int | None
    """As `os.waitpid` gives it; None if its supervisor was killed, and so the command was, too."""
    timed_out: bool = False


def fill_standard_descriptors() -> None:
    """Let nothing else take the place of stdin, stdout and stderr where they are closed, which they are in the command.

    To be called before this program opens anything.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest, and is closed by exec


def check_command(name: str, path: str) -> None:
    """Raise CommandError if there is no program `name`, for which `path` (as $PATH) is searched."""
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
) -> Ended:
    """Run `command` until it and everything that it started is gone.

    `lease` is a descriptor that its process tree gets. After `timeout` seconds everything gets SIGTERM, and `grace`
    seconds later SIGKILL, of which the user is told by `tell`. `in_children` closes what forked processes must not
    keep. This process must be single-threaded; its stdin and stdout are given up. Raises CommandError.
    """
    before = frozenset(children())
    become_child_subreaper()
    here = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    witness = _Witness(signals, _calls(ours.close, theirs.close, *_closing(lease), in_children))
    for arrived in signals.read():  # since somebody looked last
        if arrived.signum not in HARMLESS | STOPS:
            witness.close()
            raise InterruptedBySignal(arrived.signum)
    supervisor = os.fork()
    if supervisor == 0:
        try:
            ours.close()
            witness.close_in_child()
            in_children()
            _Supervisor(theirs, here, timeout, grace).run(command, environment, signals, lease)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    theirs.close()
    try:
        return _Front(ours, supervisor, signals, witness, tell).wait(command[0])
    finally:
        witness.close()
        ours.close()
        os.waitpid(supervisor, 0)
        end_descendants(0.0, spare=before)  # none, unless the supervisor was killed


class InterruptedBySignal(Exception):
    """A signal arrived that ends this program before the command runs."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def _calls(*functions: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        for function in functions:
            function()

    return call


def _closing(descriptor: int | None) -> list[Callable[[], None]]:
    return [] if descriptor is None else [lambda: os.close(descriptor)]


def _send(channel: socket.socket, kind: bytes, number: int = 0) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever is gone is noticed when it is read from
        channel.send(_MESSAGE.pack(kind, number))


def _receive(channel: socket.socket) -> tuple[bytes, int] | None:
    """None when the other end is closed."""
    try:
        content = channel.recv(_MESSAGE.size)
    except ConnectionResetError:
        return None
    return _MESSAGE.unpack(content) if content else None


class _Witness:
    """A process that does nothing but be in the same process group, and tell of signals that it gets."""

    def __init__(self, signals: CommandSignals, in_child: Callable[[], None]) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._seen: dict[int, float] = {}
        here = os.getpid()
        self._process: int | None = os.fork()
        if self._process == 0:
            try:
                self._ours.close()
                in_child()
                die_with_parent(here)
                _use_devnull(0, 1, 2)
                descriptor = SignalDescriptor(signals.heeded)
                while True:
                    select.select([descriptor], [], [])
                    for arrived in descriptor.read():
                        _send(theirs, _PASS_ON, arrived.signum)
            finally:
                os._exit(1)
        theirs.close()
        self._ours.setblocking(False)

    def saw(self, signum: int) -> bool:
        """Whether the whole process group got such a signal just now."""
        end = time.monotonic() + WITNESS
        while True:
            self._listen()
            now = time.monotonic()
            if now - self._seen.get(signum, -TOGETHER) < TOGETHER:
                return True
            if self._process is None or now >= end:
                return False
            select.select([self._ours], [], [], end - now)

    def _listen(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._process is not None:
                message = _receive(self._ours)
                if message is None:
                    os.waitpid(self._process, 0)
                    self._process = None
                    return
                self._seen[message[1]] = time.monotonic()

    def close(self) -> None:
        if self._process is not None:
            os.kill(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
            self._process = None
        self._ours.close()

    def close_in_child(self) -> None:
        self._ours.close()


def _use_devnull(*descriptors: int) -> None:
    """Stop using what the command uses: the other end of a pipe should notice when the command closes its own."""
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(devnull, descriptor)
    if devnull not in descriptors:
        os.close(devnull)


class _Front:
    """What this program does while the command runs."""

    def __init__(
        self,
        channel: socket.socket,
        supervisor: int,
        signals: CommandSignals,
        witness: _Witness,
        tell: Callable[[str], None],
    ) -> None:
        self._channel = channel
        self._supervisor = supervisor
        self._signals = signals
        self._witness = witness
        self._tell = tell
        self._command: int | None = None
        """Its process id, once it runs."""
        self._suspended: int | None = None
        """The signal that stopped the command, if this program is to be stopped, too."""
        self._timed_out = False

    def wait(self, name: str) -> Ended:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._signals.fileno(), select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            while self._channel.fileno() in ready:
                message = _receive(self._channel)
                if message is None:
                    return Ended(None, self._timed_out)
                if message[0] == _FAILED:
                    raise _why_not(name, message[1])
                if message[0] == _GONE:
                    return Ended(message[1], self._timed_out)
                self._take_note(*message)
                # What the command did since counts: it may go on already.
                ready = {descriptor for descriptor, _ in poll.poll(0)}
            if self._signals.fileno() in ready:
                for arrived in self._signals.read():
                    if self._is_to_be_passed_on(arrived):
                        _send(self._channel, _PASS_ON, arrived.signum)
            if self._suspended is not None:
                signum, self._suspended = self._suspended, None
                self._signals.suspend(signum)

    def _take_note(self, kind: bytes, number: int) -> None:
        if kind == _STARTED:
            self._command = number
            _use_devnull(0, 1)
        elif kind == _STOPPED:
            self._suspended = number
        elif kind == _CONTINUED:
            self._suspended = None
        elif kind == _TIME_OVER:
            self._timed_out = True
            self._tell("the command's time is over: it gets SIGTERM")
        elif kind == _KILLED:
            self._tell(f"the command did not end within {number} s of SIGTERM: it is killed")

    def _is_to_be_passed_on(self, arrived: Arrived) -> bool:
        """Whether the command did not get it, too."""
        if arrived.signum == signal.SIGCHLD or arrived.sender == self._supervisor:
            return False
        if not self._shares_our_group():
            return True
        return not arrived.by_kernel and not self._witness.saw(arrived.signum)

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


class _Supervisor:
    """The command's parent."""

    def __init__(self, channel: socket.socket, front: int, timeout: float | None, grace: float) -> None:
        self._channel = channel
        self._front = front
        self._timeout = timeout
        self._grace = grace
        self._end_at: float | None = None
        self._kill_at: float | None = None
        self._told_stopped: int | None = None

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        signals: CommandSignals,
        lease: int | None,
    ) -> NoReturn:
        events = SignalDescriptor({signal.SIGCHLD})
        become_child_subreaper()
        here = os.getpid()
        problem, problem_write = os.pipe()
        # What was sent to the whole job since this process has been in it, and before the command is.
        missed = signal.sigpending() - HARMLESS - STOPS
        try:
            main = os.fork()
        except OSError as error:
            _send(self._channel, _FAILED, error.errno or errno.EAGAIN)
            os._exit(1)
        if main == 0:
            _become(command, environment, signals, lease, here, problem_write)
        os.setsid()
        os.close(problem_write)
        failed = os.read(problem, 4)
        os.close(problem)
        if failed:
            os.waitpid(main, 0)
            _send(self._channel, _FAILED, int.from_bytes(failed, "big"))
            os._exit(1)
        _use_devnull(0, 1)
        for signum in missed:
            os.kill(main, signum)
        _send(self._channel, _STARTED, main)
        self._end_at = None if self._timeout is None else time.monotonic() + self._timeout
        tree = ProcessTree(main, _pauses(events), note_stops=True)
        self._see_to_its_end(tree, events)
        assert tree.status is not None, "no children, so the command was reaped"
        self._let_front_go_on()
        _send(self._channel, _GONE, tree.status)
        os._exit(0)

    def _see_to_its_end(self, tree: ProcessTree, events: SignalDescriptor) -> None:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(events, select.POLLIN)
        while not self._is_gone(tree):
            ready = {descriptor for descriptor, _ in poll.poll(self._until_deadline(tree))}
            events.read()
            if self._channel.fileno() in ready:
                message = _receive(self._channel)
                if message is None:
                    tree.kill()
                else:
                    self._pass_on(tree, message[1])

    def _is_gone(self, tree: ProcessTree) -> bool:
        # What timed out has all of its grace, whatever part of it ends first.
        gone = tree.is_gone() if self._kill_at is None else not tree.reap()
        if tree.stopped != self._told_stopped:
            self._told_stopped = tree.stopped
            if tree.stopped is not None:
                _send(self._channel, _STOPPED, tree.stopped)
            else:
                _send(self._channel, _CONTINUED)
                self._let_front_go_on()
        if gone:
            return True
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            _send(self._channel, _KILLED, round(self._grace))
            tree.kill()
            return True
        if self._end_at is not None and now >= self._end_at and tree.status is None:
            self._end_at = None
            self._kill_at = now + self._grace
            self._let_front_go_on()
            _send(self._channel, _TIME_OVER)
            for pid in descendants():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGTERM)
                    os.kill(pid, signal.SIGCONT)
        return False

    def _until_deadline(self, tree: ProcessTree) -> float | None:
        own = [at for at in (self._end_at, self._kill_at) if at is not None]
        waits = [max(0.0, at - time.monotonic()) * 1000 + 1 for at in own]
        if self._kill_at is None and (leftovers := tree.until_deadline()) is not None:
            waits = [leftovers]
        # poll(2) counts milliseconds in 32 bits.
        return min((*waits, 2.0**30), default=None)

    def _pass_on(self, tree: ProcessTree, signum: int) -> None:
        if tree.status is None:
            os.kill(tree.main, signum)
        elif signum in _ENDS_IT_ALL:  # the user does not want to wait for what is left
            tree.kill()

    def _let_front_go_on(self) -> None:
        """It was stopped because the command was."""
        if os.getppid() == self._front:
            os.kill(self._front, signal.SIGCONT)


def _pauses(events: SignalDescriptor) -> Callable[[], None]:
    def pause() -> None:
        select.select([events], [], [], 0.1)
        events.read()

    return pause


def _become(
    command: Sequence[str],
    environment: Mapping[str, str],
    signals: CommandSignals,
    lease: int | None,
    supervisor: int,
    problem: int,
) -> NoReturn:
    try:
        die_with_parent(supervisor)
        if lease is not None:
            os.set_inheritable(lease, True)
        signals.hand_over()
        os.execvpe(command[0], list(command), dict(environment))
    except OSError as error:
        os.write(problem, (error.errno or errno.EACCES).to_bytes(4, "big"))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(NOT_FOUND)
