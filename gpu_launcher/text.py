"""Makes text from other users and programs safe to show in terminals, logs, errors and tables.

Names, command lines, messages and labels come from other users' files, from programs and from the kernel. They may
contain escape sequences that move the cursor or change the terminal's settings, characters that reverse the direction
of text, line breaks that imitate our lines, passwords, or megabytes of text.
"""

from __future__ import annotations

import functools
import re
import reprlib
from pathlib import Path

from gpu_launcher.redaction import redact

MAX_SHOWN = 4096
"""Maximum number of characters shown of such a text."""

ESCAPE_SEQUENCE = re.compile(
    r"""\x1b\[ [0-?]* [ -/]* [@-~]                       # CSI: colours, cursor movement
      | \x1b[\]PX^_] [^\x07\x1b]* (?: \x07 | \x1b\\ )?   # OSC, DCS and other strings: window titles, links
      | \x1b [ -/]* [0-~]                                # two-character sequences
    """,
    re.VERBOSE,
)
# C0 and C1, line and paragraph separators, and the marks that change the direction of text (CVE-2021-42574).
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def one_line(text: str, limit: int = MAX_SHOWN) -> str:
    """Return the text as one line without control characters and secrets, cut to `limit` characters."""
    # Cut first, because the rest is slow for megabytes. The factor leaves room for escape sequences.
    return _one_line(text[: 4 * limit], limit)


@functools.lru_cache(maxsize=512)  # a live view shows the same labels ten times a second
def _one_line(text: str, limit: int) -> str:
    text = redact(CONTROL.sub(" ", ESCAPE_SEQUENCE.sub("", text)).strip())
    # Undecodable bytes of a command line arrive as lone surrogates, which no stream accepts.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def middle_cut(text: str, room: int) -> str:
    """Shorten a text to `room` characters. The middle is cut, because texts often differ at their ends."""
    if len(text) <= room:
        return text
    end = max(0, room - 1) // 2
    return f"{text[: max(0, room - 1 - end)]}…{text[len(text) - end :]}"[:room]


def short_repr(value: object, limit: int = 60) -> str:
    """Return the representation of a value. Long texts and unknown objects in it are cut to `limit` characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = limit
    return short.repr(value)


def read_digits(text: str, most: int) -> int | None:
    """Return the number that a text of ASCII digits stands for. None for another text, and for more than `most`.

    int() takes more than digits, and raises ValueError for thousands of them.
    """
    if not (text.isascii() and text.isdecimal()):
        return None
    digits = text.lstrip("0") or "0"
    return int(digits) if len(digits) <= len(str(most)) and int(digits) <= most else None


def short_path(path: Path) -> str:
    """Return the path, relative to the working directory if it is below that."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (OSError, ValueError):
        return str(path)
