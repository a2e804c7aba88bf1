"""The content of the live view: lines made from a tally and a terminal's size. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len, get_character_cell_size
from rich.text import Text

from gpu_launcher.jobs.progress.plain import stopping, waits
from gpu_launcher.jobs.progress.screen_state import RETRY, Page, ScreenState, question
from gpu_launcher.model import Device
from gpu_launcher.text import middle_cut, one_line
from gpu_launcher.wording import count, duration, rough_duration

if TYPE_CHECKING:
    from gpu_launcher.jobs.events import JobStarted
    from gpu_launcher.jobs.progress.tally import SweepTally

WIDEST = 120
"""Maximum columns of the view. On wider lines, a duration would be too far from its job."""
MOST_ROWS = 24
"""Maximum rows for devices and jobs, so that the lines above the view stay visible on a tall terminal."""
BAR_FROM = 100
"""Columns from which a list of sweeps has bars."""
BAR_COLUMNS = 20
NARROW = 60
"""Columns below which the names of devices are shortened."""
_TIME = 8
"""Columns of a duration; see `wording.duration`."""
_GAP = "  "
LOST_CONTACT = "lost contact"
"""What is shown for jobs and devices of a node that has not been heard for a while."""
HINTS = {
    Page.OVERVIEW: ("? help", "↑↓ select", "l log", "c cancel", "p pause", "L limit", "f failures"),
    Page.FAILURES: ("q back", "↑↓ select", "l log", f"{RETRY} retry", "? help"),
    Page.LOG: ("q back", "↑↓ scroll", "G follow", "←→ columns", "c cancel", "? help"),
    Page.HELP: ("q back", "↑↓ scroll"),
}
"""The keys that the last line names, the most important first."""


def frame(
    tally: SweepTally,
    width: int,
    height: int,
    state: ScreenState | None = None,
    *,
    can_quit: bool = False,
) -> list[Text]:
    """Return the lines of the view: at most `height - 1`, each narrower than `width`.

    The cursor rests on the line below them. Lines do not reach the last column, because terminals differ in where they
    leave the cursor then. `state` is None where no keys are taken. `can_quit` is as for `Shown`.
    """
    room = max(1, height - 1)
    if state is None:
        return _overview(tally, width, room, None)
    last = footer(state, tally, min(width - 1, WIDEST), can_quit=can_quit)
    if room < 4 and not (state.asked or state.prompt or state.said):  # the keys are the first to go
        return _overview(tally, width, room, state.job)
    return [*_overview(tally, width, room - 1, state.job)[: room - 1], last]


def _overview(tally: SweepTally, width: int, height: int, selected: int | None) -> list[Text]:
    """Return at most `height` lines."""
    width = min(width - 1, WIDEST)
    lines = [_header(tally, width), _bar(tally, width)]
    if tally.facts:
        lines.append(_facts(tally, width))
    # This line appears and disappears, so it is below the permanent lines.
    below = [] if tally.waits is None else [_fit(Text(waits(tally.waits), "yellow"), width)]
    room = min(height - 1 - len(lines) - len(below), MOST_ROWS)
    lines += _rows(tally, width, room, selected)
    lines += below
    return lines[: max(1, height)]


def footer(state: ScreenState, tally: SweepTally, width: int, *, can_quit: bool = False, files: int = 1) -> Text:
    """Return the last line: the open question, what is being typed, what a key did, or the keys that there are.

    `files` is the number of files of the open log.
    """
    if state.asked is not None:
        return _fit(Text(question(state, tally), "bold yellow"), width)
    if state.prompt is not None:
        text = state.prompt.value + state.typed
        return _fit(Text(from_column(text, max(0, cell_len(text) - width)), "bold yellow"), width)
    if state.said:
        return _fit(Text(one_line(state.said), "yellow"), width)
    hints = list(HINTS[state.page])
    if state.page is Page.OVERVIEW:
        hints.append("q quit" if can_quit else "d detach")
        if tally.throttled is not None and tally.throttled.paused:
            hints[hints.index("p pause")] = "p continue"
    if state.page is Page.FAILURES and tally.is_search:
        hints.remove(f"{RETRY} retry")
    if state.page is Page.LOG and files > 1:
        hints.insert(1, "Tab other log")
    while len(hints) > 1 and cell_len(_GAP.join(hints)) > width:
        hints.pop()
    return _fit(Text(_GAP.join(hints), "dim"), width)


def running_in_order(tally: SweepTally) -> list[int]:
    """Return the numbers of the running jobs in the order of their rows."""
    by_device = _by_device(tally)
    placed = (job for device in tally.devices for job in by_device.get((device.node, device.uuid), ()))
    rows = [job.number for job in (*placed, *(job for job in tally.running.values() if not job.devices))]
    return list(dict.fromkeys(rows))


def _by_device(tally: SweepTally) -> dict[tuple[str, str], list[JobStarted]]:
    found: dict[tuple[str, str], list[JobStarted]] = {}
    for job in tally.running.values():
        for device in job.devices:
            found.setdefault((device.node, device.uuid), []).append(job)
    return found


def one_row(tally: SweepTally, name: str, columns: int, width: int) -> Text:
    """Return a sweep's row in a list of sweeps. Names have `columns` columns; wide terminals get a bar."""
    row = _fit(Text(one_line(name)), columns, pad=True)
    row.append(_GAP)
    if width >= BAR_FROM:
        row.append_text(_bar(tally, BAR_COLUMNS))
        row.append(_GAP)
    row.append_text(_header(tally, max(1, width - row.cell_len)))
    return _fit(row, width)


def _header(tally: SweepTally, width: int) -> Text:
    short = duration(tally.elapsed, tenths=False)
    elapsed = f"{short:>{_TIME}}"
    if tally.stopping is not None:
        left = max(0.0, tally.stopping.grace - (tally.now - tally.stopping.time))
        text = Text(stopping(tally.stopping, len(tally.running), left), "bold yellow")
        return _spread(text, Text(elapsed), width)
    parts = [(f"{tally.done}/{tally.total} done", "bold")]
    if tally.pruned:
        parts.append((f"{tally.pruned} pruned", ""))
    if tally.failed:
        parts.append((f"{tally.failed} failed", "bold red"))
    silent = len(tally.silent_jobs & tally.running.keys())
    parts.append((f"{len(tally.running) - silent} running", ""))
    if silent:
        parts.append((f"{silent} {LOST_CONTACT}", "yellow"))
    if tally.waiting:
        parts.append((f"{tally.waiting} waiting", ""))
    if tally.throttled is not None and tally.throttled.paused:
        parts.append(("paused", "bold yellow"))
    elif tally.throttled is not None and tally.throttled.devices is not None:
        parts.append((f"at most {count(tally.throttled.devices, 'device')}", "yellow"))
    seconds = tally.time_left()
    estimate = "" if seconds is None else f"{rough_duration(seconds)} left"
    # Parts that do not fit are omitted, the least important first.
    every = len(parts)
    for shown, right in ((every, estimate + elapsed), (every, short), (every - 1, short), (1, short)):
        text = Text(_GAP).join(Text(part, style) for part, style in parts[:shown])
        if text.cell_len + len(_GAP) + len(right) <= width:
            return _spread(text, Text(right), width)
    return _fit(text, width)


def _bar(tally: SweepTally, width: int) -> Text:
    good = tally.completed + tally.pruned
    ends = [good, good + tally.failed, tally.done]
    cells = [width * end // max(1, tally.total) for end in ends]
    if tally.failed and cells[1] == cells[0] and width > 1:  # even one failure among thousands must be visible
        cells[0] = max(0, cells[0] - 1)
        cells[1:] = [max(cell, cells[0] + 1) for cell in cells[1:]]
    bar = Text("━" * cells[0])
    bar.stylize("green")
    bar.append("━" * (cells[1] - cells[0]), "red")
    bar.append("━" * (cells[2] - cells[1]), "yellow")
    bar.append("─" * (width - cells[2]), "dim")
    return bar


def _facts(tally: SweepTally, width: int) -> Text:
    text = Text()
    for name, value in tally.facts:
        text.append(f"{_GAP if text else ''}{name} ", "dim")
        text.append(one_line(value))
    return _fit(text, width)


def _rows(tally: SweepTally, width: int, room: int, selected: int | None) -> list[Text]:
    """Return rows for the devices, in the order of the pool, and then for the jobs without devices.

    A device has one row, or one for each job if jobs share it. If the rows do not fit, the first ones keep their places
    and a last line counts the rest, so that nothing moves unless the selected job is among the rest.
    """
    by_device = _by_device(tally)
    held = None if tally.waits is None else {(device.node, device.uuid) for device in tally.waits.held_by_others}
    names = [_label(device, width) for device in tally.devices]
    columns = (max(map(len, names), default=0), len(f"#{tally.highest_number}"))
    rows: list[tuple[JobStarted | None, Text]] = []
    for device, name in zip(tally.devices, names, strict=True):
        if sharing := by_device.get((device.node, device.uuid)):
            names_of_rows = [name, *[""] * (len(sharing) - 1)]
            rows += [
                (job, _job_row(row, job, tally, columns, width))
                for row, job in zip(names_of_rows, sharing, strict=True)
            ]
            continue
        # If the devices that others hold are unknown, every device without one of our jobs counts as held by others.
        others = held is not None and ((device.node, device.uuid) in held or not held)
        state = LOST_CONTACT if device.node in tally.silent_nodes else "held by others" if others else "idle"
        rows.append((None, _fit(Text(f"{name:<{columns[0]}}{_GAP}{state}", "dim"), width)))
    for job in tally.running.values():
        if not job.devices:
            rows.append((job, _job_row("no device" if columns[0] >= 9 else "-", job, tally, columns, width)))
    places = [place for place, (job, _) in enumerate(rows) if job is not None and job.number == selected]
    for place in places:
        rows[place][1].stylize("reverse")
    if len(rows) <= room:
        return [row for _, row in rows]
    most = max(0, room - 1)
    first = max(0, places[0] - most + 1) if places else 0
    shown = [row for _, row in rows[first : first + most]]
    hidden = [job for job, _ in (*rows[:first], *rows[first + most :])]
    return [*shown, _rest(hidden, tally.now, width)]


def _label(device: Device, width: int) -> str:
    if width >= NARROW:
        return device.label
    return device.label.replace("simulated GPU", "sim").replace("CPU slot", "CPU")


def _job_row(name: str, job: JobStarted, tally: SweepTally, columns: tuple[int, int], width: int) -> Text:
    number = f"#{job.number}"
    row = Text(f"{name:<{columns[0]}}{_GAP}")
    row.append(f"{number:>{columns[1]}}", "cyan")
    if job.number in tally.silent_jobs:
        row.append(f"{_GAP}{LOST_CONTACT}", "yellow")
    label = one_line(job.label)
    room = width - row.cell_len - len(_GAP) - _TIME - 1
    row.append(f"{_GAP}{middle_cut(label, room) if cell_len(label) > room else label}")
    return _spread(row, Text(f"{duration(tally.now - job.time, tenths=False):>{_TIME}}"), width)


def _rest(hidden: list[JobStarted | None], now: float, width: int) -> Text:
    running = {job.number: job for job in hidden if job is not None}
    free = sum(job is None for job in hidden)
    parts = [f"{len(running)} running"] if running else []
    parts += [f"{free} idle"] if free else []
    text = f"and {len(hidden)} more: {', '.join(parts)}"
    if running:
        oldest = min(running.values(), key=lambda job: job.time)
        text += f" (longest: #{oldest.number}, {duration(now - oldest.time, tenths=False)})"
    return _fit(Text(text, "dim"), width)


def _spread(left: Text, right: Text, width: int) -> Text:
    """Return a line with `left` and `right` at its ends. `left` is cut to fit."""
    line = _fit(left, max(0, width - right.cell_len - 1), pad=True)
    line.append(" ")
    line.append_text(right)
    return _fit(line, width)


def _fit(text: Text, width: int, *, pad: bool = False) -> Text:
    text.truncate(max(0, width), overflow="ellipsis", pad=pad)
    return text


def from_column(text: str, column: int) -> str:
    """Return the text without its first columns. A wide character of which one half is cut off becomes a space."""
    if not column:
        return text
    passed = 0
    for place, char in enumerate(text):
        if passed >= column and get_character_cell_size(char):
            return " " * (passed - column) + text[place:]
        passed += get_character_cell_size(char)
    return ""
