"""`gpu-launcher top`: a live view of what `status` shows."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import click

from gpu_launcher.cli import options
from gpu_launcher.text import middle_cut

if TYPE_CHECKING:
    from rich.text import Text

    from gpu_launcher.allocation.readings import PoolWindow
    from gpu_launcher.allocation.survey import Found
    from gpu_launcher.cli.screen import Screen
    from gpu_launcher.devices.monitor import ConditionMonitor

INTERVAL = 1.0
"""Seconds between two updates."""
SWEEP_INTERVAL = 0.25
"""Seconds between two updates of a sweep that fills the terminal."""


@click.command()
@options.devices("Devices to show")
@options.busy_memory
@options.pool_dir
def top(devices: str, busy_memory: str, pool_dir: str | None) -> None:
    """Show `status` live, with the running sweeps.

    The sweeps are those below the current directory. Enter shows the jobs, failures and logs of one, with keys that
    cancel jobs, pause the sweep and more; `?` explains them. q or Ctrl-C quits, and the sweeps continue.

    Refreshes every second. Where stdout is not a terminal, as in a pipe, shows one status and ends.

    Examples:

    \b
      gpu-launcher top
      gpu-launcher top --devices 0,2
    """
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("", "dumb"):
        from gpu_launcher.cli.status import show_status

        show_status(devices, busy_memory, pool_dir)
        print("gpu-launcher top: this terminal cannot show a live view, so this is a single status", file=sys.stderr)
        return

    from gpu_launcher.allocation.observation import find, read_busy_memory
    from gpu_launcher.allocation.readings import PoolWindow, nvml_kept_open
    from gpu_launcher.cli.screen import HungUpError, Screen
    from gpu_launcher.devices.monitor import ConditionMonitor

    most = read_busy_memory(busy_memory)
    pool = PoolWindow(pool_dir)
    with nvml_kept_open():
        found = find(devices, os.environ)
    pool.look()  # report problems with the pool before the view takes over the screen
    monitor = ConditionMonitor(found.measured)
    try:
        with Screen() as screen:
            _Top(screen, found, pool, monitor, most).run()
    except (KeyboardInterrupt, HungUpError):
        pass
    finally:
        monitor.close()
        pool.close()


class _Top:
    """What is on the screen: the pool with the sweeps below it, or one of the sweeps."""

    def __init__(
        self, screen: Screen, found: Found, pool: PoolWindow, monitor: ConditionMonitor, busy_memory: int | None
    ) -> None:
        from gpu_launcher.cli.watched_sweeps import WatchedSweep, WatchedSweeps
        from gpu_launcher.jobs.progress.keys import KeyDecoder

        self._screen = screen
        self._found = found
        self._pool = pool
        self._monitor = monitor
        self._busy_memory = busy_memory
        self._sweeps = WatchedSweeps()
        self._selected: WatchedSweep | None = None
        self._open: WatchedSweep | None = None
        """The sweep that fills the terminal."""
        self._decoder = KeyDecoder()

    def run(self) -> None:
        """Show everything until the user quits."""
        due = asked = time.monotonic()
        self._monitor.ask(asked)
        if self._monitor.latest is None:
            due += INTERVAL  # wait for the first reading; without it, busy devices would appear free
        try:
            while True:
                now = time.monotonic()
                if now - asked >= INTERVAL:
                    self._monitor.ask(now)
                    asked = now
                if now >= due:
                    self._paint()
                    due = now + (INTERVAL if self._open is None else SWEEP_INTERVAL)
                seconds = min(due, asked + INTERVAL) - time.monotonic()
                data = self._screen.wait(seconds, self._monitor.fileno(), *self._sweeps.descriptors)
                keys = self._decoder.feed(data) if data else self._decoder.flush()
                if self._press(keys):
                    return
                if self._monitor.receive() is not None or self._screen.changed or keys:
                    due = time.monotonic()
                self._sweeps.receive()
        finally:
            self._sweeps.close()

    def _press(self, keys: list[str]) -> bool:
        """Press keys. Returns whether the user quits."""
        if self._open is not None:
            from gpu_launcher.jobs.steering import carry_out

            if self._open.screen.serve(keys, self._screen.size, partial(carry_out, self._open.sweep)):
                self._open = None
            return False
        for key in keys:
            sweeps = self._sweeps.sweeps
            at = sweeps.index(self._selected) if self._selected in sweeps else -1
            if key in ("q", "Q"):
                return True
            if key in ("down", "j") and sweeps:
                self._selected = sweeps[min(at + 1, len(sweeps) - 1)]
            elif key in ("up", "k") and sweeps:
                self._selected = sweeps[max(at - 1, 0)]
            elif key == "enter" and sweeps:
                self._open = self._selected = sweeps[max(at, 0)]
        return False

    def _paint(self) -> None:
        self._sweeps.look()
        self._sweeps.receive()
        if self._open not in self._sweeps.sweeps:
            self._open = None
        size = self._screen.size
        if self._open is None:
            self._paint_all(*size)
        elif self._open.screen.fills_terminal:
            self._screen.show(self._open.screen.page(size))
        else:
            from rich.text import Text

            *lines, last = self._open.screen.overview(size)
            self._screen.paint([Text(self._open.name, "bold"), *lines], [last])

    def _paint_all(self, width: int, height: int) -> None:
        from rich.text import Text

        from gpu_launcher.allocation.readings import put_together
        from gpu_launcher.cli.printing import to_text
        from gpu_launcher.cli.render import render
        from gpu_launcher.jobs.node_devices import node_devices

        reading = self._monitor.latest
        conditions = reading.conditions if reading else ()
        notices = (reading.problem,) if reading and reading.problem else ()
        survey = put_together(self._found, conditions, self._pool.look(), self._busy_memory, notices)
        sweeps = self._sweep_rows(width - 1, max(1, height // 3))
        nodes = [seen for one in self._sweeps.sweeps for seen in node_devices(one.sweep.directory, one.screen.tally)]
        lines = render(survey, width - 1, nodes=nodes, brief=True).within(height - 2 - len(sweeps))
        clock = time.strftime("%H:%M:%S", time.localtime(survey.time))
        keys = "↑↓ Enter show a sweep, q ends" if sweeps else "every second; q ends"
        footer = Text(f"{clock}  on {survey.machine}, {keys}", "dim")
        self._screen.paint([to_text(line) for line in lines], [*sweeps, footer])

    def _sweep_rows(self, width: int, most: int) -> list[Text]:
        """Return the rows of the running sweeps, at most `most`, after an empty one."""
        from rich.text import Text

        from gpu_launcher.jobs.progress.view import one_row

        sweeps = self._sweeps.sweeps
        if not sweeps:
            return []
        at = sweeps.index(self._selected) if self._selected in sweeps else -1
        first = max(0, at - most + 1)
        columns = min(max(len(one.name) for one in sweeps), max(8, width // 3))
        rows = []
        for one in sweeps[first : first + most]:
            row = one_row(one.screen.tally, middle_cut(one.name, columns), columns, width)
            if one is self._selected:
                row.stylize("reverse")
            rows.append(row)
        hidden = len(sweeps) - len(rows)
        title = f"SWEEPS{f'  ({hidden} more)' if hidden else ''}"
        return [Text(), Text(title, "dim"), *rows]
