"""Checks the project's configs for lines that other plugins need but gpu-launcher does not."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from gpu_launcher.cli.checks.finding import Finding, warning

CHECK = "project"
MAX_FOLDERS = 2000
MAX_BYTES = 1_000_000
"""Largest size of a config file in bytes. Larger files are assumed to be data and are skipped."""
_NOT_CONFIGS = {"multirun", "outputs", "logs", "tests", "node_modules", "site-packages", "wandb", "mlruns"}
_OFFICIAL = re.compile(r"\s*_target_\s*:\s*[\"']?(hydra_plugins\.hydra_optuna_sweeper\.[\w.]+)")
_N_JOBS = re.compile(r"(\s*)n_jobs\s*:\s*(\d+)\b")


def examine_project(root: Path) -> Iterator[Finding]:
    for file in _configs(root):
        try:
            lines = file.read_text().splitlines() if file.stat().st_size <= MAX_BYTES else []
        except (OSError, UnicodeDecodeError):
            continue  # not a Hydra config
        shown = file.relative_to(root)
        for number, line in enumerate(lines):
            if found := _OFFICIAL.match(line):
                yield warning(
                    CHECK,
                    f"{shown}:{number + 1} sets the official sweeper's _target_ ({found[1]})",
                    "delete the line if this config should choose hydra/sweeper=optuna_async; on the command line, "
                    "that choice takes precedence",
                )
            elif (found := _N_JOBS.match(line)) and _in_sweeper(file, lines, number, len(found[1])):
                yield warning(
                    CHECK,
                    f"{shown}:{number + 1} limits a search to n_jobs: {found[2]}, however many devices are free",
                    "delete the line, or add hydra.sweeper.n_jobs=null on the command line",
                )


def _configs(root: Path) -> Iterator[Path]:
    for folder, folders, files in islice(os.walk(root), MAX_FOLDERS):
        folders[:] = sorted(name for name in folders if name not in _NOT_CONFIGS and not name.startswith((".", "_")))
        if "pyvenv.cfg" in files:
            folders.clear()
            continue
        yield from (Path(folder, name) for name in sorted(files) if name.endswith((".yaml", ".yml")))


def _in_sweeper(file: Path, lines: list[str], number: int, indent: int) -> bool:
    """Whether a line belongs to `hydra.sweeper`."""
    if indent == 0:
        return file.parent.parts[-2:] == ("hydra", "sweeper")
    for line in reversed(lines[:number]):
        text = line.strip()
        if text and not text.startswith("#") and len(line) - len(line.lstrip()) < indent:
            return text.rstrip(" :").endswith("sweeper")
    return False
