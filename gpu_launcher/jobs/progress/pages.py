"""The pages that fill the terminal: failures, a job's log, help. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.cells import cell_len, chop_cells
from rich.text import Text

from gpu_launcher.jobs.progress.alike import ranges
from gpu_launcher.jobs.progress.screen_state import Page, ScreenState, Shown, help_of
from gpu_launcher.jobs.progress.tally import failure
from gpu_launcher.jobs.progress.view import footer, from_column
from gpu_launcher.text import middle_cut, one_line
from gpu_launcher.wording import count, job_name

if TYPE_CHECKING:
    from gpu_launcher.jobs.progress.alike import Group

AROUND = 2
"""Rows of a page that are not its own: the title and the last line."""
KEYS_WIDTH = 20
"""Columns of the keys in the help."""
MOST_LINES = 8
"""Maximum number of lines on which the selected failure is shown."""


def page(state: ScreenState, shown: Shown, log_name: str, width: int, height: int) -> list[Text]:
    """Return the lines of the open page: at most `height`, each narrower than `width`. The last one is the footer."""
    width = max(1, width - 1)
    rows = max(0, height - AROUND)
    match state.page:
        case Page.FAILURES:
            title, lines = _failures(state, shown, width, rows)
        case Page.LOG:
            title, lines = _log(state, shown, log_name, width, rows)
        case _:
            title, lines = "keys", _help(shown, width)[state.line :]
    body = lines[:rows]
    body += [Text()] * (rows - len(body))
    heading = Text(one_line(title), "bold")
    heading.truncate(width, overflow="ellipsis")
    return [heading, *body, footer(state, shown.tally, width, files=shown.files)][-height:]


def _failures(state: ScreenState, shown: Shown, width: int, rows: int) -> tuple[str, list[Text]]:
    groups = list(shown.tally.failures.groups.values())
    if not groups:
        return "failures", [Text("no job has failed", "dim")]
    at = min(state.group, len(groups) - 1)
    title = f"failures: {count(shown.tally.failed, 'job')}"
    title += f" in {len(groups)} different ways" if len(groups) > 1 else ""
    selected = _whole(groups[at], width)[: max(1, min(MOST_LINES, rows))]
    first = max(0, at + len(selected) - rows)
    lines = [_cut(_one(group), width) for group in groups[first:at]]
    lines += selected
    lines += [_cut(_one(group), width) for group in groups[at + 1 : at + 1 + rows]]
    return title, lines


def _one(group: Group) -> str:
    others = f"(and {len(group.others)} more) " if group.others else ""
    return f"{job_name(group.first.number, group.first.label)} {others}{one_line(group.first.message or '')}"


def _whole(group: Group, width: int) -> list[Text]:
    """Return all that is known about a failure."""
    text = failure(group.first)
    if group.others:
        text += f"; {count(len(group.others), 'more job')} failed in the same way: {ranges(group.others)}"
    return [Text(line, "reverse") for line in chop_cells(text, width)]


def _log(state: ScreenState, shown: Shown, name: str, width: int, rows: int) -> tuple[str, list[Text]]:
    assert state.log is not None
    job = shown.tally.running.get(state.log)
    title = job_name(state.log, job.label) if job is not None else f"job {state.log}"
    follows = "" if state.at is not None else ", following" if job is not None else ""
    title += follows
    if name and cell_len(title) + 2 < width:
        title += f": {middle_cut(one_line(name), max(1, width - cell_len(title) - 2))}"
    if shown.log is None or shown.log.problem:
        return title, [Text(one_line(shown.log.problem if shown.log is not None else ""), "dim")]
    return title, [_cut(from_column(line, state.column), width) for line in shown.log.lines(state.at, rows)]


def _help(shown: Shown, width: int) -> list[Text]:
    lines = []
    for keys, what in help_of(shown.tally, can_quit=shown.can_quit):
        line = Text(f"{keys:<{KEYS_WIDTH}}" if what else keys, "cyan" if what else "bold")
        line.append(what)
        line.truncate(width, overflow="ellipsis")
        lines.append(line)
    return lines


def _cut(text: str, width: int) -> Text:
    line = Text(text)
    line.truncate(width, overflow="ellipsis")
    return line
