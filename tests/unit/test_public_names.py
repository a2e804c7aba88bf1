"""The public names: they are listed, they work, and every error that they raise is among them."""

from __future__ import annotations

import ast
import builtins
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import gpu_launcher
from gpu_launcher.errors import GpuLauncherError

PACKAGE = Path(gpu_launcher.__file__).parent
OF_COMMANDS_AND_SWEEPS = {
    "CommandError",
    "CompositionError",
    "ManifestError",
    "MapError",
    "ReportError",
    "SearchSpaceError",
    "StudyError",
    "UsageError",
    "WebError",
}
"""Errors of the command line, of sweep directories and of `hydra/sweeper=optuna_async`, which no function raises."""
CAUGHT_INSIDE = {"ServerDiedError"}


def test_all_names_can_be_used_and_are_listed() -> None:
    listed = dir(gpu_launcher)
    for name in gpu_launcher.__all__:
        assert getattr(gpu_launcher, name) is not None
        assert name in listed
    assert sorted(gpu_launcher.__all__) == gpu_launcher.__all__
    assert not {"TYPE_CHECKING", "annotations", "import_module", "_HOMES"} & set(listed)


def test_star_import_brings_exactly_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from gpu_launcher import *", namespace)
    assert sorted(namespace.keys() - {"__builtins__"}) == gpu_launcher.__all__


def test_type_checkers_see_the_names_that_exist() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (branch,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name for node in branch.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"report"} == set(gpu_launcher.__all__) == {*gpu_launcher._HOMES, "report"}  # type: ignore[attr-defined]


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gpu_launcher' has no attribute 'nothing'"):
        gpu_launcher.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_version_is_the_installed_one() -> None:
    assert gpu_launcher.__version__ == version("gpu-launcher")
    assert "__version__" in dir(gpu_launcher)


@pytest.mark.parametrize("with_project", [True, False])
def test_version_is_known_in_a_tree_that_is_not_installed(tmp_path: Path, with_project: bool) -> None:
    (tmp_path / "gpu_launcher").mkdir()
    shutil.copy(PACKAGE / "version.py", tmp_path / "gpu_launcher" / "version.py")
    (tmp_path / "gpu_launcher" / "__init__.py").touch()
    if with_project:
        (tmp_path / "pyproject.toml").write_text('[project]\nname = "gpu-launcher"\nversion = "7.8.9"\n')
    code = "from gpu_launcher.version import find_version; print(find_version())"
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ("7.8.9" if with_project else "unknown")


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys, gpu_launcher; print({'optuna', 'hydra', 'rich', 'cloudpickle', 'psutil'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def errors_of_ours() -> Iterator[type[GpuLauncherError]]:
    for found in pkgutil.walk_packages([str(PACKAGE)], "gpu_launcher."):
        if not found.name.startswith(("gpu_launcher.cli", "gpu_launcher.lightning")):
            importlib.import_module(found.name)
    pending: list[type[GpuLauncherError]] = [GpuLauncherError]
    for kind in pending:
        pending += [one for one in kind.__subclasses__() if one.__module__.startswith("gpu_launcher.")]
        yield kind


def test_every_error_is_public_or_not_for_callers() -> None:
    hidden = {kind.__name__ for kind in errors_of_ours()} - set(gpu_launcher.__all__)
    assert {name for name in hidden if not name.startswith("_")} <= OF_COMMANDS_AND_SWEEPS | CAUGHT_INSIDE


def documented_errors() -> Iterator[tuple[str, str]]:
    """Where public functions, classes and methods say what they raise, and what."""
    for name in gpu_launcher.__all__:
        public = getattr(gpu_launcher, name)
        things = [public, *(vars(public).values() if isinstance(public, type) else ())]
        for thing in things:
            text = thing.__doc__ if isinstance(getattr(thing, "__doc__", None), str) else ""
            for sentence in re.findall(r"[Rr]aises? (.*?)(?:\. |\.$|\Z)", text or "", re.DOTALL):
                for word in re.findall(r"[\w.]*(?:Error|Timeout|Exception|TrialPruned)\b", sentence):
                    yield f"{name}: {sentence[:60]!r}", word


def test_what_public_functions_say_they_raise_can_be_caught_by_name() -> None:
    said = list(documented_errors())
    assert len(said) > 20
    known = {*gpu_launcher.__all__, *vars(builtins)}
    unknown = [(where, word) for where, word in said if word not in known and not word.startswith("optuna.")]
    assert unknown == []
