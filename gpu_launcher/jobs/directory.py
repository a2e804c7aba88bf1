"""The directory of a sweep or map: which launch has it, which log is whose, and where the newest sweep is.

A launch holds the `flock` of `.gpu_launcher/lock` as long as any of its processes lives: its fork server, and so all
that runs below it, has the same open file. The kernel releases it when the last of them has ended, whatever ended it.
The file says which program that is, for those that it keeps out.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.failures import set_aside
from gpu_launcher.jobs.identity import ProcessIdentity
from gpu_launcher.jobs.manifest import DIRECTORY, MANIFEST, Entry, State, refuse_if_running
from gpu_launcher.json_data import Fields, load_object
from gpu_launcher.processes.messages import JobPrepared
from gpu_launcher.safe_files import make_directories, open_regular
from gpu_launcher.text import one_line
from gpu_launcher.wording import count

LOCK = "lock"
WAIT_SECONDS = 15.0
"""Seconds to wait for the processes of a killed launch to end."""
MAX_DIRECTORIES = 5000
"""Directories that the search for the newest sweep looks into, at most."""

_held: weakref.WeakValueDictionary[tuple[int, int, int], DirectoryLock] = weakref.WeakValueDictionary()
"""Locks that this process holds, by process id, device and inode. `flock` would keep it out of its own directory."""


class DirectoryLock:
    """The right to run jobs in a directory. Ends with `close`, or when nothing refers to it any more.

    On a file system without locks it excludes nobody: what `refuse_if_running` finds has to be enough there.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        """For processes of the launch that are no forks of this one."""
        self.close = weakref.finalize(self, _release, descriptor, os.getpid())
        """Release it, once the launch's other processes have ended."""

    @classmethod
    def take(
        cls, directory: Path, command: str, remedy: str, notice: Callable[[str], None] = lambda text: None
    ) -> DirectoryLock:
        """Be the only launch in `directory`, which is made, and come after what a killed one left behind.

        To be called before the fork server is started, which is to have the lock, too. `command` names this program to
        those that come meanwhile, `remedy` says what to do if another has the directory. A process that has the lock
        gets the same one again. Raises ManifestError if another program runs jobs here or its processes do not end,
        and OSError if nothing can be written.
        """
        path = directory / DIRECTORY / LOCK
        make_directories(path.parent)
        descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
        try:
            status = os.fstat(descriptor)
            key = (os.getpid(), status.st_dev, status.st_ino)
            if (held := _held.get(key)) is not None:
                os.close(descriptor)
                return held
            refuse_if_running(directory, remedy)
            _wait_for(descriptor, directory, remedy, notice)
            refuse_if_running(directory, remedy)
            _sign(descriptor, command)
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


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _refuse_holder(descriptor: int, directory: Path, remedy: str) -> None:
    """Raise ManifestError if the program that the lock names may live. The lock is held, or this would not be asked."""
    try:
        content = load_object(os.pread(descriptor, 64 * 1024, 0))
        holder, command = ProcessIdentity.from_json(content), one_line(Fields(content).text("command"))
    except ValueError:
        return  # it has just been taken, or is being released
    lives = holder.is_alive(os.fstat(descriptor).st_uid)
    if lives is False:
        return  # what it left behind has the lock
    where = "" if lives else f" on {holder.host}"
    raise ManifestError(f"{directory} is being run by process {holder.pid} ({command}){where}: {remedy}")


def _sign(descriptor: int, command: str) -> None:
    content = json.dumps({**ProcessIdentity.here().to_json(), "command": command}).encode()
    with suppress(OSError):  # a full disk: others are kept out all the same, but cannot say by whom
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)


def _release(descriptor: int, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        with suppress(OSError):
            os.ftruncate(descriptor, 0)  # this program may live on, and does not have it any more
        os.close(descriptor)


class LogFiles:
    """Gives each job of a sweep a log file, and notices directories that are used twice.

    A job that finds its log taken by another job gets `<number>.<name>` beside it. What an earlier launch left in a
    job's log is kept under another name. Used for all launches of one launcher.
    """

    def __init__(self, directory: Path, earlier: Mapping[int, Entry], *, shared: str, used: str | None) -> None:
        """`earlier` are the jobs that the directory knew before.

        `shared` is what to do about jobs that share an output directory, `used` about jobs of an earlier sweep whose
        files are overwritten; None if that is what the user asked for.
        """
        self._directory = directory
        self._earlier = earlier
        self._shared: str | None = shared
        self._used = used
        self._owners: dict[tuple[object, ...], int] = {}
        self._claimed: set[int] = set()
        self._earlier_owners = {entry.log: number for number, entry in earlier.items() if entry.log is not None}

    def claim(self, number: int, prepared: JobPrepared) -> tuple[str, list[str]]:
        """Return the log file of a prepared job, which opens it next, and the notices for the user."""
        assert prepared.log is not None
        notices = []
        if self._used is not None and number in self._earlier:
            notices.append(f"{self._directory} has {_summary(self._earlier)} from an earlier sweep: {self._used}")
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
    """See `LogFiles.claim`; for jobs that propose logs of their own."""
    return str(prepared.log), []


def _summary(entries: Mapping[int, Entry]) -> str:
    """`6 jobs (4 completed, 2 lost)`"""
    states = Counter(entry.state for entry in entries.values())
    said = ", ".join(f"{states[state]} {state.value}" for state in State if states[state])
    return f"{count(len(entries), 'job')} ({said})"


def newest_sweep(*roots: Path) -> Path | None:
    """The directory, at most three levels below one of `roots`, whose sweep has written something last."""
    found: list[tuple[float, Path]] = []
    for root in roots:
        for directory in itertools.islice(_directories(root), MAX_DIRECTORIES):
            with suppress(OSError):
                found.append(((directory / DIRECTORY / MANIFEST).stat().st_mtime, directory))
    return max(found, default=(0.0, None))[1]


def _directories(root: Path, depth: int = 3) -> Iterator[Path]:
    """Yield the directories that may be a sweep's, breadth first. Directories within a sweep's belong to its jobs."""
    waiting = deque([(root, 0)])
    while waiting:
        directory, level = waiting.popleft()
        yield directory
        with suppress(OSError):
            if level == depth or (directory / DIRECTORY / MANIFEST).exists():
                continue
            with os.scandir(directory) as entries:
                below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            # Names are often dates, and what was made last is most likely to be wanted.
            waiting.extend((Path(path), level + 1) for path in sorted(below, reverse=True))
