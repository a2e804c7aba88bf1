"""Converts a sweep in Hydra's override grammar to one of Optuna's distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    FloatRange,
    Glob,
    IntervalSweep,
    Override,
    RangeSweep,
    Sweep,
)
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hydra_plugins.gpu_pool_launcher._override_text import override_text, unquoted
from hydra_plugins.gpu_pool_launcher._zip import Zip, bare

_MAX_ENUMERATED = 100_000


@dataclass(frozen=True)
class Searched:
    """A searched parameter. If it has choices, `texts` and `values` are these as override texts and as values."""

    distribution: BaseDistribution
    texts: tuple[str, ...] | None = None
    values: tuple[Any, ...] = ()
    zipped: Zip | None = None
    """The zip whose rows are the choices, if they are. Each value is then a dictionary of the members' values."""


def searched(override: Override, options: Sequence[str] | None = None) -> Searched:
    """Convert an override that is a sweep. `options` are the names that a glob matches.

    Raises ValueError with a message that ends with the fix.
    """
    sweep = override.value()
    if isinstance(sweep, Glob):
        return _glob(options)
    assert isinstance(sweep, Sweep)
    _check_tags(sweep)
    if isinstance(sweep, ChoiceSweep):
        return _choices([unquoted(item) for item in sweep.list])
    if isinstance(sweep, RangeSweep):
        return _range(sweep)
    if isinstance(sweep, IntervalSweep):
        return _interval(sweep)
    raise ValueError(f"a {type(sweep).__name__} cannot be searched: use choice, range or interval")


def searched_rows(zipped: Zip) -> Searched:
    """Convert a zip to one categorical parameter, whose choices are the texts of its rows."""
    rows = dict(zip(zipped.rows, zipped.values, strict=True))  # without duplicates
    keys = [bare(key) for key in zipped.keys]
    return Searched(
        CategoricalDistribution([" ".join(row) for row in rows]),
        tuple(" ".join(row) for row in rows),
        tuple(dict(zip(keys, values, strict=True)) for values in rows.values()),
        replace(zipped, rows=tuple(rows), values=tuple(rows.values())),
    )


def on_grid(distribution: FloatDistribution, value: float) -> float:
    """The exact value of the range if `value` differs from it only by rounding; otherwise `value`."""
    if distribution.step is None or not math.isfinite(value):
        return value
    low, step = Decimal(str(distribution.low)), Decimal(str(distribution.step))
    exact = float(low + round((Decimal(str(value)) - low) / step) * step)
    return exact if math.isclose(exact, value, rel_tol=1e-9, abs_tol=1e-9 * float(step)) else value


def _check_tags(sweep: Sweep) -> None:
    for tag in sorted(sweep.tags):
        if tag != "log":
            raise ValueError(f"the tag {tag!r} is unknown: the only one is log, as in tag(log, interval(1e-4, 1))")
        if not isinstance(sweep, IntervalSweep):
            raise ValueError(
                "only an interval can be logarithmic: use tag(log, interval(a, b)), for whole numbers "
                "tag(log, int(interval(a, b)))"
            )


def _glob(options: Sequence[str] | None) -> Searched:
    if options is None:
        raise ValueError("there is no config group to look for this glob in: name the choices, as in choice(a,b)")
    if not options:
        raise ValueError("no config of the group matches: change the glob, or name the choices, as in choice(a,b)")
    return _choices(options)


def _choices(values: Sequence[Any]) -> Searched:
    """Create a categorical parameter with these choices.

    Optuna stores only None, bool, int, float and str, and treats 1, True and 1.0 as the same choice. So lists and
    dictionaries are stored as their text. If two choices would be the same to Optuna, all choices are stored as text.
    """
    if not values:
        raise ValueError("there is nothing to choose from: name at least one value, as in choice(a,b)")
    try:
        by_text = {override_text(value): value for value in values}  # without duplicates
    except TypeError:
        raise ValueError("choices cannot contain a sweep: give single values, as in choice(a,b)") from None
    held = [value if _plain(value) else text for text, value in by_text.items()]
    if len(set(held)) < len(held):
        held = list(by_text)
    return Searched(CategoricalDistribution(held), tuple(by_text), tuple(by_text.values()))


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _interval(sweep: IntervalSweep) -> Searched:
    low, high = sweep.start, sweep.end
    assert low is not None
    assert high is not None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"from {low} to {high} is not an interval: give two finite numbers")
    if low == high:
        raise ValueError(f"the interval from {low} to {high} has no size: give two bounds, or fix the value")
    if low > high:
        raise ValueError(f"the interval from {low} to {high} is reversed: write interval({high}, {low})")
    log = "log" in sweep.tags
    if log and low <= 0:
        raise ValueError(f"a logarithmic interval cannot start at {low}: give a lower bound above 0, or leave out log")
    if isinstance(low, int) and isinstance(high, int):
        return Searched(IntDistribution(low, high, log=log))
    return Searched(FloatDistribution(low, high, log=log))


def _range(sweep: RangeSweep) -> Searched:
    """Convert Hydra's range, which excludes its stop. Floats use decimal arithmetic, as in Hydra 1.4."""
    assert sweep.start is not None
    assert sweep.stop is not None
    if not all(math.isfinite(number) for number in (sweep.start, sweep.stop, sweep.step)):
        raise ValueError("a range needs finite numbers: give them, or use an interval")
    if sweep.step == 0:
        raise ValueError("a range with step 0 has no end: give another step, or use an interval")
    start, stop, step = (Decimal(str(number)) for number in (sweep.start, sweep.stop, sweep.step))
    count = math.ceil((Fraction(stop) - Fraction(start)) / Fraction(step))
    if count <= 0:
        raise ValueError(
            f"the range from {start} to {stop} by {step} is empty: swap the bounds, or change the sign of the step"
        )
    if count == 1 and not (isinstance(sweep.start, int) and isinstance(sweep.stop, int) and sweep.step == 1):
        floats = f"interval({float(start)}, {float(stop)})"
        raise ValueError(
            f"the range from {start} to {stop} by {step} has one value, {start}, because its end is excluded: "
            f"write {floats}, give a smaller step, or fix the value"
        )
    last = start + (count - 1) * step
    low, high, step = min(start, last), max(start, last), abs(step)
    whole = all(isinstance(number, int) for number in (sweep.start, sweep.stop, sweep.step))
    # Hydra 1.3 casts bounds and step; Hydra 1.4 casts each value. A cast that keeps the grid gives a range with both
    # versions. Other casts give choices.
    for cast in getattr(sweep, "transformers", ()):
        name = getattr(cast, "__name__", "")
        if not (name == "cast_float" or (name == "cast_int" and whole)):
            return _choices(_enumerated(sweep, count))
        whole = name == "cast_int"
    if whole:
        return Searched(IntDistribution(int(low), int(high), step=int(step)))
    if not _exact_in_floats(low, high, step):
        return _choices([float(low + i * step) for i in range(_enumerable(count))])
    return Searched(FloatDistribution(float(low), float(high), step=float(step)))


def _enumerated(sweep: RangeSweep, count: int) -> list[Any]:
    _enumerable(count)
    values: Any = sweep.range()
    if isinstance(values, FloatRange):
        values = list(values)
    for cast in getattr(sweep, "transformers", ()):
        values = [cast(value) for value in values]
    return list(values)


def _enumerable(count: int) -> int:
    if count > _MAX_ENUMERATED:
        raise ValueError(f"a range of {count} such values cannot be searched: use a larger step, or an interval")
    return count


def _exact_in_floats(low: Decimal, high: Decimal, step: Decimal) -> bool:
    """Whether Optuna, which uses floats, would search exactly these numbers."""
    if any(Decimal(str(float(number))) != number for number in (low, high, step)):
        return False
    return low == high or float(step) >= max(math.ulp(float(low)), math.ulp(float(high)))
