"""Many sweeps on one pool, whose parts are killed at random, while every process of every job bears witness.

A witness writes, again and again, the time at which it still is and the devices of its job. So each job is known to
have held its devices at least from the first to the last line of all its processes, however they ended.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import stat
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from tests.waiting import until

DEVICES = 8
GIB_EACH = 80
"""Memory of a simulated device."""
AT_ONCE = 16
JOBS = 6
"""In each sweep."""


@dataclass(frozen=True)
class Need:
    """What a job asks for, and what it then holds."""

    gpus: float | None
    memory: str | None
    devices: int
    percent: int
    """Of each of them."""
    gib: int = 0
    """Declared on each of them."""


NEEDS = {
    "quarter": Need(0.25, None, 1, 25),
    "sixty": Need(0.6, None, 1, 60),
    "whole": Need(1, None, 1, 100),
    "two": Need(2, None, 2, 100),
    "three": Need(3, None, 3, 100),
    "20GiB": Need(None, "20GiB", 1, 25, 20),
    "60GiB": Need(None, "60GiB", 1, 75, 60),
    "quarter-50GiB": Need(0.25, "50GiB", 1, 25, 50),
    "half-30GiB": Need(0.5, "30GiB", 1, 50, 30),
    "whole-80GiB": Need(1, "80GiB", 1, 100, 80),
    "two-40GiB": Need(2, "40GiB", 2, 100, 40),
    "three-80GiB": Need(3, "80GiB", 3, 100, 80),
}
ALL = {"all": Need(DEVICES, None, DEVICES, 100)}

UMASKS = (0o000, 0o002, 0o022, 0o027, 0o077)
ONE: tuple[dict[str, Any], ...] = ({},)
TWO: tuple[dict[str, Any], ...] = tuple({"user": id, "group": id, "extra_groups": []} for id in (60001, 60002))
"""For Popen."""

KINDS = ("launcher", "node", "guard", "server", "supervisor", "job", "grandchild")
ROUND = [*KINDS, "server", "supervisor", "supervisor", "job", "job", "grandchild"]
"""What is killed, in random order, before it begins anew."""
MOST_KILLS = 4
"""For each sweep there is, so that some launching programs and most jobs reach their end."""

APP = """
import json, os, random, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

HERE = Path(__file__).parent
NEEDS = json.loads((HERE / "needs.json").read_text())
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
    need: str = "whole"
    gpus: Any = "${asked:${need},0}"
    memory: Any = "${asked:${need},1}"


ConfigStore.instance().store(name="config", node=Config)
OmegaConf.register_new_resolver("asked", lambda need, which: NEEDS[need][which])


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    devices = os.environ["CUDA_VISIBLE_DEVICES"]

    def path(role):
        return HERE / "beats" / f"{cfg.sweep}.{cfg.need}.{role}.{os.getpid()}"

    with open(path("main"), "a", buffering=1) as file:
        file.write(f"{time.monotonic()} {devices}\\n")
        witnesses = random.choice([["popen"], ["daemon"], ["popen", "daemon"]])
        if "popen" in witnesses:  # which has no copy of the lease, so that nothing but supervision makes that last
            python = [sys.executable, "-S", "-E", "-c", WITNESS]
            subprocess.Popen([*python, path("popen"), devices], start_new_session=True)
        if "daemon" in witnesses and os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                with open(path("daemon"), "a", buffering=1) as mine:
                    while True:
                        mine.write(f"{time.monotonic()} {devices}\\n")
                        time.sleep(0.02)
            os._exit(0)
        end = time.monotonic() + random.uniform(0.1, 0.6)
        while time.monotonic() < end or (HERE / "hold").exists():
            file.write(f"{time.monotonic()} {devices}\\n")
            time.sleep(0.02)
    return cfg.need


if __name__ == "__main__":
    from watched import watch

    watch()
    main()
"""


@dataclass(frozen=True)
class Held:
    """What the witnesses of one job say."""

    job: str
    need: Need
    devices: tuple[str, ...]
    begin: float
    end: float


def violations(jobs: Iterable[Held]) -> Iterator[str]:
    """When devices were held beyond what they are."""
    changes: dict[str, list[tuple[float, int, int, str]]] = defaultdict(list)
    for held in jobs:
        if len(held.devices) != held.need.devices or len(set(held.devices)) != held.need.devices:
            yield f"{held.job} had devices {held.devices}"
        for device in held.devices:
            changes[device].append((held.begin, held.need.percent, held.need.gib, held.job))
            changes[device].append((held.end, -held.need.percent, -held.need.gib, held.job))
    for device, all_of_them in changes.items():
        percent = gib = 0
        for moment, *change, job in sorted(all_of_them):  # at the same moment, what ends goes first
            percent, gib = percent + change[0], gib + change[1]
            if percent > 100 or gib > GIB_EACH:
                yield f"device {device} was held to {percent} % and {gib} GiB when {job} began, at {moment}"


@dataclass
class Attack:
    """One sweep, and what was done to it."""

    name: str
    needs: Sequence[str]
    sweep: Any
    kills: Counter[str] = field(default_factory=Counter)
    orphans: list[psutil.Process] = field(default_factory=list)
    """The processes of killed supervisors' jobs."""

    @property
    def launcher_killed(self) -> bool:
        return self.kills["launcher"] > 0

    def bears(self, kind: str) -> bool:
        """Whether it is to keep its promises when one of that kind is killed now."""
        if kind in ("guard", "server"):
            # It gives up when that happens for the fifth time, or twice before any job was ready.
            most = 4 if " started on " in self.sweep.output.read_text() else 1
            return self.kills["guard"] + self.kills["server"] < most
        if kind == "node" and " started on " not in self.sweep.output.read_text():
            return False  # before any job is ready, the launch raises
        if kind in ("launcher", "node"):
            # Not promised: that jobs end before their lease if their supervisor and the node die together.
            return not any(process.is_running() for process in self.orphans)
        return True


class Chaos:
    def __init__(self, world, users: Sequence[dict[str, Any]], seed: int) -> None:
        self.world = world
        self.users = users
        self.chance = random.Random(seed)
        self.attacks: list[Attack] = []
        self.due: list[str] = []
        world.app.write_text(APP)
        asked = {name: [need.gpus, need.memory] for name, need in (NEEDS | ALL).items()}
        (world.directory / "needs.json").write_text(json.dumps(asked))
        self.hold = world.directory / "hold"
        """While this file exists, jobs do not end by themselves."""
        self.beats = world.directory / "beats"
        self.beats.mkdir()
        self.beats.chmod(0o777)
        if self.chance.random() < 0.5:
            shutil.rmtree(world.pool)  # else it is its maker's, as one that an administrator made

    def going(self) -> list[Attack]:
        return [attack for attack in self.attacks if attack.sweep.process.poll() is None]

    def start(self, user: dict[str, Any], needs: Sequence[str]) -> Attack:
        name = f"sweep{len(self.attacks)}"
        sweep = self.world.start(
            f"need={','.join(needs)}",
            f"sweep={name}",
            "hydra.launcher.gpus=${gpus}",
            "hydra.launcher.memory=${memory}",
            devices=DEVICES,
            method="spawn" if len(self.attacks) % 8 == 1 else "fork",
            name=name,
            umask=self.chance.choice(UMASKS),
            **user,
        )
        self.attacks.append(Attack(name, needs, sweep))
        return self.attacks[-1]

    def kills(self) -> Counter[str]:
        return sum((attack.kills for attack in self.attacks), Counter())

    def has_seen_everything(self) -> bool:
        """Whether each kind was killed, and a job of each need and of each user ran."""
        witnesses = list(self.beats.iterdir())
        needs = {path.name.split(".")[1] for path in witnesses}
        users = {path.stat().st_uid for path in witnesses}
        return self.kills().keys() == set(KINDS) and needs == set(NEEDS) and len(users) == len(self.users)

    def run(self, launchers: int) -> None:
        """Run so many sweeps, `AT_ONCE` at a time, or more until everything was seen; kill something all the time."""
        at_once = min(launchers, AT_ONCE)
        while True:
            while len(self.attacks) < launchers and len(self.going()) < at_once:
                self.start(self.chance.choice(self.users), self.chance.sample(list(NEEDS), JOBS))
            if not self.going():
                if self.has_seen_everything():
                    return
                launchers += at_once
            time.sleep(self.chance.uniform(0.02, 0.3))
            if self.kills().total() < MOST_KILLS * len(self.attacks):
                self.kill_something()

    def kill_something(self) -> None:
        children: dict[int, list[psutil.Process]] = defaultdict(list)
        for process in psutil.process_iter(["ppid"]):
            children[process.info["ppid"]].append(process)
        self.due = self.due or self.chance.sample(ROUND, len(ROUND))
        attacks = [attack for attack in self.going() if not attack.launcher_killed]
        self.chance.shuffle(attacks)
        for kind, attack in itertools.product(dict.fromkeys(self.due), attacks):
            # The launching program forks a node, that a guard, that the server, that supervisors, those jobs, ...
            victims = [psutil.Process(attack.sweep.process.pid)]
            for _ in range(KINDS.index(kind)):
                victims = [child for parent in victims for child in children[parent.pid]]
            if victims and attack.bears(kind):
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim = self.chance.choice(victims)
                    if kind == "supervisor":
                        attack.orphans += victim.children(recursive=True)
                    victim.kill()
                    attack.kills[kind] += 1
                    self.due.remove(kind)
                    return

    def leave_leases(self) -> None:
        """Kill a launching program of each user while all of them have leases, which nobody tidies up."""
        self.hold.touch()
        attacks = [self.start(user, ["quarter"]) for user in self.users]

        def all_run() -> bool:
            return all(list(self.beats.glob(f"{attack.name}.*.main.*")) for attack in attacks)

        until(lambda: all_run() or len(self.going()) < len(attacks), "not all jobs run")
        assert all_run(), [attack.sweep.output.read_text() for attack in attacks]
        for attack in attacks:
            attack.sweep.process.kill()
            attack.kills["launcher"] += 1

    def owners(self, pattern: str) -> set[int]:
        """Whose files are in the pool."""
        owners = set()
        for path in (self.world.pool / "queue").glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                owners.add(path.stat().st_uid)
        return owners

    # What must hold in the end

    def check_witnesses(self) -> int:
        """No device was held beyond what it is at a time, and no job ran twice; returns how many jobs ran."""
        starts: Counter[str] = Counter()
        moments: dict[str, list[float]] = defaultdict(list)
        devices: dict[str, set[str]] = defaultdict(set)
        for path in self.beats.iterdir():
            sweep, need, role, _ = path.name.split(".")
            job = f"{sweep}.{need}"
            starts[job] += role == "main"
            for line in path.read_text().splitlines():
                moment, _, names = line.partition(" ")
                if names:  # else it was killed in the middle of a line
                    moments[job].append(float(moment))
                    devices[job].add(names)
        assert set(starts.values()) <= {1}, "a job ran twice"
        held = [
            Held(job, NEEDS[job.split(".")[1]], tuple(",".join(devices[job]).split(",")), min(times), max(times))
            for job, times in moments.items()
        ]
        assert list(violations(held)) == []
        return len(held)

    def check_pool(self) -> None:
        """What killed programs left there hinders nobody, and each user's next program removes what is its own."""
        assert len(self.owners("lease-*")) == len(self.users)
        self.hold.unlink()
        again = [self.start(user, list(ALL)) for user in self.users]
        for attack in again:
            assert attack.sweep.returns() == [("COMPLETED", "all")]
        queue = self.world.pool / "queue"
        assert list(queue.iterdir()) == []
        assert [stat.S_IMODE(directory.stat().st_mode) for directory in (self.world.pool, queue)] == [0o1777, 0o1777]
        assert self.world.leased() == []
        assert self.world.claimable(DEVICES)

    def check_results(self) -> None:
        for attack in self.attacks:
            if attack.launcher_killed:
                continue
            returns = attack.sweep.returns()
            assert len(returns) == len(attack.needs), attack
            for (status, value), need in zip(returns, attack.needs, strict=True):
                if status == "COMPLETED":
                    assert value == need, attack
                else:
                    assert f"(need={need})" in value, attack
                    assert "killed" in value, attack
            failed = sum(status == "FAILED" for status, _ in returns)
            one_each = attack.kills["supervisor"] + attack.kills["job"]
            all_at_once = attack.kills["node"] + attack.kills["guard"] + attack.kills["server"]
            assert failed <= one_each + JOBS * all_at_once, attack
            assert list((self.world.directory / attack.name).glob(".gpu_launcher/launch-*")) == [], attack


def held(need: str, devices: str, begin: float = 0, end: float = 2) -> Held:
    return Held(need, NEEDS[need], tuple(devices), begin, end)


@pytest.mark.parametrize(
    "jobs",
    [
        [held("quarter", "1")] * 4,
        [held("20GiB", "1"), held("60GiB", "1")],
        [held("20GiB", "1"), held("quarter-50GiB", "1"), held("half-30GiB", "2"), held("quarter-50GiB", "2")],
        [held("sixty", "1", 0, 2), held("sixty", "1", 2, 3), held("whole-80GiB", "1", 3, 4)],
        [held("two", "12", 0, 1), held("three-80GiB", "123", 1, 2), held("two-40GiB", "45", 0, 2)],
    ],
)
def test_what_goes_together_is_no_violation(jobs):
    assert list(violations(jobs)) == []


@pytest.mark.parametrize(
    "jobs",
    [
        [held("quarter", "1")] * 5,
        [held("sixty", "1", 0, 2), held("sixty", "1", 1, 3)],
        [held("whole", "1", 0, 4), held("quarter", "1", 1, 2)],
        [held("quarter-50GiB", "1", 0, 2), held("quarter-50GiB", "1", 1, 3)],
        [held("20GiB", "1"), held("quarter-50GiB", "1"), held("quarter", "1"), held("20GiB", "1")],
        [held("two", "12", 0, 2), held("three-80GiB", "234", 1, 3)],
        [held("two", "1")],
        [held("two", "11", 0, 0)],
        [held("whole", "12")],
    ],
)
def test_what_does_not_go_together_is_a_violation(jobs):
    assert list(violations(jobs))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("users", "launchers"),
    [
        pytest.param(
            ONE, 6, id="one user", marks=pytest.mark.skipif(os.geteuid() == 0, reason="two users do, and more")
        ),
        pytest.param(TWO, 16, id="two users", marks=pytest.mark.root),
        pytest.param(ONE, 64, id="one user, for minutes", marks=pytest.mark.slow),
        pytest.param(TWO, 96, id="two users, for minutes", marks=[pytest.mark.slow, pytest.mark.root]),
    ],
)
def test_devices_are_never_held_twice_and_nothing_is_left_whatever_is_killed(request, users, launchers):
    world = request.getfixturevalue("world" if users is ONE else "common_world")
    seed = random.randrange(2**32)
    print("seed", seed)
    chaos = Chaos(world, users, seed)
    began = time.monotonic()
    chaos.run(launchers)
    print(f"{len(chaos.attacks)} sweeps in {time.monotonic() - began:.1f} s, kills: {dict(chaos.kills())}")
    chaos.leave_leases()
    until(lambda: not world.marked(), "something was left behind")
    ran = chaos.check_witnesses()
    chaos.check_results()
    chaos.check_pool()
    print(f"{ran} jobs ran")
