"""How long the Slurm allocation of this process lasts, and what that leaves for jobs."""

from __future__ import annotations

import os
import re
import subprocess
import time

from gpu_launcher.debug_log import get_logger
from gpu_launcher.jobs.term import Term

_log = get_logger("nodes.slurm_time")

EARLY_SECONDS = 60
"""Maximum seconds by which Slurm signals earlier than it was asked to."""
SQUEUE_SECONDS = 5.0
"""Maximum seconds to wait for Slurm's answer."""
_TIME = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", re.ASCII)


def term_of_allocation(notice: float, allocation_of_head: str | None) -> Term | None:
    """Return how long jobs can run in the allocation of this process. None if it has no end, or that is unknown.

    Jobs are interrupted `notice` seconds before the end. `allocation_of_head` is the id of the allocation in which the
    head runs, if it runs in one.
    """
    allocation = os.environ.get("SLURM_JOB_ID")
    if allocation is None:
        return None
    squeue = ("squeue", "--noheader", "--format=%L %l", f"--jobs={allocation}")
    # SLURM_JOB_END_TIME would say the same, but Slurm 22.05 does not set it, and an administrator may change the limit.
    try:
        done = subprocess.run(squeue, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("it is unknown when this allocation ends: %s", error)
        return None
    now = time.monotonic()
    times = [read_time(word) for word in done.stdout.split()]
    if len(times) != 2 or times[0] is None or times[1] is None:
        _log.info("this allocation has no end, or it is unknown: squeue says %r", done.stdout)
        return None
    left, limit = (seconds - notice - EARLY_SECONDS for seconds in times if seconds is not None)
    # A step in the head's own allocation never gets more time than that has left.
    return Term(now + left, left if allocation == allocation_of_head else limit)


def read_time(text: str) -> float | None:
    """Read a time as squeue shows it, such as 1-02:03:04, 2:03:04 or 3:04. None for anything else."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
