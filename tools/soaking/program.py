"""The job of `make soak`: it ends as its number and its attempt make it end, and keeps a diary of what it did."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from fates import fate_of, value_of
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus

from hydra_plugins.gpu_pool_launcher import _launch


@dataclass
class Config:
    n: int = 0
    seed: int = 0
    diary: str = "diary.txt"


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg: Config) -> int:
    attempt = int(os.environ["GPU_LAUNCHER_ATTEMPT"])
    fate = fate_of(cfg.n, cfg.seed)
    entry = {"n": cfg.n, "attempt": attempt, "devices": os.environ["CUDA_VISIBLE_DEVICES"]}
    write(cfg.diary, {**entry, "did": "began"})
    time.sleep(random.random() * 0.02)
    match fate:
        case "exception":
            raise ValueError(f"job {cfg.n} was meant to fail")
        case "exit":
            os._exit(3)
        case "sys_exit":
            sys.exit(4)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "supervisor":
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
        case "hangs":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "once" if attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "leaves":
            leave_something()
        case "noisy":
            sys.stdout.write("noise\n" * 20_000)
    write(cfg.diary, {**entry, "did": "ended"})
    return value_of(int(HydraConfig.get().job.num))


def write(diary: str, entry: dict[str, object]) -> None:
    """Append a line in one write, which others' lines do not come into."""
    with Path(diary).open("ab", buffering=0) as file:
        file.write(json.dumps(entry).encode() + b"\n")


def leave_something() -> None:
    """A grandchild out of the session, which nobody waits for."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    os.wait()


launch = _launch.launch


def recording_launch(*args: Any) -> Sequence[JobReturn]:
    """As the launcher's own, which leaves what it returns in `returns.jsonl`, for the soak to read."""
    returns = launch(*args)
    with Path("returns.jsonl").open("a") as file:
        for job in returns:
            number = next(int(word.removeprefix("n=")) for word in job.overrides or () if word.startswith("n="))
            value = job.return_value if job.status is JobStatus.COMPLETED else None
            file.write(json.dumps({"number": number, "status": job.status.name, "value": value}) + "\n")
    return returns


if __name__ == "__main__":
    _launch.launch = recording_launch
    main()
