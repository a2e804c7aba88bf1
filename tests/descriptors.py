"""Helpers that find descriptors that a test leaves open."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path


def open_descriptors() -> set[tuple[int, str]]:
    """The descriptors of this process, each with what it refers to.

    Compare with `<=`: what earlier tests left to the garbage collector may be closed at any time.
    """
    gc.collect()
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            found.add((int(entry.name), str(entry.readlink())))
    return {(number, target) for number, target in found if not target.endswith("/fd")}
