"""A module of the program with generators."""

import numpy as np

UNSEEDED = np.random.default_rng()
SEEDED = np.random.default_rng(11)
