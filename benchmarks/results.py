"""How long `gpu-launcher results` takes: the CPU time of the command on a sweep of 20,000 jobs, best of several runs.

The sweep is a manifest that this program writes. Nothing is run.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from gpu_launcher.jobs.events import JobEnded, JobStarted, Outcome
from gpu_launcher.jobs.figures import Figures
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.model import Device, DeviceKind

COMMANDS = ([], ["--csv"], ["--sort", "-loss", "--top", "10"], ["--pivot", "lr,seed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_sweep(Path(directory), options.jobs)
        for arguments in COMMANDS:
            best = min(cpu_seconds(["results", directory, *arguments]) for _ in range(options.rounds))
            print(f"results {' '.join(arguments):24} {best:.2f} s")


def write_sweep(directory: Path, jobs: int) -> None:
    gpu = Device("GPU-0", 0, "a GPU", DeviceKind.GPU)
    planned = [Job(n, "", [f"lr={n % 100}", f"seed={n // 100}", "model=big"]) for n in range(jobs)]
    recorder = Recorder(directory, planned, "train.py")
    for job in planned:
        log = str(directory / str(job.number) / "job.log")
        figures = Figures({"loss": 1 / (1 + job.number)}, 2**30)
        recorder.handle(JobStarted(0.0, job.number, "", (gpu,), log, 1))
        recorder.handle(JobEnded(0.0, job.number, "", (gpu,), Outcome.COMPLETED, 1.0, None, log, figures=figures))
    recorder.close()


def cpu_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "gpu_launcher.cli", *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
