"""A disk of a few kilobytes, which is soon full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_tmpfs(point: Path, options: str) -> Iterator[None]:
    """Mount a file system in memory at `point`, which is made. Skips the test where that is not allowed."""
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(point)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode != 0:
        pytest.skip(f"cannot mount a file system: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


def fill(disk: Path) -> Path:
    """Fill the disk to the last byte; return the file to remove."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return filler
