from __future__ import annotations

import hydra
from omegaconf import DictConfig

from .work import work


@hydra.main(version_base=None, config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    return work(cfg.lr)


if __name__ == "__main__":
    main()
