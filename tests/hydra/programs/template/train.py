"""A program with configs as the lightning-hydra-template has them."""

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> float:
    return float(cfg.model.optimizer.lr * cfg.data.batch_size)


if __name__ == "__main__":
    main()
