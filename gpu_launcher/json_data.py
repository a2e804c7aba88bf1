"""Reads JSON that other users may have written. Values of an unexpected type or size are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 2**16
"""Maximum number of characters of a text."""
MAX_ITEMS = 1024
"""Maximum number of items in a list of texts, such as the devices of a job."""
MAX_TIME = 1e11
"""Latest time, in seconds since the epoch: the year 5138."""


def load_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises ValueError for anything else."""
    try:
        content = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


class Fields:
    """The values of a JSON object. Each method raises ValueError for a missing or invalid value."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content

    def __contains__(self, name: str) -> bool:
        return name in self._content

    def text(self, name: str, limit: int = MAX_TEXT) -> str:
        value = self._content.get(name)
        if not isinstance(value, str) or len(value) > limit:
            raise ValueError(f"{name} is not a text of at most {limit} characters")
        return value

    def text_or_none(self, name: str) -> str | None:
        return None if self._content.get(name) is None else self.text(name)

    def texts(self, name: str) -> tuple[str, ...]:
        values = self._content.get(name)
        if not isinstance(values, list) or len(values) > MAX_ITEMS:
            raise ValueError(f"{name} is not a list of at most {MAX_ITEMS} texts")
        return tuple(Fields({name: value}).text(name) for value in values)

    def integer(self, name: str, least: int = 0, most: int = 2**31) -> int:
        value = self._content.get(name)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} is not an integer from {least} to {most}")
        return value

    def boolean(self, name: str) -> bool:
        value = self._content.get(name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} is not true or false")
        return value

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self._content.get(name)
        if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
            raise ValueError(f"{name} is not a list of numbers")
        try:
            return tuple(map(float, values))
        except OverflowError as error:
            raise ValueError(f"{name} has a number out of range") from error

    def time(self, name: str) -> float:
        value = self._content.get(name)
        if not isinstance(value, (int, float)) or not 0 <= value <= MAX_TIME:
            raise ValueError(f"{name} is not a time")
        return float(value)
