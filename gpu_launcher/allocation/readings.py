"""Reads the devices' conditions and the pool, without changing anything."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_launcher.allocation.survey import Found, PoolSeen, PoolSurvey, take_survey
from gpu_launcher.devices import Condition, NvmlProbe
from gpu_launcher.devices.nvml import NoGpuError, open_nvml
from gpu_launcher.errors import DeviceError, PoolDirectoryError
from gpu_launcher.leases import FileLedger, PoolView, choose_pool_directory
from gpu_launcher.leases.pool_directory import QUEUE, explained
from gpu_launcher.model import Device, DeviceKind


def put_together(
    found: Found,
    conditions: Sequence[Condition],
    pool: PoolSeen,
    busy_memory: int | None,
    notices: Sequence[str] = (),
) -> PoolSurvey:
    return take_survey(
        found,
        conditions,
        pool,
        time=time.time(),
        machine=os.uname().nodename,
        exists=lambda pid: Path(f"/proc/{pid}").exists(),
        busy_memory=busy_memory,
        notices=notices,
    )


@contextlib.contextmanager
def nvml_kept_open() -> Iterator[None]:
    """Initialise NVML once for all queries in the block, because initialising may take seconds per GPU."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(NoGpuError, DeviceError):  # each query in the block raises them itself
            stack.enter_context(open_nvml())
        yield


def measure(devices: Sequence[Device]) -> tuple[tuple[Condition, ...], tuple[str, ...]]:
    """The conditions of the devices, and notices if NVML cannot provide them."""
    try:
        if _real(devices):
            return NvmlProbe().conditions(devices), ()
    except DeviceError as error:
        return (), (str(error),)
    return (), ()


class PoolWindow:
    """Reads the pool directory repeatedly. The directory need not exist yet, and is never created."""

    def __init__(self, pool_dir: str | None) -> None:
        """Raises PoolDirectoryError for an invalid name."""
        self.directory, self.why = choose_pool_directory(pool_dir)
        self._ledger: FileLedger | None = None

    def look(self) -> PoolSeen:
        """The pool's current state. Raises PoolDirectoryError if it cannot be read."""
        try:
            return PoolSeen(self.directory, self._snapshot())
        except PoolDirectoryError:
            if self._ledger is None:
                raise
        self.close()  # the directory may have been removed and created again
        return PoolSeen(self.directory, self._snapshot())

    def _snapshot(self) -> PoolView | None:
        if self._ledger is None:
            try:
                (self.directory / QUEUE).stat()
            except FileNotFoundError:
                return None
            except OSError as error:
                raise explained(self.directory, error) from error
            self._ledger = FileLedger(self.directory)
        self._ledger.drain()
        return self._ledger.snapshot(thorough=True)

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None


def _real(devices: Sequence[Device]) -> bool:
    return any(device.kind in (DeviceKind.GPU, DeviceKind.MIG) for device in devices)
