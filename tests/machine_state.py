"""What holds in the state machine of a sweep's jobs between any two stimuli."""

from __future__ import annotations

from itertools import pairwise

from gpu_launcher.jobs.machine import _LIVE, Machine, Phase


def check_state(machine: Machine) -> None:
    """Raise AssertionError if the machine's state contradicts itself."""
    jobs = machine._jobs
    queued = [number for number, job in jobs.items() if job.phase is Phase.QUEUED]
    assert sorted([*machine._queue, *machine._after_all]) == sorted(queued), "each queued job is in one queue once"
    assert machine._live == {number for number, job in jobs.items() if job.phase in _LIVE}
    if machine._ticket is not None:
        assert jobs[machine._ticket].phase is Phase.PREPARED, "only a prepared job waits for devices"
        assert machine.takes_more, "a sweep that is to end does not wait for devices"
    for number, job in jobs.items():
        if job.phase in (Phase.PREPARED, Phase.RUNNING):
            assert job.request is not None
        assert job.ends is None or job.phase in (Phase.RUNNING, Phase.ENDED), f"job {number} has no time limit yet"
        steps = list(job.story)
        assert all(one.after is two.before for one, two in pairwise(steps))
        assert not steps or steps[-1].after is job.phase, "the story ends where the job is"
