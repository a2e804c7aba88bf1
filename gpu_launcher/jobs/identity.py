"""Identities of processes that can be stored, so that other processes can check later whether the process is alive."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_launcher.boot import Origin
from gpu_launcher.json_data import Fields
from gpu_launcher.processes.linux import start_time
from gpu_launcher.text import one_line
from gpu_launcher.users import MAX_PID, user_of

MAX_NAME_LENGTH = 256
"""Maximum length in characters of a namespace, boot or host."""


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """The identity of a process. The id alone is not enough: the kernel may give it to another process later."""

    pid: int
    start: int | None
    """Its start time in clock ticks since boot. None if it has ended."""
    namespace: str
    """Its PID namespace. In another one, such as another container's, the same id means another process."""
    boot: str
    host: str

    @classmethod
    def here(cls) -> ProcessIdentity:
        """Return the identity of this process."""
        origin = Origin.here()
        return cls(os.getpid(), start_time(os.getpid()), _namespace(), origin.boot, origin.machine)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ProcessIdentity:
        """Read what `to_json` returned. Raises ValueError for anything else."""
        fields = Fields(content)
        start = None if content.get("start") is None else fields.integer("start", most=2**63)
        namespace, boot, host = (one_line(fields.text(name, MAX_NAME_LENGTH)) for name in ("namespace", "boot", "host"))
        return cls(fields.integer("pid", least=1, most=MAX_PID), start, namespace, boot, host)

    def to_json(self) -> dict[str, Any]:
        """Return the identity as names and values for JSON."""
        return asdict(self)

    def is_alive(self, owner: int | None = None) -> bool | None:
        """Whether the process is alive. None if that cannot be known from here.

        `owner` is the owner of the file that names the process. The process counts as alive only if it belongs to that
        user.
        """
        here = Origin.here()
        if self.boot != here.boot:
            return False if self.host == here.machine else None  # before the last restart, or on another machine
        if self.namespace != _namespace():
            return None
        start = start_time(self.pid)
        if start is not None:
            return start == self.start and (owner is None or user_of(self.pid) == owner)
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            return None  # another user's process that /proc does not show (`hidepid`)
        except ProcessLookupError:
            return False
        return False  # a zombie


def _namespace() -> str:
    with suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""
