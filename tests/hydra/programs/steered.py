"""Jobs that run until there is a file `go` in the directory from which the sweep was started.

A job fails if that directory has, or gets, a file named `bad-` and its `x`.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

GO = Path("go").absolute()
HERE = Path.cwd()


@dataclass
class Config:
    x: float = 0.0
    ignores: bool = False
    """Whether the job ignores SIGTERM."""


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base=None, config_path=None, config_name="config")
def main(cfg: Config) -> float:
    if cfg.ignores:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    directory = Path(HydraConfig.get().runtime.output_dir)
    (directory / "pids.new").write_text(str(os.getpid()))
    (directory / "pids.new").rename(directory / "pids")
    print(f"attempt {os.environ['GPU_LAUNCHER_ATTEMPT']}")
    bad = HERE / f"bad-{cfg.x:g}"
    while not bad.exists():
        if GO.exists():
            return cfg.x
        time.sleep(0.02)
    raise ValueError("bad")


if __name__ == "__main__":
    main()
