"""Displays that a person steers with keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from gpu_launcher.jobs.control import Steering
from gpu_launcher.jobs.progress.plain import PlainProgress
from gpu_launcher.jobs.progress.screen_state import Detach, Quit


@runtime_checkable
class Interactive(Protocol):
    """What a display has in addition to the methods of `Progress` if it reads keys."""

    def fileno(self) -> int | None:
        """Return a descriptor that is readable when a key was pressed. None if no keys are read."""

    def serve(self, carry_out: Callable[[Steering], str]) -> Quit | Detach | None:
        """Handle the keys that were pressed. Never waits. Returns whether the person quits or detaches.

        `carry_out` does what a key asks for, and returns a line for the person. It raises ValueError if it refuses.
        """

    def give_way(self, last: Sequence[str], leave: Callable[[], bool]) -> PlainProgress | None:
        """Show last lines, give the terminal back and call `leave`, which moves the program out of its terminal.

        If it returns true, this display is closed, and the display that is returned continues on the same stream.
        Otherwise, this one continues.
        """
