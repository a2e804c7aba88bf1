"""Formats durations, counts, jobs and devices for messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from gpu_launcher.model import Device, DeviceKind
from gpu_launcher.text import one_line, read_digits

MAX_PLACE = 2**31
"""Largest number of a device in a range of devices."""


def duration(seconds: float, *, tenths: bool = True) -> str:
    """Format seconds as `1.2 s`, `3m 12s`, `2h 05m` or `3d 04h`; without `tenths`, `1 s`.

    Durations below a year take at most eight characters.
    """
    seconds = max(0.0, seconds)
    if tenths and seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = int(seconds + 0.5) if tenths else int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 100:
        return f"{hours}h {minutes:02d}m"
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}h"


def rough_duration(seconds: float) -> str:
    """Format an estimate as `about 2m 30s` or `a few seconds`, in coarse steps so that it does not flicker."""
    if seconds < 10:
        return "a few seconds"
    if seconds < 60:
        return f"about {_up_to(seconds, 5)} s" if seconds <= 55 else "about 1m"
    if seconds < 600:
        minutes, rest = divmod(_up_to(seconds, 30), 60)
        return f"about {minutes}m {rest:02d}s" if rest else f"about {minutes}m"
    minutes = _up_to(seconds / 60, 1 if seconds < 3600 else 5)
    if minutes < 60:
        return f"about {minutes}m"
    return f"about {duration(minutes * 60)}"


def _up_to(value: float, step: int) -> int:
    return int(-(-value // step) * step)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def job_name(number: int, label: str) -> str:
    label = one_line(label)
    return f"job {number} ({label})" if label else f"job {number}"


def device_names(devices: Iterable[Device]) -> str:
    """List devices as `GPU 0-3, GPU 6`."""
    return join_labels(device.label for device in devices)


def join_labels(labels: Iterable[str]) -> str:
    """Join labels of devices. Three or more consecutive ones become a range: `GPU 0-3, GPU 6`."""
    runs: list[list[str]] = []
    before = ("", -1)
    for label in labels:
        kind, _, number = label.rpartition(" ")
        place = read_digits(number, MAX_PLACE)
        at = ("", -1) if place is None else (kind, place)
        if runs and at[0] and at == (before[0], before[1] + 1):
            runs[-1].append(label)
        else:
            runs.append([label])
        before = at
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]}-{run[-1].rpartition(' ')[2]}"] if len(run) > 2 else run
    return ", ".join(parts)


def device_counts(devices: Sequence[Device]) -> str:
    """Count devices by kind: `4 GPUs`, `8 simulated GPUs`, `2 GPUs and 1 CPU slot`."""
    nouns = {
        DeviceKind.GPU: "GPU",
        DeviceKind.MIG: "MIG instance",
        DeviceKind.SIMULATED: "simulated GPU",
        DeviceKind.CPU: "CPU slot",
    }
    kinds = Counter(device.kind for device in devices)
    return " and ".join(count(number, nouns[kind]) for kind, number in kinds.items()) or "no device"
