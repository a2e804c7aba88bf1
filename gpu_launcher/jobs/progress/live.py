"""The live display of a sweep: a view that stays at the bottom of the terminal, and pages that fill it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TextIO

from rich.text import Text

from gpu_launcher.jobs.control import Steering
from gpu_launcher.jobs.events import (
    Event,
    JobEnded,
    JobRetried,
    JobsRequeued,
    NodesChanged,
    Notice,
    Outcome,
    SweepEnded,
    SweepStarted,
    Throttled,
)
from gpu_launcher.jobs.progress.keys import KeyDecoder
from gpu_launcher.jobs.progress.plain import NAME, PlainProgress, log_quote, opening, present
from gpu_launcher.jobs.progress.screen_state import Detach, Quit
from gpu_launcher.jobs.progress.stream import Output
from gpu_launcher.jobs.progress.sweep_screen import SweepScreen
from gpu_launcher.jobs.progress.tally import SweepTally, failure, retry
from gpu_launcher.jobs.progress.terminal import ALTERNATE, NORMAL, Size, Terminal, stop_until_continued
from gpu_launcher.processes.keyboard import Keyboard
from gpu_launcher.text import one_line
from gpu_launcher.wording import job_name

_INTERVAL = 0.125
"""Minimum seconds between two frames."""
_PAGE_INTERVAL = 1.0
"""Maximum seconds between two frames of a page, which replace what another program wrote to the terminal."""
_SUSPENDED = 3.0
"""Seconds without a tick that mean that the process was stopped (Ctrl-Z), and a shell has written to the terminal."""
_SAID_SECONDS = 5.0
"""Seconds for which the last line says what a key did."""
_MAX_KEPT = 1000
"""Maximum number of lines that are kept for the scrollback while a page is open. A page is left briefly for more."""


class LiveProgress:
    """A view with a header and one row per device, repainted in place. Notices and failures scroll above it.

    It paints only in `handle`, `tick` and `serve`, at most eight times a second and after each key, and only if
    something changed. It has no thread. While the process is in the background of its terminal, it paints only notices
    and failures.

    Failures, logs and help are pages on the terminal's alternate screen. What would scroll above the view meanwhile is
    written when the page is closed.

    Not promised: a tidy view when another program writes to the same terminal. That program's line stays, and a piece
    of the view above it may stay, too.
    """

    def __init__(
        self,
        stream: TextIO,
        size: Callable[[], Size] | None = None,
        name: str = NAME,
        *,
        keyboard: Keyboard | None = None,
        can_quit: bool = False,
    ) -> None:
        """Prepare to write to `stream`.

        `keyboard` is the terminal's; None if the program itself reads it. `can_quit` is whether a key quits the view.
        """
        self._name = name
        self._prefix = Text(f"[{name}]", "dim")
        self._output = Output(stream)
        self._stream = stream
        self._terminal = Terminal(stream)
        self._size = size or self._terminal.size
        self._screen = SweepScreen(can_quit=can_quit)
        self._permanent: list[Text] = []
        """Lines for the scrollback that the next frame will write."""
        self._painted: list[Text] = []
        self._painted_size: Size = (0, 0)
        self._next_painting = 0.0
        self._page_due = 0.0
        """When an unchanged page is painted again."""
        self._summed_up = False
        self._closed = False
        self._keyboard = keyboard
        self._decoder = KeyDecoder()
        self._flush_keys_at = 0.0
        self._reads_keys = False
        self._said_until = 0.0
        """When what a key did is no longer shown."""
        self._on_alternate = False
        """Whether the terminal shows its alternate screen."""
        self._on_stop: Any = None
        """The previous handler of SIGTSTP."""
        self._busy = False
        self._stop_wanted = False
        """Whether Ctrl-Z was pressed while a frame was written or the keyboard taken."""

    @property
    def _tally(self) -> SweepTally:
        return self._screen.tally

    def handle(self, event: Event) -> None:
        if event.time - self._tally.now > _SUSPENDED:
            self._painted = []
        self._screen.take(event)
        match event:
            case SweepStarted():
                self._keep(Text(opening(event)))
            case Notice() | NodesChanged() | Throttled() | JobsRequeued():
                self._keep(Text(one_line(event.text)))
            case JobEnded(outcome=Outcome.FAILED):
                line = Text(failure(event, same=self._tally.same))
                verdict = len(job_name(event.number, event.label)) + 1
                line.stylize("bold red", verdict, verdict + len("FAILED"))
                self._keep(line, [Text(quoted, "dim") for quoted in log_quote(event, self._tally)])
                if hint := self._tally.all_alike():
                    self._keep(Text(hint, "bold yellow"))
            case JobRetried():
                self._keep(Text(retry(event), "yellow"))
            case SweepEnded():
                self._sum_up()
        self._paint_if_due()

    def tick(self, now: float) -> None:
        if now - self._tally.now > _SUSPENDED:
            self._painted = []
        self._tally.advance(now)
        if now > self._flush_keys_at:
            self._press(self._decoder.flush(), lambda request: "")  # Escape, which asks for nothing
        self._paint_if_due()

    def join(self, tally: SweepTally) -> None:
        """Show a sweep of another process, from its present state. Its events follow."""
        self._screen.show(tally)
        self._keep(Text(present(tally)))
        self._paint_if_due()

    def leave(self, text: str) -> None:
        """Show a last line instead of a summary, because the sweep continues without this display."""
        self._summed_up = True
        self._keep(Text(text))
        self._leave_alternate()
        self._paint([], self._size())
        self.close()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            try:
                self._sum_up()
                self._leave_alternate()
            finally:  # also if Ctrl-C is pressed meanwhile
                self._give_keyboard_back()

    # Keys

    def fileno(self) -> int | None:
        """Return a descriptor that is readable when a key was pressed. None if no keys are read."""
        descriptor = None if self._keyboard is None else self._keyboard.fileno()
        self._reads_keys = descriptor is not None
        return descriptor

    def serve(self, carry_out: Callable[[Steering], str]) -> Quit | Detach | None:
        """Handle the keys that were pressed. Never waits. Returns whether the person quits or detaches.

        `carry_out` does what a key asks for, and returns a line for the person. It raises ValueError if it refuses.
        """
        if self._keyboard is None:
            return None
        keys = self._decoder.feed(self._keyboard.read())
        self._flush_keys_at = self._tally.now + _INTERVAL
        left = self._press(keys, carry_out)
        if left is None:
            self._paint_if_due()
        return left

    def give_way(self, last: Sequence[str], leave: Callable[[], bool]) -> PlainProgress | None:
        """Show last lines, give the terminal back and call `leave`, which moves the program out of its terminal.

        If it returns true, this display is closed, and the display that is returned continues on the same stream.
        Otherwise, this one continues.
        """
        assert self._keyboard is not None
        for line in last:
            self._keep(Text(line))
        self._leave_alternate()
        self._paint([], self._size())
        self._keyboard.give_back()
        if not leave():
            return None
        self._closed = self._summed_up = True
        self._give_keyboard_back()
        plain = PlainProgress(self._stream, self._name)
        plain.join(self._tally)
        return plain

    def _press(self, keys: list[str], carry_out: Callable[[Steering], str]) -> Quit | Detach | None:
        if not keys:
            return None
        self._said_until = self._tally.now + _SAID_SECONDS
        self._next_painting = 0.0
        return self._screen.serve(keys, self._size(), carry_out)

    # Painting

    def _keep(self, line: Text, more: list[Text] | None = None) -> None:
        self._permanent += [Text.assemble(self._prefix, " ", line), *(more or [])]

    def _sum_up(self) -> None:
        if self._summed_up or self._tally.started_at is None:
            return
        self._summed_up = True
        head, *rest = self._tally.summary()
        line = Text(head)
        line.highlight_regex(r"\d+ failed", "bold red")
        self._keep(line, [Text(text) for text in rest])
        self._leave_alternate()
        self._paint([], self._size())

    def _paint_if_due(self) -> None:
        now = self._tally.now
        if self._summed_up or self._tally.started_at is None or now < self._next_painting:
            return
        self._next_painting = now + _INTERVAL
        size = self._size()
        if self._in_background():
            self._leave_alternate()
            self._painted = []
            if self._permanent:
                self._paint([], size)
            return
        self._take_keyboard()
        if self._screen.state.said and now >= self._said_until:
            self._screen.state = replace(self._screen.state, said="")
        if self._screen.fills_terminal:
            self._paint_page(size)
        else:
            self._leave_alternate()
            lines = self._screen.overview(size, keys=self._reads_keys)
            if self._permanent or lines != self._painted or size != self._painted_size:
                self._paint(lines, size)
        if self._stop_wanted:
            self._stop_wanted = False
            self._suspend()

    def _paint_page(self, size: Size) -> None:
        if len(self._permanent) > _MAX_KEPT:
            self._leave_alternate()
        if not self._on_alternate:
            self._paint([], size)  # if the terminal is resized meanwhile, no piece of the view is left
            self._write(ALTERNATE)
            self._on_alternate = True
        lines = self._screen.page(size)
        if lines != self._painted or size != self._painted_size or self._tally.now >= self._page_due:
            self._page_due = self._tally.now + _PAGE_INTERVAL
            self._write(self._terminal.whole_screen(lines, size))
            self._painted = lines
            self._painted_size = size

    def _leave_alternate(self) -> None:
        if self._on_alternate:
            self._write(NORMAL)
            self._on_alternate = False
            self._painted = []

    def _paint(self, lines: list[Text], size: Size) -> None:
        """Replace the last frame in one write, so that no terminal shows a partial frame."""
        width, height = size
        # If the terminal became narrower, the old lines take more rows than before.
        rows = sum(max(1, -(-line.cell_len // width)) for line in self._painted)
        up = min(rows, height - 1)
        text = f"\r\x1b[{up}A" if up else "\r"
        if self._permanent or not lines:
            text += "\x1b[J" + "".join(f"{self._terminal.render(line, size)}\n" for line in self._permanent)
        text += "".join(f"{self._terminal.render(line, size)}\x1b[K\n" for line in lines)
        self._write(text + "\x1b[J")
        self._permanent = []
        self._painted = lines
        self._painted_size = size

    def _write(self, text: str) -> None:
        self._busy = True
        try:
            self._output.write(text)
        finally:
            self._busy = False

    # The terminal

    def _take_keyboard(self) -> None:
        if self._keyboard is None:
            return
        if self._on_stop is None and threading.current_thread() is threading.main_thread():
            self._on_stop = signal.getsignal(signal.SIGTSTP)
            if self._on_stop is signal.SIG_DFL:  # before the keyboard is taken, so that Ctrl-Z always gives it back
                signal.signal(signal.SIGTSTP, self._stop)
        self._busy = True
        try:
            self._keyboard.take()
        finally:
            self._busy = False

    def _give_keyboard_back(self) -> None:
        if self._keyboard is None:
            return
        self._keyboard.close()
        if self._on_stop is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def _stop(self, signum: int, frame: object) -> None:
        """Handle Ctrl-Z."""
        if self._busy:  # the end of the frame must not come after the shell's prompt
            self._stop_wanted = True
        else:
            self._suspend()

    def _suspend(self) -> None:
        """Restore the terminal for the shell, and stop until continued."""
        assert self._keyboard is not None
        self._leave_alternate()
        self._keyboard.give_back()
        stop_until_continued()
        self._painted = []  # a shell has written to the terminal since

    def _in_background(self) -> bool:
        try:
            return os.tcgetpgrp(self._stream.fileno()) != os.getpgrp()
        except (OSError, ValueError):
            return False
