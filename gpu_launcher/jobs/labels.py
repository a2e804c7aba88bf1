"""Short names for the jobs of a sweep: the overrides that differ between them, with short numbers. Pure.

A job's label is for people. The manifest keeps its overrides unchanged. Values are shortened, but only as far as the
different values of a key stay different. Keys are shortened only if a label is too long.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from gpu_launcher.text import middle_cut

LABEL_ROOM = 48
"""Number of characters above which the keys in labels are shortened."""
MAX_LABEL = 200
"""Maximum length of a label in characters."""
MAX_REMEMBERED = 10_000
"""Maximum number of values remembered for a key. They are remembered so that shortened values differ."""

_SHORTER = ((4, 32), (6, 48), (9, 80), (17, 400))
"""Significant digits of a number and characters of a value, from short to long."""
_NUMBER = re.compile(r"(?<![\w./+-])[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?(?![\w./])")


class Labels:
    """Makes the labels of jobs. A job is given as a list of texts such as `lr=0.1`."""

    def __init__(self, common: Collection[str] | None = None) -> None:
        """Leave out the texts `common`, which all jobs share. None stands for those that all jobs so far share."""
        self._known = common is not None
        self._common: set[str] | None = None if common is None else set(common)
        self._shown: dict[str, dict[str, str]] = {}
        """For each key: full values by their shortened forms."""
        self._level: dict[str, int] = {}
        self._short_keys = False
        """Whether keys are shortened because a label with whole keys was too long."""

    def of(self, job: Sequence[str]) -> str:
        """Return the label of one more job."""
        (label,) = self.of_all([job])
        return label

    def of_all(self, jobs: Sequence[Sequence[str]]) -> list[str]:
        """Return the labels of several jobs, shortened in the same way."""
        alone = self._common is None and len(jobs) == 1
        common = self._learn(jobs)
        varying = [[text for text in job if text not in common] for job in jobs]
        if alone or not any(varying):
            varying = [list(job) for job in jobs]
        for job in varying:
            for text in job:
                self._tell_apart(*_split(text))
        labels = [self._label(job) for job in varying]
        if not self._short_keys and any(len(label) > LABEL_ROOM for label in labels):
            self._short_keys = True
            labels = [self._label(job) for job in varying]
        return labels

    def _learn(self, jobs: Sequence[Sequence[str]]) -> set[str]:
        """Return the texts that all jobs share, including these `jobs`."""
        if self._known:
            assert self._common is not None
            return self._common
        for job in jobs:
            self._common = set(job) if self._common is None else self._common.intersection(job)
        return self._common or set()

    def _tell_apart(self, key: str, value: str) -> None:
        """Find the shortest form in which different values of a key stay different."""
        shown = self._shown.setdefault(key, {})
        level = self._level.setdefault(key, 0)
        short = _shorten(value, level)
        while shown.setdefault(short, value) != value and level < len(_SHORTER) - 1:
            values = [*shown.values(), value]
            level += 1
            shown = {_shorten(one, level): one for one in values}
            short = _shorten(value, level)
        if len(shown) > MAX_REMEMBERED:
            shown = {}
        self._shown[key], self._level[key] = shown, level

    def _label(self, job: Iterable[str]) -> str:
        texts = []
        for text in job:
            key, value = _split(text)
            shown = self._short_key(key) if self._short_keys else key
            texts.append(f"{shown}={_shorten(value, self._level[key])}" if "=" in text else shown)
        return middle_cut(" ".join(texts), MAX_LABEL)

    def _short_key(self, key: str) -> str:
        """Return the shortest end of a dotted key that is not the end of another key."""
        parts = key.split(".")
        for begin in range(len(parts) - 1, 0, -1):
            end = ".".join(parts[begin:])
            if not any(other != key and f".{other}".endswith(f".{end}") for other in self._shown):
                return end
        return key


def _split(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key, value


def _shorten(value: str, level: int) -> str:
    digits, room = _SHORTER[level]
    return middle_cut(_NUMBER.sub(lambda match: short_number(match[0], digits), value), room)


def short_number(text: str, digits: int = 4) -> str:
    """Round a number with a point or an exponent to `digits` significant digits. Shorter numbers stay as they are."""
    mantissa = re.split("[eE]", text.lstrip("+-"))[0]
    if len(mantissa.replace(".", "").strip("0")) <= digits:
        return text
    number = float(text)
    short = f"{number:.{digits}g}"
    if "e+" in short and abs(number) < 1e15:
        short = f"{number:.0f}"
    return short if len(short) < len(text) else text
