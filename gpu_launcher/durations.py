"""Reads time spans, such as `90s` or `1h30m`."""

from __future__ import annotations

import math
import re

from gpu_launcher.errors import OptionError

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_PART = re.compile(r"([0-9]{1,12}(?:\.[0-9]{0,9})?)\s*([smhd]?)", re.ASCII)


def read_duration(value: object, option: str) -> float:
    """Return `value` in seconds: a number of seconds, or text such as `90s`, `30m`, `2h`, `1d` or `1h30m`.

    Raises OptionError, which names `option`, for anything else.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    if isinstance(value, str):
        text = value.strip().lower()
        parts = _PART.findall(text)
        if parts and re.sub(r"\s", "", text) == "".join(number + unit for number, unit in parts):
            units = [unit for _, unit in parts]
            if len(parts) == 1 or all(units):
                return sum(float(number) * _UNITS[unit] for number, unit in parts)
    raise OptionError(option, f"{value!r} is not a time span: write seconds, or one like 90s, 30m, 2h or 1h30m")
