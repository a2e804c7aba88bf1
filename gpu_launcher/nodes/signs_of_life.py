"""Signs that a head is there, for its agents and for another launch of the sweep. A thread for each.

Agents end if they hear nothing, so a thread sends them signs of life while the head may be busy. Another thread renews
the time of a file in the sweep's directory, by which another launch sees that agents of this one may still run. It may
wait for the file system, and the signs of life must not.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from gpu_launcher.jobs.directory import sign_of_nodes
from gpu_launcher.jobs.node_client import harmless_thread
from gpu_launcher.nodes.member import Member
from gpu_launcher.safe_files import make_directories, write_whole


class SignsOfLife:
    """See the module."""

    def __init__(self, directory: Path | None, members: Mapping[str, Member]) -> None:
        """Write the file into the sweep's `directory`, if there is one. Raises OSError."""
        self.probe: tuple[str, bytes] | None = None
        """The path of the file, and its content, by which a node knows that it sees the directory."""
        self._members = members
        self.file = None if directory is None else sign_of_nodes(directory)
        """The file in the sweep's directory."""
        if self.file is not None:
            content = uuid.uuid4().hex.encode()
            make_directories(self.file.parent)
            write_whole(self.file, content)
            self.probe = str(self.file.absolute()), content
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, seconds: float) -> None:
        """Begin to give a sign every few `seconds`."""
        for main in (self._beat,) if self.file is None else (self._beat, self._touch):
            name = f"gpu-launcher-nodes-{main.__name__.strip('_')}"
            thread = threading.Thread(target=self._repeat, args=(main, seconds), daemon=True, name=name)
            thread.start()
            self._threads.append(thread)

    def _repeat(self, main: Callable[[], None], seconds: float) -> None:
        with harmless_thread():
            while not self._over.wait(seconds):
                main()

    def _beat(self) -> None:
        """Send signs of life to the agents. Never waits for anything else."""
        for member in self._members.values():
            if member.remote is not None:
                member.remote.beat()

    def _touch(self) -> None:
        """Renew the time of the file. May wait for a file server."""
        assert self.file is not None
        with contextlib.suppress(OSError):
            os.utime(self.file)

    def stop(self) -> None:
        """Give no more signs. Idempotent."""
        self._over.set()

    def close(self, *, nothing_left: bool) -> None:
        """Wait for the threads, and remove the file if `nothing_left` of the nodes can run. Idempotent."""
        self.stop()
        for thread in self._threads:
            join_unless_current(thread)
        if self.file is not None and nothing_left:
            self.file.unlink(missing_ok=True)


def join_unless_current(thread: threading.Thread) -> None:
    """Wait for a thread of a group. A forgotten group may be closed in one of them, by the garbage collector."""
    if thread is not threading.current_thread():
        thread.join()
