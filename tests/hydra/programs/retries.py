"""A job that fails, as `kind` says, until attempt number `good`. It then returns the number of the attempt."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore


class OutOfMemoryError(RuntimeError):
    """Looks like torch's."""


OutOfMemoryError.__module__ = "torch"


def unheard_of() -> None:
    raise ValueError("a mistake")


def torch_oom() -> None:
    try:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    except OutOfMemoryError as error:
        raise RuntimeError("training failed") from error


RUNS = Path("hang-runs")


def hang() -> None:
    RUNS.touch()
    time.sleep(60)


def after_hang() -> None:
    while not RUNS.exists():
        time.sleep(0.01)
    raise ValueError("a late mistake")


WAYS = {
    "hang": hang,
    "after_hang": after_hang,
    "exception": unheard_of,
    "signal": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "sys_exit": lambda: sys.exit(3),
    "oom": torch_oom,
    "timeout": lambda: time.sleep(60),
}


@dataclass
class Config:
    kind: str = "exception"
    good: int = 2
    n: int = 0


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg: Any) -> str:
    attempt = int(os.environ["GPU_LAUNCHER_ATTEMPT"])
    print(f"attempt {attempt} with {os.environ['GPU_LAUNCHER_MEMORY_FRACTION']} of its devices")
    if attempt < cfg.good:
        WAYS[cfg.kind]()
    print(f"GPU_LAUNCHER_LOG={os.environ.get('GPU_LAUNCHER_LOG')}")
    return f"{attempt}"


if __name__ == "__main__":
    main()
