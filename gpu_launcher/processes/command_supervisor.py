"""The supervisor of the command that `gpu-launcher run` executes. See `command_front`."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence

from gpu_launcher.processes.command_channel import Word, receive, send, use_devnull
from gpu_launcher.processes.forking import fork_child
from gpu_launcher.processes.linux import become_child_subreaper, descendants, die_with_parent
from gpu_launcher.processes.signals import HARMLESS, STOPS, CommandSignals, SignalDescriptor
from gpu_launcher.processes.tree import ProcessTree

_ENDS_IT_ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class CommandSupervisor:
    """The command's parent, a subreaper. It ends what the command leaves behind."""

    def __init__(self, channel: socket.socket, front: int, timeout: float | None, grace: float) -> None:
        """See `command_front.run_command`. `front` is the process id of the program that stands in for the command."""
        self._channel = channel
        self._front = front
        self._timeout = timeout
        self._grace = grace
        self._end_at: float | None = None
        self._kill_at: float | None = None
        self._told_stops: tuple[int, int | None] = (0, None)
        """`stops` and `stopped` of the command's tree when the front was last told of them."""

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        signals: CommandSignals,
        lease: int | None,
    ) -> None:
        """Run the command, wait until it and everything that it started are gone, and report its status."""
        events = SignalDescriptor({signal.SIGCHLD})
        become_child_subreaper()
        here = os.getpid()
        problem, problem_write = os.pipe()
        # Signals for the whole job that arrived after this process was forked but before the command was.
        missed = signal.sigpending() - HARMLESS - STOPS
        try:
            main = fork_child(lambda: _become(command, environment, signals, lease, here, problem_write))
        except OSError as error:
            send(self._channel, Word.FAILED, error.errno or errno.EAGAIN)
            return
        os.setsid()
        os.close(problem_write)
        failed = os.read(problem, 4)
        os.close(problem)
        if failed:
            os.waitpid(main, 0)
            send(self._channel, Word.FAILED, int.from_bytes(failed, "big"))
            return
        use_devnull(0, 1)
        for signum in missed:
            os.kill(main, signum)
        send(self._channel, Word.STARTED, main)
        self._end_at = None if self._timeout is None else time.monotonic() + self._timeout
        tree = ProcessTree(main, events, note_stops=True)
        self._see_to_its_end(tree, events)
        assert tree.status is not None, "no children, so the command was reaped"
        self._let_front_go_on()
        send(self._channel, Word.GONE, tree.status)

    def _see_to_its_end(self, tree: ProcessTree, events: SignalDescriptor) -> None:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(events, select.POLLIN)
        while not self._is_gone(tree):
            ready = {descriptor for descriptor, _ in poll.poll(self._until_deadline(tree))}
            events.read()
            if self._channel.fileno() in ready:
                message = receive(self._channel)
                if message is None:
                    tree.kill()
                else:
                    self._pass_on(tree, message[1])

    def _is_gone(self, tree: ProcessTree) -> bool:
        # After a timeout every process gets the whole grace period, even if the main process ends first.
        gone = tree.is_gone() if self._kill_at is None else not tree.reap()
        self._tell_of_stops(tree)
        if gone:
            return True
        now = time.monotonic()
        if self._kill_at is not None and now >= self._kill_at:
            send(self._channel, Word.KILLED, round(self._grace))
            tree.kill()
            return True
        if self._end_at is not None and now >= self._end_at and tree.status is None:
            self._end_at = None
            self._kill_at = now + self._grace
            self._let_front_go_on()
            send(self._channel, Word.TIME_OVER)
            for pid in descendants():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGTERM)
                    os.kill(pid, signal.SIGCONT)
        return False

    def _tell_of_stops(self, tree: ProcessTree) -> None:
        # Since the last message the command can have continued and stopped again. The front has then only continued.
        if (tree.stops, tree.stopped) == self._told_stops:
            return
        self._told_stops = (tree.stops, tree.stopped)
        if tree.stopped is not None:
            send(self._channel, Word.STOPPED, tree.stopped)
        else:
            send(self._channel, Word.CONTINUED)
            self._let_front_go_on()

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
        elif signum in _ENDS_IT_ALL:  # the user does not want to wait for the remaining processes
            tree.kill()

    def _let_front_go_on(self) -> None:
        """Send SIGCONT to the front, which stopped itself because the command was stopped."""
        if os.getppid() == self._front:
            os.kill(self._front, signal.SIGCONT)


def _become(
    command: Sequence[str],
    environment: Mapping[str, str],
    signals: CommandSignals,
    lease: int | None,
    supervisor: int,
    problem: int,
) -> None:
    """Execute the command. If that fails, write the error number to `problem`."""
    die_with_parent(supervisor)
    if lease is not None:
        os.set_inheritable(lease, True)
    signals.hand_over()
    try:
        os.execvpe(command[0], list(command), dict(environment))
    except OSError as error:
        os.write(problem, (error.errno or errno.EACCES).to_bytes(4, "big"))
