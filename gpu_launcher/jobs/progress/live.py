"""The live display of a sweep: a view that stays at the bottom of the terminal."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any, TextIO

from rich.text import Text

from gpu_launcher.jobs.events import (
    Event,
    JobEnded,
    JobRetried,
    NodesChanged,
    Notice,
    Outcome,
    SweepEnded,
    SweepStarted,
)
from gpu_launcher.jobs.progress.plain import NAME, log_quote, opening
from gpu_launcher.jobs.progress.stream import Output
from gpu_launcher.jobs.progress.tally import SweepTally, failure, retry
from gpu_launcher.jobs.progress.terminal import Size, Terminal, stop_until_continued
from gpu_launcher.jobs.progress.view import frame
from gpu_launcher.processes.keyboard import Keyboard
from gpu_launcher.text import one_line
from gpu_launcher.wording import job_name

if TYPE_CHECKING:
    from collections.abc import Callable

_INTERVAL = 0.125
"""Minimum seconds between two frames."""
_SUSPENDED = 3.0
"""Seconds without a tick that mean that the process was stopped (Ctrl-Z), and a shell has written to the terminal."""


class LiveProgress:
    """A view with a header and one row per device, repainted in place. Notices and failures scroll above it.

    It paints only in `handle` and `tick`, at most eight times a second, and only if something changed. It has no
    thread. While the process is in the background of its terminal, it paints only notices and failures.

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
    ) -> None:
        """Prepare to write to `stream`. `keyboard` is the terminal's; None if the program itself reads it."""
        self._prefix = Text(f"[{name}]", "dim")
        self._output = Output(stream)
        self._stream = stream
        self._terminal = Terminal(stream)
        self._size = size or self._terminal.size
        self._tally = SweepTally()
        self._permanent: list[Text] = []
        """Lines for the scrollback that the next frame will write."""
        self._painted: list[Text] = []
        self._painted_size: Size = (0, 0)
        self._next_painting = 0.0
        self._summed_up = False
        self._closed = False
        self._keyboard = keyboard
        self._on_stop: Any = None
        """The previous handler of SIGTSTP."""

    def handle(self, event: Event) -> None:
        if event.time - self._tally.now > _SUSPENDED:
            self._painted = []
        self._tally.take(event)
        match event:
            case SweepStarted():
                self._keep(Text(opening(event)))
            case Notice() | NodesChanged():
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
        self._paint_if_due()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._sum_up()
            self._give_keyboard_back()

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
        self._paint([], self._size())

    def _paint_if_due(self) -> None:
        now = self._tally.now
        if self._summed_up or self._tally.started_at is None or now < self._next_painting:
            return
        self._next_painting = now + _INTERVAL
        size = self._size()
        if self._in_background():
            self._painted = []
            if self._permanent:
                self._paint([], size)
            return
        self._take_keyboard()
        lines = frame(self._tally, *size)
        if self._permanent or lines != self._painted or size != self._painted_size:
            self._paint(lines, size)

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
        self._output.write(text + "\x1b[J")
        self._permanent = []
        self._painted = lines
        self._painted_size = size

    def _take_keyboard(self) -> None:
        if self._keyboard is None:
            return
        self._keyboard.take()
        if self._on_stop is None and threading.current_thread() is threading.main_thread():
            self._on_stop = signal.getsignal(signal.SIGTSTP)
            if self._on_stop is signal.SIG_DFL:
                signal.signal(signal.SIGTSTP, self._stop)

    def _give_keyboard_back(self) -> None:
        if self._keyboard is None:
            return
        self._keyboard.give_back()
        if self._on_stop is signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def _stop(self, signum: int, frame: object) -> None:
        """Handle Ctrl-Z: restore the terminal for the shell, and stop until continued."""
        assert self._keyboard is not None
        self._keyboard.give_back()
        stop_until_continued()
        self._painted = []  # a shell has written to the terminal since

    def _in_background(self) -> bool:
        try:
            return os.tcgetpgrp(self._stream.fileno()) != os.getpgrp()
        except (OSError, ValueError):
            return False
