"""A neural network with one hidden layer, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Network:
    """Rectified hidden units and a softmax, trained by Adam or by gradient descent with momentum."""

    def __init__(self, inputs: int, hidden: int, classes: int, rng: np.random.Generator) -> None:
        """Start from small random weights."""
        self.parameters = [
            rng.normal(0, np.sqrt(2 / inputs), (inputs, hidden)),
            np.zeros(hidden),
            rng.normal(0, np.sqrt(1 / hidden), (hidden, classes)),
            np.zeros(classes),
        ]
        self.momentum = [np.zeros_like(parameter) for parameter in self.parameters]
        self.scale = [np.zeros_like(parameter) for parameter in self.parameters]
        self.steps = 0

    def activations(self, images: Array) -> tuple[Array, Array]:
        """Of the hidden units, shape (n, hidden), and of the classes as probabilities, shape (n, classes)."""
        w1, b1, w2, b2 = self.parameters
        hidden = np.maximum(images @ w1 + b1, 0)
        scores = hidden @ w2 + b2
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return hidden, scores / scores.sum(axis=1, keepdims=True)

    def train_step(self, images: Array, labels: NDArray[np.int64], lr: float, momentum: float, beta: float) -> float:
        """Learn from one batch; returns its loss. `beta` 0 is gradient descent, otherwise Adam's second moment."""
        hidden, probabilities = self.activations(images)
        rows = np.arange(len(labels))
        loss = -np.log(probabilities[rows, labels] + 1e-12).mean()
        error = probabilities.copy()
        error[rows, labels] -= 1
        error /= len(labels)
        back = error @ self.parameters[2].T * (hidden > 0)
        gradients = [images.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]
        self.steps += 1
        for i, gradient in enumerate(gradients):
            self.momentum[i] = momentum * self.momentum[i] + (1 - momentum) * gradient
            step = self.momentum[i] / (1 - momentum**self.steps)
            if beta:
                self.scale[i] = beta * self.scale[i] + (1 - beta) * gradient**2
                step = step / (np.sqrt(self.scale[i] / (1 - beta**self.steps)) + 1e-8)
            self.parameters[i] = self.parameters[i] - lr * step
        return float(loss)

    def accuracy(self, images: Array, labels: NDArray[np.int64]) -> float:
        """The share of images that are read rightly."""
        return float((self.activations(images)[1].argmax(axis=1) == labels).mean())


def batches(count: int, size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices of one epoch's batches, in random order."""
    order = rng.permutation(count)
    for start in range(0, count, size):
        yield order[start : start + size]
