"""Shares a job's decisions with its other processes, such as the ranks of distributed training.

All ranks must agree whether a trial is pruned, but only the job's main process has the job's channel. Some ranks are
forked; others run the program again. So the main process writes the data about the job to one file and appends each of
its decisions to another, from which the ranks read them in order. Environment variables say where the files are,
because all descendants inherit them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pickle
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_launcher.safe_files import open_regular, read_regular

WHERE = "GPU_LAUNCHER_TRIAL"
"""Path of the file with the data about the job."""
DIGEST = "GPU_LAUNCHER_TRIAL_DIGEST"
"""SHA-256 of that file."""
SO_FAR = "GPU_LAUNCHER_TRIAL_DECISIONS"
"""Number of decisions that had been made when a process was started."""
VARIABLES = (WHERE, DIGEST, SO_FAR)
MAX_SIZE = 2**30
"""Maximum size in bytes of the file with the data about the job."""
POLL_SECONDS = 0.005
"""Seconds between checks for a new decision. Decisions are made once per step and take milliseconds."""

RANK_VARIABLES = (
    "RANK",  # torchrun, and most scripts that set ranks themselves
    "LOCAL_RANK",  # Lightning sets only this one
    "NODE_RANK",
    "GROUP_RANK",  # torchrun's name for NODE_RANK
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",  # MPICH, Intel MPI
)
"""Variables that launchers set for ranks. On the first rank each of them is 0 or not set."""


@dataclass(frozen=True, slots=True)
class RankDecisions:
    """The decisions of one attempt at one job."""

    path: Path
    about: Any
    """Data from the source of the job."""
    inherited: dict[str, str]
    """Rank variables of the job's main process when it began."""

    @classmethod
    def publish(cls, path: Path, about: Any) -> RankDecisions:
        """Create the file and set the variables. Call this in the job's main process, before the program's code.

        Raises OSError.
        """
        withdraw(path)  # files of an earlier attempt
        decisions = cls(path, about, ranks_in_environment())
        data = pickle.dumps((decisions.about, decisions.inherited))
        with open(open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(data)
        os.environ[WHERE] = str(path)
        os.environ[DIGEST] = hashlib.sha256(data).hexdigest()
        os.environ[SO_FAR] = "0"
        return decisions

    @classmethod
    def find(cls) -> RankDecisions | None:
        """Return the decisions of the job that this process belongs to; None without such a job, or if it is over.

        The file is unpickled, so it is compared with the digest in the environment: other users may be able to replace
        it. Raises OSError.
        """
        path = os.environ.get(WHERE)
        if path is None:
            return None
        try:
            data = read_regular(path, MAX_SIZE)
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).hexdigest() != os.environ.get(DIGEST):
            raise PermissionError(errno.EPERM, "not what the job's main process wrote", path)
        about, inherited = pickle.loads(data)
        return cls(Path(path), about, inherited)

    def append(self, decision: bool) -> None:
        """Append a decision. Raises OSError, because otherwise the other ranks would wait forever."""
        descriptor = open_regular(_decisions(self.path), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, b"1" if decision else b"0")
        finally:
            os.close(descriptor)
        # For processes that start later in the middle of the program, for example by torch's `spawn`.
        os.environ[SO_FAR] = str(int(os.environ.get(SO_FAR, "0")) + 1)

    def become_leader(self) -> bool:
        """Become the process that makes the decisions. Returns False if another process already does."""
        try:
            os.close(open_regular(_decisions(self.path), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def first_index(self, anew: bool) -> int:
        """Return the index of the first decision that this process must follow.

        A process that runs the program `anew`, from its beginning, makes every call that the main process made. A
        process that began in the middle of the program does not.
        """
        return 0 if anew else int(os.environ.get(SO_FAR, "0"))

    def wait_for(self, index: int) -> bool:
        """Wait for the decision at `index` and return it. If the job is over, returns True, which means to stop."""
        while True:
            with (
                contextlib.suppress(FileNotFoundError),
                open(open_regular(_decisions(self.path)), "rb", buffering=0) as file,
            ):
                file.seek(index)
                if decision := file.read(1):
                    return decision == b"1"
            if not self.path.exists():
                return True
            time.sleep(POLL_SECONDS)


def path_for(report: Path) -> Path:
    """Return the path of the ranks' file of a job whose report is `report`."""
    return report.with_suffix(".trial")


def withdraw(path: Path) -> None:
    """Remove the files. Call this when the processes that could read them are gone. Raises OSError."""
    for file in (path, _decisions(path)):
        file.unlink(missing_ok=True)


def forget() -> None:
    """Remove the variables of another job from this job's environment. This sweep may have been started in that job."""
    for name in VARIABLES:
        os.environ.pop(name, None)


def inherited() -> bool:
    """Return whether this process belongs to a job that shares, or shared, its decisions."""
    return WHERE in os.environ


def _decisions(path: Path) -> Path:
    return path.with_suffix(".decisions")


def ranks_in_environment() -> dict[str, str]:
    """Return the rank variables of this process."""
    return {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ}


def is_later_rank(inherited: Mapping[str, str]) -> bool | None:
    """Whether this process is a rank of its job other than the first; None if nothing shows that it is a rank.

    `inherited` contains the rank variables that the job's main process began with. Variables that still have these
    values are ignored, because they are not about this job: Slurm may have started the sweep, and its jobs and their
    children inherit Slurm's variables.
    """
    torch = sys.modules.get("torch.distributed")
    if torch is not None and torch.is_available() and torch.is_initialized():
        return bool(torch.get_rank() > 0)
    told = [value for name, value in ranks_in_environment().items() if inherited.get(name) != value]
    if not told:
        return None
    return any(value.strip() not in ("", "0") for value in told)
