"""What an installed plugin costs a Hydra program that does not use it.

Two environments are made of links to what is installed: Hydra with its dependencies, and the same with the plugin of
this tree and its metadata, as an installed wheel would have it. The same small program starts in each by turns. An
editable install adds its own path file to every start of Python, which is not counted.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

from overhead.programs import PROGRAMS, Run, Usage, scratch

TREE = Path(__file__).parents[2]
PACKAGES = ("gpu_launcher", "hydra_plugins")


def measure(*, pairs: int) -> dict[str, Any]:
    """Start the program so many times in each."""
    with scratch() as directory:
        sites = {False: directory / "without", True: directory / "with"}
        for site in sites.values():
            _link("hydra-core", site)
        for package in PACKAGES:
            (sites[True] / package).symlink_to(TREE / package)
        _write_metadata(sites[True])
        usages: dict[bool, list[Usage]] = {False: [], True: []}
        for number in range(-1, pairs):
            for plugin in (False, True) if number % 2 else (True, False):
                usage = _start(sites[plugin], directory)
                if number >= 0:  # the first ones compile
                    usages[plugin].append(usage)
    return {
        "pairs": pairs,
        "others_cores": median(usage.others for usage in usages[True]),
        # It is one process that computes, so that its CPU time is what it takes on an idle machine.
        "cpu": _compare(*([1000 * usage.cpu for usage in usages[plugin]] for plugin in (False, True))),
        "wall": _compare(*([1000 * usage.wall for usage in usages[plugin]] for plugin in (False, True))),
    }


def _compare(without: list[float], with_it: list[float]) -> dict[str, Any]:
    added = sorted(more - less for more, less in zip(with_it, without, strict=True))
    return {
        "without_ms": median(without),
        "with_ms": median(with_it),
        "added_ms": median(added),
        "added_quartiles_ms": [added[len(added) // 4], added[(3 * len(added)) // 4]],
    }


def _start(site: Path, directory: Path) -> Usage:
    environment = {"PYTHONPATH": str(site), "BENCH_IMPORT": "json"}
    # Without `site`, which would bring in what is installed.
    command = [sys.executable, "-S", "-s", str(PROGRAMS / "empty.py"), "hydra.run.dir=run"]
    with Run(command, directory, environment) as run:
        return run.wait()


def _link(distribution: str, site: Path, seen: set[str] | None = None) -> None:
    """Link what the distribution installed, and all that it depends on, into `site`."""
    seen = set() if seen is None else seen
    site.mkdir(exist_ok=True)
    if distribution in seen:
        return
    seen.add(distribution)
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return  # a dependency on other conditions than ours
    for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        if top.endswith(".pth") or top in PACKAGES:
            continue
        (site / top).symlink_to(Path(os.fspath(found.locate_file(top))).absolute())
    for requirement in found.requires or []:
        name, _, condition = requirement.partition(";")
        if "extra ==" not in condition:
            _link(re.split(r"[^\w.-]", name.strip(), maxsplit=1)[0], site, seen)


def _write_metadata(site: Path) -> None:
    """As an installer would: Hydra 1.4 finds the plugin by its entry point."""
    text = (TREE / "pyproject.toml").read_text()
    information = site / "gpu_launcher-0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: gpu-launcher\nVersion: 0\n")
    entries = re.search(r'^\[project\.entry-points\."hydra\.plugins"\]\n((?:.+\n)+)', text, re.MULTILINE)
    lines = entries[1].replace('"', "") if entries else ""
    (information / "entry_points.txt").write_text(f"[hydra.plugins]\n{lines}")
