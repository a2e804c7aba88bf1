"""A job of Slurm: what Slurm says about it, and how it is cancelled."""

from __future__ import annotations

import os
import subprocess
import time

from gpu_launcher.debug_log import get_logger

_log = get_logger("nodes.slurm_job")

SLURM_SECONDS = 4.0
"""Maximum seconds to wait for an answer about a job."""
CANCEL_TRIES = 3
"""Maximum number of tries to cancel a job. A head waits 15 s for its nodes to end."""
CANCEL_PAUSE = 0.3
"""Seconds between two tries to cancel a job."""
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
"""States of a job that has ended."""


class SlurmJob:
    """A job of Slurm."""

    def __init__(self, number: str, cluster: str = "") -> None:
        """Name the job, and its cluster if that may be another one than that of this machine."""
        self._number = number
        self._where = [f"--clusters={cluster}"] if cluster else []

    def state(self) -> str:
        """Return the state of the job. Empty if it is not known."""
        done = self._run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self._number}")
        if done is None:
            return ""
        if done.returncode == 0:
            return done.stdout.strip() or "COMPLETED"
        return "COMPLETED" if "Invalid job id" in done.stderr else ""  # Slurm has forgotten it

    def cancel(self) -> None:
        """Cancel it, if it has not ended. Otherwise it may stay in the queue for days.

        Try again if that fails: a signal to the process group of this process also ends scancel, until it is in its own
        session. Slurm may also need longer to answer.
        """
        for _ in range(CANCEL_TRIES):
            done = self._run("scancel", "--quiet", self._number)
            if done is not None and done.returncode == 0:
                return
            _log.warning("scancel %s failed: %s", self._number, "no answer" if done is None else done.stderr.strip())
            time.sleep(CANCEL_PAUSE)

    def _run(self, *command: str) -> subprocess.CompletedProcess[str] | None:
        words = [command[0], *self._where, *command[1:]]
        # A user may name clusters there, in which other jobs have this number.
        environ = {name: value for name, value in os.environ.items() if name != "SLURM_CLUSTERS"}
        try:
            return subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SLURM_SECONDS,
                start_new_session=True,
                env=environ,
            )
        except (OSError, subprocess.SubprocessError) as error:
            _log.warning("%s: %s", command[0], error)
            return None
