"""Kernel features that keep a job's process tree together and make it visible to users. Linux only; see prctl(2)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from gpu_launcher.text import one_line

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NAME = 15
_ARG_START, _ARG_END = 45, 46
"""Indexes of fields of /proc/self/stat after the command name: proc_pid_stat(5) numbers them 48 and 49."""
_PF_EXITING = 0x4

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}, {argument}): {os.strerror(error)}")


def become_child_subreaper() -> None:
    """Make this process the new parent of all descendants whose parent dies, even after `setsid`.

    Children do not inherit this setting. Raises OSError if the kernel refuses.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int, signum: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send `signum` when the parent ends. Exit now if `parent` is no longer the parent.

    The kernel sends the signal when the *thread* that forked this process ends, so the parent must have forked
    from a thread that lives as long as it does (prctl(2), PR_SET_PDEATHSIG). The setting survives exec, but not fork.
    """
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it died before the call, so the kernel will not send the signal
        os._exit(1)


_EXECUTE = f"""
import ctypes, os, signal, sys
parent, signum, name, *words = sys.argv[1:]
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, ctypes.c_ulong(int(signum)), 0, 0, 0)
if os.getppid() != int(parent):
    os._exit(1)
for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and the command would inherit that
    signal.signal(ignored, signal.SIG_DFL)
try:
    os.execv(name, words)
except OSError as error:
    sys.exit(f"{{name}}: {{error.strerror}}")
"""


def dying_with_parent(command: Sequence[str], signum: signal.Signals, directory: str = os.curdir) -> list[str]:
    """Return a command line for `subprocess` that runs `command`, and gets `signum` when this process ends.

    See `die_with_parent`. A short-lived interpreter asks the kernel and then becomes the command. This is safe in a
    program with threads, unlike `preexec_fn`, which runs Python code in a fork. `directory` is its working directory.
    Raises FileNotFoundError if there is no such program.
    """
    import shutil  # it loads all compression libraries

    name = command[0]
    is_path = "/" in name
    found = shutil.which(Path(directory).absolute() / name if is_path else name)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    here = (str(os.getpid()), str(int(signum)))
    return [sys.executable, "-I", "-S", "-c", _EXECUTE, *here, name if is_path else str(found), *command]


def ends_within(pid: int, seconds: float) -> bool:
    """Wait at most `seconds` for a child to end, and return whether it has. The child can still be waited for."""
    end = time.monotonic() + seconds
    with contextlib.suppress(ChildProcessError):  # the user's program reaps all children itself
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)
    return True


def children() -> list[int]:
    """Process ids of this process's children, including dead ones that are not reaped.

    The process must be single-threaded. A child that appears during the call may be missed: call again until
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
    """Process ids of all descendants of process `pid`; of this process by default.

    `below` is a result of `children_of_all`, which several calls can share.
    """
    below = children_of_all() if below is None else below
    found = list(below.get(os.getpid() if pid is None else pid, ()))
    for child in found:
        found += below.get(child, ())
    return found


def children_of_all() -> dict[int, list[int]]:
    """Process ids of the children of every process that /proc shows. New processes may be missed."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(errors="replace")
            except OSError:  # just ended, or hidden from us
                continue
            # The command name is in parentheses and may contain any character, even parentheses.
            fields = stat[stat.rindex(")") + 2 :].split()
            found.setdefault(int(fields[1]), []).append(int(entry.name))
    return found


def command_lines(pids: Iterable[int]) -> list[str]:
    """Command lines of those processes that have not ended, such as `tensorboard --logdir runs (pid 4711)`."""
    found = []
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # just ended, or hidden from us
            continue
        text = one_line(" ".join(words), MAX_COMMAND_LINE)
        if text:  # a zombie has none
            found.append(f"{text} (pid {pid})")
    return found


MAX_COMMAND_LINE = 80
"""Maximum number of characters of a command line that are shown."""


def kill(pid: int) -> None:
    """Send SIGKILL to a child. Does nothing if that is not permitted, as with `sudo`: callers must wait for its end."""
    with contextlib.suppress(PermissionError):
        os.kill(pid, signal.SIGKILL)  # cannot hit another process: the id stays in use until we reap the child


def other_threads(besides: Container[int] = ()) -> list[str]:
    """Names of this process's threads, except the main thread and those whose native ids are in `besides`.

    The name is Python's if the thread has one, otherwise the kernel's.
    """
    python = {thread.native_id: thread.name for thread in threading.enumerate()}
    names = []
    for task in Path("/proc/self/task").iterdir():
        if task.name != str(os.getpid()) and int(task.name) not in besides:
            try:
                names.append(python.get(int(task.name)) or (task / "comm").read_text().strip())
            except (FileNotFoundError, ProcessLookupError):  # the thread has just ended
                continue
    return sorted(names)


def is_thread(native_id: int | None) -> bool:
    """Whether the kernel has a thread of this process with this id."""
    return Path(f"/proc/self/task/{native_id}").exists()


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (proc_pid_stat(5)); None if there is no live process.

    Process id and start time together identify a process until the next boot.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def may_be_stopped(pid: int) -> bool:
    """Whether a process is stopped, or may be: proc(5) can hide it, or only its main thread has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        state = stat[stat.rindex(b")") + 2 :][:1]
        return state in b"Tt" or (state == b"Z" and len(os.listdir(f"/proc/{pid}/task")) > 1)  # noqa: PTH208
    except OSError:
        with contextlib.suppress(PermissionError):
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return False
        return True


class ProcessEnding:
    """True once a process has begun to end. A check takes only a few microseconds.

    It becomes true before the kernel closes the process's files and releases its locks; `os.getppid()` changes only
    afterwards.
    """

    def __init__(self, pid: int) -> None:
        self._stat: int | None = None
        with contextlib.suppress(FileNotFoundError, PermissionError):  # no such process, or it is hidden from us
            self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)

    def __bool__(self) -> bool:
        if self._stat is None:
            return False
        try:
            stat = os.pread(self._stat, 4096, 0)
        except ProcessLookupError:  # it has been reaped
            return True
        fields = stat[stat.rindex(b")") + 2 :].split(None, 7)
        return fields[0] in b"ZX" or bool(int(fields[6]) & _PF_EXITING)

    def close(self) -> None:
        if self._stat is not None:
            os.close(self._stat)
            self._stat = None


def set_process_title(title: str) -> None:
    """Make ps, top and nvidia-smi show `title` for this process, truncated to the length of its first command line.

    `sys.argv` does not change, nor do programs that this process executes later.
    """
    encoded = title.encode(errors="replace").replace(b"\0", b" ")
    _libc.prctl(_PR_SET_NAME, encoded, 0, 0, 0)  # the kernel keeps 15 bytes
    try:
        # If setproctitle is installed, use it: it works later only if it finds the original command line.
        import_module("setproctitle").setproctitle(title)
    except (ImportError, AttributeError):
        _overwrite_command_line(encoded)


def _overwrite_command_line(title: bytes) -> None:
    fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
    start, size = int(fields[_ARG_START]), int(fields[_ARG_END]) - int(fields[_ARG_START])
    if start == 0 or size < 2:  # the kernel does not show where the command line is
        return
    # If the last byte is not 0, the kernel shows the text up to the first 0 instead of everything up to that byte
    # (`get_mm_cmdline` in fs/proc/base.c).
    ctypes.memmove(start, title[: size - 2].ljust(size - 1, b"\0") + b" ", size)


def flush_c_streams() -> None:
    """Flush the output of C code, so that a forked child does not print it again."""
    _libc.fflush(None)


def cuda_in_use() -> str | None:
    """Return a text that says that CUDA is initialised in this process; None if it is not.

    CUDA cannot be used in a child forked after `cuInit`. Only `cuInit` opens /dev/nvidia-uvm; NVML does not.
    """
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # the descriptor of this listing
            continue
        if target == "/dev/nvidia-uvm":
            return "CUDA is already initialised in this program"
    return None
