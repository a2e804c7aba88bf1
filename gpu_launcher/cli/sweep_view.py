"""Shows a sweep that another process runs, until it ends or the user leaves."""

from __future__ import annotations

import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from gpu_launcher.errors import SteeringError
from gpu_launcher.jobs.ending import Ending, ending_of
from gpu_launcher.jobs.progress import open_progress
from gpu_launcher.jobs.progress.interactive import Interactive
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.jobs.steering import Sweep, Watch, carry_out
from gpu_launcher.text import short_path

NAME = "gpu-launcher"
LOOK_SECONDS = 0.1
"""Seconds between two looks whether a sweep has ended."""
TICK_SECONDS = 0.125
"""Maximum seconds between two updates of the live view."""
INTERRUPTED = 128 + signal.SIGINT


def wait_for_end(directory: Path, while_it_runs: Callable[[], None] = lambda: None) -> Ending:
    """Wait until the program of a sweep has ended, and return how. Calls `while_it_runs` every now and then.

    Raises SteeringError if that cannot be known from here, and ManifestError.
    """
    while (ending := ending_of(directory)) is None:
        while_it_runs()
        time.sleep(LOOK_SECONDS)
    return ending


def follow(sweep: Sweep) -> int:
    """Show a sweep on stdout until it has ended, and return its exit code; 130 if the user leaves before.

    Raises SteeringError if it cannot be shown.
    """
    with _ending_by_signals():
        try:
            _show(sweep, sweep.watch())
            ending = wait_for_end(sweep.directory, lambda: _show_next_batch(sweep))
        except KeyboardInterrupt:
            return INTERRUPTED
    if ending.killed:
        print(ending.text)
    return ending.exit_code


def _show_next_batch(sweep: Sweep) -> None:
    """Show the next batch of a sweep whose sweeper launches batches, if it runs."""
    try:
        watch = sweep.watch()
    except SteeringError:  # it has not begun, or its program is about to end
        return
    _show(sweep, watch)


def _show(sweep: Sweep, watch: Watch) -> None:
    """Show what `watch` receives until no more comes."""
    display = open_progress(sys.stdout, name=NAME, can_quit=True)
    with closing(watch), closing(display), selectors.DefaultSelector() as selector:
        selector.register(watch.fileno(), selectors.EVENT_READ)
        if isinstance(display, Interactive) and (keys := display.fileno()) is not None:
            selector.register(keys, selectors.EVENT_READ, partial(display.serve, partial(carry_out, sweep)))
        try:
            while not watch.is_over:
                for key, _ in selector.select(TICK_SECONDS):
                    if key.data is not None and key.data():
                        raise KeyboardInterrupt
                for one in watch.receive():
                    if isinstance(one, SweepTally):
                        display.join(one)
                    else:
                        display.handle(one)
                display.tick(time.monotonic())
        except (KeyboardInterrupt, SystemExit):
            name = short_path(sweep.directory)
            display.leave(f"{name} continues; `gpu-launcher attach` shows it again, `gpu-launcher stop` stops it")
            raise


@contextmanager
def _ending_by_signals() -> Iterator[None]:
    """End this program by an exception at SIGTERM and SIGHUP, so that it restores the terminal."""

    def end(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    before = {signum: signal.signal(signum, end) for signum in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
