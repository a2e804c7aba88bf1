"""Reads and formats amounts of memory, such as `20GiB`."""

from __future__ import annotations

import re

from gpu_launcher.errors import OptionError

MIB = 2**20
GIB = 2**30

_UNITS = {unit.lower(): 1024**power for power, unit in enumerate(("", "K", "M", "G", "T"))}
_UNITS |= {f"{unit.lower()}ib": 1024**power for power, unit in enumerate(("K", "M", "G", "T"), 1)}
_UNITS |= {f"{unit.lower()}b": 1000**power for power, unit in enumerate(("", "K", "M", "G", "T"))}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,15})?)\s*([a-z]*)", re.ASCII)


def read_memory(value: object, option: str) -> int:
    """Return `value` in bytes: `20GiB`, `1.5 GiB`, `500MB`, `10G`, or a plain number of bytes.

    KiB, MiB, GiB and TiB are powers of 1024, and so are K, M, G and T alone, as in Slurm and Docker; KB, MB, GB and TB
    are powers of 1000. Case does not matter.

    Raises OptionError, which names `option`, for anything else. An amount between 0 and 1 MiB is refused, too, because
    the unit was probably forgotten.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise OptionError(option, f"{_shown(value)} is not an amount of memory: write one like 20GiB")
    match = _SIZE.fullmatch(str(value).strip().lower())
    if match is None or match[2] not in _UNITS:
        raise OptionError(option, f"{_shown(value)} is not an amount of memory: write one like 20GiB, 500MB or 10G")
    whole, _, decimals = match[1].partition(".")
    digits = int(whole + decimals)
    size: int = digits * _UNITS[match[2]] // 10 ** len(decimals)
    if size < MIB and digits:
        unit = "" if match[2] else f"; write {match[1]}GiB if gibibytes are meant"
        raise OptionError(option, f"{_shown(value)} is less than 1 MiB{unit}")
    return size


def show_memory(size: int) -> str:
    """Format bytes with about three digits: `20 GiB`, `1.5 GiB`, `500 MiB`, `0 MiB`."""
    unit, name = (GIB, "GiB") if size >= GIB else (MIB, "MiB")
    amount = size / unit
    return f"{amount:.0f} {name}" if unit == MIB or amount >= 100 else f"{amount:.1f}".removesuffix(".0") + f" {name}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
