"""Train a small neural network on scikit-learn's digits: an ordinary Hydra program, like anyone's."""

from __future__ import annotations

import logging
import os

import hydra
from omegaconf import DictConfig
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """Train as `cfg` says, and return the accuracy on images that the network has not seen."""
    log.info("CUDA_VISIBLE_DEVICES=%s", os.environ.get("CUDA_VISIBLE_DEVICES", "(not set)"))

    images, labels = load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images / 16.0, labels, test_size=cfg.test_share, random_state=cfg.seed, stratify=labels
    )
    network = MLPClassifier(
        hidden_layer_sizes=(cfg.hidden,),
        learning_rate_init=cfg.lr,
        batch_size=cfg.batch_size,
        random_state=cfg.seed,
        **cfg.optimizer,
    )

    accuracy = 0.0
    for epoch in range(1, cfg.epochs + 1):
        network.partial_fit(train_images, train_labels, classes=range(10))
        accuracy = float(network.score(test_images, test_labels))
        if epoch % cfg.log_every == 0 or epoch == cfg.epochs:
            log.info("epoch %d: loss %.4f, accuracy %.4f", epoch, network.loss_, accuracy)

    print(f"accuracy: {accuracy:.4f}")
    return accuracy


if __name__ == "__main__":
    main()
