"""The machine and its boot, by which files say where they were written."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Origin:
    """The machine and the boot in which a file was written.

    A boot id is random, and the same in all containers of a machine. Locks and CLOCK_BOOTTIME are meaningful only
    within one boot. A file from another boot of the same machine is left over from before a restart. A file from
    another machine is not touched.
    """

    boot: str
    """The boot id; empty if it cannot be read."""
    machine: str
    """Host name."""

    @classmethod
    def here(cls) -> Origin:
        """The origin of files that this process writes now."""
        boot = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(boot, os.uname().nodename)
