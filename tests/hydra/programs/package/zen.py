"""A hydra-zen program: its configs are made in Python, and its task takes parameters instead of a config."""

from __future__ import annotations

from hydra.conf import HydraConf, JobConf
from hydra_zen import builds, store, zen

from .work import Schedule, work


@store(name="zen", schedule=builds(Schedule, lr="${lr}"))
def task(lr: float, schedule: Schedule) -> float:
    assert isinstance(schedule, Schedule)
    assert schedule.lr == lr
    return work(lr)


if __name__ == "__main__":
    store(HydraConf(job=JobConf(name="zen", chdir=False)))
    store.add_to_hydra_store()
    zen(task).hydra_main(config_name="zen", version_base=None, config_path=None)
