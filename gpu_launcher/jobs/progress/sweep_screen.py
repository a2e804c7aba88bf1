"""The screen of one sweep: its state, what is open on it, and the lines that show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.text import Text

from gpu_launcher.jobs.control import ContinueSweep, LimitDevices, PauseSweep, Steering
from gpu_launcher.jobs.events import Event, JobEnded, JobStarted, StopRequested, Throttled
from gpu_launcher.jobs.progress.log_window import LogWindow, files_of, read_window
from gpu_launcher.jobs.progress.pages import AROUND, page
from gpu_launcher.jobs.progress.screen_state import Detach, Page, Quit, ScreenState, Shown, press
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.jobs.progress.terminal import Size
from gpu_launcher.jobs.progress.view import frame, running_in_order

MAX_LOGS = 1000
"""Maximum number of jobs that have ended and whose logs can be opened."""


class SweepScreen:
    """A sweep on a terminal. It reads the log that is open, and does nothing else to the world."""

    def __init__(self, tally: SweepTally | None = None, *, can_quit: bool = False) -> None:
        """Show `tally`, by default that of a sweep that has not begun. `can_quit` is as for `Shown`."""
        self.state = ScreenState()
        """What is open."""
        self._can_quit = can_quit
        self._logs: dict[int, str | None] = {}
        """The logs of jobs that run, and of the latest that have ended."""
        self.show(tally or SweepTally())

    def show(self, tally: SweepTally) -> None:
        """Replace the state of the sweep."""
        self.tally = tally
        for job in tally.running.values():
            self._note_log(job)
        for group in tally.failures.groups.values():
            self._note_log(group.first)

    def take(self, event: Event) -> None:
        """Change the state of the sweep."""
        self.tally.take(event)
        if isinstance(event, JobStarted | JobEnded):
            self._note_log(event)
        if isinstance(event, StopRequested):  # who does not see that it stops would press Ctrl-C again
            self.state = ScreenState(job=self.state.job)

    @property
    def fills_terminal(self) -> bool:
        """Whether a page is open that fills the terminal."""
        return self.state.page is not Page.OVERVIEW

    def serve(self, keys: Sequence[str], size: Size, carry_out: Callable[[Steering], str]) -> Quit | Detach | None:
        """Press keys that arrived together. `carry_out` and what is returned are as for `Interactive`.

        What a key asks for is done before the next key is pressed, which may ask for more of the same. A yes that
        arrives together with the question was typed or pasted before the question could be read. It is ignored, with
        all that follows.
        """
        shown = self._shown(size)
        for key in keys:
            asked = self.state.asked
            self.state, action = press(self.state, key, shown)
            if isinstance(action, Quit | Detach):
                return action
            if action is not None:
                self._do(action, carry_out)
                shown = self._shown(size)
            if self.state.asked is not None and asked is None:
                break
        return None

    def _do(self, action: Steering, carry_out: Callable[[Steering], str]) -> None:
        before = self.tally.throttled
        try:
            said = carry_out(action)
        except ValueError as error:
            said = str(error)
        else:
            if self.tally.throttled is before:  # the sweep is another program's, whose event is on its way
                self.tally.throttled = _throttled(before, action, self.tally.now)
        self.state = replace(self.state, said=said)

    def overview(self, size: Size, *, keys: bool = True) -> list[Text]:
        """Return the lines of the overview, at most one less than the terminal has. See `view.frame`."""
        return frame(self.tally, *size, self.state if keys else None, can_quit=self._can_quit)

    def page(self, size: Size) -> list[Text]:
        """Return the lines of the page that is open, as many as the terminal has."""
        files = [] if self.state.log is None else files_of(self._logs.get(self.state.log))
        name = files[self.state.file % len(files)][1] if files else ""
        return page(self.state, self._shown(size), name, *size)

    def _shown(self, size: Size) -> Shown:
        """Return what the keys act on."""
        window, files = None, 1
        if self.state.page is Page.LOG and self.state.log is not None:
            paths = files_of(self._logs.get(self.state.log))
            window, files = self._window(self.state.log, paths), len(paths)
        return Shown(
            self.tally, running_in_order(self.tally), max(1, size[1] - AROUND), window, max(1, files), self._can_quit
        )

    def _window(self, number: int, paths: list[tuple[str, str]]) -> LogWindow:
        if not paths:
            return LogWindow(problem=f"no log of job {number} is known here; `gpu-launcher log {number}` looks for it")
        return read_window(paths[self.state.file % len(paths)][1], self.state.at)

    def _note_log(self, job: JobStarted | JobEnded) -> None:
        self._logs.pop(job.number, None)
        self._logs[job.number] = job.log
        if len(self._logs) > MAX_LOGS + len(self.tally.running):
            self._logs.pop(next(one for one in self._logs if one not in self.tally.running))


def _throttled(before: Throttled | None, action: Steering, now: float) -> Throttled | None:
    """Return how much may run once a request is carried out."""
    if not isinstance(action, LimitDevices | PauseSweep | ContinueSweep):
        return before
    paused, devices = (False, None) if before is None else (before.paused, before.devices)
    if isinstance(action, LimitDevices):
        devices = action.devices
    else:
        paused = isinstance(action, PauseSweep)
    return Throttled(now, paused, devices, "")
