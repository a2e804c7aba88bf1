"""Reads JSON that other users may have written. Values of an unexpected type or size are refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 2**16
"""Maximum number of characters of a text."""
MAX_ITEMS = 1024
"""Maximum number of items in a list of texts, such as the devices of a job."""
MAX_VALUES = 64
"""Maximum number of values of one job."""
MAX_NAME = 100
"""Maximum number of characters in the name of a value."""
MAX_VALUE_TEXT = 200
"""Maximum number of characters of a value that is a text."""
MAX_INTEGER = 2**53
"""Largest integer among the values: up to here, each has a float of its own."""
MAX_TIME = 1e11
"""Latest time, in seconds since the epoch: the year 5138."""


Value = float | str
"""A value in a table of results. Whole numbers and booleans are numbers."""
Values = dict[str, Value]
"""The values of one job, by name."""


def is_value(value: object) -> bool:
    """Whether a value that came from JSON or from a program fits into a table."""
    if type(value) is int:
        return -MAX_INTEGER <= value <= MAX_INTEGER
    return type(value) in (float, bool) or (type(value) is str and len(value) <= MAX_VALUE_TEXT)


def values_in(content: Mapping[Any, Any]) -> Values:
    """Return those of a program's values that fit into a table. The names of the others are not in the result."""
    fitting = ((name, value) for name, value in content.items() if type(name) is str and len(name) <= MAX_NAME)
    return dict(itertools.islice(((name, value) for name, value in fitting if is_value(value)), MAX_VALUES))


def load_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises ValueError for anything else."""
    try:
        content = json.loads(data.decode())  # which is quicker than bytes, whose encoding would be guessed
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
        if any(not isinstance(value, str) or len(value) > MAX_TEXT for value in values):
            raise ValueError(f"{name} has an item that is not a text of at most {MAX_TEXT} characters")
        return tuple(values)

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

    def values(self, name: str) -> Values:
        values = self._content.get(name)
        if not isinstance(values, dict) or len(values) > MAX_VALUES:
            raise ValueError(f"{name} is not an object of at most {MAX_VALUES} values")
        if not all(len(key) <= MAX_NAME and is_value(value) for key, value in values.items()):
            raise ValueError(f"{name} has a value that does not fit into a table")
        return values

    def time(self, name: str) -> float:
        value = self._content.get(name)
        if not isinstance(value, (int, float)) or not 0 <= value <= MAX_TIME:
            raise ValueError(f"{name} is not a time")
        return float(value)
