"""All entry points at once, of two users, on one pool: no device is ever two runs'."""

from __future__ import annotations

import subprocess
from collections import Counter

import pytest

WORK = """
import os, random, sys, time
from pathlib import Path

HERE = Path(__file__).parent


def work(entry):
    devices = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    files = [HERE / f"busy-{device}" for device in devices]
    for file in files:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))  # FileExistsError: somebody else is there
    time.sleep(random.uniform(0.01, 0.1))
    for file in files:
        file.unlink()
    with open(HERE / f"worked-{os.getuid()}", "a") as log:
        log.write(f"{entry} {len(devices)}\\n")
    return 0.0


if __name__ == "__main__":
    work(sys.argv[1])
"""
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

pool = gpu_launcher.Pool("simulated:8")
if sys.argv[1] == "executor":
    with gpu_launcher.PoolExecutor(gpus=3, pool=pool) as executor:
        list(executor.map(work, ["executor"] * 10))
elif sys.argv[1] == "parallel_map":
    list(gpu_launcher.parallel_map(["parallel_map"] * 10, function=work, gpus=1, num_workers=3, pool=pool))
elif sys.argv[1] == "leases":
    for _ in range(10):
        with pool.lease(gpus=2) as lease:
            lease.apply()
            work("leases")
else:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=gpu_launcher.storage(f"sqlite:///{sys.argv[2]}"))
    gpu_launcher.optimize(study, lambda trial: work("optimize") + trial.suggest_float("x", 0, 1), 10, gpus=1, pool=pool)
    assert all(trial.state.name == "COMPLETE" for trial in study.trials)
"""
USERS = (60001, 60002)
DEVICES = ("--devices", "simulated:8")


@pytest.mark.root
@pytest.mark.timeout(240)
def test_two_users_mix_all_entries_without_overlap(common_world) -> None:
    here = common_world.directory
    for name, text in (("work.py", WORK), ("sweep.py", SWEEP), ("functions.py", FUNCTIONS)):
        (here / name).write_text(text)
    for user in USERS:
        (here / str(user)).mkdir()
        (here / str(user)).chmod(0o777)
    python = common_world.python
    cli = (python, "-m", "gpu_launcher.cli")
    grid = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:8", "hydra.sweep.dir=sweep", "+n=range(10)")
    commands = {
        "map": [
            *cli,
            "map",
            *DEVICES,
            "--gpus",
            "2",
            "--param",
            "n=range(10)",
            "--",
            python,
            "../work.py",
            "map",
            "{n}",
        ],
        "sweep": [python, "../sweep.py", "-m", *grid],
        "run": [*cli, "run", *DEVICES, "--gpus", "8", "--", python, "../work.py", "run"],
        "executor": [python, "../functions.py", "executor"],
        "parallel_map": [python, "../functions.py", "parallel_map"],
        "leases": [python, "../functions.py", "leases"],
        "optimize": [python, "../functions.py", "optimize", "study.db"],
    }
    programs = [
        (
            user,
            entry,
            subprocess.Popen(
                command,
                cwd=here / str(user),
                env={**common_world.surroundings(), "TMPDIR": str(here / str(user))},
                user=user,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ),
        )
        for entry, command in commands.items()
        for user in USERS
    ]
    for user, entry, program in programs:
        output, _ = program.communicate(timeout=200)
        assert program.returncode == 0, f"{entry} of {user}:\n{output}"
    for user in USERS:
        worked = Counter((here / f"worked-{user}").read_text().splitlines())
        expected = {"map 2": 10, "sweep 1": 10, "run 8": 1, "executor 3": 10, "parallel_map 1": 10, "leases 2": 10}
        assert worked == {**expected, "optimize 1": 10}
    assert common_world.leased() == []
    assert common_world.claimable(8)
