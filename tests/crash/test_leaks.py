"""What a long sweep uses up: nothing that grows with the number of its jobs."""

from __future__ import annotations

import contextlib

import psutil
import pytest

from tests.waiting import until

JOBS = 100

APP = """
import os, signal
from dataclasses import dataclass

import hydra
from hydra.core.config_store import ConfigStore


@dataclass
class Config:
    n: int = 0


ConfigStore.instance().store(name="config", node=Config)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    if cfg.n % 5 == 3:
        os._exit(3)
    if cfg.n % 5 == 1:
        os.kill(os.getppid(), signal.SIGKILL)  # its supervisor, with which it dies
        signal.pause()
    if os.fork() == 0:
        os._exit(0)
    return cfg.n


if __name__ == "__main__":
    from watched import watch

    watch()
    main()
"""


@pytest.mark.timeout(600)
def test_descriptors_and_processes_do_not_grow_with_the_number_of_jobs(world):
    world.app.write_text(APP)
    sweep = world.start(f"n=range({JOBS})", devices=4)
    launcher = psutil.Process(sweep.process.pid)
    samples: list[tuple[int, int, int, int]] = []

    def sample() -> bool:
        over = sweep.process.poll() is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            ended = sweep.output.read_text().count(" done)")
            family = [launcher, *launcher.children(recursive=True)]
            descriptors = [process.num_fds() for process in family[:3]]  # launching program, guard, server
            zombies = sum(process.status() == psutil.STATUS_ZOMBIE for process in family)
            samples.append((ended, sum(descriptors), len(family), zombies))
        return over

    until(sample, seconds=500)
    returns = sweep.returns()
    assert len(returns) == JOBS
    for number, (status, value) in enumerate(returns):
        if number % 5 in (1, 3):
            assert status == "FAILED"
        else:
            assert (status, value) == ("COMPLETED", number)
    early = [sample for sample in samples if JOBS * 0.1 < sample[0] < JOBS * 0.4]
    late = [sample for sample in samples if sample[0] > JOBS * 0.7]
    assert len(early) > 10
    assert len(late) > 10
    for what, column, slack in (("descriptors", 1, 4), ("processes", 2, 6), ("zombies", 3, 6)):
        before, after = (max(sample[column] for sample in part) for part in (early, late))
        print(f"{what}: at most {before} early, {after} late")
        assert after <= before + slack, what
    assert world.marked() == []
