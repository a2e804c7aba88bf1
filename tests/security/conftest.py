"""Separate accounts: an attacker and those who share a pool with them. Only root can play them all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_launcher.leases import resolve_pool_directory
from tests.security.accounts import Account, protections

Start = Callable[[int, Callable[[], object]], Account]


@pytest.fixture
def parent() -> Iterator[Path]:
    """A directory that other users can reach, which those of pytest's are not."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as several users")
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        yield Path(parent)


@pytest.fixture
def queue(parent: Path) -> Path:
    """Of a pool that root made for all."""
    return resolve_pool_directory(str(parent / "pool")) / "queue"


@pytest.fixture
def start() -> Iterator[Start]:
    """Start processes of other users, which are killed at the end."""
    accounts: list[Account] = []

    def begin(user: int, do: Callable[[], object]) -> Account:
        accounts.append(Account(user, do))
        assert accounts[-1].done, "the attack could not be prepared"
        return accounts[-1]

    yield begin
    for account in accounts:
        account.kill()


@pytest.fixture(params=[True, False], ids=["protected", "unprotected"])
def protected(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the kernel's protections of sticky directories (proc_sys_fs(5)), and without."""
    if os.geteuid() != 0:
        pytest.skip("only root can set fs.protected_*")
    with protections(request.param) as problem:
        if problem:
            pytest.skip(f"fs.protected_* {problem}")
        yield
