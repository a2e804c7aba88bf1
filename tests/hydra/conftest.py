from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.warm import USED_BY_SWEEPS, TextProgram, Warm

PROGRAMS = Path(__file__).parent / "programs"

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., TextProgram]


def environment(directory: Path) -> dict[str, str]:
    """The environment of a program in `directory`: with its own pool."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GPU_LAUNCHER_")}
    return {**kept, "GPU_LAUNCHER_POOL_DIR": str(directory / "pool"), "PYTHONWARNINGS": "ignore"}


@pytest.fixture(autouse=True)
def _pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment for launches in the test's own process."""
    for name in [name for name in os.environ if name.startswith("GPU_LAUNCHER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GPU_LAUNCHER_POOL_DIR", str(tmp_path / "pool"))


@pytest.fixture(scope="module")
def start(warm: Warm) -> Start:
    """Start one of the programs in a directory: `start(directory, "deaths.py", *arguments, **environment)`.

    Instead of a name, `program` may be interpreter arguments such as `("-m", "package.train")`. `within` is a command
    that runs the program, such as `("nohup",)`. Without it, the program is forked, because most of its cost is imports.
    """

    def start(
        directory: Path,
        program: str | tuple[str, ...],
        *arguments: str,
        within: tuple[str, ...] = (),
        **extra: str,
    ) -> TextProgram:
        what = [str(PROGRAMS / program)] if isinstance(program, str) else program
        if not within:
            return warm.start_piped([*what, *arguments], {**environment(directory), **extra}, directory)
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


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """Forks sweeps. Ends after each file, because tests in other files count child processes."""
    warm = Warm(USED_BY_SWEEPS, {**os.environ, "PYTHONWARNINGS": "ignore"})
    yield warm
    warm.close()


@pytest.fixture(scope="module")
def run(start: Start) -> Run:
    """Run a program to its end, like `start`. Sweeps run on four simulated devices unless the arguments name others."""

    def run(
        directory: Path, program: str | tuple[str, ...], *arguments: str, within: tuple[str, ...] = (), **extra: str
    ) -> subprocess.CompletedProcess[str]:
        pool = ["hydra/launcher=gpu_pool"] if "-m" in arguments else []
        if pool and not any(argument.startswith("hydra.launcher.devices=") for argument in arguments):
            pool.append("hydra.launcher.devices=simulated:4")
        with start(directory, program, *arguments, *pool, within=within, **extra) as process:
            try:
                out, err = process.communicate(timeout=500)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run
