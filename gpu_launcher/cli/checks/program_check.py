"""Checks the Python environment and this process: versions, plugin, start method and limits."""

from __future__ import annotations

import importlib.util
import re
import resource
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from gpu_launcher.cli.checks.finding import Finding, ok, problem, warning
from gpu_launcher.requirements import DISTRIBUTION, parsed, satisfies

SHOWN = ("hydra-core", "optuna", "nvidia-ml-py")
"""Dependencies whose versions are always shown. Others are named only if their version is unsupported."""
PLUGIN = "hydra_plugins.gpu_pool_launcher"
FEW_FILES = 512
"""Limits on open files below this cause a warning. A sweep has about five open files per job, besides its own."""


def examine_program() -> Iterator[Finding]:
    yield _start_method()
    yield _python()
    yield from _packages()
    yield _plugin()
    yield _files()


def _start_method() -> Finding:
    check = "start method"
    if not sys.platform.startswith("linux"):
        return problem(check, f"jobs can be started on Linux only, and this is {sys.platform}", "use Linux, or WSL 2")
    # The check below reads /proc.
    if not Path("/proc/self/task").is_dir():
        return problem(check, "/proc is not mounted, without which jobs cannot be started safely", "mount it")
    from gpu_launcher.processes.linux import other_threads

    if names := other_threads():
        listed = ", ".join(sorted(set(names)))
        return warning(
            check,
            f"spawn: threads run in every Python program here from its start on ({listed}), and forking beside them "
            "is not safe; jobs start in seconds",
            "find what starts them: a sitecustomize.py, or a .pth file in site-packages",
        )
    return ok(
        check,
        "fork: jobs start in milliseconds; a program that has threads or CUDA running when its sweep begins gets "
        "spawn, and says why",
    )


def _python() -> Finding:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    text = f"Python {sys.version.split()[0]} at {sys.executable}"
    tested = _tested_pythons()
    if tested and version not in tested:
        return warning("python", f"{text}, which is not tested", f"use one of {', '.join(tested)}")
    return ok("python", text)


def _tested_pythons() -> list[str]:
    try:
        classifiers = metadata.metadata(DISTRIBUTION).get_all("Classifier") or []
    except metadata.PackageNotFoundError:
        return []
    found = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", str(line)) for line in classifiers]
    return [match[1] for match in found if match]


def _packages() -> Iterator[Finding]:
    check = "packages"
    try:
        own = metadata.version(DISTRIBUTION)
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield problem(check, "gpu-launcher is not installed in this environment", "`pip install gpu-launcher`")
        return
    shown = [f"{DISTRIBUTION} {own}"]
    for requirement in requirements:
        name, wanted = parsed(requirement)
        if "extra ==" in requirement:
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield problem(check, f"{name} is not installed", f"`pip install '{name}{wanted}'`")
            continue
        if not satisfies(version, wanted):
            yield problem(check, f"{name} {version} is not supported", f"`pip install '{name}{wanted}'`")
        elif name in SHOWN:
            shown.append(f"{name} {version} (supported: {wanted})")
    yield ok(check, ", ".join(shown))
    if _installed("pynvml"):
        yield warning(
            check,
            "the deprecated distribution pynvml is installed beside nvidia-ml-py, whose module it may replace",
            "`pip uninstall pynvml && pip install --force-reinstall nvidia-ml-py`",
        )


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _plugin() -> Finding:
    """Check that Hydra finds the plugin.

    Hydra 1.3 searches the namespace package `hydra_plugins`; Hydra 1.4 also reads entry points.
    """
    check = "plugin"
    try:
        found = importlib.util.find_spec(PLUGIN)
    except (ImportError, ValueError):  # `hydra_plugins` is a module, not a package
        found = None
    if found is None:
        namespace = importlib.util.find_spec("hydra_plugins")
        if namespace is not None and namespace.origin is not None:
            return problem(
                check,
                f"Hydra cannot find hydra/launcher=gpu_pool, because {namespace.origin} hides all other plugins",
                "remove that file: hydra_plugins is a namespace that plugins share",
            )
        return problem(
            check, "Hydra cannot find hydra/launcher=gpu_pool", "`pip install --force-reinstall gpu-launcher`"
        )
    if not any(entry.value.startswith(PLUGIN) for entry in metadata.entry_points(group="hydra.plugins")):
        return warning(
            check,
            "Hydra 1.3 finds hydra/launcher=gpu_pool, Hydra 1.4 does not: its entry point is missing",
            "`pip install --force-reinstall gpu-launcher`",
        )
    return ok(check, "Hydra finds hydra/launcher=gpu_pool")


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        most = "4096" if hard == resource.RLIM_INFINITY or hard >= 4096 else str(hard)
        return warning(
            "open files", f"ulimit -n is {shown}: a sweep of many parallel jobs needs more", f"`ulimit -n {most}`"
        )
    return ok("open files", f"ulimit -n is {shown}")
