"""The directory of a sweep or map: the lock that keeps other launches out, and the jobs' log files.

A launch holds the `flock` of `.gpu_launcher/lock` as long as any of its processes lives: the head opens the file, and
the node and the processes below it inherit the descriptor. The kernel releases the lock when the last of them has
ended, for whatever reason. The file names the program that has the lock, so that other programs can say who it is.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.failures import set_aside
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.launches import DIRECTORY, refuse_if_running
from gpu_launcher.jobs.manifest import Entry, State
from gpu_launcher.json_data import Fields, load_object
from gpu_launcher.processes.messages import JobPrepared
from gpu_launcher.safe_files import make_directories, open_regular
from gpu_launcher.text import one_line
from gpu_launcher.wording import count

LOCK = "lock"
WAIT_SECONDS = 15.0
"""Seconds to wait for the processes of a killed launch to end."""
NODES = "nodes-"
"""Beginning of the names of files that launches with nodes on other machines touch."""
NODES_END_SECONDS = 40.0
"""Seconds after which all nodes of a head that was killed have ended. See `nodes.agent_messages.Timing`."""

_held: weakref.WeakValueDictionary[tuple[int, int, int], DirectoryLock] = weakref.WeakValueDictionary()
"""Locks that this process holds, by process id, device and inode. A second `flock` in one process would fail."""


class DirectoryLock:
    """The right to run jobs in a directory. It ends with `close`, or when nothing refers to the object any more.

    On a file system without locks it does not exclude other launches. There, `refuse_if_running` is the only
    protection.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        """The lock's descriptor, for processes of the launch that are not forks of this one."""
        self.close = weakref.finalize(self, _release, descriptor, os.getpid())
        """Closes this process's descriptor. The lock is released when the launch's other processes have ended too."""

    @classmethod
    def take(
        cls,
        directory: Path,
        command: str,
        remedy: str,
        notice: Callable[[str], None] = lambda text: None,
        *,
        exclusive: bool = False,
    ) -> DirectoryLock:
        """Take the lock of `directory`, which is created if it does not exist. Waits for processes of a killed launch.

        Call this before the node is started, because its processes must hold the lock too. `command` is the name that
        other programs show for this one if they find the directory locked. `remedy` says what to do if another program
        has it. If this process already has the lock, the same object is returned, unless the lock is to be `exclusive`.
        Raises ManifestError if another program runs jobs here (or this one, if `exclusive`), or if the processes of a
        killed launch do not end, and OSError if nothing can be written.
        """
        path = directory / DIRECTORY / LOCK
        make_directories(path.parent)
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        try:
            status = os.fstat(descriptor)
            key = (os.getpid(), status.st_dev, status.st_ino)
            if (held := _held.get(key)) is not None and held.close.alive:
                if exclusive:
                    raise ManifestError(f"{directory} is being run by process {key[0]} ({command}): {remedy}")
                os.close(descriptor)
                return held
            refuse_if_running(directory, remedy)
            _wait_for(descriptor, directory, remedy, notice)
            refuse_if_running(directory, remedy)
            _sign(descriptor, command)
            _wait_for_other_machines(descriptor, directory, notice)
        except BaseException:
            os.close(descriptor)
            raise
        lock = _held[key] = cls(descriptor)
        return lock


def _wait_for(descriptor: int, directory: Path, remedy: str, notice: Callable[[str], None]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    told = False
    while not _lock(descriptor):
        refuse_if_running(directory, remedy)
        _refuse_holder(descriptor, directory, remedy)
        if time.monotonic() > deadline:
            lock = directory / DIRECTORY / LOCK
            problem = f"processes of an earlier launch in {directory} do not end"
            raise ManifestError(f"{problem}: `fuser {lock}` lists those that have its lock")
        if not told:
            notice(f"waiting for the processes of an earlier launch in {directory} to end")
            told = True
        time.sleep(0.05)


def refuse_if_locked(directory: Path, remedy: str) -> None:
    """Raise ManifestError if another program has the directory, even if it has not begun to run jobs there."""
    with suppress(OSError), open(open_regular(directory / DIRECTORY / LOCK), "rb") as file:
        _refuse_holder(file.fileno(), directory, remedy)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


@dataclass(frozen=True, slots=True)
class Holder:
    """The program that has taken a directory, and has not released it."""

    pid: int
    command: str
    host: str
    is_alive: bool | None
    """Whether it is alive. None if that cannot be known from here."""


def holder_of(directory: Path) -> Holder | None:
    """Return the program that has taken the directory. None if it was released, or was never taken."""
    with suppress(OSError), open(open_regular(directory / DIRECTORY / LOCK), "rb") as file:
        return _holder(file.fileno())
    return None


def _holder(descriptor: int) -> Holder | None:
    """Return the program that the lock file names. A program that releases the lock empties the file."""
    try:
        content = load_object(os.pread(descriptor, 64 * 1024, 0))
        holder, command = ProcessIdentity.from_json(content), one_line(Fields(content).text("command"))
    except ValueError:
        return None  # the lock was taken a moment ago, or is being released
    return Holder(holder.pid, command, holder.host, holder.is_alive(os.fstat(descriptor).st_uid))


def _refuse_holder(descriptor: int, directory: Path, remedy: str) -> None:
    """Raise ManifestError if the program that the lock file names may be alive."""
    holder = _holder(descriptor)
    if holder is None or holder.is_alive is False:
        return  # it has ended; remaining processes of its launch hold the lock
    where = "" if holder.is_alive else f" on {holder.host}"
    raise ManifestError(f"{directory} is being run by process {holder.pid} ({holder.command}){where}: {remedy}")


def _sign(descriptor: int, command: str) -> None:
    content = json.dumps({**ProcessIdentity.here().to_json(), "command": command}).encode()
    with suppress(OSError):  # a full disk: the lock still works, but other programs cannot say who has it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)


def sign_of_nodes(directory: Path) -> Path:
    """Return a new name for the file that a launch with nodes on other machines keeps touching while it lives."""
    return directory / DIRECTORY / f"{NODES}{uuid.uuid4().hex[:12]}"


def _wait_for_other_machines(descriptor: int, directory: Path, notice: Callable[[str], None]) -> None:
    """Wait until nodes of a killed launch must have ended. They cannot hold the lock, and end when they hear nothing.

    The file system's times are compared, because the clocks of machines differ: the lock was written a moment ago. A
    sign of another user, or with a time in the future, counts as fresh: it costs one wait, however many there are.
    """
    signs = list((directory / DIRECTORY).glob(f"{NODES}{'[0-9a-f]' * 12}"))
    age = math.inf
    for sign in signs:
        with suppress(OSError):
            age = min(age, os.fstat(descriptor).st_mtime - sign.lstat().st_mtime)
    left = min(NODES_END_SECONDS, NODES_END_SECONDS - age)
    if left > 0:
        notice(f"waiting {left:.0f} s for the nodes of an earlier launch in {directory} to end")
        time.sleep(left)
    for sign in signs:
        with suppress(OSError):
            sign.unlink()


def _release(descriptor: int, process: int) -> None:
    if os.getpid() == process:  # not in a fork
        with suppress(OSError):
            os.ftruncate(descriptor, 0)  # this program may continue without the directory
        os.close(descriptor)


class LogFiles:
    """Chooses the log file of each job of a sweep, and notices directories that are used twice.

    If another job has the log that a job proposes, the job gets `<number>.<name>` beside it. A log from an earlier
    launch is renamed and kept. One object serves all launches of a launcher.
    """

    def __init__(self, directory: Path, earlier: Mapping[int, Entry], *, shared: str, used: str | None) -> None:
        """Choose logs in `directory`. `earlier` are the jobs that its manifest already has.

        `shared` tells the user what to do about jobs that share an output directory. `used` tells the user what to do
        about an earlier sweep whose files are overwritten; None if the user asked for that.
        """
        self._directory = directory
        self._earlier = earlier
        self._shared: str | None = shared
        self._used = used
        self._owners: dict[tuple[object, ...], int] = {}
        self._claimed: set[int] = set()
        self._earlier_owners = {entry.log: number for number, entry in earlier.items() if entry.log is not None}

    def claim(self, number: int, prepared: JobPrepared) -> tuple[str, list[str]]:
        """Return the log file that a prepared job must open, and notices for the user."""
        assert prepared.log is not None
        notices = []
        if self._used is not None and number in self._earlier:
            notices.append(f"{self._directory} has {summary(self._earlier)} from an earlier sweep: {self._used}")
            self._used = None
        path = Path(prepared.log)
        owner = self._owners.setdefault((prepared.place, path.name), number)
        if owner == number:
            owner = self._earlier_owners.get(prepared.log, number)
        if owner != number:
            path = path.with_name(f"{number}.{path.name}")
            if self._shared is not None:
                notices.append(f"jobs {owner} and {number} share the output directory {path.parent}: {self._shared}")
                self._shared = None
        if number not in self._claimed:
            self._claimed.add(number)
            before = self._earlier[number].attempts if number in self._earlier else 0
            with suppress(OSError):
                if path.stat().st_size or before:
                    set_aside(str(path), before or 1)
        return str(path), notices


def as_proposed(number: int, prepared: JobPrepared) -> tuple[str, list[str]]:
    """Return the log that the job proposes. Replaces `LogFiles.claim` for jobs that have logs of their own."""
    return str(prepared.log), []


def summary(entries: Mapping[int, Entry]) -> str:
    """Summarise jobs by state: `6 jobs (4 completed, 2 lost)`."""
    states = Counter(entry.state for entry in entries.values())
    said = ", ".join(f"{states[state]} {state.value}" for state in State if states[state])
    return f"{count(len(entries), 'job')} ({said})"
