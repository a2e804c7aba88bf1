"""Reads `--param name=VALUES` with Hydra's own parser for sweeps, and builds the grid of all combinations.

No other file of the command line imports Hydra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from random import shuffle
from typing import Any

from gpu_launcher.errors import OptionError

MOST = 10**15
"""Largest number of combinations in a grid. More are probably a mistake, and are refused."""
MOST_VALUES = 10**6
"""Largest number of values of a parameter, which are all kept in memory."""


@dataclass(frozen=True, slots=True)
class Grid:
    """All combinations of values, in order: the last parameter varies fastest. Each is computed on demand."""

    axes: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    """The name and the values of each parameter."""

    @property
    def size(self) -> int:
        """Number of combinations."""
        return prod(len(values) for _, values in self.axes)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The combination at `index`."""
        chosen: dict[str, Any] = {}
        for name, values in reversed(self.axes):
            index, rest = divmod(index, len(values))
            chosen[name] = values[rest]
        return {name: chosen[name] for name, _ in self.axes}


def read_grid(texts: Sequence[str]) -> Grid:
    """Read a grid from texts of the form `name=VALUES`. Raises OptionError."""
    if not texts:
        return Grid()
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    axes: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, values = _axis(parser, text)
        if name in axes:
            raise OptionError("param", f"{name} is given twice: put all its values into one, as in {name}=1,2,3")
        axes[name] = values
    grid = Grid(tuple(axes.items()))
    if grid.size > MOST:
        raise OptionError("param", f"that makes {grid.size} combinations, which are too many")
    return grid


def _axis(parser: Any, text: str) -> tuple[str, tuple[Any, ...]]:
    from hydra.core.override_parser.types import OverrideType, RangeSweep, Transformer, ValueType
    from hydra.errors import HydraException

    try:
        override = parser.parse_override(text)
        name = str(override.key_or_group)
        if override.type is not OverrideType.CHANGE or override.package is not None:
            raise OptionError("param", f"{text!r}: a parameter is written name=VALUES, without +, ~ and @")
        if override.value_type in (ValueType.INTERVAL_SWEEP, ValueType.GLOB_CHOICE_SWEEP):
            raise OptionError("param", f"{text!r}: a grid needs single values: write {name}=1,2,3 or {name}=range(1,4)")
        if not name:
            raise OptionError("param", f"{text!r} has no name: write one before the =, as in lr=1e-3,1e-4")
        if isinstance(override._value, RangeSweep):
            values = _range(name, override._value)
        elif override.is_sweep_override():
            values = list(override.sweep_iterator(transformer=Transformer.identity))
        else:
            values = [override._value]
        plain = tuple(map(_plain, values))
    except OptionError:
        raise
    except (HydraException, ArithmeticError, TypeError, ValueError) as error:  # ranges with a step of 0, inf or nan
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise OptionError(
            "param",
            f"{text!r} is not NAME=VALUES in Hydra's syntax ({why}): write lr=1e-3,1e-4 or n=range(1,5), and values "
            "with special characters between quotes, as in \"text='a, b','c'\"",
        ) from error
    if not values:
        raise OptionError("param", f"{text!r} has no value")
    return name, plain


def _range(name: str, sweep: Any) -> list[Any]:
    values = list(islice(sweep.range(), MOST_VALUES + 1))
    if len(values) > MOST_VALUES:
        raise OptionError(
            "param",
            f"{name} has more than {MOST_VALUES} values: write the parameters to a file or a pipe, and name that "
            "with --from",
        )
    if sweep.shuffle:
        shuffle(values)
    return values


def _plain(value: Any) -> Any:
    """Convert a value of Hydra's parser to a JSON value. Raises ValueError for a range inside another value."""
    from hydra.core.override_parser.types import QuotedString, Sweep

    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, Sweep):
        raise ValueError("a range cannot be one value of several")
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value
