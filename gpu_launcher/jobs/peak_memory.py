"""Decides what share of a device the next jobs of a sweep get with `memory=auto`, from what earlier ones used. Pure.

Theory of operation. The first jobs get whole devices. The device memory of each job is measured while it runs, at least
every five seconds, and every second while a job waits. Once enough jobs have completed, later ones declare the highest
peak so far with head-room. Jobs of a sweep may differ, so the highest peak counts, not a typical one, and it counts
whether or not its job completed. A job that ran too briefly to be measured well does not count: its measurements may
all be from before it allocated its memory.

The decision can be too low. A packed job that runs out of memory is therefore run again on a whole device (see
`jobs/failures.py`). That is after the sweep's other jobs, which would all run out of memory if they learned only then.
So its failure itself raises what they declare: it counts as a peak of what was declared.
"""

from __future__ import annotations

from collections.abc import Collection

from gpu_launcher.model import Device, Share

MIN_JOBS = 3
"""Number of well measured jobs that must have completed before others are packed."""
MIN_MEASUREMENTS = 5
"""Number of times that a job must have been seen on a device for its peak to count."""
HEAD_ROOM = 0.2
"""Head-room above the highest peak, as a part of it."""
MIN_HEAD_ROOM = 2**30
"""Minimum head-room, in bytes."""
STEP = 256 * 2**20
"""Declared amounts are multiples of this, in bytes, so that they change rarely."""


class PeakMemory:
    """The peaks of a sweep's jobs on one machine."""

    def __init__(self, devices: Collection[Device]) -> None:
        """Begin without any peak. `devices` are those that the jobs may get."""
        memories = [device.memory for device in devices]
        self._smallest = min((memory for memory in memories if memory is not None), default=0)
        self._shareable = None not in memories and not any(device.exclusive for device in devices)
        self._highest = 0
        self._jobs = 0
        self._ended = 0

    def note(self, peak: int | None, measurements: int, *, completed: bool) -> None:
        """Take note of a job that ended, of its peak on one of its devices, and of how often it was seen there."""
        self._ended += 1
        if peak is None or measurements < MIN_MEASUREMENTS:
            return
        self._highest = max(self._highest, peak)
        self._jobs += completed

    def note_too_small(self, share: Share) -> None:
        """Take note that a job with this share, which was the learned one, has run out of memory."""
        self._highest = max(self._highest, share.memory)

    @property
    def share(self) -> Share | None:
        """The share that the next job is to get. None: a whole device."""
        need = self._highest + max(int(self._highest * HEAD_ROOM), MIN_HEAD_ROOM)
        need = -(-need // STEP) * STEP
        if self._jobs < MIN_JOBS or not self._shareable or need > self._smallest:
            return None
        return Share(0, need)

    @property
    def blind(self) -> bool:
        """Whether several jobs have ended and none of them could be measured."""
        return not self._highest and self._ended == MIN_JOBS
