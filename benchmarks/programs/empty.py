"""A job that does nothing, in a program that imports something heavy, as programs that train do."""

import importlib
import os

import hydra
from omegaconf import DictConfig

heavy = importlib.import_module(os.environ.get("BENCH_IMPORT", "torch"))


@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig) -> str:
    # The task uses what was imported, so that launchers that send it to fresh interpreters import it there, too.
    return heavy.__name__


if __name__ == "__main__":
    main()
