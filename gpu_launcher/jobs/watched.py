"""A progress display whose events also go to other programs that watch the sweep."""

from __future__ import annotations

import time

from gpu_launcher.jobs.control_socket import ControlSocket
from gpu_launcher.jobs.event_lines import write_event, write_state
from gpu_launcher.jobs.events import Event, Progress
from gpu_launcher.jobs.progress.tally import SweepTally


class Watched:
    """Passes events on to a display, and to those who watch. A `Progress`."""

    def __init__(self, display: Progress) -> None:
        self.control: ControlSocket | None = None
        """The control socket at which programs ask to watch."""
        self.display = display
        self._tally = SweepTally()

    def tick(self, now: float) -> None:
        """See `Progress`."""
        self.display.tick(now)

    def close(self) -> None:
        """See `Progress`."""
        self.display.close()

    def handle(self, event: Event) -> None:
        """See `Progress`."""
        self._tally.take(event)
        self.display.handle(event)
        if self.control is not None and self.control.is_watched:
            self.control.publish(write_event(event))

    def state(self) -> bytes:
        """Return the line of the present state."""
        self._tally.advance(time.monotonic())
        return write_state(self._tally)
