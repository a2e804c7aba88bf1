"""Fit a polynomial to a noisy sine: a script that knows neither gpu-launcher nor how many GPUs there are."""

import os
import random
import sys


def design(x, degree):
    return [x**power for power in range(degree + 1)]


def fit(points, degree, steps, rate=0.1):
    """By stochastic gradient descent."""
    weights = [0.0] * (degree + 1)
    dice = random.Random(1)
    for _ in range(steps):
        x, y = dice.choice(points)
        row = design(x, degree)
        error = sum(weight * feature for weight, feature in zip(weights, row, strict=True)) - y
        weights = [weight - rate * error * feature for weight, feature in zip(weights, row, strict=True)]
    return weights


def main():
    name, degree = sys.argv[1], int(sys.argv[2])
    dice = random.Random(0)
    points = [(x / 50 - 1, 2 * (x / 50 - 1) - 1.3 * (x / 50 - 1) ** 3 + dice.gauss(0, 0.1)) for x in range(101)]
    weights = fit(points, degree, steps=100_000)
    errors = [sum(w * f for w, f in zip(weights, design(x, degree), strict=True)) - y for x, y in points]
    loss = sum(error**2 for error in errors) / len(errors)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    print(f"{name}: loss {loss:.3f} with {len(gpus.split(',')) if gpus else 0} GPUs")
    if loss > 0.1:
        sys.exit(f"{name} does not fit")


if __name__ == "__main__":
    main()
