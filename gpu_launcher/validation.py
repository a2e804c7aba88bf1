"""Checks option values for all entry points. The checks raise OptionError, with the same wording everywhere."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, TypeVar, cast, get_args

from gpu_launcher.errors import OptionError

StartMethod = Literal["auto", "fork", "spawn"]
"""The way jobs are started: `fork` from the program, `spawn` in fresh interpreters, `auto` forks if that is safe."""

T = TypeVar("T")


def read_number(value: object) -> float | None:
    """Return `value` as a number if it is a finite number or the text of one; otherwise return None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def integer(option: str, value: object, *, least: int, most: int | None = None, or_else: str = "") -> int:
    """Return `value` if it is an int within bounds. `or_else` describes other values that the option accepts."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"from {least} to {most}"
        raise OptionError(option, f"must be an integer {bounds}{or_else and f', or {or_else}'}, got {value!r}")
    return value


def read_integer(option: str, value: object, *, least: int, most: int | None = None, or_else: str = "") -> int:
    """Like `integer`, but also accepts whole numbers in other forms, such as "3" or 3.0."""
    number = read_number(value)
    if number is not None and number.is_integer():
        value = int(number)
    return integer(option, value, least=least, most=most, or_else=or_else)


def one_of(option: str, value: T, allowed: Collection[object]) -> T:
    """Return `value` if it is `allowed`."""
    if value not in allowed:
        listed = ", ".join("null" if choice is None else str(choice) for choice in allowed)
        raise OptionError(option, f"must be one of {listed}, got {value!r}")
    return value


def true_or_false(option: str, value: object) -> bool:
    """Return `value` if it is a bool."""
    if not isinstance(value, bool):
        raise OptionError(option, f"must be True or False, got {value!r}")
    return value


def read_start_method(value: object) -> StartMethod:
    """Read the option `start_method`."""
    return cast("StartMethod", one_of("start_method", value, get_args(StartMethod)))
