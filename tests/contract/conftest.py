"""What the contract tests need of an implementation: ledgers that stand for processes sharing one pool."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from gpu_launcher.leases import FileLedger, Ledger, resolve_pool_directory
from gpu_launcher.model import Device, DeviceKind, Owner
from gpu_launcher.users import user_name
from tests.memory_ledger import MemoryLedger, MemoryPool


class Processes:
    """Opens one ledger per pretended process, and closes them at the end."""

    def __init__(self, open_ledger) -> None:
        self.now = 100.0
        """What every process's clock says."""
        self._open = open_ledger
        self._ledgers: list[Ledger] = []

    def __call__(self) -> Ledger:
        ledger = self._open()
        self._ledgers.append(ledger)
        return ledger

    def close(self) -> None:
        for ledger in self._ledgers:
            ledger.close()


@pytest.fixture(params=["files", "memory"])
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Processes]:
    if request.param == "files":
        directory = resolve_pool_directory(str(tmp_path / "pool"))
        processes = Processes(lambda: FileLedger(directory, wall_clock=lambda: 1234.5, clock=lambda: processes.now))
        yield processes
        processes.close()
    else:
        pool = MemoryPool()
        processes = Processes(lambda: MemoryLedger(pool, wall_clock=lambda: 1234.5, clock=lambda: processes.now))
        yield processes
        processes.close()
        pool.close()


@pytest.fixture
def devices() -> list[Device]:
    """Four with 80 GiB each."""
    return [
        Device(uuid=f"SIMULATED-{n}", index=n, name="simulated", kind=DeviceKind.SIMULATED, memory=80 << 30)
        for n in range(4)
    ]


@pytest.fixture
def owner() -> Owner:
    """This process: of others, the ledger on files does not believe that they are it."""
    return Owner(pid=os.getpid(), user=user_name(os.geteuid()), command="train.py #7 lr=0.1")


class Readable(Protocol):
    def __call__(self, ledger: Ledger, timeout: float = 0) -> bool: ...


@pytest.fixture
def readable() -> Readable:
    def check(ledger: Ledger, timeout: float = 0) -> bool:
        descriptor = ledger.fileno()
        assert descriptor is not None
        return bool(select.select([descriptor], [], [], timeout)[0])

    return check
