"""Finds the version of gpu-launcher."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def find_version() -> str:
    """Return the installed version, or the one in `pyproject.toml` in a source tree, or `unknown`."""
    try:
        return version("gpu-launcher")
    except PackageNotFoundError:
        pass
    try:
        found = re.search(r'^name = "gpu-launcher"\nversion = "(.+)"$', _PYPROJECT.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else "unknown"
