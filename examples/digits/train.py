"""Train a small neural network on scikit-learn's digits: an ordinary Hydra program, like anyone's."""

from __future__ import annotations

import logging
import os

import hydra
import numpy as np
from network import Network, batches
from omegaconf import DictConfig
from sklearn.datasets import load_digits

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Train as `cfg` says, and return the accuracy on images that the network has not seen."""
    log.info("CUDA_VISIBLE_DEVICES=%s", os.environ.get("CUDA_VISIBLE_DEVICES", "(not set)"))

    rng = np.random.default_rng(cfg.seed)
    images, labels = load_digits(return_X_y=True)
    images = images / 16
    shuffled = rng.permutation(len(images))
    test, train = np.split(shuffled, [int(cfg.test_share * len(images))])
    network = Network(images.shape[1], cfg.hidden, 10, rng)

    accuracy = 0.0
    for epoch in range(1, cfg.epochs + 1):
        losses = [
            network.train_step(images[train][batch], labels[train][batch], cfg.lr, **cfg.optimizer)
            for batch in batches(len(train), cfg.batch_size, rng)
        ]
        accuracy = network.accuracy(images[test], labels[test])
        if epoch % cfg.log_every == 0 or epoch == cfg.epochs:
            log.info("epoch %d: loss %.4f, accuracy %.4f", epoch, np.mean(losses), accuracy)

    print(f"accuracy: {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
