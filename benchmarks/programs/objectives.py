"""Functions to minimise, and how long each trial takes. Shared by the real programs and the simulation."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Objective:
    """A function of named parameters."""

    space: dict[str, str]
    """What is searched, as on Hydra's command line, by the name of the parameter."""
    evaluate: Callable[[Mapping[str, Any]], float]
    minimum: float
    """The least value there is: what a value is above it is the regret."""


def seconds(seed: int, trial: int, *, median: float, sigma: float) -> float:
    """How long a trial takes: lognormal, and the same for every sweeper that is given the same seed."""
    return median * math.exp(sigma * random.Random(f"{seed}/{trial}").gauss(0.0, 1.0))


def _hartmann6(x: Mapping[str, Any]) -> float:
    # https://www.sfu.ca/~ssurjano/hart6.html
    point = [float(x[f"x{i}"]) for i in range(6)]
    exponents = (
        sum(a * (xi - p / 10000) ** 2 for a, xi, p in zip(row, point, center, strict=True))
        for row, center in zip(_A, _P, strict=True)
    )
    return -sum(alpha * math.exp(-exponent) for alpha, exponent in zip(_ALPHA, exponents, strict=True))


_ALPHA = (1.0, 1.2, 3.0, 3.2)
_A = ((10, 3, 17, 3.5, 1.7, 8), (0.05, 10, 17, 0.1, 8, 14), (3, 3.5, 1.7, 10, 17, 8), (17, 8, 0.05, 10, 0.1, 14))
_P = (
    (1312, 1696, 5569, 124, 8283, 5886),
    (2329, 4135, 8307, 3736, 1004, 9991),
    (2348, 1451, 3522, 2883, 3047, 6650),
    (4047, 8828, 8732, 5743, 1091, 381),
)


def _branin(x: Mapping[str, Any]) -> float:
    # https://www.sfu.ca/~ssurjano/branin.html
    x0, x1 = float(x["x0"]), float(x["x1"])
    bent = x1 - 5.1 / (4 * math.pi**2) * x0**2 + 5 / math.pi * x0 - 6
    return bent**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x0) + 10


def _mixed(x: Mapping[str, Any]) -> float:
    """Shaped like a training's loss: the best learning rate depends on the optimiser, width and depth trade off."""
    best_rate = {"sgd": -1.5, "adam": -3.0, "rmsprop": -3.5}[x["optimizer"]]
    worse = {"sgd": 0.15, "adam": 0.0, "rmsprop": 0.1}[x["optimizer"]]
    worse += {"relu": 0.05, "gelu": 0.0, "tanh": 0.2}[x["activation"]]
    width, layers = math.log2(int(x["width"])), int(x["layers"])
    rate = 0.5 * (math.log10(float(x["lr"])) - best_rate) ** 2
    size = 0.02 * (width + layers - 11) ** 2 + 0.05 * (layers - 4) ** 2
    return rate + size + 2.0 * (float(x["dropout"]) - 0.2) ** 2 + worse


OBJECTIVES = {
    "hartmann6": Objective({f"x{i}": "interval(0.0,1.0)" for i in range(6)}, _hartmann6, -3.32237),
    "branin": Objective({"x0": "interval(-5.0,10.0)", "x1": "interval(0.0,15.0)"}, _branin, 0.397887),
    "mixed": Objective(
        {
            "lr": "tag(log,interval(1e-5,1e-1))",
            "dropout": "interval(0.0,0.7)",
            "layers": "range(1,9)",
            "width": "tag(log,interval(8,512))",
            "optimizer": "choice(sgd,adam,rmsprop)",
            "activation": "choice(relu,gelu,tanh)",
        },
        _mixed,
        0.0,
    ),
}
"""The minimum of `mixed` is at lr=1e-3, dropout=0.2, layers=4, width=128, optimizer=adam, activation=gelu."""
