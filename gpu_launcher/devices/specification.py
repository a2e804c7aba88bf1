"""Reads the option `devices`. Does not look at the machine."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_launcher.errors import OptionError
from gpu_launcher.text import read_digits, short_repr

MAX_COUNT = 4096
"""Most CPU slots or simulated devices; a larger number is taken for a typing error."""

ALONE = ("auto", "cpu", "simulated")
FORMS = "auto, a list of GPU indices or UUIDs such as [0,2], cpu:4, or simulated:8"


@dataclass(frozen=True, slots=True)
class Auto:
    """All GPUs, or CPU slots if there are none."""


@dataclass(frozen=True, slots=True)
class CpuSlots:
    count: int | None
    """Number of slots; None for as many as there are CPUs."""


@dataclass(frozen=True, slots=True)
class SimulatedDevices:
    count: int


@dataclass(frozen=True, slots=True)
class Named:
    """GPUs by index, and GPUs and MIG instances by UUID or prefix, in the user's order. May contain duplicates."""

    names: tuple[int | str, ...]

    number: int | None = None
    """The only name if it is a bare number, which users may have meant as a number of GPUs."""


Specification = Auto | CpuSlots | SimulatedDevices | Named


def read_specification(spec: object, option: str) -> Specification:
    """Read `spec`. Raises OptionError about `option` if it cannot name devices on any machine."""
    if isinstance(spec, str):
        kind, _, count = spec.strip().lower().partition(":")
        if kind == "auto" == spec.strip().lower():
            return Auto()
        if kind in ("cpu", "simulated") and "," not in count:
            return _counted(spec, kind, count, option)
        names = tuple(_name(entry, option) for entry in spec.split(","))
        return Named(names, names[0] if len(names) == 1 and isinstance(names[0], int) else None)
    if isinstance(spec, (list, tuple)):
        if not spec:
            raise OptionError(option, f"the list is empty; use {FORMS}")
        return Named(tuple(_name(entry, option) for entry in spec))
    name = _name(spec, option)
    return Named((name,), name if isinstance(name, int) else None)


def _counted(spec: str, kind: str, count: str, option: str) -> Specification:
    if kind == "cpu" == spec.strip().lower():
        return CpuSlots(None)
    if not (slots := read_digits(count, MAX_COUNT)):
        raise OptionError(option, f"{short_repr(spec)} needs a number from 1 to {MAX_COUNT}, such as {kind}:4")
    return CpuSlots(slots) if kind == "cpu" else SimulatedDevices(slots)


def _name(entry: object, option: str) -> int | str:
    if isinstance(entry, str):
        text = entry.strip()
        if not text:
            raise OptionError(option, f"an entry is empty; use {FORMS}")
        if text.lower().partition(":")[0] in ALONE:
            raise OptionError(option, f"{short_repr(text)} stands alone, not in a list; use {FORMS}")
        if text.lower().startswith(("gpu-", "mig-")):
            return text
        try:
            entry = int(text)
        except ValueError:
            raise OptionError(
                option, f"{short_repr(text)} is neither a GPU's index nor its UUID (GPU-...); use {FORMS}"
            ) from None
    if isinstance(entry, bool) or not isinstance(entry, int):
        raise OptionError(option, f"{short_repr(entry)} is not a device; use {FORMS}")
    if entry < 0:
        raise OptionError(option, f"{entry} is negative; GPUs are counted from 0; use {FORMS}")
    return entry
