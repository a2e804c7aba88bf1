"""A job that says it is there and stays until it may go, so that all jobs can be looked at together."""

import importlib
import os
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

heavy = importlib.import_module(os.environ.get("BENCH_IMPORT", "torch"))


@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig) -> str:
    place = Path(os.environ["BENCH_PLACE"])
    (place / f"here.{cfg.job}").touch()
    while not (place / "go").exists():
        time.sleep(0.05)
    return heavy.__name__


if __name__ == "__main__":
    main()
