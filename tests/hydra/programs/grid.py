"""A program that appends the process id to the file `composed` whenever a process composes a job's config."""

import os
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore

load_sweep_config = ConfigLoaderImpl.load_sweep_config
COMPOSED = Path("composed").absolute()


def noting(self, *args, **kwargs):
    with COMPOSED.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return load_sweep_config(self, *args, **kwargs)


ConfigLoaderImpl.load_sweep_config = noting


@dataclass
class Config:
    lr: float = 0.1
    n: int = 0
    kind: str = "a"
    fails: int = -1


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    if cfg.n == cfg.fails:
        raise ValueError(f"{cfg.n} was meant to fail")


if __name__ == "__main__":
    main()
