"""A minimal Hydra program. It leaves a file if a job runs."""

from pathlib import Path

import hydra
import recording  # noqa: F401
from omegaconf import DictConfig


@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig) -> None:
    Path("a_job_ran").touch()


if __name__ == "__main__":
    main()
