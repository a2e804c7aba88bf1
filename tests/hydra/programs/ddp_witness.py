"""Records what each rank of a distributed job sees, and lets the jobs of a sweep wait for each other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOBS = RANKS = 2


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)


def testify(rank: int, directory: Path, number: int, sum_over_ranks: Callable[[float], float], **more: Any) -> None:
    """Write `rank-N.json`, then wait until every rank of both jobs has written its own: the jobs run side by side."""
    found = {
        "pid": os.getpid(),
        "number": number,
        "sum": sum_over_ranks(10.0**number * (rank + 1)),
        "mask": os.environ["CUDA_VISIBLE_DEVICES"],
        "port": os.environ["MASTER_PORT"],
        **more,
    }
    temporary = directory / f".rank-{rank}"
    temporary.write_text(json.dumps(found))
    temporary.rename(directory / f"rank-{rank}.json")
    until(lambda: len(list(directory.parent.glob("*/rank-*.json"))) == JOBS * RANKS, "the other ranks do not begin")
