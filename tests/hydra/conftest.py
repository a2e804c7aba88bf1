from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.warm import USED_BY_SWEEPS, Warm

PROGRAMS = Path(__file__).parent / "programs"

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]


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


@pytest.fixture(scope="session")
def start() -> Start:
    """Start one of the programs in a directory: `start(directory, "deaths.py", *arguments, **environment)`.

    Instead of a name, `program` may be interpreter arguments such as `("-m", "package.train")`. `within` is a command
    that runs the program, such as `("nohup",)`.
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


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """Forks sweeps. It ends with each file, because other files look for child processes."""
    warm = Warm(USED_BY_SWEEPS, {**os.environ, "PYTHONWARNINGS": "ignore"})
    yield warm
    warm.close()


@pytest.fixture(scope="module")
def run(start: Start, warm: Warm | None) -> Run:
    """Run a program to its end, like `start`. Sweeps run on four simulated devices unless the arguments name others.

    Most of what a short sweep costs are imports, so those that no other command runs are forked.
    """

    def run(
        directory: Path, program: str | tuple[str, ...], *arguments: str, within: tuple[str, ...] = (), **extra: str
    ) -> subprocess.CompletedProcess[str]:
        pool = ["hydra/launcher=gpu_pool"] if "-m" in arguments else []
        if pool and not any(argument.startswith("hydra.launcher.devices=") for argument in arguments):
            pool.append("hydra.launcher.devices=simulated:4")
        if warm is not None and not within:
            what = [str(PROGRAMS / program)] if isinstance(program, str) else program
            return warm.run([*what, *arguments, *pool], {**environment(directory), **extra}, timeout=500, cwd=directory)
        with start(directory, program, *arguments, *pool, within=within, **extra) as process:
            try:
                out, err = process.communicate(timeout=500)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run
