"""Checks installed distributions against the versions that gpu-launcher's metadata requires."""

from __future__ import annotations

import re
from importlib import metadata

from gpu_launcher.errors import UnsupportedVersionError

DISTRIBUTION = "gpu-launcher"

_CLAUSE = re.compile(r"(<=|>=|==|!=|<|>)\s*([0-9]+(?:\.[0-9]+)*)")


def check_version(name: str) -> None:
    """Raise UnsupportedVersionError if a distribution is not installed, or if its version is not supported."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # gpu-launcher runs from a source tree
        return
    wanted = next((wanted for found, wanted in map(parsed, requirements) if found == name), "")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        raise UnsupportedVersionError(name, None, wanted) from None
    if not satisfies(version, wanted):
        raise UnsupportedVersionError(name, version, wanted)


def parsed(requirement: str) -> tuple[str, str]:
    """Split a requirement such as `optuna<6,>=4.8` into name and versions."""
    match = re.match(r"([A-Za-z0-9._-]+)\s*\(?([^;)]*)", requirement)
    assert match is not None, requirement
    clauses = sorted(match[2].replace(" ", "").split(","), key=lambda clause: clause.startswith("<"))
    return match[1], ",".join(clauses)


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is in a range such as `>=1.3.2,<1.5`. A pre-release counts as its release."""
    release = _release(version)
    compare = {
        ">=": lambda limit: release >= limit,
        "<=": lambda limit: release <= limit,
        ">": lambda limit: release > limit,
        "<": lambda limit: release < limit,
        "==": lambda limit: release == limit,
        "!=": lambda limit: release != limit,
    }
    return all(compare[how](_release(limit)) for how, limit in _CLAUSE.findall(wanted))


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version)
    numbers = [int(number) for number in match[1].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
