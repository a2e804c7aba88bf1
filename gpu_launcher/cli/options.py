"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEVICE_KINDS = (
    ("auto", "all GPUs, or CPU slots where there is none"),
    ("cpu:4", "four CPU slots"),
    ("simulated:8", "eight simulated GPUs"),
)


def _device_kinds(incomplete: str) -> list[tuple[str, str]]:
    return [(kind, meaning) for kind, meaning in DEVICE_KINDS if kind.startswith(incomplete)]


def _directories(incomplete: str) -> list[str]:
    head, slash, start = incomplete.rpartition("/")
    try:
        entries = sorted(Path(f"{head}{slash}" or ".").expanduser().iterdir())
        return [f"{head}{slash}{entry.name}/" for entry in entries if entry.name.startswith(start) and entry.is_dir()]
    except OSError:
        return []


Devices = Annotated[
    str,
    typer.Option(
        "--devices",
        metavar="DEVICES",
        help="What to show, written as hydra.launcher.devices is: auto (everything), 0,2, GPU-1a2b..., cpu:4, "
        "simulated:8. An inherited CUDA_VISIBLE_DEVICES restricts auto and lists.",
        autocompletion=_device_kinds,
    ),
]
BusyMemory = Annotated[
    str,
    typer.Option(
        "--busy-memory",
        metavar="MEMORY",
        help="Judge who is busy as a sweep with this hydra.launcher.busy_memory does: 2GiB, or null for nobody.",
    ),
]
# Not a Path: that would take an empty name for the current directory.
PoolDir = Annotated[
    str | None,
    typer.Option(
        "--pool-dir",
        metavar="DIRECTORY",
        help="The pool to look at. Default: $GPU_LAUNCHER_POOL_DIR, else the machine's own.",
        show_default=False,
        autocompletion=_directories,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as docs/status.md documents it.")]
