"""The kernel features that keep a job's process tree together and show it to people. Linux only; see prctl(2)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from gpu_launcher.text import one_line

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NAME = 15
_ARG_START, _ARG_END = 45, 46
"""Fields of /proc/self/stat behind the name: proc_pid_stat(5) counts them as 48 and 49."""
_PF_EXITING = 0x4

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}, {argument}): {os.strerror(error)}")


def become_child_subreaper() -> None:
    """From now on descendants whose parent dies become children of this process, also after `setsid`.

    Not inherited by children. Raises OSError where the kernel refuses.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int, signum: signal.Signals = signal.SIGKILL) -> None:
    """Ask for `signum` when the parent ends, and end now if `parent` is no longer the parent.

    The kernel sends the signal when the *thread* that forked this process ends, so the parent must have forked
    from a thread that lives as long as it does (prctl(2), PR_SET_PDEATHSIG). Kept over exec, not over fork.
    """
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it died before we asked, so nobody would tell us
        os._exit(1)


def children() -> list[int]:
    """Process ids of this process's children, dead and unreaped ones included.

    Of a single-threaded process only. A child that appears meanwhile may be missed: call again until
    `os.waitpid` raises ChildProcessError.
    """
    try:
        listed = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
        return [int(pid) for pid in listed.split()]
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return _children_by_scan(os.getpid())


def _children_by_scan(parent: int) -> list[int]:
    return children_of_all().get(parent, [])


def descendants(pid: int | None = None, below: Mapping[int, Sequence[int]] | None = None) -> list[int]:
    """Process ids of a process's children, of theirs, and so on; without `pid` of this process.

    `below` is what `children_of_all` returned, for several calls.
    """
    below = children_of_all() if below is None else below
    found = list(below.get(os.getpid() if pid is None else pid, ()))
    for child in found:
        found += below.get(child, ())
    return found


def children_of_all() -> dict[int, list[int]]:
    """Process ids of the children of every process, as far as /proc shows them. New ones may be missed."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The command name is in parentheses and may hold anything, parentheses included.
            fields = stat[stat.rindex(")") + 2 :].split()
            found.setdefault(int(fields[1]), []).append(int(entry.name))
    return found


def command_lines(pids: Iterable[int]) -> list[str]:
    """`tensorboard --logdir runs (pid 4711)` for each of these processes that has not ended."""
    found = []
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended, or is hidden from us
            continue
        text = one_line(" ".join(words), MAX_COMMAND_LINE)
        if text:  # a process that has ended and that nobody has waited for has none
            found.append(f"{text} (pid {pid})")
    return found


MAX_COMMAND_LINE = 80
"""Characters of a command line that are shown."""


def kill(pid: int) -> None:
    """SIGKILL a child. One that may not be killed, as after `sudo`, is left alone: whoever waits for it must wait."""
    with contextlib.suppress(PermissionError):
        os.kill(pid, signal.SIGKILL)  # a zombie takes it in silence, and only we can reap it


def other_threads(besides: Container[int] = ()) -> list[str]:
    """Names of this process's threads besides the first and some others, which are given by their native ids.

    Python's name where a thread has one, else the kernel's.
    """
    python = {thread.native_id: thread.name for thread in threading.enumerate()}
    names = []
    for task in Path("/proc/self/task").iterdir():
        if task.name != str(os.getpid()) and int(task.name) not in besides:
            try:
                names.append(python.get(int(task.name)) or (task / "comm").read_text().strip())
            except (FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                continue
    return sorted(names)


def start_time(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was (proc_pid_stat(5)); None if there is none.

    Together with its id it is that process and no other, until the machine is restarted.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


class ProcessEnding:
    """Whether a process has begun to end. It can be asked often: that takes a few microseconds.

    Known since before its files are closed and its locks with them: `os.getppid()` changes only after that.
    """

    def __init__(self, pid: int) -> None:
        self._stat: int | None = None
        with contextlib.suppress(FileNotFoundError, PermissionError):  # there is none, or none that we may see
            self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    def __bool__(self) -> bool:
        if self._stat is None:
            return False
        try:
            stat = os.pread(self._stat, 4096, 0)
        except ProcessLookupError:  # it has been waited for
            return True
        fields = stat[stat.rindex(b")") + 2 :].split(None, 7)
        return fields[0] in b"ZX" or bool(int(fields[6]) & _PF_EXITING)

    def close(self) -> None:
        if self._stat is not None:
            os.close(self._stat)
            self._stat = None


def set_process_title(title: str) -> None:
    """Have ps, top and nvidia-smi call this process `title`, as far as its first command line was that long.

    `sys.argv`, and what this process executes later, stay as they are.
    """
    encoded = title.encode(errors="replace").replace(b"\0", b" ")
    _libc.prctl(_PR_SET_NAME, encoded, 0, 0, 0)  # the kernel keeps 15 bytes of it
    try:
        # Where the program has this library, it must find the command line as it was, or it cannot work later.
        import_module("setproctitle").setproctitle(title)
    except (ImportError, AttributeError):
        _overwrite_command_line(encoded)


def _overwrite_command_line(title: bytes) -> None:
    fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
    start, size = int(fields[_ARG_START]), int(fields[_ARG_END]) - int(fields[_ARG_START])
    if start == 0 or size < 2:  # the kernel does not say where it is
        return
    # If the last byte is not 0, the kernel shows the text up to the first 0 instead of everything up to that byte
    # (`get_mm_cmdline` in fs/proc/base.c).
    ctypes.memmove(start, title[: size - 2].ljust(size - 1, b"\0") + b" ", size)


def flush_c_streams() -> None:
    """Write out what C code has printed, lest a forked child print it again."""
    _libc.fflush(None)


def cuda_in_use() -> str | None:
    """CUDA cannot be used in a child forked after `cuInit`, which opens this device (NVML does not)."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # the descriptor of this very listing
            continue
        if target == "/dev/nvidia-uvm":
            return "CUDA is already initialised in this program"
    return None
