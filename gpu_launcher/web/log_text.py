"""Parts of a log as text. Logs may be larger than memory, so no function reads a whole one into it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from gpu_launcher.text import ESCAPE_SEQUENCE

PART_BYTES = 128 * 2**10
"""Maximum number of bytes of a log in one answer."""
SEARCH_BYTES = 2**20
"""Number of bytes that are searched at once."""
MAX_FOUND = 200
"""Maximum number of lines that a search finds."""
MAX_FOUND_LINE = 400
"""Maximum number of characters shown of a found line."""
MAX_QUERY = 200
MAX_TAIL = 4096
"""Maximum number of bytes of an incomplete line that are shown again when it has grown."""

# Line breaks and tabs stay; the rest of C0 and C1, and marks that change the direction of text, do not.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@dataclass(frozen=True, slots=True)
class LogPart:
    """A part of a log, from the byte `start` to before the byte `end`."""

    text: str
    start: int
    end: int
    size: int
    """Size of the whole log when this was read."""
    tail: str = ""
    """What the last line has so far, if more may be written to it. It is not in `text`."""
    tail_bytes: int = 0

    @property
    def next(self) -> int:
        """Where the next part begins: with the line that was not complete, because its text may be replaced."""
        return self.end - self.tail_bytes


@dataclass(frozen=True, slots=True)
class FoundLine:
    """A line that has what was searched for."""

    at: int
    """Where the line begins, in bytes."""
    text: str


def read_part(descriptor: int, start: int | None = None, end: int | None = None) -> LogPart:
    """Read the part from `start`, or to `end`, or the last one. It begins and ends between lines where there are some.

    What the log's last line has so far is its `tail`, because a log may end without a line break.
    """
    size = os.fstat(descriptor).st_size
    if start is not None:
        start = min(max(0, start), size)
        data = os.pread(descriptor, PART_BYTES, start)
        if start + len(data) < size and (last := data.rfind(b"\n")) >= 0:
            data = data[: last + 1]
        return _part(data, start, size)
    end = size if end is None else min(max(0, end), size)
    start = max(0, end - PART_BYTES)
    data = os.pread(descriptor, end - start, start)
    if start and 0 <= (first := data.find(b"\n")) < len(data) - 1:
        start, data = start + first + 1, data[first + 1 :]
    return _part(data, start, size)


def _part(data: bytes, start: int, size: int) -> LogPart:
    end = start + len(data)
    complete = data.rfind(b"\n") + 1
    # Of a progress bar, only the last state can still be seen.
    tail = data[complete:][data[complete:].rstrip(b"\r").rfind(b"\r") + 1 :]
    if end < size or len(tail) > MAX_TAIL:
        return LogPart(readable(data), start, end, size)
    return LogPart(readable(data[:complete]), start, end, size, readable(tail), len(tail))


def search(descriptor: int, query: str, most: int = MAX_FOUND) -> list[FoundLine]:
    """Find lines that contain a text, in any case. The last ones, if there are more than `most`."""
    wanted = query[:MAX_QUERY].encode("utf-8", "surrogateescape")
    pattern = re.compile(re.escape(wanted), re.IGNORECASE)
    found: list[FoundLine] = []
    end = os.fstat(descriptor).st_size
    while end > 0 and len(found) < most:
        start = max(0, end - SEARCH_BYTES)
        data = os.pread(descriptor, end - start, start)
        if start and 0 <= (first := data.find(b"\n")) < len(data) - 1:
            before = start = start + first + 1
            data = data[first + 1 :]
        else:  # all of this is in one line, so what is searched for may begin in the block before
            before = start + len(wanted) - 1 if start else 0
        here: dict[int, FoundLine] = {}
        for match in pattern.finditer(data):
            begin = data.rfind(b"\n", 0, match.start()) + 1
            if begin not in here:
                stop = data.find(b"\n", match.end())
                line = data[begin : stop if stop >= 0 else len(data)]
                here[begin] = FoundLine(start + begin, readable(line[: MAX_FOUND_LINE * 4])[:MAX_FOUND_LINE])
        found = [*list(here.values())[-(most - len(found)) :], *found]
        end = before
    return found


def readable(data: bytes) -> str:
    """Return what a terminal would show: without escape sequences, and of a progress bar its last state."""
    text = ESCAPE_SEQUENCE.sub("", data.decode("utf-8", "replace")).replace("\r\n", "\n")
    if "\r" in text:
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
