"""The NVML double, compiled, and a machine made of it in which the shipped code runs in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("nvml_double.c")
REPOSITORY = Path(__file__).parents[2]


@dataclass
class Machine:
    """Runs Python code where libnvidia-ml.so.1 is the double in `libraries`, or nothing at all for None."""

    state: Path
    libraries: Path | None

    def has(self, *lines: str) -> None:
        """Replaces the state; the next NVML call, also of a process that runs already, sees it."""
        new = self.state.with_suffix(".new")
        new.write_text("".join(line + "\n" for line in lines))
        new.replace(self.state)

    def run(self, code: str, **environ: str) -> str:
        """What `code` prints. Fails with its traceback where it fails."""
        clean = {
            name: value
            for name, value in os.environ.items()
            if name not in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH")
        }
        clean |= {"NVML_DOUBLE_STATE": str(self.state), "PYTHONPATH": str(REPOSITORY), **environ}
        if self.libraries is not None:
            clean["LD_LIBRARY_PATH"] = str(self.libraries)
        done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.strip()


def compiled(directory: Path, *flags: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the NVML double with")
    library = directory / "libnvidia-ml.so.1"
    name = f"-Wl,-soname,{library.name}"
    strict = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, "-shared", "-fPIC", *strict, *flags, name, "-o", library, SOURCE], check=True)
    return directory


@pytest.fixture(scope="session")
def nvml_double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory, for LD_LIBRARY_PATH, that holds the double."""
    return compiled(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(nvml_double: Path, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "nvml-state", nvml_double)


@pytest.fixture
def old_machine(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Machine:
    """One whose driver is from before MIG."""
    return Machine(tmp_path / "nvml-state", compiled(tmp_path_factory.mktemp("old-nvml"), "-DOLD_DRIVER"))


@pytest.fixture
def machine_without_driver(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "nvml-state", None)
