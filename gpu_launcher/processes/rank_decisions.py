"""Shares a job's decisions with its other processes, such as the ranks of distributed training.

All ranks must decide alike whether a trial is pruned, but only the job's main process has the job's channel: some ranks
are forked, others are the program started again. So the main process writes what the job is about to a file, and
appends each of its decisions to another, where they are read in order. Environment variables say where the files are,
because all descendants inherit those.
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
"""Path of the file that says what the job is about."""
DIGEST = "GPU_LAUNCHER_TRIAL_DIGEST"
"""SHA-256 of that file."""
SO_FAR = "GPU_LAUNCHER_TRIAL_DECISIONS"
"""How many decisions there were when a process was started."""
VARIABLES = (WHERE, DIGEST, SO_FAR)
MAX_SIZE = 2**30
"""Bytes of that file, at most."""
POLL_SECONDS = 0.005
"""Seconds between two looks at whether a decision has been made: they are made once a step, and take milliseconds."""

RANK_VARIABLES = (
    "RANK",  # torchrun, and most who do it by hand
    "LOCAL_RANK",  # Lightning sets this one only
    "NODE_RANK",
    "GROUP_RANK",  # torchrun's name for that
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",  # MPICH, Intel MPI
)
"""Variables that launchers set for ranks. On the first rank each of these is 0 or not set."""


@dataclass(frozen=True, slots=True)
class RankDecisions:
    """The decisions of one attempt at one job."""

    path: Path
    about: Any
    """Data from the source of the job."""
    inherited: dict[str, str]
    """The rank variables of the job's main process when it began."""

    @classmethod
    def publish(cls, path: Path, about: Any) -> RankDecisions:
        """In the job's main process, before the program's code. Raises OSError."""
        withdraw(path)  # of an earlier attempt
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
        """In any process: that of the job it belongs to, if it belongs to one that lives. Raises OSError.

        The file is unpickled, so it must be what the environment says: others may be able to replace it.
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
        """Append a decision. Raises OSError; the other ranks would wait forever."""
        descriptor = open_regular(_decisions(self.path), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, b"1" if decision else b"0")
        finally:
            os.close(descriptor)
        # For processes that are started from now on in the middle of the program, such as by torch's `spawn`.
        os.environ[SO_FAR] = str(int(os.environ.get(SO_FAR, "0")) + 1)

    def become_leader(self) -> bool:
        """Return whether no process has made a decision yet, so that this one may."""
        try:
            os.close(open_regular(_decisions(self.path), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def first_index(self, anew: bool) -> int:
        """Return the index of the first decision that this process has to follow.

        A process that runs the program `anew`, from its beginning, makes every call that the main process made. A
        process that began in the middle of it does not.
        """
        return 0 if anew else int(os.environ.get(SO_FAR, "0"))

    def wait_for(self, index: int) -> bool:
        """Wait for the decision at `index` and return it. Returns True, which means to stop, if the job is over."""
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
    """The file of the ranks of a job whose report is `report`."""
    return report.with_suffix(".trial")


def withdraw(path: Path) -> None:
    """Remove the files. The processes that could read them are gone. Raises OSError."""
    for file in (path, _decisions(path)):
        file.unlink(missing_ok=True)


def forget() -> None:
    """Remove the variables of another job, in which this sweep was started, from this job's environment."""
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
    """Whether this process is a rank of its job other than the first; None if nothing says that it is a rank.

    `inherited` is what the job's main process was told when it began, which is about something else: a sweep may have
    been started by Slurm, and its jobs and their children have those variables as well.
    """
    torch = sys.modules.get("torch.distributed")
    if torch is not None and torch.is_available() and torch.is_initialized():
        return bool(torch.get_rank() > 0)
    told = [value for name, value in ranks_in_environment().items() if inherited.get(name) != value]
    if not told:
        return None
    return any(value.strip() not in ("", "0") for value in told)
