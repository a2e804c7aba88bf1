"""Several sweeps on one pool, whose parts are killed at random, while every process of every job bears witness.

A witness writes, again and again, the time at which it still is and the devices of its job. So each job is known to
have held its devices at least from the first to the last line of all its processes, however they ended.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

DEVICES = 8
SWEEPS = 6
NEEDS = (25, 50, 100, 200, 300)
"""What jobs ask for, in hundredths of a device."""
NUMBERS = (0, 1)
KINDS = ("launcher", "guard", "server", "supervisor", "job", "grandchild")
ENOUGH = 12
"""Kills in one run."""

APP = """
import os, random, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

BEATS = Path(__file__).parent / "beats"
WITNESS = '''
import sys, time
with open(sys.argv[1], "a", buffering=1) as file:
    while True:
        file.write(f"{time.monotonic()} {sys.argv[2]}\\\\n")
        time.sleep(0.02)
'''


@dataclass
class Config:
    sweep: str = ""
    n: int = 0
    need: int = 100
    gpus: float = "${hundredths:${need}}"


ConfigStore.instance().store(name="config", node=Config)
OmegaConf.register_new_resolver("hundredths", lambda number: number / 100)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    devices = os.environ["CUDA_VISIBLE_DEVICES"]

    def path(role):
        return BEATS / f"{cfg.sweep}.{cfg.need}.{cfg.n}.{role}.{os.getpid()}"

    with open(path("main"), "a", buffering=1) as file:
        file.write(f"{time.monotonic()} {devices}\\n")
        python = [sys.executable, "-S", "-E", "-c", WITNESS]
        subprocess.Popen([*python, path("popen"), devices], start_new_session=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                with open(path("daemon"), "a", buffering=1) as mine:
                    while True:
                        mine.write(f"{time.monotonic()} {devices}\\n")
                        time.sleep(0.02)
            os._exit(0)
        end = time.monotonic() + random.uniform(0.1, 0.6)
        while time.monotonic() < end:
            file.write(f"{time.monotonic()} {devices}\\n")
            time.sleep(0.02)
    return [cfg.need, cfg.n]


if __name__ == "__main__":
    from watched import watch

    watch()
    main()
"""


@dataclass
class Attack:
    """One running sweep, and what was done to it."""

    name: str
    sweep: Any
    kills: Counter[str] = field(default_factory=Counter)

    @property
    def launcher_killed(self) -> bool:
        return self.kills["launcher"] > 0

    def bears_the_loss_of_its_server(self) -> bool:
        """A sweep gives up when that happens for the fifth time, or twice before any job was ready."""
        return self.kills["guard"] + self.kills["server"] < 4 and " started on " in self.sweep.output.read_text()


class Chaos:
    def __init__(self, world, seed: int) -> None:
        self.world = world
        self.chance = random.Random(seed)
        self.attacks: list[Attack] = []
        world.app.write_text(APP)
        self.beats = world.directory / "beats"
        self.beats.mkdir()
        self.beats.chmod(0o777)

    def going(self) -> list[Attack]:
        return [attack for attack in self.attacks if attack.sweep.process.poll() is None]

    def start(self, **process: Any) -> Attack:
        name = f"sweep{len(self.attacks)}"
        sweep = self.world.start(
            f"need={','.join(map(str, NEEDS))}",
            f"n={','.join(map(str, NUMBERS))}",
            f"sweep={name}",
            "hydra.launcher.gpus=${gpus}",
            devices=DEVICES,
            method="spawn" if len(self.attacks) % SWEEPS == 1 else "fork",
            name=name,
            **process,
        )
        self.attacks.append(Attack(name, sweep))
        return self.attacks[-1]

    def kills(self) -> Counter[str]:
        return sum((attack.kills for attack in self.attacks), Counter())

    def run(self, seconds: float) -> None:
        """Keep `SWEEPS` sweeps going and kill something in one of them again and again; then let the rest end.

        On a busy machine it takes longer until enough has been killed.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end or (self.kills().total() < ENOUGH and time.monotonic() < end + 60):
            while len(self.going()) < SWEEPS:
                self.start()
            time.sleep(self.chance.uniform(0.02, 0.3))
            self.kill_something()
        for attack in self.attacks:
            attack.sweep.process.wait(90)

    def kill_something(self) -> None:
        (kind,) = self.chance.choices(KINDS, [1, 1, 2, 3, 3, 2])
        attacks = self.going()
        self.chance.shuffle(attacks)
        for attack in attacks:
            if kind in ("guard", "server") and not attack.bears_the_loss_of_its_server():
                continue
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                self.victim(attack, kind).kill()
                attack.kills[kind] += 1
                return

    def victim(self, attack: Attack, kind: str) -> psutil.Process:
        """The launching program forks a guard, that the server, that supervisors, those jobs, those what they like.

        Raises IndexError if there is none now.
        """
        launcher = process = psutil.Process(attack.sweep.process.pid)
        for level in KINDS[1:]:
            process = self.chance.choice(process.children())
            if level == kind or kind == "launcher":
                break
        return launcher if kind == "launcher" else process

    # What must hold in the end

    def check_results(self) -> None:
        expected = [[need, n] for need, n in itertools.product(NEEDS, NUMBERS)]
        for attack in self.attacks:
            if attack.launcher_killed:
                continue
            returns = attack.sweep.returns()
            assert len(returns) == len(expected), attack
            for (status, value), (need, n) in zip(returns, expected, strict=True):
                if status == "COMPLETED":
                    assert value == [need, n], attack
                else:
                    assert f"(need={need} n={n} sweep={attack.name})" in value, attack
                    assert "killed" in value, attack
            failed = sum(status == "FAILED" for status, _ in returns)
            one_each = attack.kills["supervisor"] + attack.kills["job"]
            all_at_once = attack.kills["guard"] + attack.kills["server"]
            assert failed <= one_each + 4 * DEVICES * all_at_once, attack

    def check_witnesses(self) -> int:
        """No device was held beyond what it is at a time, and no job ran twice; returns how many jobs ran."""
        starts: Counter[tuple[str, ...]] = Counter()
        held: dict[tuple[str, ...], list[float]] = defaultdict(list)
        devices: dict[tuple[str, ...], str] = {}
        for path in self.beats.iterdir():
            *job, role, _ = path.name.split(".")
            starts[tuple(job)] += role == "main"
            for line in path.read_text().splitlines():
                moment, _, names = line.partition(" ")
                if names:  # else it was killed in the middle of a line
                    held[tuple(job)].append(float(moment))
                    devices.setdefault(tuple(job), names)
        assert set(starts.values()) <= {1}, "a job ran twice"
        changes: dict[str, list[tuple[float, int, tuple[str, ...]]]] = defaultdict(list)
        for job, moments in held.items():
            names = devices[job].split(",")
            need = int(job[1])
            assert len(names) == max(1, need // 100)
            for name in names:
                share = min(need, 100)
                changes[name] += [(min(moments), share, job), (max(moments), -share, job)]
        for name, all_of_them in changes.items():
            taken = 0
            for moment, change, job in sorted(all_of_them):  # at the same moment, what ends goes first
                taken += change
                assert taken <= 100, f"device {name} was held to {taken} % when {job} began, at {moment}"
        assert set(changes) == {str(device) for device in range(DEVICES)}
        return len(held)


def check_chaos(world, wait_until, seconds: float, seed: int) -> None:
    print("seed", seed)
    chaos = Chaos(world, seed)
    chaos.run(seconds)
    took = wait_until(lambda: not world.marked() and not world.leased(), 5.0, "something was left behind")
    assert world.claimable(DEVICES)
    ran = chaos.check_witnesses()
    chaos.check_results()
    kills = chaos.kills()
    survivors = [attack for attack in chaos.attacks if not attack.launcher_killed]
    print(f"{len(chaos.attacks)} sweeps, {len(survivors)} not killed, {ran} jobs ran, kills: {dict(kills)}")
    print(f"nothing left {took:.2f} s after the last sweep")
    assert ran >= seconds
    assert len(survivors) >= 2
    assert kills.total() >= ENOUGH
    assert len(kills) >= 3


@pytest.mark.timeout(240)
def test_sweeps_share_devices_without_overlap_and_leave_nothing_whatever_is_killed(world, wait_until):
    check_chaos(world, wait_until, 30, random.randrange(2**32))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sweeps_share_devices_without_overlap_and_leave_nothing_for_minutes(world, wait_until):
    check_chaos(world, wait_until, 180, random.randrange(2**32))


ADA = {"user": 60001, "group": 60001, "extra_groups": [], "umask": 0o077}
GRACE = {"user": 60002, "group": 60002, "extra_groups": [], "umask": 0o022}


@pytest.mark.root
def test_two_users_share_devices_without_overlap_also_when_a_program_of_one_is_killed(common_world, wait_until):
    chaos = Chaos(common_world, 0)
    first = chaos.start(**ADA)
    chaos.start(**GRACE)
    chaos.start(**ADA)
    wait_until(lambda: list(chaos.beats.glob(f"{first.name}.*")))
    chaos.victim(first, "launcher").kill()
    first.kills["launcher"] += 1
    for attack in chaos.attacks:
        attack.sweep.process.wait(90)
    wait_until(lambda: not common_world.marked() and not common_world.leased(), 5.0)
    assert common_world.claimable(DEVICES)
    chaos.check_witnesses()
    chaos.check_results()
    assert not any(attack.kills for attack in chaos.attacks[1:])
    owners = {path.stat().st_uid for path in chaos.beats.iterdir()}
    assert owners == {60001, 60002}
