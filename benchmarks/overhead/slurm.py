"""A real Slurm of several nodes on this machine, of which the CPU time of all jobs is known.

`tests/crash/slurm_here.sh` starts it, in a process of its own that adopts the steps of all jobs, so that their CPU time
is counted there. It ends when the benchmark does, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

SCRIPT = Path(__file__).parents[2] / "tests" / "crash" / "slurm_here.sh"
_PR_SET_CHILD_SUBREAPER = 36


def missing() -> str | None:
    """Why there is no Slurm, if so."""
    programs = [name for name in ("slurmctld", "slurmd", "srun", "sbatch", "munged") if shutil.which(name) is None]
    if programs:
        return f"Slurm is not installed ({', '.join(programs)} not found)"
    return None if os.geteuid() == 0 else "only root can start Slurm's daemons"


class SlurmError(Exception):
    """Slurm does not do what it should."""


class Slurm:
    """Nodes n1, n2, ... Use as a context manager. Start it before the first `Run`, which adopts processes, too."""

    def __init__(self, directory: Path, *, nodes: int, gpus: int) -> None:
        """Start the daemons. Raises SlurmError if they do not start."""
        self._directory = directory
        port = 20000 + os.getpid() % 3000 * 4
        environment = {"SLURM_HERE": str(directory), "NODES": str(nodes), "GPUS": str(gpus), "PORT": str(port)}
        environment["SLURM_CONF"] = str(directory / "slurm.conf")
        os.environ.update(environment)
        keeper = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        self._alive, self._said = keeper.stdin, keeper.stdout
        pid, _, nodes_shown = self._said.readline().decode().partition(" ")
        keeper.wait()
        self._keeper = psutil.Process(int(pid))
        if nodes_shown.count("idle") < nodes:
            self.__exit__()
            raise SlurmError(f"Slurm does not start: {nodes_shown}")

    def __enter__(self) -> Slurm:
        return self

    def __exit__(self, *error: object) -> None:
        self._alive.close()
        self._said.read()  # ends when the keeper does
        self._said.close()

    def cpu(self) -> float:
        """Seconds of CPU that all steps have taken, without the daemons. Waits for steps that are about to end."""
        end = time.monotonic() + 60
        while any(child.name() == "slurmstepd" for child in self._keeper.children(recursive=True)):
            if time.monotonic() > end:
                raise SlurmError("steps of Slurm do not end")
            time.sleep(0.05)
        used = self._keeper.cpu_times()
        return float(used.children_user + used.children_system)


def _keep() -> None:
    """Keep Slurm's daemons until standard input ends. Tell the process id and what `sinfo` shows."""
    if os.fork():
        os._exit(0)  # so that this is no child of the benchmark
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), 0, 0, 0)
    started = subprocess.run(
        ["bash", str(SCRIPT), "start"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    print(os.getpid(), " ".join(started.stdout.split()), flush=True)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    while not poll.poll(50):
        _reap()
    subprocess.run(["bash", str(SCRIPT), "stop"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for left in psutil.Process().children(recursive=True):
        left.kill()


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    _keep()
