"""Real sweeps in processes of their own, and the means to kill any part of them and to look at what is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.leases import FileLedger, resolve_pool_directory
from gpu_launcher.model import Owner, Request
from gpu_launcher.processes.linux import die_with_parent
from tests.waiting import alive, until
from tests.warm import USED_BY_CALLS, USED_BY_SWEEPS, Program, Warm

PATIENCE = 100.0
"""Seconds until a test gives up on what should happen soon."""

MARKER = "GPU_LAUNCHER_TEST_RUN"
"""Environment variable that every process of a test inherits."""

# A job starts grandchildren of all kinds, says so in `witness-<n>`, and waits for the file `finish-<n>`.
APP = """
import json, os, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore

HERE = Path(__file__).parent


@dataclass
class Config:
    n: int = 0
    gpus: int = 1
    grandchildren: bool = True
    bomb: int = 0
    stubborn: bool = False
    linger: bool = False


ConfigStore.instance().store(name="config", node=Config)


def daemon():
    heard, said = os.pipe()
    if os.fork() == 0:
        os.setsid()
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
        os.write(said, str(pid).encode())
        os._exit(0)
    pid = int(os.read(heard, 99))
    os.close(heard), os.close(said)
    os.wait()
    return pid


def stubborn():
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    witness = {"main": os.getpid(), "devices": os.environ["CUDA_VISIBLE_DEVICES"]}
    if cfg.stubborn:
        stubborn()
    if cfg.linger:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            stubborn()
            time.sleep(600)
        witness["child"] = pid
    if cfg.grandchildren:
        witness["child"] = subprocess.Popen(["sleep", "600"]).pid
        witness["session"] = subprocess.Popen(["sleep", "600"], start_new_session=True).pid
        witness["daemon"] = daemon()
    for number in range(cfg.bomb):
        if os.fork() == 0:
            if number % 2:
                os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            time.sleep(600)
    temporary = HERE / f"temporary-{cfg.n}"
    temporary.write_text(json.dumps(witness))
    temporary.rename(HERE / f"witness-{cfg.n}")
    while not (HERE / f"finish-{cfg.n}").exists():
        time.sleep(0.01)
    return cfg.n


if __name__ == "__main__":
    from watched import watch

    watch()
    main()
"""

# What the launch returns is written to $RETURNS; at the checkpoint $DIE_AT the node kills the launching program.
WATCHED = """
import contextlib, functools, json, os, signal, time
from pathlib import Path


def watch():
    head = os.getpid()
    from gpu_launcher.jobs import node
    from hydra_plugins.gpu_pool_launcher import _launch

    def checkpoint(name):
        if name == os.environ.get("DIE_AT"):
            with contextlib.suppress(ProcessLookupError):  # it was killed at this point of another job's life
                os.kill(head, signal.SIGKILL)
            while os.getppid() == head:
                time.sleep(0.001)

    def launch(*arguments):
        returns = original(*arguments)
        said = [(one.status.name, one._return_value if one.status.name == "COMPLETED" else str(one._return_value))
                for one in returns]
        Path(os.environ["RETURNS"]).write_text(json.dumps(said))
        return returns

    original = _launch.launch
    _launch.launch = launch
    node.JobLoop = functools.partial(node.JobLoop, checkpoint=checkpoint)
"""


class Sweep:
    """A launching program."""

    def __init__(
        self, directory: Path, name: str, warm: Warm, command: list[str], environment: dict[str, str], **process: Any
    ) -> None:
        self._directory = directory
        self._returns = directory / f"{name}.returns"
        self.output = directory / f"{name}.output"
        environment = {**environment, "RETURNS": str(self._returns)}
        me = os.getpid()
        self.process: Program
        with self.output.open("wb") as output:
            streams = {"stdout": output.fileno(), "stderr": output.fileno()}
            if command[0] == sys.executable and not process:
                self.process = warm.start(command[1:], environment, **streams)
                return
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=environment,
                preexec_fn=lambda: die_with_parent(me),  # no sweep is to outlive a test run that is killed
                **streams,
                **process,
            )

    def running(self, count: int) -> list[int]:
        """Wait until so many jobs have begun to run; return which, in order. Jobs run as they are prepared."""

        def begun() -> list[int]:
            return sorted(int(path.name.split("-")[1]) for path in self._directory.glob("witness-*"))

        try:
            until(lambda: len(begun()) >= count or self.process.poll() is not None, what=f"not {count} jobs run")
        except AssertionError:
            print(self.output.read_text())
            raise
        assert len(begun()) >= count, self.output.read_text()
        return begun()

    def witness(self, number: int) -> dict[str, int]:
        return json.loads((self._directory / f"witness-{number}").read_text())

    def tree(self, number: int) -> dict[str, psutil.Process]:
        """The processes that a job told of, by name."""
        return {name: psutil.Process(pid) for name, pid in self.witness(number).items() if name != "devices"}

    def processes(self, numbers: list[int]) -> list[psutil.Process]:
        return [process for number in numbers for process in self.tree(number).values()]

    def part(self, name: str, number: int) -> psutil.Process:
        """Such as `launcher`, `node`, `guard`, `server`, or the job's `supervisor`, `main` or `daemon`."""
        launcher = psutil.Process(self.process.pid)
        if name == "launcher":
            return launcher
        node = next(child for child in launcher.children() if child.status() != psutil.STATUS_ZOMBIE)
        if name == "node":
            return node
        guard = next(child for child in node.children() if child.children())  # the other one measures devices
        if name == "guard":
            return guard
        if name == "server":
            return guard.children()[0]
        if name == "supervisor":
            return psutil.Process(self.witness(number)["main"]).parent()
        return self.tree(number)[name]

    def finish(self, numbers: int) -> None:
        """Let so many jobs return."""
        for number in range(numbers):
            (self._directory / f"finish-{number}").touch()

    def returns(self) -> list[tuple[str, object]]:
        """What the launch returned, in order: a status, and the value or what the error says."""
        self.process.wait(PATIENCE)
        assert self._returns.exists(), self.output.read_text()
        return [tuple(one) for one in json.loads(self._returns.read_text())]


class World:
    """One pool, and all processes of one test."""

    def __init__(self, directory: Path, warm: Warm) -> None:
        self.directory = directory
        self._warm = warm
        self.pool = resolve_pool_directory(str(directory / "pool"))
        self._sweeps: list[Sweep] = []
        self.python = sys.executable
        self.environment = dict(os.environ)
        self.app = directory / "app.py"
        self.app.write_text(APP)
        (directory / "watched.py").write_text(WATCHED)

    def start(
        self,
        *overrides: str,
        devices: int = 2,
        method: str = "fork",
        name: str = "sweep",
        die_at: str = "",
        before: Sequence[str] = (),
        **process: Any,
    ) -> Sweep:
        """Start the program `app` on `simulated:devices`, by the words `before`. `process` is for Popen."""
        environment = {**self.surroundings(), "DIE_AT": die_at}
        command = [
            *before,
            *(self.python, str(self.app), "-m", "hydra/launcher=gpu_pool"),
            f"hydra.launcher.devices=simulated:{devices}",
            f"hydra.launcher.start_method={method}",
            f"hydra.sweep.dir={self.directory / name}",
            *overrides,
        ]
        return self.begin(command, environment, name, **process)

    def begin(self, command: list[str], environment: dict[str, str], name: str = "sweep", **process: Any) -> Sweep:
        """Start any program whose jobs leave witnesses as those of `app` do."""
        sweep = Sweep(self.directory, name, self._warm, command, environment, **process)
        self._sweeps.append(sweep)
        return sweep

    def surroundings(self) -> dict[str, str]:
        """The environment of a program of this test."""
        return {**self.environment, MARKER: str(self.directory), "GPU_LAUNCHER_POOL_DIR": str(self.pool)}

    def marked(self) -> list[psutil.Process]:
        """All living processes of this test."""
        found = []
        marker = f"{MARKER}={self.directory}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, psutil.NoSuchProcess):
                    if marker in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(psutil.Process(int(entry.name)))
        return [process for process in found if alive(process)]

    def leased(self) -> list[str]:
        """What the pool's live leases and tickets say."""
        with FileLedger(self.pool) as ledger:
            view = ledger.snapshot()
            return [str(one) for one in (*view.leases, *view.tickets)]

    def claimable(self, devices: int) -> bool:
        """Whether all devices can be had at once, without waiting."""
        wanted = simulated_devices(devices)
        with FileLedger(self.pool) as ledger:
            ticket = ledger.enqueue(Request(len(wanted)), wanted, Owner(os.getpid(), "test", "test"))
            return ledger.claim(ticket) is not None

    def close(self) -> None:
        for process in self.marked():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for sweep in self._sweeps:
            sweep.process.kill()
            sweep.process.wait()


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    """Forks launching programs. Ends after each file, because tests in other files count child processes."""
    warm = Warm([*USED_BY_SWEEPS, *USED_BY_CALLS], os.environ)
    yield warm
    warm.close()


@pytest.fixture
def world(tmp_path: Path, warm: Warm) -> Iterator[World]:
    world = World(tmp_path, warm)
    yield world
    world.close()


@pytest.fixture
def common_world(warm: Warm) -> Iterator[World]:
    """One that other users can reach, with a Python that they can run: what pytest and /root hold, they cannot."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as several users")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o777)
        world = World(directory, warm)
        path = os.pathsep.join(path for path in sys.path if path and Path(path).is_dir())
        own = (sys.executable, {})
        system = (f"/usr/bin/python3.{sys.version_info.minor}", {"PYTHONPATH": path})
        for world.python, more in (own, system):
            world.environment = {**os.environ, **more, "HOME": name}
            command = [world.python, "-c", "import hydra, hydra_plugins.gpu_pool_launcher._launch"]
            with contextlib.suppress(OSError):
                if subprocess.run(command, user=60001, env=world.environment, capture_output=True).returncode == 0:
                    break
        else:
            pytest.skip("no Python with this package that another user may run")
        yield world
        world.close()


@pytest.fixture
def kill_together() -> Callable[[list[psutil.Process]], None]:
    """SIGKILL several processes of which none can react to the death of another."""

    def kill(processes: list[psutil.Process]) -> None:
        if len(processes) > 1:
            for process in processes:
                process.send_signal(signal.SIGSTOP)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just died with the one before
                process.kill()

    return kill
