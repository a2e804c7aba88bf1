"""Stands for imports that take long: remembers which process made them."""

import os

IMPORTED_IN = os.getpid()
