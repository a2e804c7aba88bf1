"""Jobs whose processes a test reports to be on a GPU. They end when two of them run at once, or after some seconds."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore

HERE = Path.cwd()
SECONDS = 8
"""Long enough to be measured five times while another job waits."""


@dataclass
class Config:
    n: int = 0


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base=None, config_path=None, config_name="config")
def main(cfg: Config) -> int:
    mine = HERE / "use" / str(os.getpid())
    mine.touch()
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and not (HERE / "packed").exists():
        if len(list((HERE / "use").iterdir())) > 1:
            (HERE / "packed").touch()
        time.sleep(0.05)
    mine.unlink()
    return cfg.n


if __name__ == "__main__":
    main()
