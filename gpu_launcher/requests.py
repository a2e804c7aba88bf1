"""Reads requests from options. Values mean the same in Hydra's options, on the command line and in Python.

Errors use the names of options here; callers rename them to what the user wrote (`OptionError.renamed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gpu_launcher.durations import read_duration
from gpu_launcher.errors import OptionError
from gpu_launcher.model import MAX_PRIORITY, Request
from gpu_launcher.sizes import read_memory
from gpu_launcher.validation import read_integer, read_number

AUTO = "auto"
"""The value of `memory` for what earlier jobs of the sweep needed."""
MIN_SHARE = 0.001
"""Smallest share of a device. Less is probably a mistake."""


def read_request(options: Mapping[str, object], *, learns: bool = False) -> Request:
    """Read a request from `gpus`, `memory`, `priority`, `timeout` and `stagger`. Each may be omitted.

    `learns`: whether it is of a job whose memory may be `auto`, because the sweep learns from earlier ones.
    Raises OptionError.
    """
    auto = options.get("memory") == AUTO
    if auto and not learns:
        raise OptionError("memory", "auto is for the jobs of a sweep or a map: give an amount such as 20GiB")
    memory = None if auto else _memory(options.get("memory"), "memory")
    gpus = _gpus(options.get("gpus"), "gpus")
    if auto and gpus is not None:
        raise OptionError("memory", "with auto, the memory decides what share of one GPU a job gets: leave out gpus")
    if gpus is None and memory is None:
        gpus = 1
    if gpus == 0 and memory is not None:
        raise OptionError("memory", "a job without a GPU has no GPU memory: leave it out, or ask for a GPU")
    request = Request.of(
        gpus,
        memory,
        priority=read_integer("priority", options.get("priority", 0), least=-MAX_PRIORITY, most=MAX_PRIORITY),
        timeout=_timeout(options.get("timeout"), "timeout"),
        stagger=read_duration(options.get("stagger", 0), "stagger"),
    )
    return replace(request, auto_memory=auto)


def _gpus(value: object, option: str) -> float | None:
    if value is None:
        return None
    number = read_number(value)
    if number == -1 or (isinstance(value, str) and value.strip().lower() == "auto"):
        raise OptionError(
            option,
            f"{value!r} does not say how many devices a job gets: give 0, 1, 2, ... or a fraction such as 0.5. "
            "A job sees only its own devices, so inside it devices=auto (or -1) still means all of them",
        )
    if number is None or number < 0 or (number > 1 and not number.is_integer()):
        raise OptionError(
            option,
            f"{value!r} is neither a number of devices nor a part of one: give 0, 1, 2, ... or a fraction such as 0.5",
        )
    if 0 < number < MIN_SHARE:
        raise OptionError(
            option, f"{value!r} is too small a part of a device: give {MIN_SHARE} or more, or 0 for no device"
        )
    return number


def _memory(value: object, option: str) -> int | None:
    if value is None:
        return None
    size = read_memory(value, option)
    if size == 0:
        raise OptionError(option, "must be more than 0 bytes, got 0: give an amount such as 20GiB, or leave it out")
    return size


def _timeout(value: object, option: str) -> float | None:
    if value is None:
        return None
    seconds = read_duration(value, option)
    if seconds == 0:
        raise OptionError(option, "0 would end every job at once: give a time, or leave it out for no limit")
    return seconds
