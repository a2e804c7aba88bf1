"""All entry points at once, of two users, on one pool: no device is ever two runs'."""

from __future__ import annotations

import contextlib
import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import until

WORK = '''
import fcntl, os, random, sys, time
from pathlib import Path

HERE = Path(__file__).parent
PF_EXITING = 4  # include/linux/sched.h


def exiting(pid):
    """A process that is killed closes its files one after the other, and maybe that of its lease first."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat[0] in "ZX" or bool(int(stat[6]) & PF_EXITING)


def work(entry):
    devices = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    files = [os.open(HERE / f"busy-{device}", os.O_RDWR | os.O_CREAT) for device in devices]
    for device, file in zip(devices, files):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = int(os.pread(file, 99, 0) or 0)
            if not exiting(other):
                with open(HERE / "overlaps", "a") as log:
                    log.write(f"{entry} {os.getpid()} on {device} of {devices} beside {other}\\n")
                raise
            fcntl.flock(file, fcntl.LOCK_EX)
        os.pwrite(file, b"%-10d" % os.getpid(), 0)
    time.sleep(random.uniform(0.01, 0.1))
    for file in files:
        os.close(file)
    with open(HERE / f"worked-{os.getuid()}", "a") as log:
        log.write(f"{entry} {len(devices)}\\n")
    return 0.0


if __name__ == "__main__":
    work(sys.argv[1])
'''
SWEEP = """
import hydra
from work import work


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    return work("sweep")


main()
"""
FUNCTIONS = """
import os, sys
import gpu_launcher
from work import work

of = int(sys.argv[2])
pool = gpu_launcher.Pool("simulated:8")
if sys.argv[1] == "executor":
    with gpu_launcher.PoolExecutor(gpus=3, pool=pool) as executor:
        list(executor.map(work, ["executor"] * of))
elif sys.argv[1] == "parallel_map":
    list(gpu_launcher.parallel_map(["parallel_map"] * of, function=work, gpus=1, num_workers=3, pool=pool))
elif sys.argv[1] == "leases":
    for _ in range(of):
        with pool.lease(gpus=2) as lease:
            lease.apply()
            work("leases")
else:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=gpu_launcher.storage(f"sqlite:///study.db"))
    gpu_launcher.optimize(study, lambda trial: work("optimize") + trial.suggest_float("x", 0, 1), of, gpus=1, pool=pool)
    assert all(trial.state.name == "COMPLETE" for trial in study.trials)
"""
USERS = (60001, 60002)
DEVICES = ("--devices", "simulated:8")


@dataclass
class Mix:
    """Programs of all kinds for two users, each of which does its work `of` times."""

    world: Any
    of: int
    programs: dict[tuple[str, int], subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        here = self.world.directory
        for name, text in (("work.py", WORK), ("sweep.py", SWEEP), ("functions.py", FUNCTIONS)):
            (here / name).write_text(text)
        for name in ("overlaps", *(f"busy-{device}" for device in range(8)), *(f"worked-{user}" for user in USERS)):
            (here / name).touch()
            (here / name).chmod(0o666)
        for user in USERS:
            (here / str(user)).mkdir()
            (here / str(user)).chmod(0o777)

    def start(self) -> None:
        """Start what does not run."""
        for entry, command in self._commands().items():
            for user in USERS:
                if (entry, user) not in self.programs or self.programs[entry, user].poll() is not None:
                    self.programs[entry, user] = self._start(command, user, self.output(entry, user))

    def output(self, entry: str, user: int) -> Path:
        return self.world.directory / f"{entry}-{user}.output"

    def worked(self, user: int) -> Counter[str]:
        return Counter((self.world.directory / f"worked-{user}").read_text().splitlines())

    def overlaps(self) -> str:
        return (self.world.directory / "overlaps").read_text()

    def processes(self) -> list[psutil.Process]:
        """All that this test started. Other tests have processes of the same users."""
        found: list[psutil.Process] = self.world.marked()
        return found

    def _commands(self) -> dict[str, list[str]]:
        python = self.world.python
        cli = (python, "-m", "gpu_launcher.cli")
        grid = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:8", "hydra.sweep.dir=sweep")
        runs = ("--gpus", "2", "--param", f"n=range({self.of})")
        functions = {
            entry: [python, "../functions.py", entry, str(self.of)]
            for entry in ("executor", "parallel_map", "leases", "optimize")
        }
        return {
            "map": [*cli, "map", *DEVICES, *runs, "--", python, "../work.py", "map", "{n}"],
            "sweep": [python, "../sweep.py", "-m", *grid, f"+n=range({self.of})"],
            "run": [*cli, "run", *DEVICES, "--gpus", "8", "--", python, "../work.py", "run"],
            **functions,
        }

    def _start(self, command: list[str], user: int, output: Path) -> subprocess.Popen[bytes]:
        own = self.world.directory / str(user)
        environment = {**self.world.surroundings(), "TMPDIR": str(own)}
        with output.open("w") as file:
            return subprocess.Popen(command, cwd=own, env=environment, user=user, stdout=file, stderr=file)


@pytest.mark.root
@pytest.mark.timeout(240)
def test_two_users_mix_all_entries_without_overlap(common_world) -> None:
    mix = Mix(common_world, 10)
    mix.start()
    for (entry, user), program in mix.programs.items():
        program.wait(200)
        assert program.returncode == 0, f"{entry} of {user}:\n{mix.output(entry, user).read_text()}"
    for user in USERS:
        expected = {"map 2": 10, "sweep 1": 10, "run 8": 1, "executor 3": 10, "parallel_map 1": 10, "leases 2": 10}
        assert mix.worked(user) == {**expected, "optimize 1": 10}
    assert mix.overlaps() == ""
    assert common_world.leased() == []
    assert common_world.claimable(8)


@pytest.mark.root
@pytest.mark.timeout(400)
def test_whatever_is_killed_there_is_no_overlap_and_nothing_is_left(common_world) -> None:
    """A program that has ended is started anew, and a process, whichever, is killed ten times a second."""
    seed = random.randrange(2**32)
    dice = random.Random(seed)
    mix = Mix(common_world, 1000)
    mix.start()
    # `run` waits for all devices, and what comes behind it too: first the other user's parallel_map must be over.
    until(lambda: all(sum(mix.worked(user).values()) > 20 for user in USERS), what="nothing is worked on")
    for _ in range(50):
        time.sleep(0.1)  # in which they work
        with contextlib.suppress(psutil.NoSuchProcess):
            dice.choice(mix.processes()).kill()
        mix.start()
    for program in mix.programs.values():
        program.kill()
        program.wait(60)
    until(lambda: not mix.processes(), what=f"processes are left, seed {seed}")
    assert mix.overlaps() == "", f"seed {seed}"
    assert common_world.leased() == [], f"seed {seed}"
    assert common_world.claimable(8)
