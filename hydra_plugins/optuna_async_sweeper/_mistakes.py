"""Suggests the line to write for a value that looks like a search but is not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra_plugins.gpu_pool_launcher._override_text import override_text

FORMS = "a search is written as interval(0.0,1.0), tag(log, interval(1e-4,1.0)), range(1,9) or choice(a,b)"
_SWEEPS = ("choice", "range", "interval", "glob", "shuffle", "sort", "tag")
_CASTS = ("int", "float", "str", "bool")
_CALL = re.compile(rf"\s*(?:(?:{'|'.join(_CASTS)})\s*\(\s*)*(?:{'|'.join(_SWEEPS)})\s*\(.*\)\s*", re.DOTALL)
_RANGE_IN_WORDS = re.compile(
    r"\s*(?P<a>[-+]?[\d.]+(e[-+]?\d+)?)\s*(\.\.+|:|-|to|\s)\s*(?P<b>[-+]?[\d.]+(e[-+]?\d+)?)\s*", re.I
)

_KIND = ("type", "distribution", "kind", "dist", "_target_")
_LOW = ("low", "min", "lower", "start", "min_value")
_HIGH = ("high", "max", "upper", "end", "stop", "max_value")
_BOTH = ("bounds", "range", "interval")
_CHOICES = ("choices", "values", "options", "categories", "choice", "categorical")
_STEP = ("step", "q")
_LOG = ("log", "log_scale", "logscale")
_KEYS = {*_KIND, *_LOW, *_HIGH, *_BOTH, *_CHOICES, *_STEP, *_LOG, "value_type", "scale", "base", "name", "default"}
"""Keys in the search spaces of the official sweeper (formerly), Hydra's Ax sweeper, Ray Tune, W&B and others."""


def is_call(text: str) -> bool:
    """Whether a text is a call of a sweep in Hydra's grammar, such as `interval(0,1)`.

    A comma-separated list does not count, because it may be plain text.
    """
    return _CALL.fullmatch(text) is not None


def described_search(value: Any) -> str | None:
    """The sweep that a dictionary such as {type: float, low: 0, high: 1} describes; None if it describes none."""
    if not isinstance(value, Mapping) or not value or not {str(key).lower() for key in value} <= _KEYS:
        return None
    said = {str(key).lower(): one for key, one in value.items()}
    choices = _first(said, _CHOICES)
    if isinstance(choices, Sequence) and not isinstance(choices, str):
        return instead_of_list(choices)
    both = _first(said, _BOTH)
    if isinstance(both, Sequence) and not isinstance(both, str) and len(both) == 2:
        low, high = both
    else:
        low, high = _first(said, _LOW), _first(said, _HIGH)
    if not (_number(low) and _number(high)):
        return None
    kind = " ".join(str(said.get(word, "")) for word in (*_KIND, "value_type", "scale")).lower()
    log = any(said.get(word) is True for word in _LOG) or "log" in kind
    step = _first(said, _STEP)
    whole = "int" in kind
    return _numbers(low, high, step if _number(step) and not log else None, log=log, whole=whole)


def nested_searches(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield the searches described within a dictionary or a list, as pairs of key and sweep."""
    if (found := described_search(value)) is not None:
        yield key, found
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from nested_searches(one, f"{key}.{name}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for one in value:
            yield from nested_searches(one, key)
    elif isinstance(value, str) and is_call(value):
        yield key, value.strip()


def instead_of_text(text: str) -> str | None:
    """The sweep that a text such as `0..1` or `1e-4:1e-1` may mean."""
    found = _RANGE_IN_WORDS.fullmatch(text)
    return f"interval({found['a']}, {found['b']})" if found else None


def instead_of_words(text: str) -> str | None:
    """The sweep that a text such as `interval 0 1` may mean."""
    found = re.fullmatch(rf"\s*({'|'.join(_SWEEPS)})[\s:]\s*([-+\d.].*)", text)
    if found is None:
        return None
    arguments = ",".join(re.split(r"[,;\s]+", found[2].strip()))
    return f"{found[1]}({arguments})"


def instead_of_call(text: str) -> str | None:
    """The sweep that a call of a function unknown to Hydra, such as `uniform(0,1)`, may mean."""
    text, comment, _ = text.partition(" #")
    text = text.strip()
    if comment and is_call(text):
        return text
    found = re.fullmatch(r"(\w+)\s*([(\[{])(.*)[)\]}]", text, re.DOTALL)
    if (unclosed := text.count("(") - text.count(")")) > 0 and text.startswith(_SWEEPS):
        return text.rstrip(" ,") + ")" * unclosed
    if found is None:
        return None
    name, bracket, arguments = found[1].lower(), found[2], found[3]
    if name == "interval" and arguments.count(",") == 2:
        return f"range({arguments})"
    if name in (*_SWEEPS, *_CASTS):
        return None if bracket == "(" and name == found[1] else f"{name}({arguments})"
    bounds = ",".join(arguments.split(",")[:2])
    if "log" in name:
        inner = f"int(interval({bounds}))" if "int" in name else f"interval({bounds})"
        return f"tag(log, {arguments if is_call(arguments) else inner})"
    if near := difflib.get_close_matches(name, _SWEEPS, 1, 0.75):
        return f"{near[0]}({arguments})"
    if any(word in name for word in ("int", "linspace", "arange", "quniform", "discrete")):
        return f"range({arguments})"
    if any(word in name for word in ("uniform", "float", "real", "between")):
        return f"interval({bounds})"
    if any(word in name for word in ("categor", "option", "select", "one_of", "oneof", "values")):
        return f"choice({arguments})"
    return None


def _numbers(low: Any, high: Any, step: Any, *, log: bool, whole: bool) -> str:
    if step is not None:
        if whole:
            low, high, step = int(low), int(high), int(step)
        return f"range({low}, {_sum(high, step)}, {step})"  # a range excludes its stop
    sweep = f"int(interval({int(low)}, {int(high)}))" if whole else f"interval({float(low)!r}, {float(high)!r})"
    return f"tag(log, {sweep})" if log else sweep


def _sum(high: Any, step: Any) -> Any:
    return float(f"{high + step:.12g}") if isinstance(high, float) or isinstance(step, float) else high + step


def instead_of_list(values: Sequence[Any]) -> str:
    """The sweep over the items of a list."""
    try:
        return f"choice({', '.join(map(override_text, values))})"
    except TypeError:
        return "choice(...)"


def _first(said: Mapping[str, Any], words: Sequence[str]) -> Any:
    return next((said[word] for word in words if word in said), None)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
