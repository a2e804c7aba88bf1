"""Fixtures that run the command line in separate processes, and programs that hold leases."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

import gpu_launcher.cli
from tests.warm import Warm

REPOSITORY = Path(__file__).parents[2]
HOLDER = Path(__file__).parent / "holder.py"
GIB = 2**30
CLI = (sys.executable, "-m", "gpu_launcher.cli")
USED_BY_COMMANDS = ("gpu_launcher.jobs.sweep", "hydra.core.override_parser.overrides_parser", "rich.live", "sqlite3")
"""Modules outside gpu_launcher.cli that commands import when they need them."""
NOT_OURS = ("GPU_LAUNCHER_", "LD_LIBRARY_PATH")

Done = subprocess.CompletedProcess[str]


def environment(**extra: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
    return {**kept, "PYTHONPATH": str(REPOSITORY), **extra}


@dataclass
class Cli:
    """Runs `gpu-launcher` on one pool, by default on a machine whose driver is not loaded."""

    pool: Path
    environ: dict[str, str]
    warm: Warm
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __call__(self, *arguments: str, **environ: str) -> Done:
        return self.warm.run(["-m", "gpu_launcher.cli", *arguments], {**self.environ, **environ}, timeout=200)

    def lines(self, *arguments: str, **environ: str) -> list[str]:
        """The lines that a command prints. It must succeed and write nothing to stderr."""
        done = self(*arguments, **environ)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout.splitlines()

    def json(self, *arguments: str, **environ: str) -> Any:
        return json.loads("\n".join(self.lines(*arguments, "--json", **environ)))

    def hold(self, *requests: Sequence[Any]) -> subprocess.Popen[str]:
        """Start another program, with tickets for these requests (see holder.py) and leases on what was free."""
        holder = subprocess.Popen(
            [sys.executable, str(HOLDER), str(self.pool), json.dumps(requests)],
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        return holder

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()


def _ending(cli: Cli) -> Iterator[Cli]:
    try:
        yield cli
    finally:
        cli.end()


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return tmp_path / "pool"


@pytest.fixture(scope="module")
def warm(nvml_double: Path) -> Iterator[Warm]:
    """Forks commands that need no terminal. It ends with each file, because other files look for child processes."""
    commands = [one.name for one in pkgutil.walk_packages(gpu_launcher.cli.__path__, "gpu_launcher.cli.")]
    imported = [name for name in commands if not name.endswith("__main__")]
    warm = Warm([*imported, *USED_BY_COMMANDS], environment(LD_LIBRARY_PATH=str(nvml_double)))
    yield warm
    warm.close()


@pytest.fixture
def cli(machine: Any, pool: Path, warm: Warm) -> Iterator[Cli]:
    """The command line on a machine without a usable driver."""
    machine.has("init.error 9")
    yield from _ending(Cli(pool, {**environment(**machine.environment()), "GPU_LAUNCHER_POOL_DIR": str(pool)}, warm))


@dataclass
class Lab:
    """A machine with four GPUs: one is held, one is shared, and a program outside the pool uses one."""

    cli: Cli
    machine: Any
    stranger: int


@pytest.fixture
def lab(cli: Cli, machine: Any) -> Lab:
    name = "NVIDIA H100 80GB HBM3"
    stranger = subprocess.Popen(["bash", "-c", "exec -a jupyter sleep 600"], text=True)
    cli.started.append(stranger)
    doing = ((61.3, 97), (20.2, 64), (12.4, 41), (0.5, 0))
    lines = ["count 4", "driver 570.86.15", "nvml 12.570.86.15", "cuda 12080", f"2.compute {stranger.pid}:{12 * GIB}"]
    for index, (used, utilisation) in enumerate(doing):
        more = (f"utilisation {utilisation}", f"memory_used {int(used * GIB)}")
        lines += machine.gpu(
            index, f"GPU-{index}1a7c3e5-0b2d-4f68-9ace-135790bdf246", *more, name=name, memory=80 * GIB
        )
    machine.has(*lines)
    cli.hold(
        ["gpus:0", 1, None, 0, "train.py #0 lr=0.1"],
        ["gpus:1", 0.5, None, 0, "train.py #1 lr=0.2"],
        ["gpus:1", 0.25, 20 * GIB, 0, "eval.py #3 fold=5", {"timeout": 7200}],
        ["gpus", 4, None, 0, "big.py #0 nodes=4"],
        ["gpus:0,1", 1, None, 0, "train.py #2 lr=0.3"],
    )
    return Lab(cli, machine, stranger.pid)


class Terminal:
    """A command in its own terminal, and its output."""

    def __init__(self, command: Sequence[str], environ: dict[str, str], size: tuple[int, int] = (80, 24)) -> None:
        self.output = b""
        self.master, slave = os.openpty()
        self.initial_attributes = self.attributes()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setsid()
                ioctl(slave, termios.TIOCSCTTY, 0)
                for stream in (0, 1, 2):
                    os.dup2(slave, stream)
                os.execvpe(command[0], command, environ)
            finally:
                os._exit(99)
        os.close(slave)
        self.status: int | None = None

    def resize(self, columns: int, lines: int) -> None:
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    @property
    def text(self) -> str:
        return self.output.decode(errors="replace")

    @property
    def frames(self) -> list[list[str]]:
        """The lines of each frame, without colours."""
        shown = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", frame) for frame in self.text.split("\x1b[H")[1:]]
        return [frame.split("\n") for frame in shown]

    def read_until(self, holds: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.text
            if not self._read():
                assert holds(), self.text

    def wait(self, seconds: float = 120) -> int:
        """Wait for the end, and return the exit code, or the negative number of the signal."""
        end = time.monotonic() + seconds
        while self.status is None:
            assert time.monotonic() < end, self.text
            self._read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        while self._read():
            pass
        return self.status

    def _read(self) -> bool:
        ready, _, _ = select.select([self.master], [], [], 0.05)
        if ready:
            try:
                self.output += os.read(self.master, 65536)
            except OSError:  # no process has the other end open
                time.sleep(0.01)
                return False
        return bool(ready) or self.status is None

    def attributes(self) -> list[Any]:
        return termios.tcgetattr(self.master)

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)
        os.close(self.master)


@pytest.fixture
def terminal(cli: Cli) -> Iterator[Callable[..., Terminal]]:
    """Start a command in a terminal: `terminal("top", size=(80, 24), NAME="value")`. `within` is the program."""
    opened: list[Terminal] = []

    def start(
        *arguments: str, size: tuple[int, int] = (80, 24), within: Sequence[str] = CLI, **environ: str
    ) -> Terminal:
        opened.append(Terminal([*within, *arguments], {**cli.environ, **environ}, size))
        return opened[-1]

    yield start
    for one in opened:
        one.close()
