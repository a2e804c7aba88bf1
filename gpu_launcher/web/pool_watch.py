"""Watches the pool: one reading for all pages, and the last hour of each device."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from gpu_launcher.allocation.observation import find, read_busy_memory
from gpu_launcher.allocation.readings import PoolWindow, measure, nvml_kept_open, put_together
from gpu_launcher.allocation.survey import DeviceSeen, PoolSurvey
from gpu_launcher.model import MILLIONTHS
from gpu_launcher.web.fresh import Fresh

SAMPLE_SECONDS = 10.0
"""Seconds between two points of a device's history."""
HISTORY_SECONDS = 3600.0


@dataclass(slots=True)
class History:
    """How busy a device was, from 0 to 1, by time."""

    points: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=int(HISTORY_SECONDS / SAMPLE_SECONDS) + 1)
    )
    measured: bool = False
    """Whether this is its utilisation. Otherwise it is the share that is leased."""

    def line(self, now: float, width: float, height: float) -> str:
        """The points of an SVG line, whose right end is now."""
        return " ".join(
            f"{width * (1 - (now - time) / HISTORY_SECONDS):.1f},{height * (1 - min(1.0, busy)):.1f}"
            for time, busy in tuple(self.points)  # another thread may add one
            if 0 <= now - time <= HISTORY_SECONDS
        )


class PoolWatch:
    """Reads devices and pool for all pages."""

    def __init__(
        self, devices: str, busy_memory: str, pool_dir: str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises OptionError and PoolDirectoryError."""
        self._busy_memory = read_busy_memory(busy_memory)
        self._open_files = threading.Lock()
        self.look = Fresh(self._look, clock)
        """Returns a reading that is at most about a second old. Raises PoolDirectoryError."""
        self.histories: dict[str, History] = {}
        """By UUID."""
        with ExitStack() as stack:
            self._pool = PoolWindow(pool_dir)
            stack.callback(self._pool.close)
            stack.enter_context(nvml_kept_open())
            self._found = find(devices, os.environ)
            self._open = stack.pop_all()

    def _look(self) -> PoolSurvey:
        with self._open_files:
            conditions, notices = measure(self._found.measured)
            return put_together(self._found, conditions, self._pool.look(), self._busy_memory, notices)

    def sample(self) -> None:
        """Add a point to the histories. Raises PoolDirectoryError."""
        survey = self.look()
        for seen in survey.devices:
            history = self.histories.setdefault(seen.device.uuid, History())
            utilisation = None if seen.condition is None else seen.condition.utilisation
            history.measured = utilisation is not None
            history.points.append((survey.time, leased(seen) if utilisation is None else utilisation))

    def close(self) -> None:
        with self._open_files:
            self._open.close()


def leased(seen: DeviceSeen) -> float:
    """The leased share of a device, from 0 to 1."""
    shares: Sequence[int] = [
        MILLIONTHS if hold.whole or hold.share is None else hold.share.millionths for hold in seen.holds
    ]
    return min(1.0, sum(shares) / MILLIONTHS)
