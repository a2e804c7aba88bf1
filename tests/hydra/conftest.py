from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = Path(__file__).parent / "programs"

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]


NOT_OURS = ("CUDA_", "GPU_LAUNCHER_", "HYDRA_")
"""What the environment of the tests may hold and a program must not see."""


def environment(directory: Path) -> dict[str, str]:
    """For a program in `directory`: a pool of its own, and no mask of the machine's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
    return {**kept, "GPU_LAUNCHER_POOL_DIR": str(directory / "pool"), "PYTHONWARNINGS": "ignore"}


@pytest.fixture(autouse=True)
def _pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For launches in the test's own process."""
    for name in [name for name in os.environ if name.startswith(NOT_OURS)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GPU_LAUNCHER_POOL_DIR", str(tmp_path / "pool"))


@pytest.fixture(scope="session")
def start() -> Start:
    """Start one of the programs in a directory: `start(directory, "deaths.py", *arguments, **environment)`.

    Instead of a name, `("-m", "package.train")` and the like say what the interpreter is to run. `within` is a command
    that runs another.
    """

    def start(
        directory: Path,
        program: str | tuple[str, ...],
        *arguments: str,
        within: tuple[str, ...] = (),
        **extra: str,
    ) -> subprocess.Popen[str]:
        what = [str(PROGRAMS / program)] if isinstance(program, str) else program
        return subprocess.Popen(
            [*within, sys.executable, *what, *arguments],
            cwd=directory,
            env={**environment(directory), **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    return start


@pytest.fixture(scope="session")
def run(start: Start) -> Run:
    """The same, to the end; on four simulated devices."""

    def run(
        directory: Path, program: str | tuple[str, ...], *arguments: str, **extra: Any
    ) -> subprocess.CompletedProcess[str]:
        pool = ["hydra/launcher=gpu_pool"] if "-m" in arguments else []
        if pool and not any(argument.startswith("hydra.launcher.devices=") for argument in arguments):
            pool.append("hydra.launcher.devices=simulated:4")
        with start(directory, program, *arguments, *pool, **extra) as process:
            try:
                out, err = process.communicate(timeout=100)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run
