"""Turns what a terminal sends into names of keys. Pure."""

from __future__ import annotations

import codecs
import re

ESCAPE = "escape"
_LETTERS = {"A": "up", "B": "down", "C": "right", "D": "left", "H": "home", "F": "end"}
_NAMES = {
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
    "\t": "tab",
    **{f"\x1b{intro}{letter}": name for intro in "[O" for letter, name in _LETTERS.items()},
    **{f"\x1b[{number}~": "home" for number in (1, 7)},
    **{f"\x1b[{number}~": "end" for number in (4, 8)},
    "\x1b[5~": "page up",
    "\x1b[6~": "page down",
    "\x02": "page up",
    "\x15": "page up",
    "\x06": "page down",
    "\x04": "page down",
}
"""Names of keys that are not a printable character. Ctrl-B, Ctrl-F, Ctrl-U and Ctrl-D scroll, as in less and vi."""
_KEY = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[@-~])|\x1b|.", re.DOTALL)
_PART = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|O)?\Z")
"""The beginning of a sequence whose rest may follow, or the key Escape."""


class KeyDecoder:
    """Decodes keys that may arrive in parts, as they do over a slow connection."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("ignore")
        self._part = ""

    def feed(self, data: bytes) -> list[str]:
        """Return the names of the keys that are complete: `up`, `enter`, ... or the character itself.

        Keys without a name or a character, such as F5, are left out.
        """
        text = self._part + self._utf8.decode(data)
        part = _PART.search(text)
        cut = len(text) if part is None else part.start()
        self._part = text[cut:]
        return _names(text[:cut])

    def flush(self) -> list[str]:
        """Return what has arrived of an incomplete key: Escape, if nothing followed it. Call this a moment later."""
        part, self._part = self._part, ""
        return [ESCAPE] if part == "\x1b" else []


def _names(text: str) -> list[str]:
    found = (_NAMES.get(key, ESCAPE if key == "\x1b" else key) for key in _KEY.findall(text))
    return [name for name in found if name in _WORDS or (len(name) == 1 and name.isprintable())]


_WORDS = {ESCAPE, *_NAMES.values()}
