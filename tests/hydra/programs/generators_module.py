"""A module of the program that has random generators."""

import numpy as np

UNSEEDED = np.random.default_rng()
SEEDED = np.random.default_rng(11)
