"""Whether a process is one of several that a distributed job consists of, and whether it is the first of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

VARIABLES = (
    "RANK",  # torchrun, and most who do it by hand
    "LOCAL_RANK",  # Lightning sets this one only
    "NODE_RANK",
    "GROUP_RANK",  # torchrun's name for that
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",  # MPICH, Intel MPI
)
"""What those who start ranks tell them. On the first rank every one of these is 0, or not set."""


def in_environment() -> dict[str, str]:
    """What this process was told."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def is_later_rank(inherited: Mapping[str, str]) -> bool | None:
    """Whether this process is a rank of its job other than the first; None if nothing says that it is a rank.

    `inherited` is what the job's main process was told when it began, which is about something else: a sweep may have
    been started by Slurm, and its jobs and their children have those variables as well.
    """
    torch = sys.modules.get("torch.distributed")
    if torch is not None and torch.is_available() and torch.is_initialized():
        return bool(torch.get_rank() > 0)
    told = [value for name, value in in_environment().items() if inherited.get(name) != value]
    if not told:
        return None
    return any(value.strip() not in ("", "0") for value in told)
