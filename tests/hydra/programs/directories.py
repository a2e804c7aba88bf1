"""A job that prints its own line, and can wait for the file `go`, or fail."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore


@dataclass
class Config:
    x: int = 0
    place: str = "a"
    fails: int = -1
    holds: bool = False


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    print(f"this is job {cfg.x}")
    Path(f"begun-{cfg.x}-{os.getppid()}").touch()
    while cfg.holds and not Path("go").exists():
        time.sleep(0.01)
    if cfg.x == cfg.fails:
        raise ValueError(f"{cfg.x} fails")
    return cfg.x


if __name__ == "__main__":
    main()
