"""Cross-validation, each fold in a process with a GPU of its own.

    python examples/functions/folds.py                       the GPUs of this machine, or else its CPUs
    python examples/functions/folds.py --devices simulated:4

Nothing here knows of GPUs: a call sees only the devices of its lease, as `CUDA_VISIBLE_DEVICES`.
"""

from __future__ import annotations

import argparse
from concurrent.futures import as_completed

import numpy as np
from sklearn.datasets import load_digits

from gpu_launcher import Pool, PoolExecutor

FOLDS = 5


def accuracy(fold: int, ridge: float) -> float:
    """Of a linear classifier of handwritten digits, on the part of the data that it has not seen."""
    images, labels = load_digits(return_X_y=True)
    images = np.hstack([images / 16, np.ones((len(images), 1))])
    if ridge < 0:
        raise ValueError(f"ridge must not be negative, and is {ridge:g}")
    test = np.arange(len(labels)) % FOLDS == fold
    seen, targets = images[~test], np.eye(10)[labels[~test]]
    weights = np.linalg.solve(seen.T @ seen + ridge * np.eye(seen.shape[1]), seen.T @ targets)
    return float(((images[test] @ weights).argmax(axis=1) == labels[test]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default="auto", help="which devices to use")
    devices = parser.parse_args().devices
    ridges = [0.1, 10.0, 1000.0, -1.0]
    with PoolExecutor(gpus=1, pool=Pool(devices)) as executor:
        calls = {executor.submit(accuracy, fold, ridge): ridge for ridge in ridges for fold in range(FOLDS)}
        found: dict[float, list[float]] = {}
        failed: dict[float, str] = {}
        for call in as_completed(calls):
            ridge = calls[call]
            try:
                found.setdefault(ridge, []).append(call.result())
            except ValueError as error:  # what the call raised, as it raised it
                failed[ridge] = str(error)
    for ridge in ridges:
        if ridge in failed:
            print(f"ridge {ridge:g} failed: {failed[ridge]}")
        else:
            print(f"ridge {ridge:g}: accuracy {np.mean(found[ridge]):.3f} over {len(found[ridge])} folds")


if __name__ == "__main__":
    main()
