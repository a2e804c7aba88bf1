"""Words for people: durations, names of jobs, and text from outside made fit for one line of a terminal."""

from __future__ import annotations

import os
import stat
from collections import Counter
from typing import TYPE_CHECKING

from gpu_launcher.model import Device, DeviceKind, device_list
from gpu_launcher.text import CONTROL, ESCAPE_SEQUENCE, one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def duration(seconds: float, *, tenths: bool = True) -> str:
    """`1.2 s`, `3m 12s`, `2h 05m`, `3d 04h`; without `tenths`, `1 s`. Never wider than eight characters for a year."""
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
    """An estimate, in steps as coarse as it deserves, so that it does not flicker: `about 2m 30s`, `a few seconds`."""
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
    return device_list(device.label for device in devices)


def device_counts(devices: Sequence[Device]) -> str:
    """`4 GPUs`, `8 simulated GPUs`, `2 GPUs and 1 CPU slot`."""
    nouns = {
        DeviceKind.GPU: "GPU",
        DeviceKind.MIG: "MIG instance",
        DeviceKind.SIMULATED: "simulated GPU",
        DeviceKind.CPU: "CPU slot",
    }
    kinds = Counter(device.kind for device in devices)
    return " and ".join(count(number, nouns[kind]) for kind, number in kinds.items()) or "no device"


def log_end(path: str | None, *, lines: int = 10, width: int = 300, window: int = 32 * 1024) -> list[str]:
    """The last lines of a log, cleaned for display; empty if there is none to be had, for whatever reason.

    Reads at most `window` bytes from the end. A line that was rewritten with carriage returns, as progress bars do,
    comes back as it looked last. Not promised: that a line longer than `window` comes back from its beginning.
    """
    if path is None:
        return []
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return []
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return []
        start = max(0, status.st_size - window)
        data = os.pread(descriptor, window, start)
    except OSError:
        return []
    finally:
        os.close(descriptor)
    raw = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    if start > 0 and len(raw) > 1:
        del raw[0]
    shown: list[str] = []
    for line in reversed(raw):
        line = _as_it_looked(line)
        if not line and not shown:
            continue
        shown.append(line if len(line) <= width else line[: width - 1] + "…")
        if len(shown) == lines:
            break
    shown.reverse()
    return shown


def _as_it_looked(line: str) -> str:
    line = ESCAPE_SEQUENCE.sub("", line).expandtabs(4)
    last = next((part for part in reversed(line.split("\r")) if part.strip()), "")
    return CONTROL.sub("", last).rstrip()
