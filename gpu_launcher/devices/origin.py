"""Finds the user, command and ancestors of a process on a device. Reads /proc."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.text import one_line
from gpu_launcher.users import user_name

_FIRST_NAMESPACE = "pid:[4026531836]"
"""The machine's initial PID namespace: PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h."""
_LENGTH = 80


@dataclass(frozen=True, slots=True)
class ProcessOrigin:
    user: str
    command: str
    ancestors: tuple[int, ...]
    """Process ids of the ancestors, the parent first, up to the first process of the namespace."""


def origin_of(pid: int, root: Path = Path("/")) -> ProcessOrigin | None:
    """The origin of the process that NVML calls `pid`; None if it cannot be known.

    In a container, NVML may report the host's process ids, which may be other processes there. So outside the machine's
    initial namespace, a process counts only if it visibly has a GPU open. The kernel shows this for processes of one's
    own user and to root. `root` contains /proc.
    """
    process = root / "proc" / str(pid)
    try:
        if str((root / "proc/self/ns/pid").readlink()) != _FIRST_NAMESPACE and not _holds_a_gpu(process):
            return None
        user = user_name(process.stat().st_uid)
        command = _command(process)
        ancestors = []
        parent = _parent(process)
        while parent > 0:
            ancestors.append(parent)
            parent = _parent(root / "proc" / str(parent))
    except (OSError, ValueError, IndexError):
        return None  # the process has ended or is hidden from this user
    return ProcessOrigin(user, command, tuple(ancestors))


def _holds_a_gpu(process: Path) -> bool:
    for descriptor in (process / "fd").iterdir():
        with suppress(OSError):  # it was just closed
            if str(descriptor.readlink()).startswith("/dev/nvidia"):
                return True
    return False


def _parent(process: Path) -> int:
    # The name in parentheses may itself contain spaces and parentheses: proc_pid_stat(5).
    return int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])


def _command(process: Path) -> str:
    arguments = (process / "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    program = arguments[0]
    if " " not in program:  # otherwise it is a title, like those of jobs, which may contain paths
        program = Path(program).name
    text = " ".join([program, *arguments[1:]]).strip()
    if not text:
        text = (process / "comm").read_text(errors="replace").strip()
    return one_line(text, _LENGTH)
