"""The connections of a group to its nodes: what is readable, and the commands of nodes on other machines.

The commands of nodes die with the thread that starts them. The thread that uses a group may end before the group, so
one of our own starts them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
from collections.abc import Callable
from concurrent.futures import Future

from gpu_launcher.jobs.node_client import harmless_thread
from gpu_launcher.nodes.member import Member
from gpu_launcher.nodes.remote_node import RemoteNode
from gpu_launcher.nodes.signs_of_life import join_unless_current


class _StarterThread:
    """A thread that lasts until it is closed. What it starts is not ended with the thread that asked for it."""

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="gpu-launcher-nodes-start")
        self._thread.start()

    def _run(self) -> None:
        with harmless_thread():
            while (wanted := self._wanted.get()) is not None:
                wanted()

    def call(self, function: Callable[[], RemoteNode]) -> RemoteNode:
        """Return what `function` returns in the thread, or raise what it raises."""
        made: Future[RemoteNode] = Future()

        def wanted() -> None:
            try:
                made.set_result(function())
            except BaseException as error:  # it is raised in the other thread
                made.set_exception(error)

        self._wanted.put(wanted)
        return made.result()

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._wanted.put(None)
        join_unless_current(self._thread)


class NodeConnections:
    """See the module. Its `fileno` is readable when a node has said something, or after `wake`."""

    def __init__(self) -> None:
        """Begin without connections."""
        self._epoll = select.epoll()
        self._awake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._awake, select.EPOLLIN)
        self._registered: dict[str, int] = {}
        self._replaced: list[RemoteNode] = []
        """Connections to lost nodes, whose commands may still run."""
        self._starter: _StarterThread | None = None

    def fileno(self) -> int:
        """Return a descriptor for `select`."""
        return self._epoll.fileno()

    def start(self, function: Callable[[], RemoteNode]) -> RemoteNode:
        """Return a node on another machine, which `function` starts. Raises what it raises."""
        if self._starter is None:
            self._starter = _StarterThread()
        return self._starter.call(function)

    def restart(self, member: Member) -> None:
        """Replace the node of a member by a new one. Raises OSError."""
        assert member.remote is not None
        self._replaced.append(member.remote)
        member.node = self.start(member.remote.again)
        self.listen_to(member)

    def listen_to(self, member: Member) -> None:
        """Watch for what a node says."""
        self._epoll.register(member.node, select.EPOLLIN)
        self._registered[member.name] = member.node.fileno()

    def forget(self, member: Member) -> bool:
        """Do not listen to a lost node any more. Returns whether it was listened to."""
        descriptor = self._registered.pop(member.name, None)
        if descriptor is None:
            return False
        with contextlib.suppress(OSError):  # closed, and so removed
            self._epoll.unregister(descriptor)
        return True

    def wait(self, seconds: float) -> set[str]:
        """Wait until a node has said something, or for `seconds`. Returns the names of those that have."""
        ready = {descriptor for descriptor, _ in self._epoll.poll(seconds)}
        if self._awake in ready:
            os.eventfd_read(self._awake)
        return {name for name, descriptor in self._registered.items() if descriptor in ready}

    def wake(self) -> None:
        """Make `fileno` readable."""
        os.eventfd_write(self._awake, 1)

    def end_replaced(self) -> None:
        """Let the commands of lost nodes end. Never waits."""
        for node in list(self._replaced):
            node.tick()
            if node.command_ended:
                node.close()
                self._replaced.remove(node)

    @property
    def replaced(self) -> tuple[RemoteNode, ...]:
        """Connections to lost nodes, whose commands may still run."""
        return tuple(self._replaced)

    def close(self) -> None:
        """End what this has of its own. The nodes were closed. Idempotent."""
        if self._starter is not None:
            self._starter.close()
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._awake)
