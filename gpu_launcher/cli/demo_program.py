"""Find a good learning rate and width for a made-up network: an ordinary Hydra program, as anyone could write it.

`gpu-launcher demo` copies this file and runs the copy. It trains nothing, and needs no GPU and no data.
"""

import logging
import math
import os
import random
import time
from dataclasses import dataclass

import hydra
from hydra.core.config_store import ConfigStore

import gpu_launcher

log = logging.getLogger(__name__)


@dataclass
class Config:
    """What a sweep may vary."""

    lr: float = 0.03
    width: int = 64
    epochs: int = 6
    epoch_seconds: float = 0.1


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg: Config) -> float:
    """Train as `cfg` says, and return the loss."""
    log.info("training with CUDA_VISIBLE_DEVICES=%s", os.environ.get("CUDA_VISIBLE_DEVICES", "(not set)"))
    best = 0.2 + abs(math.log10(cfg.lr / 0.03)) + 0.1 * abs(math.log2(cfg.width / 128))
    loss = math.inf
    for epoch in range(1, cfg.epochs + 1):
        time.sleep(cfg.epoch_seconds)
        if cfg.lr * cfg.width > 100 and epoch > 2:
            raise FloatingPointError(f"the loss is nan in epoch {epoch}")
        loss = best + 2 * math.exp(-epoch / 2) + random.uniform(0, 0.05)
        log.info("epoch %d: loss %.3f", epoch, loss)
        gpu_launcher.report(loss, step=epoch)  # lets a search prune bad trials; does nothing in a grid
    return loss


if __name__ == "__main__":
    main()
