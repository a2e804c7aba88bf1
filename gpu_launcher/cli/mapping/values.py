"""Values of parameters as text, as JSON and as names of runs. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

Params = Mapping[str, Any]
"""A combination of parameters: names, and values of JSON's types."""

_NEWLINES = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""Escapes for characters that JSON allows in strings but that end a line for many readers, such as `str.splitlines`."""


class Written(float):
    """A number that keeps the user's notation, such as `1e-3`, which JSON would write as 0.001."""

    text: str

    @classmethod
    def read(cls, text: str) -> Written:
        """Read a number from its text. Raises ValueError."""
        number = cls(text)
        number.text = text
        return number


def text(value: object) -> str:
    """A value as an argument: strings unchanged, everything else as JSON (`0.1`, `true`, `null`, `[1, 2]`)."""
    if isinstance(value, str):
        return value
    return value.text if isinstance(value, Written) else to_json(value)


def to_json(value: object) -> str:
    """JSON on one line; in ASCII if the value has lone surrogates, which UTF-8 cannot encode."""
    written = json.dumps(value, ensure_ascii=False).translate(_NEWLINES)
    try:
        written.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return written


def digest(params: Params) -> int:
    """A hash of a combination, from 1 to 2**64 - 1."""
    return int.from_bytes(blake2b(json.dumps(params).encode(), digest_size=8).digest(), "big") or 1


def words(params: Params) -> list[str]:
    """Parameters as users read them: `learning_rate=0.001`, `batch_size=32`."""
    return [f"{name}={text(value)}" for name, value in params.items()]
