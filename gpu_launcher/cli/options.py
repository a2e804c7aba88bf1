"""The options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

DEVICE_KINDS = {
    "auto": "all GPUs, or CPU slots on a machine without GPUs",
    "cpu:4": "four CPU slots",
    "simulated:8": "eight simulated GPUs",
}
HOW_DEVICES_ARE_WRITTEN = (
    "auto (all GPUs, or CPU slots on a machine without GPUs), indices (0,2), UUIDs (GPU-1a2b...), cpu:4, or "
    "simulated:8. auto and lists keep to an inherited CUDA_VISIBLE_DEVICES. Default: auto."
)

Decorator = Callable[[Any], Any]


def _complete_devices(context: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(kind, help=text) for kind, text in DEVICE_KINDS.items() if kind.startswith(incomplete)]


def _complete_directories(context: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


def as_flag(option: str) -> str:
    """Return the name of an option as users write it."""
    return option if option.startswith("-") else f"--{option.replace('_', '-')}"


def value(name: str, metavar: str, help: str, default: str | None = None, *names: str, **more: Any) -> Decorator:
    """Create an option with a value."""
    return click.option(name, *names, metavar=metavar, help=help, default=default, **more)


def flag(name: str, help: str) -> Decorator:
    """Create an option without a value. It is None if it is not given."""
    return click.option(name, is_flag=True, default=None, help=help)


def directory(name: str, help: str) -> Decorator:
    # click.Path is not used, because it reads an empty name as the current directory.
    return value(name, "DIRECTORY", help, shell_complete=_complete_directories)


sweep = click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
"""The directory of a sweep or a map. `jobs.sweep_finder` finds it if it is not given."""


sweep_option = directory(
    "--dir",
    "Directory of the sweep. Default: the newest running sweep below the current directory, else the newest sweep.",
)
job_numbers = click.argument("jobs", metavar="JOB...", nargs=-1, required=True)


def nodes(what: str) -> Decorator:
    kinds = "local, ssh:HOST, slurm:COUNT with options of srun, sbatch:COUNT with options of sbatch, ray:COUNT, or "
    kinds += "command:'COMMAND ...'"
    return value("--nodes", "NODE", f"{what}: {kinds}. Can be repeated. See `gpu-launcher guide nodes`.", multiple=True)


def devices(what: str, default: str | None = "auto") -> Decorator:
    text = f"{what}: {HOW_DEVICES_ARE_WRITTEN}"
    return value("--devices", "DEVICES", text, default, shell_complete=_complete_devices)


pool_dir = directory("--pool-dir", "Directory of the pool. Default: $GPU_LAUNCHER_POOL_DIR, else the machine's own.")
busy_memory = value(
    "--busy-memory",
    "MEMORY",
    "Memory that programs outside the pool may use on a GPU before it counts as busy: an amount such as 2GiB, or null "
    "for any amount. Default: 512MiB.",
    "512MiB",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON; `gpu-launcher guide status` describes it.")

gpus = value(
    "--gpus",
    "NUMBER",
    "GPUs for the command: a whole number, or a fraction such as 0.5. Default: 1, or with --memory a part of one GPU.",
)
memory = value(
    "--memory", "MEMORY", "Memory that the command needs on each GPU, such as 20GiB. Lets it share a GPU with others."
)
priority = value(
    "--priority",
    "NUMBER",
    "Rank among waiting requests on this machine, a whole number: higher goes first, below 0 goes after others. Above "
    "0 is for root and the owner of the pool directory. Default: 0.",
)
timeout = value(
    "--timeout",
    "TIME",
    "Time limit, such as 90s, 30m or 2h. The command then gets SIGTERM, and SIGKILL after --grace. A short "
    "command may start while a large one waits. Default: no limit.",
)
