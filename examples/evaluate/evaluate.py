"""Evaluate a classifier on scikit-learn's digits. It takes its parameters as JSON, and prints its result as JSON."""

from __future__ import annotations

import argparse
import json
import os
import time

from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--params", type=json.loads, default={}, help='such as {"n_neighbors": 3, "weights": "distance"}')
params = parser.parse_args().params

print(f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '(not set)')}", flush=True)
images, labels = load_digits(return_X_y=True)
began = time.perf_counter()
scores = cross_val_score(KNeighborsClassifier(**params), images, labels, cv=3)

print(json.dumps({"accuracy": round(float(scores.mean()), 4), "seconds": round(time.perf_counter() - began, 2)}))
