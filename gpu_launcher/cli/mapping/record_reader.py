"""Parses records of parameters from JSON Lines or CSV as the bytes arrive. Pure."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from gpu_launcher.cli.mapping.values import Written

LONGEST = 16 * 2**20
"""Largest size of a record in bytes. A longer one is a mistake, such as an unclosed quote; it is not kept in memory."""

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Record:
    """A valid record."""

    line: int
    """The line where it begins, counted from 1."""
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bad:
    """An invalid record."""

    line: int
    problem: str
    """The problem, as a predicate about the line."""
    all: bool = False
    """Whether the rest of the input is unusable, too."""


class _Format(Protocol):
    def take(self, line: int, data: bytes) -> Record | Bad | None:
        """Take a line; return the record that it ends, or None."""

    def end(self) -> Bad | None:
        """The record that the end of the input cuts off, if any."""


class RecordReader:
    """Parses the bytes of an input into records."""

    def __init__(self, *, of_csv: bool) -> None:
        self._format: _Format = _Csv() if of_csv else _JsonLines()
        self._line = 0
        self._held = b""
        self._too_long = False

    def feed(self, data: bytes) -> Iterator[Record | Bad]:
        """Yield the records that end within `data`."""
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._held += line
            yield from self._take()
        self._held += rest
        if len(self._held) > LONGEST:
            self._held, self._too_long = b"", True

    def end(self) -> Iterator[Record | Bad]:
        """Yield what remains at the end of the input."""
        if self._held or self._too_long:
            for found in self._take():
                cut = isinstance(found, Bad) and not found.all
                yield Bad(found.line, f"{found.problem}; the input ends in the middle of it") if cut else found  # type: ignore[union-attr]
        if (bad := self._format.end()) is not None:
            yield bad

    def _take(self) -> Iterator[Record | Bad]:
        line, self._held = self._held, b""
        self._line += 1
        if self._line == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if self._too_long or len(line) > LONGEST:
            self._too_long = False
            yield Bad(self._line, f"is longer than {LONGEST >> 20} MiB")
        elif (found := self._format.take(self._line, line)) is not None:
            yield found


class _JsonLines:
    """JSON Lines: one object on each line. Empty lines are ignored."""

    def take(self, line: int, data: bytes) -> Record | Bad | None:
        """See `_Format`."""
        if not data.strip():
            return None
        try:
            found = json.loads(data.decode())
        except UnicodeDecodeError:
            return Bad(line, "is not UTF-8")
        except json.JSONDecodeError as error:
            return Bad(line, f"is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # a number with thousands of digits, or thousands of brackets
            return Bad(line, f"is not JSON that can be read: {error}")
        if not isinstance(found, dict):
            return Bad(line, f'is not a JSON object, such as {{"lr": 0.1}}, but {_shown(data)}')
        if "" in found:
            return Bad(line, "has a parameter without a name")
        return Record(line, found)

    def end(self) -> None:
        """See `_Format`."""


class _Csv:
    """CSV as spreadsheets write it: names on the first line; fields with commas, quotes or newlines in quotes."""

    def __init__(self) -> None:
        csv.field_size_limit(LONGEST)
        self._names: list[str] | None = None
        self._held: list[str] = []
        self._inside = False
        self._size = 0
        self._begins = 0
        self._broken = False

    def take(self, line: int, data: bytes) -> Record | Bad | None:
        """See `_Format`."""
        if self._broken:
            return None
        try:
            text = data.decode()
        except UnicodeDecodeError:
            self._held.clear()
            self._inside = False
            return self._bad(line, "is not UTF-8")
        if not self._held:
            self._begins, self._size = line, 0
            if not text.strip():
                return None
        self._held.append(text)
        self._size += len(data)
        if self._size > LONGEST:
            self._broken = True
            return Bad(self._begins, f"has a quote that is not closed within {LONGEST >> 20} MiB", all=True)
        self._inside = _inside_quotes(text, self._inside)
        if self._inside:
            return None
        whole = "\n".join(self._held).removesuffix("\r")
        self._held.clear()
        return self._record(whole)

    def _record(self, text: str) -> Record | Bad | None:
        try:
            (fields,) = csv.reader([text], strict=True)
        except (csv.Error, ValueError) as error:
            return self._bad(self._begins, f"is not CSV: {error}")
        if self._names is None:
            if "" in fields or len(set(fields)) < len(fields):
                return self._bad(self._begins, "should give each column a name of its own")
            self._names = fields
            return None
        if len(fields) != len(self._names):
            return Bad(self._begins, f"has {len(fields)} fields, and the first line names {len(self._names)}")
        return Record(self._begins, dict(zip(self._names, map(_value, fields), strict=True)))

    def _bad(self, line: int, problem: str) -> Bad:
        self._broken = self._names is None
        return Bad(line, problem, all=self._broken)

    def end(self) -> Bad | None:
        """See `_Format`."""
        if self._held and not self._broken:
            return Bad(self._begins, "has a quote that is never closed")
        return None


def _inside_quotes(text: str, inside: bool) -> bool:
    """Whether a line ends within a quoted field. `inside` says whether it begins within one.

    A quote opens a quoted field only at the beginning of the field.
    """
    if '"' not in text:
        return inside
    position, field_begins = 0, True
    if inside:
        position, field_begins = _end_of_quoted(text, 0), False
        if position < 0:
            return True
    while position < len(text):
        character = text[position]
        if character == '"' and field_begins:
            position = _end_of_quoted(text, position + 1)
            if position < 0:
                return True
            field_begins = False
            continue
        field_begins = character == ","
        position += 1
    return False


def _end_of_quoted(text: str, position: int) -> int:
    """The position after the closing quote of the field that begins at `position`; -1 if it is not closed."""
    while (position := text.find('"', position)) >= 0:
        if text[position + 1 : position + 2] != '"':
            return position + 1
        position += 2
    return -1


def _value(field: str) -> str | int | Written:
    """The value of a field: a number if it is a valid JSON number; otherwise text, including `007` and `true`."""
    match = _NUMBER.fullmatch(field)
    if match is None or len(field) > 300:
        return field
    if match[1] is None and match[2] is None:
        return field if field == "-0" else int(field)
    number = Written.read(field)
    return number if math.isfinite(number) else field


def _shown(data: bytes) -> str:
    text = data.decode().strip()
    return text if len(text) <= 40 else f"{text[:37]}..."
