"""What is open on the screen, and what each key does. Pure.

The live view and everything else that shows a sweep's screen keep one `ScreenState`, give it the keys that are pressed,
and carry out the actions that come back. `jobs.progress.view` and `jobs.progress.pages` draw it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from gpu_launcher.jobs.control import (
    MAX_RANGES,
    CancelJobs,
    ContinueSweep,
    LimitDevices,
    PauseSweep,
    RetryJobs,
    Steering,
    ranges_of,
    read_ranges,
    spell,
)
from gpu_launcher.jobs.progress.log_window import LogWindow
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.wording import job_name

TYPED = tuple("0123456789,- none")
"""Characters that can be typed into a prompt: numbers, ranges, and the word none."""
MAX_TYPED = 60
"""Maximum number of characters that can be typed into a prompt."""
COLUMNS_AT_ONCE = 20
"""Number of columns by which left and right move a log."""


class Page(Enum):
    """What fills the screen."""

    OVERVIEW = "overview"
    FAILURES = "failures"
    LOG = "log"
    HELP = "help"


class Prompt(Enum):
    """What is asked for. The value is shown before what is typed."""

    CANCEL = "cancel which jobs (such as 7 or 9-12)? "
    LOG = "log of which job? "
    LIMIT = "devices at most (a number, or none)? "


@dataclass(frozen=True, slots=True)
class Quit:
    """The person leaves the screen. The sweep continues."""


@dataclass(frozen=True, slots=True)
class Detach:
    """The program that runs the sweep leaves its terminal. The sweep continues."""


Action = Steering | Quit | Detach


RETRY = "r"
"""The key that retries jobs. In a search, it does nothing."""
HELP = (
    ("Select and scroll", ""),
    ("↑ ↓  k j", "previous and next row"),
    ("PgUp PgDn  b Space", "previous and next page"),
    ("Home End  g G", "first and last row; G follows a log"),
    ("← →", "move a log sideways"),
    ("Esc  q", "close a page or a question"),
    ("", ""),
    ("Jobs", ""),
    ("l  Enter", "log of the selected job, or of a number"),
    ("Tab", "the other log of a map's job"),
    ("c", "cancel the selected job, or some numbers"),
    ("f", "failures; those alike are one row"),
    (RETRY, "retry the jobs of the selected failure"),
    ("", ""),
    ("Sweep", ""),
    ("p", "pause: start no more jobs; p continues"),
    ("+ -", "use one device more or less"),
    ("L", "limit the devices in use"),
    ("d", "leave this terminal; the sweep continues"),
    ("q  Ctrl-C", "quit this screen; the sweep continues"),
    ("Ctrl-C", "stop the sweep; twice kills its jobs"),
    ("Ctrl-Z", "suspend; `fg` continues"),
)
"""Keys and what they do. They fit on a terminal of 60 columns."""
_QUITTING = {"q  Ctrl-C": True, "Ctrl-C": False, "d": False}
"""Keys of the help that are there only if the screen can, or cannot, be quit."""


@dataclass(frozen=True, slots=True)
class ScreenState:
    """What is open, selected and typed."""

    page: Page = Page.OVERVIEW
    below: tuple[Page, ...] = ()
    """The pages to which q returns, the last first."""
    job: int | None = None
    """The selected job of the overview."""
    group: int = 0
    """Place of the selected failure."""
    log: int | None = None
    """The job whose log is open."""
    file: int = 0
    """Which of its files: a map's job has two. -1 is the last one."""
    at: int | None = None
    """Offset of the first line that is shown of the log. None to follow its end."""
    column: int = 0
    """The first column that is shown of the log."""
    line: int = 0
    """The first line that is shown of the help."""
    asked: CancelJobs | Detach | None = None
    """The request that waits for a yes."""
    prompt: Prompt | None = None
    typed: str = ""
    """What was typed into the prompt."""
    said: str = ""
    """What the last key did, or why it did nothing."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What the keys act on."""

    tally: SweepTally
    jobs: Sequence[int] = ()
    """The running jobs, in the order of their rows."""
    rows: int = 20
    """Number of rows of a page."""
    log: LogWindow | None = None
    """The open log."""
    files: int = 1
    """Number of files of the open log."""
    can_quit: bool = False
    """Whether the screen can be left. That of the program that runs the sweep cannot."""


def press(state: ScreenState, key: str, shown: Shown) -> tuple[ScreenState, Action | None]:
    """Press one key."""
    if state.asked is not None:
        return _answer(state, key)
    if state.prompt is not None:
        return _type(state, key)
    state = replace(state, said="")
    if key == "?" and state.page is not Page.HELP:
        return replace(_opened(state, Page.HELP), line=0), None
    if key in ("q", "escape") and state.page is not Page.OVERVIEW:
        return _closed(state), None
    match state.page:
        case Page.OVERVIEW:
            return _overview(state, key, shown)
        case Page.FAILURES:
            return _failures(state, key, shown)
        case Page.LOG:
            return _log(state, key, shown), None
        case Page.HELP:
            if key == "?":
                return _closed(state), None
            places = max(1, len(help_of(shown.tally, can_quit=shown.can_quit)) - shown.rows + 1)
            return replace(state, line=_moved(state.line, key, shown.rows, places)), None


def help_of(tally: SweepTally, *, can_quit: bool) -> list[tuple[str, str]]:
    """Return the keys that work here and what they do. Headings have no second text."""
    missing = [keys for keys, if_quitting in _QUITTING.items() if if_quitting != can_quit]
    missing += [RETRY] if tally.is_search else []
    return [(keys, what) for keys, what in HELP if keys not in missing]


def _opened(state: ScreenState, page: Page) -> ScreenState:
    return replace(state, page=page, below=(*state.below, state.page))


def _closed(state: ScreenState) -> ScreenState:
    return replace(state, page=state.below[-1], below=state.below[:-1])


# Questions


def _answer(state: ScreenState, key: str) -> tuple[ScreenState, Action | None]:
    """Only y is a yes."""
    if key in ("y", "Y"):
        return replace(state, asked=None), state.asked
    said = "the sweep stays here" if isinstance(state.asked, Detach) else "nothing was cancelled"
    return replace(state, asked=None, said=said), None


def question(state: ScreenState, tally: SweepTally) -> str:
    """Return the question that is open, or an empty text."""
    if state.asked is None:
        return ""
    if isinstance(state.asked, Detach):
        return "leave this terminal, and let the sweep continue? y/n"
    jobs = spell(state.asked.jobs)
    ((first, last), *more) = state.asked.jobs
    if first == last and not more and (job := tally.running.get(first)) is not None:
        jobs = job_name(first, job.label)
    return f"cancel {jobs}? y/n"


def _type(state: ScreenState, key: str) -> tuple[ScreenState, Action | None]:
    match key:
        case "enter":
            return _entered(replace(state, prompt=None, typed=""), state.prompt, state.typed.strip())
        case "escape" | "q":
            state = replace(state, prompt=None, typed="")
        case "backspace":
            state = replace(state, typed=state.typed[:-1])
        case _ if key in TYPED and len(state.typed) < MAX_TYPED:
            state = replace(state, typed=state.typed + key)
    return state, None


def _entered(state: ScreenState, prompt: Prompt | None, typed: str) -> tuple[ScreenState, Action | None]:
    match prompt:
        case _ if not typed:
            return state, None
        case Prompt.CANCEL:
            try:
                return replace(state, asked=CancelJobs(read_ranges(typed.split()))), None
            except ValueError as error:
                return replace(state, said=str(error)), None
        case Prompt.LIMIT if typed == "none":
            return state, LimitDevices(None)
        case Prompt.LIMIT if _is_number(typed) and int(typed):
            return state, LimitDevices(int(typed))
        case Prompt.LIMIT:
            return replace(state, said=f"{typed!r} is not a number of devices; p pauses"), None
    if not _is_number(typed):
        return replace(state, said=f"{typed!r} is not a job's number"), None
    return _log_of(state, int(typed)), None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


# Pages


def _overview(state: ScreenState, key: str, shown: Shown) -> tuple[ScreenState, Action | None]:
    selected = state.job if state.job in shown.jobs else None
    state = replace(state, job=selected)
    match key:
        case "escape":
            return replace(state, job=None), None
        case "enter" | "l":
            return (replace(state, prompt=Prompt.LOG) if selected is None else _log_of(state, selected)), None
        case "c" if selected is not None:
            return replace(state, asked=CancelJobs(((selected, selected),))), None
        case "c":
            return replace(state, prompt=Prompt.CANCEL), None
        case "p":
            paused = shown.tally.throttled is not None and shown.tally.throttled.paused
            return state, ContinueSweep() if paused else PauseSweep()
        case "+" | "-":
            return _step(state, 1 if key == "+" else -1, shown.tally)
        case "L":
            return replace(state, prompt=Prompt.LIMIT), None
        case "f":
            return replace(_opened(state, Page.FAILURES), group=0), None
        case "d" if not shown.can_quit:
            return replace(state, asked=Detach()), None
        case "q" if shown.can_quit:
            return state, Quit()
        case "q":
            return replace(state, said="Ctrl-C stops the sweep"), None
    if key in _MOVES and shown.jobs:
        at = shown.jobs.index(selected) if selected is not None else -1 if key in ("down", "j") else 0
        return replace(state, job=shown.jobs[_moved(at, key, shown.rows, len(shown.jobs))]), None
    return state, None


def _step(state: ScreenState, step: int, tally: SweepTally) -> tuple[ScreenState, Action | None]:
    """One device more or less."""
    most = len(tally.devices)
    limit = None if tally.throttled is None else tally.throttled.devices
    wanted = (most if limit is None else limit) + step
    if (limit is None and step > 0) or wanted < 1:
        return replace(state, said="no limit on devices is set" if step > 0 else "p pauses the sweep"), None
    return state, LimitDevices(None if wanted >= most and step > 0 else wanted)


def _failures(state: ScreenState, key: str, shown: Shown) -> tuple[ScreenState, Action | None]:
    groups = list(shown.tally.failures.groups.values())
    if groups:  # jobs that run again are in none
        state = replace(state, group=min(state.group, len(groups) - 1))
    if key == RETRY and groups and not shown.tally.is_search:
        group = groups[state.group]
        return state, RetryJobs(ranges_of([group.first.number, *group.others])[:MAX_RANGES])
    if key in ("enter", "l") and groups:
        log = replace(_log_of(state, groups[state.group].first.number), file=-1)  # its stderr, if there are two
        return log, None
    return replace(state, group=_moved(state.group, key, shown.rows, len(groups))), None


def _log_of(state: ScreenState, number: int) -> ScreenState:
    return replace(_opened(state, Page.LOG), log=number, file=0, at=None, column=0)


def _log(state: ScreenState, key: str, shown: Shown) -> ScreenState:
    match key:
        case "c":
            if state.log is None or state.log not in shown.tally.running:
                return replace(state, said=f"job {state.log} does not run")
            return replace(state, asked=CancelJobs(((state.log, state.log),)))
        case "tab":
            return replace(state, file=(state.file + 1) % max(1, shown.files), at=None, column=0)
        case "left":
            return replace(state, column=max(0, state.column - COLUMNS_AT_ONCE))
        case "right":
            return replace(state, column=state.column + COLUMNS_AT_ONCE)
        case "home" | "g":
            return replace(state, at=0)
        case "end" | "G" | "F":
            return replace(state, at=None)
    if shown.log is None or not shown.log.starts or key not in _MOVES:
        return state
    first = shown.log.first(state.at, shown.rows)
    moved = _moved(first, key, shown.rows, len(shown.log.starts))
    if moved + shown.rows >= len(shown.log.starts) and shown.log.has_end and key not in _UPWARD:
        return replace(state, at=None)
    return replace(state, at=shown.log.starts[moved])


_MOVES = {
    "up": (-1, 0),
    "k": (-1, 0),
    "down": (1, 0),
    "j": (1, 0),
    "page up": (1, -1),
    "b": (1, -1),
    "page down": (-1, 1),
    " ": (-1, 1),
    "home": (-(2**31), 0),
    "g": (-(2**31), 0),
    "end": (2**31, 0),
    "G": (2**31, 0),
}
"""How many lines and pages a key moves. One line of the page before stays in view."""
_UPWARD = ("up", "k", "page up", "b")


def _moved(at: int, key: str, rows: int, length: int) -> int:
    lines, pages = _MOVES.get(key, (0, 0))
    return max(0, min(at + lines + pages * max(2, rows), length - 1))
