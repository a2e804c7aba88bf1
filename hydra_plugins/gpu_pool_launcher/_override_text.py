"""Writes values as text that Hydra's override parser reads back as the same value and type, and reads its values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from hydra.core.override_parser.types import Glob, QuotedString, Sweep

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_READ_AS_OTHERS = ("null", "true", "false", "inf", "nan")
_ESCAPED_IN_KEYS = re.compile(r"([\\()\[\]{}:=, \t])")


def override_text(value: Any) -> str:
    """The text of a value, to write after the `=` of an override.

    Accepts None, bool, int, float (also numpy's), str, and lists and mappings of these. Raises TypeError for other
    types. OmegaConf's special strings keep their meaning: `${x}` is an interpolation, and `???` is a missing value.
    """
    if value is None:
        return "null"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return "true" if value else "false"
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(key)}:{override_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ",".join(map(override_text, value)) + "]"
    raise TypeError(f"{value!r} of type {type(value).__name__} has no form as an override")


def unquoted(value: Any) -> Any:
    """Remove quotes from a value of Hydra's parser."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [unquoted(item) for item in value]
    if isinstance(value, dict):
        return {key: unquoted(item) for key, item in value.items()}
    return value


def holds_sweep(value: Any) -> bool:
    """Whether a value of Hydra's parser is a sweep or contains one."""
    if isinstance(value, (Sweep, Glob)):
        return True
    items: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(holds_sweep, items))


def _string(text: str) -> str:
    if _BARE.fullmatch(text) and text.lower() not in _READ_AS_OTHERS:
        return text
    return _quote(text)


def _quote(text: str) -> str:
    r"""Quote text so that Hydra's lexer finds its end and Hydra's parser reads the same text.

    Both treat a backslash as an ordinary character unless it precedes a quote: the closing one, or one in the text.
    Hydra halves the backslashes before such a quote, so they are doubled here; `a\b` stays `'a\b'`.
    """
    quote = '"' if "'" in text and '"' not in text else "'"
    within = re.sub(rf"(\\*){quote}", lambda found: found[1] * 2 + "\\" + quote, text)
    trailing = len(within) - len(within.rstrip("\\"))
    return quote + within + "\\" * trailing + quote


def _key(key: Any) -> str:
    """The text of a mapping's key. Hydra's grammar does not allow quotes there."""
    return _ESCAPED_IN_KEYS.sub(r"\\\1", key) if isinstance(key, str) else override_text(key)
