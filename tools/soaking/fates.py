"""How each job of the soak ends. Known to the jobs, and to who checks them."""

from __future__ import annotations

import random

FATES = {
    "fine": 76.0,
    "noisy": 2.0,
    "leaves": 4.0,
    "once": 5.0,
    "exception": 3.0,
    "exit": 2.5,
    "sys_exit": 1.0,
    "killed": 2.5,
    "segfault": 2.0,
    "supervisor": 1.8,
    "hangs": 0.2,
}
"""Weights."""
COMPLETES = ("fine", "noisy", "leaves", "once")
"""`once` in its second attempt."""
RETRIED = ("once", "exit", "killed", "segfault", "supervisor", "hangs")
"""With retry_on=[crash,timeout] and retries=1."""


def fate_of(number: int, seed: int) -> str:
    """The same for everybody who asks."""
    return random.Random(f"{seed}/{number}").choices(list(FATES), list(FATES.values()))[0]


def value_of(number: int) -> int:
    """What a job returns that completes."""
    return number + 1_000_000
