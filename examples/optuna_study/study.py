"""A plain Optuna study whose trials run in parallel, each in a process with a GPU of its own."""

import argparse

import numpy as np
import optuna
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import gpu_launcher


def objective(trial):
    """Train a small network on handwritten digits; return its accuracy on images that it has not seen."""
    layers = [
        trial.suggest_int(f"units {layer}", 8, 128, log=True) for layer in range(trial.suggest_int("layers", 1, 3))
    ]
    network = MLPClassifier(
        layers,
        learning_rate_init=trial.suggest_float("learning rate", 1e-4, 1e-1, log=True),
        alpha=trial.suggest_float("alpha", 1e-6, 1e-1, log=True),
        random_state=0,
    )
    images, labels = load_digits(return_X_y=True)
    seen, unseen, seen_labels, unseen_labels = train_test_split(images / 16, labels, random_state=0)
    accuracy = 0.0
    for epoch in range(15):
        network.partial_fit(seen, seen_labels, classes=np.unique(labels))
        accuracy = network.score(unseen, unseen_labels)
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy


def main():
    """Continue the study in study.db, or begin it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--devices", default="auto", help="auto, 0,1, cpu:4, simulated:4")
    parser.add_argument("--directory", help="directory of the search, for `gpu-launcher results` and the like")
    arguments = parser.parse_args()
    study = optuna.create_study(
        study_name="digits",
        storage=gpu_launcher.storage("sqlite:///study.db"),
        direction="maximize",
        sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=3),
        load_if_exists=True,
    )
    gpu_launcher.optimize(
        study,
        objective,
        n_trials=arguments.trials,
        pool=gpu_launcher.Pool(arguments.devices),
        directory=arguments.directory,
    )
    print(f"best accuracy: {study.best_value:.3f} with {study.best_params}")


if __name__ == "__main__":
    main()
