"""Formats the values of parameters as arguments, as JSON and as labels of runs. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

Params = Mapping[str, Any]
"""A combination of parameters: values of JSON's types, by name."""

_NEWLINES = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""Escapes for characters that JSON strings may contain but at which many readers, such as `str.splitlines`, split."""


class Written(float):
    """A number in the user's notation, such as `1e-3`, which JSON would write as 0.001."""

    text: str

    @classmethod
    def read(cls, text: str) -> Written:
        """Read a number. Raises ValueError."""
        number = cls(text)
        number.text = text
        return number


def text(value: object) -> str:
    """Format a value as an argument: strings unchanged, others as JSON (`0.1`, `true`, `null`, `[1, 2]`)."""
    if isinstance(value, str):
        return value
    return value.text if isinstance(value, Written) else to_json(value)


def to_json(value: object) -> str:
    """Format a value as one line of JSON; in ASCII if it has lone surrogates, which UTF-8 cannot encode."""
    written = json.dumps(value, ensure_ascii=False).translate(_NEWLINES)
    try:
        written.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return written


def digest(params: Params) -> int:
    """The hash of a combination, from 1 to 2**64 - 1."""
    return int.from_bytes(blake2b(json.dumps(params).encode(), digest_size=8).digest(), "big") or 1


def words(params: Params) -> list[str]:
    """Format parameters for display: `learning_rate=0.001`, `batch_size=32`."""
    return [f"{name}={text(value)}" for name, value in params.items()]
