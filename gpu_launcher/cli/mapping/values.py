"""The values of parameters: as text, as JSON, and as names of runs. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

Params = Mapping[str, Any]
"""A combination: names of parameters, and values as JSON has them."""

_NEWLINES = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
"""Which JSON may have in text, and which end a line for many who read lines, `str.splitlines` among them."""


class Written(float):
    """A number that its user wrote in a way that must not get lost, such as `1e-3`, which JSON makes 0.001."""

    text: str

    @classmethod
    def read(cls, text: str) -> Written:
        """Of a number's text. Raises ValueError."""
        number = cls(text)
        number.text = text
        return number


def text(value: object) -> str:
    """A value as an argument: text as it is, everything else as JSON has it (`0.1`, `true`, `null`, `[1, 2]`)."""
    if isinstance(value, str):
        return value
    return value.text if isinstance(value, Written) else to_json(value)


def to_json(value: object) -> str:
    """JSON on one line: as UTF-8 where it can be, which it cannot for lone surrogates."""
    written = json.dumps(value, ensure_ascii=False).translate(_NEWLINES)
    try:
        written.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return written


def digest(params: Params) -> int:
    """A number from 1 to 2**64 - 1 that tells combinations apart."""
    return int.from_bytes(blake2b(json.dumps(params).encode(), digest_size=8).digest(), "big") or 1


def words(params: Params) -> list[str]:
    """`learning_rate=0.001`, `batch_size=32`, for people."""
    return [f"{name}={text(value)}" for name, value in params.items()]
