"""The choice of a pool and its devices for calls from Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.model import BUSY_MEMORY, Request
from gpu_launcher.sizes import read_memory

GRACE = 10.0
"""Seconds between asking a call to end and SIGKILL."""


@dataclass(frozen=True, slots=True)
class Where:
    """A choice of a pool and of devices in it. Default: all devices of the machine's pool."""

    devices: object = "auto"
    """The devices, as `gpu_launcher.devices.select_devices` takes them."""
    pool_dir: str | os.PathLike[str] | None = None
    """The pool directory. None: the machine's."""
    busy_memory: object = BUSY_MEMORY
    """A device with more unleased memory in use than this is not granted. None: ignore memory in use."""
    environ: Mapping[str, str] | None = None
    """Environment whose mask makes GPUs visible. None: this process's environment when the jobs are run."""

    def options(self, request: Request, max_parallel: int | None = None, cap: str | None = None) -> Options:
        """Return the options for jobs on these devices that each have this request.

        `cap` is the user's name for `max_parallel`. Raises OptionError.
        """
        return Options(
            devices=self.devices,
            request=request,
            max_parallel=max_parallel,
            cap=None if max_parallel is None else cap,
            grace=GRACE,
            pool_dir=None if self.pool_dir is None else os.fspath(self.pool_dir),
            busy_memory=None if self.busy_memory is None else read_memory(self.busy_memory, "busy_memory"),
            device_environment=DeviceEnvironment(),
            environ=self.environ,
        )


def this_program() -> str:
    """Return the name of this program, for others who wait for devices."""
    script = sys.argv[0] if sys.argv else ""
    return Path(script).name if script not in ("", "-c") else "python"
