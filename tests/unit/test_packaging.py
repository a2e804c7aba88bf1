"""What is shipped: one version, the declared dependencies, and archives that install and work.

The tests of archives take them from `GPU_LAUNCHER_DIST` if it is set, as the matrix does, and else build them.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
PACKAGES = ("gpu_launcher", "hydra_plugins")
PYPROJECT = (TREE / "pyproject.toml").read_text()

needs_packages = pytest.mark.skipif(
    not all((TREE / package).is_dir() for package in PACKAGES), reason="needs the source tree"
)

# What the packages may import, by the dependency that brings it.
MODULES = {
    "hydra-core": {"hydra", "omegaconf", "yaml"},
    "optuna": {"optuna", "sqlalchemy", "numpy"},
    "greenlet": set(),  # Optuna uses it
    "nvidia-ml-py": {"pynvml"},
    "cloudpickle": {"cloudpickle"},
    "psutil": {"psutil"},
    "rich": {"rich"},
    "click": {"click"},
}
OPTIONAL = {
    "jinja2",
    "markupsafe",
    "matplotlib",
    "optuna_dashboard",
    "pandas",
    "plotly",
    "ray",
    "starlette",
    "uvicorn",
}
"""Used where it is installed."""


def declared_version() -> str:
    (version,) = re.findall(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)
    return str(version)


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((TREE / package).rglob("*.py"))]


def test_the_installed_version_is_the_one_in_pyproject() -> None:
    assert importlib.metadata.version("gpu-launcher") == declared_version()


@needs_packages
def test_no_source_repeats_the_version() -> None:
    repeats = re.compile(rf"__version__\s*=\s*['\"]|['\"]{re.escape(declared_version())}['\"]")
    assert [str(path) for path in sources() if repeats.search(path.read_text())] == []


def test_the_changelog_has_a_section_for_the_version() -> None:
    assert f"## {declared_version()}" in (TREE / "CHANGELOG.md").read_text()


def test_the_citation_has_the_version() -> None:
    assert f"version: {declared_version()}\n" in (TREE / "CITATION.cff").read_text()


def test_the_metadata_names_what_is_supported() -> None:
    metadata = importlib.metadata.metadata("gpu-launcher")
    classifiers = metadata.get_all("Classifier") or []
    for python in ("3.10", "3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {python}" in classifiers
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert {"hydra", "launcher", "gpu"} <= set(metadata["Keywords"].split(","))
    assert metadata["Summary"]


def test_the_dependencies_are_the_ones_that_have_a_reason() -> None:
    requirements = importlib.metadata.requires("gpu-launcher") or []
    names = {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements if "extra ==" not in requirement}
    assert names == set(MODULES)


@needs_packages
def test_the_packages_import_only_what_is_declared() -> None:
    known = {*sys.stdlib_module_names, *PACKAGES}.union(*MODULES.values(), OPTIONAL)
    unknown = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            unknown |= {(str(path), name) for name in names if name.partition(".")[0] not in known}
    assert unknown == set()


def test_hydra_1_4_finds_the_plugins_by_their_entry_points() -> None:
    found = importlib.metadata.distribution("gpu-launcher").entry_points.select(group="hydra.plugins")
    assert "gpu_pool" in found.names
    for entry_point in found:
        assert entry_point.load().__module__.startswith("hydra_plugins.")


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the sdist."""
    if given := os.environ.get("GPU_LAUNCHER_DIST"):
        return Path(given)
    if not (TREE / "gpu_launcher").is_dir():
        pytest.skip("needs the source tree, or archives in GPU_LAUNCHER_DIST")
    pytest.importorskip("build")
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(directory), str(TREE))
    return directory


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(dist: Path) -> Path:
    (path,) = dist.glob("*.tar.gz")
    return path


def run(*command: str, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"gpu_launcher-{declared_version()}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        pages = {name: archive.read(name).decode() for name in names if "/cli/pages/" in name}
    assert {name.partition("/")[0] for name in names} == {*PACKAGES, info}
    assert {"gpu_launcher/py.typed", "hydra_plugins/gpu_pool_launcher/__init__.py"} <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    assert "hydra_plugins/__init__.py" not in names, "other plugins must be able to share the namespace"
    assert not [name for name in names if "/tests/" in name or name.endswith((".pyc", ".so"))]
    assert "[hydra.plugins]\ngpu_pool = " in entry_points
    assert metadata.endswith((TREE / "README.md").read_text())
    assert pages == {f"gpu_launcher/cli/pages/{path.name}": path.read_text() for path in (TREE / "docs").rglob("*.md")}


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_the_sdist_holds_what_is_needed_to_build_and_test(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        top = f"gpu_launcher-{declared_version()}/"
        names = {name.removeprefix(top) for name in archive.getnames()}
    pages = {
        str(path.relative_to(TREE)) for path in (TREE / "docs").rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    assert pages <= names
    assert {
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "SECURITY.md",
        "examples/digits/conf/config.yaml",
        "gpu_launcher/py.typed",
        "hydra_plugins/gpu_pool_launcher/__init__.py",
        "pyproject.toml",
        "tests/unit/test_packaging.py",
        "tools/matrix.py",
    } <= names


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("archive", ["wheel", "sdist"])
def test_it_installs_with_its_dependencies_alone_and_hydra_sees_it(
    archive: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    home = tmp_path / "venv"
    run(sys.executable, "-m", "venv", str(home))
    python = str(home / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", str(request.getfixturevalue(archive)))
    (tmp_path / "app.py").write_text(
        textwrap.dedent(
            """
            import hydra

            @hydra.main(version_base="1.3")
            def main(cfg):
                return cfg.x

            if __name__ == "__main__":
                main()
            """
        )
    )
    assert "GpuPoolLauncher" in run(python, "app.py", "--info", "plugins", cwd=tmp_path)
    assert "GpuPoolLauncher" in run(python, "app.py", "hydra/launcher=gpu_pool", "--cfg", "hydra", cwd=tmp_path)
    options = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2", "hydra.launcher.pool_dir=pool")
    run(python, "app.py", "-m", "+x=1,2,3", *options, cwd=tmp_path)
    (sweep,) = (tmp_path / "multirun").glob("*/*")
    assert {path.name for path in sweep.iterdir() if path.is_dir()} >= {"0", "1", "2"}
    assert run(str(home / "bin" / "gpu-launcher"), "guide") == (TREE / "docs" / "guide.md").read_text()
    assert "8 jobs: 7 completed, 1 failed" in run(str(home / "bin" / "gpu-launcher"), "demo", cwd=tmp_path)
