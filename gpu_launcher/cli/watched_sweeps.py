"""The running sweeps below a directory, watched through their control sockets, for `gpu-launcher top`."""

from __future__ import annotations

import time
from pathlib import Path

from gpu_launcher.errors import SteeringError
from gpu_launcher.jobs.launches import launches_in
from gpu_launcher.jobs.progress.sweep_screen import SweepScreen
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.jobs.steering import Sweep, Watch
from gpu_launcher.jobs.sweep_finder import sweeps_below
from gpu_launcher.text import short_path

LOOK_SECONDS = 3.0
"""Seconds between two searches for sweeps."""
SPARING = 20
"""How much longer to wait than a search takes."""
CONNECT_SECONDS = 0.3
"""Maximum seconds to wait for the head of a sweep, which answers at once unless it is suspended."""
AGAIN_SECONDS = 15.0
"""Seconds until a head that did not answer is asked again."""


class WatchedSweep:
    """A running sweep and its screen."""

    def __init__(self, sweep: Sweep, watch: Watch) -> None:
        self.sweep = sweep
        self.watch = watch
        self.name = short_path(sweep.directory)
        self.screen = SweepScreen(can_quit=True)

    def receive(self) -> bool:
        """Take what has arrived. Returns whether the sweep still runs."""
        try:
            for one in self.watch.receive():
                if isinstance(one, SweepTally):
                    self.screen.show(one)
                else:
                    self.screen.take(one)
        except SteeringError:
            return False
        return not self.watch.is_over


class WatchedSweeps:
    """The running sweeps below the working directory that this user may steer, in the order in which they were seen."""

    def __init__(self) -> None:
        self.sweeps: list[WatchedSweep] = []
        self._next_look = 0.0
        self._not_before: dict[Path, float] = {}
        """When sweeps whose heads do not answer are tried again."""

    @property
    def descriptors(self) -> list[int]:
        return [one.watch.fileno() for one in self.sweeps]

    def receive(self) -> None:
        """Take what has arrived, and leave out the sweeps that have ended."""
        for one in list(self.sweeps):
            if not one.receive():
                one.watch.close()
                self.sweeps.remove(one)
            one.screen.tally.advance(time.monotonic())

    def look(self) -> None:
        """Search for sweeps, if that is due."""
        began = time.monotonic()
        if began < self._next_look:
            return
        known = {one.sweep.directory for one in self.sweeps}
        for directory in sweeps_below(Path()):
            if directory.absolute() not in known and began >= self._not_before.get(directory, 0.0):
                self._watch(directory)
        ended = time.monotonic()
        self._next_look = ended + max(LOOK_SECONDS, SPARING * (ended - began))

    def _watch(self, directory: Path) -> None:
        if not any(launch.is_alive for launch in launches_in(directory)):
            return
        try:
            sweep = Sweep(directory)
            self.sweeps.append(WatchedSweep(sweep, sweep.watch(seconds=CONNECT_SECONDS)))
        except SteeringError:  # another user's, suspended, or without a socket
            self._not_before[directory] = time.monotonic() + AGAIN_SECONDS

    def close(self) -> None:
        for one in self.sweeps:
            one.watch.close()
