"""`gpu-launcher top`: a live view of what `status` shows."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import click

from gpu_launcher.cli import options

if TYPE_CHECKING:
    from gpu_launcher.allocation.survey import Found
    from gpu_launcher.cli.collect import PoolWindow
    from gpu_launcher.cli.screen import Screen
    from gpu_launcher.devices import ConditionMonitor

INTERVAL = 1.0
"""Seconds between two updates."""


@click.command()
@options.devices("Devices to show")
@options.busy_memory
@options.pool_dir
def top(devices: str, busy_memory: str, pool_dir: str | None) -> None:
    """Show what `status` shows, live. Press q or Ctrl-C to quit.

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

    from gpu_launcher.cli.collect import PoolWindow, find, nvml_kept_open, read_busy_memory
    from gpu_launcher.cli.screen import HungUpError, Screen
    from gpu_launcher.devices import ConditionMonitor

    most = read_busy_memory(busy_memory)
    pool = PoolWindow(pool_dir)
    with nvml_kept_open():
        found = find(devices, os.environ)
    pool.look()  # report problems with the pool before the view takes over the screen
    monitor = ConditionMonitor(found.measured)
    try:
        with Screen() as screen:
            _watch(screen, found, pool, monitor, most)
    except (KeyboardInterrupt, HungUpError):
        pass
    finally:
        monitor.close()
        pool.close()


def _watch(screen: Screen, found: Found, pool: PoolWindow, monitor: ConditionMonitor, busy_memory: int | None) -> None:
    due = asked = time.monotonic()
    monitor.ask(asked)
    if monitor.latest is None:
        due += INTERVAL  # wait for the first reading; without it, busy devices would appear free
    while True:
        now = time.monotonic()
        if now - asked >= INTERVAL:
            monitor.ask(now)
            asked = now
        if now >= due:
            _paint(screen, found, pool, monitor, busy_memory)
            due = now + INTERVAL
        keys = screen.wait(min(due, asked + INTERVAL) - time.monotonic(), monitor.fileno())
        if "q" in keys.lower():
            return
        answered = monitor.receive() is not None
        if answered or screen.changed:
            due = time.monotonic()


def _paint(screen: Screen, found: Found, pool: PoolWindow, monitor: ConditionMonitor, busy_memory: int | None) -> None:
    from gpu_launcher.cli.collect import put_together
    from gpu_launcher.cli.render import render

    reading = monitor.latest
    conditions = reading.conditions if reading else ()
    notices = (reading.problem,) if reading and reading.problem else ()
    width, height = screen.size
    survey = put_together(found, conditions, pool.look(), busy_memory, notices)
    lines = render(survey, width - 1, brief=True).within(height - 2)
    clock = time.strftime("%H:%M:%S", time.localtime(survey.time))
    screen.paint(lines, [(f"{clock}  on {survey.machine}, every second; q ends", "dim")])
