"""The keys of the live view and its pages: what they open, what they ask for, and that every page fits its terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from gpu_launcher.jobs.control import CancelJobs, ContinueSweep, LimitDevices, PauseSweep, RetryJobs, Steering
from gpu_launcher.jobs.event_lines import read_line, write_state
from gpu_launcher.jobs.events import Event, JobEnded, JobStarted, Outcome, SweepStarted, Throttled
from gpu_launcher.jobs.progress.keys import KeyDecoder
from gpu_launcher.jobs.progress.log_window import REACH, LogWindow, files_of, read_window
from gpu_launcher.jobs.progress.pages import page
from gpu_launcher.jobs.progress.screen_state import (
    Action,
    Detach,
    Page,
    Prompt,
    Quit,
    ScreenState,
    Shown,
    help_of,
    press,
)
from gpu_launcher.jobs.progress.sweep_screen import SweepScreen
from gpu_launcher.jobs.progress.tally import SweepTally
from gpu_launcher.jobs.progress.view import footer, frame, from_column, running_in_order
from gpu_launcher.model import Device, DeviceKind

GPUS = tuple(Device(f"gpu-{i}", i, "A card", DeviceKind.GPU) for i in range(4))
WIDE = "学習率=0.1 n̈a🎉 "
START = ScreenState()
KEYS = ["up", "down", "page up", "page down", "home", "end", "left", "right", "enter", "escape", "backspace", "tab"]
KEYS += list("jkgGbFlcpLfdqy?+-Y,: 0179xn学")


def started(number: int, *, on: int | None = None, label: str = "") -> JobStarted:
    devices = () if on is None else GPUS[on : on + 1]
    return JobStarted(0.0, number, label or f"lr={number}", devices, f"/sweep/{number}/train.log")


def failed(number: int, message: str = "ValueError: nan") -> JobEnded:
    return JobEnded(1.0, number, f"lr={number}", (), Outcome.FAILED, 0.8, message, f"/sweep/{number}/train.log")


def tally_of(*events: Event) -> SweepTally:
    tally = SweepTally()
    for event in (SweepStarted(0.0, 20, GPUS, None), *events):
        tally.take(event)
    return tally


def shown(*events: Event, log: LogWindow | None = None, rows: int = 10, can_quit: bool = False) -> Shown:
    tally = tally_of(*(events or (started(3, on=1), started(5, on=0), started(7))))
    return Shown(tally, running_in_order(tally), rows, log, 1, can_quit)


def after(keys: Iterable[str], view: Shown, state: ScreenState = START) -> tuple[ScreenState, list[Action]]:
    """Press the keys one after another, as a person does."""
    actions = []
    for key in keys:
        state, action = press(state, key, view)
        actions += [] if action is None else [action]
    return state, actions


def test_arrows_select_running_jobs_in_the_order_of_their_rows() -> None:
    view = shown()
    assert view.jobs == [5, 3, 7]
    assert after(["down"], view)[0].job == 5
    assert after(["down", "j", "j", "j"], view)[0].job == 7
    assert after(["up"], view)[0].job == 5
    assert after(["end", "k"], view)[0].job == 3
    assert after(["down", "escape"], view)[0].job is None
    assert after(["down"], shown(started(1)), ScreenState(job=9))[0].job == 1, "job 9 has ended"


def test_selected_job_is_cancelled_after_a_yes_and_nothing_else() -> None:
    view = shown()
    state, actions = after(["down", "c"], view)
    assert (state.asked, actions) == (CancelJobs(((5, 5),)), [])
    assert after(["y"], view, state)[1] == [CancelJobs(((5, 5),))]
    for key in KEYS:
        if key not in "yY":
            answered, actions = after([key], view, state)
            assert (answered.asked, answered.said, actions) == (None, "nothing was cancelled", [])


def test_jobs_that_are_typed_are_cancelled_after_a_yes() -> None:
    view = shown()
    state, actions = after(["c", *"7 9-12", "enter"], view)
    assert (state.asked, actions) == (CancelJobs(((7, 7), (9, 12))), [])
    assert after(["y"], view, state)[1] == [CancelJobs(((7, 7), (9, 12)))]
    assert "is not a job's number" in after(["c", *"none", "enter"], view)[0].said
    assert after(["c", *"7all!", "enter"], view)[0].asked == CancelJobs(((7, 7),)), "letters are not taken"
    assert after(["c", "7", "q", "enter", "y"], view)[1] == []
    assert after(["c", "7", "escape", "y"], view)[1] == []
    assert after(["c", "enter", "y"], view)[1] == []


def test_a_pasted_yes_is_not_an_answer() -> None:
    for keys, job in ((["down", "c", "y", "p"], 5), (["c", "7", "enter", "y"], 7)):
        screen, actions = SweepScreen(shown().tally), list[Steering]()
        screen.serve(keys, (80, 24), recorded(actions))
        assert (screen.state.asked, actions) == (CancelJobs(((job, job),)), [])


def recorded(actions: list[Steering]) -> Callable[[Steering], str]:
    """Carry out what keys ask for, as another program does: its event about it comes later."""

    def carry_out(request: Steering) -> str:
        actions.append(request)
        return "done"

    return carry_out


def test_each_press_counts_even_if_keys_are_read_together() -> None:
    screen, actions = SweepScreen(shown().tally), list[Steering]()
    screen.serve(["-", "-", "-"], (80, 24), recorded(actions))
    assert actions == [LimitDevices(3), LimitDevices(2), LimitDevices(1)]
    actions.clear()
    screen.serve(["+"], (80, 24), recorded(actions))
    screen.serve(["+", "+", "+"], (80, 24), recorded(actions))
    assert actions == [LimitDevices(2), LimitDevices(3), LimitDevices(None)]
    assert screen.state.said == "no limit on devices is set"
    actions.clear()
    screen.serve(["p", "p", "p"], (80, 24), recorded(actions))
    assert actions == [PauseSweep(), ContinueSweep(), PauseSweep()]
    screen.take(Throttled(1.0, False, 2, "from another terminal"))
    screen.serve(["-"], (80, 24), recorded(actions))
    assert actions[-1] == LimitDevices(1), "what the sweep says holds"


def test_key_that_is_refused_changes_no_limit() -> None:
    def refuse(request: Steering) -> str:
        raise ValueError("it is stopping")

    screen, actions = SweepScreen(shown().tally), list[Steering]()
    screen.serve(["-"], (80, 24), refuse)
    assert screen.state.said == "it is stopping"
    screen.serve(["-"], (80, 24), recorded(actions))
    assert actions == [LimitDevices(3)]


def test_sweep_is_paused_continued_and_limited() -> None:
    view = shown()
    assert after("p", view)[1] == [PauseSweep()]
    assert after("p", shown(Throttled(0.0, True, None, "")))[1] == [ContinueSweep()]
    assert after("-", view)[1] == [LimitDevices(3)]
    assert after("+", view)[1] == []
    limited = shown(Throttled(0.0, False, 3, ""))
    assert after("+", limited)[1] == [LimitDevices(None)], "all four may be used"
    assert after("-", limited)[1] == [LimitDevices(2)]
    assert after("-", shown(Throttled(0.0, False, 1, "")))[0].said == "p pauses the sweep"
    assert after(["L", "2", "enter"], view)[1] == [LimitDevices(2)]
    assert after(["L", *"none", "enter"], view)[1] == [LimitDevices(None)]
    state, actions = after(["L", "0", "enter"], view)
    assert (actions, state.said) == ([], "'0' is not a number of devices; p pauses")


def test_log_of_the_selected_job_or_of_a_number_is_opened() -> None:
    view = shown()
    assert after(["down", "l"], view)[0].log == 5
    assert after(["l"], view)[0].prompt is Prompt.LOG
    state, _ = after(["l", *"123x", "backspace", "enter"], view)
    assert (state.page, state.log, state.typed) == (Page.LOG, 12, "")
    assert after(["q"], view, state)[0].page is Page.OVERVIEW
    assert after(["l", "n", "enter"], view)[0].said == "'n' is not a job's number"


def test_failures_open_logs_and_q_leads_back() -> None:
    view = shown(failed(1), failed(2), failed(4, "KeyError: 'lr'"))
    state, _ = after(["f", "down", "enter"], view)
    assert (state.page, state.log, state.below) == (Page.LOG, 4, (Page.OVERVIEW, Page.FAILURES))
    assert after(["?", "q", "q", "q"], view, state)[0].page is Page.OVERVIEW
    assert after(["f", "enter"], shown())[0].page is Page.FAILURES, "no job has failed"


def test_jobs_that_failed_in_the_same_way_are_retried_together() -> None:
    view = shown(failed(1), failed(2), failed(4, "KeyError: 'lr'"))
    assert after("fr", view)[1] == [RetryJobs(((1, 2),))]
    assert after(["f", "down", "r"], view)[1] == [RetryJobs(((4, 4),))]
    assert after("fr", shown())[1] == [], "no job has failed"
    state, _ = after(["f", "down"], view)
    assert press(state, "r", shown(failed(1)))[1] == RetryJobs(((1, 1),)), "the last one is selected when others go"


def test_open_log_cancels_its_job() -> None:
    view = shown()
    state, actions = after(["down", "l", "c", "y"], view)
    assert (state.page, actions) == (Page.LOG, [CancelJobs(((5, 5),))])
    assert after(["c"], view, ScreenState(Page.LOG, (Page.OVERVIEW,), log=9))[0].said == "job 9 does not run"


def test_screen_is_quit_only_if_it_can_be() -> None:
    assert after("q", shown())[1] == []
    assert after("q", shown(can_quit=True))[1] == [Quit()]
    assert after(["f", "q"], shown(can_quit=True))[1] == [], "it closes the page"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(KEYS), max_size=40), st.integers(1, 60), st.integers(2, 220), st.integers(2, 60))
def test_keys_at_random_cancel_nothing_without_a_yes_and_pages_fit(
    keys: list[str], rows: int, width: int, height: int
) -> None:
    events = [started(3, on=1), started(5, on=0, label=WIDE * 9), started(7), failed(1, WIDE * 9), failed(2)]
    log = LogWindow((0, 50, 90), (WIDE.encode() * 20, b"\x1b[31mred\x1b[0m\tx\r\n", b"\xff" * 9), True)
    view = shown(*events, log=log, rows=rows, can_quit=True)
    state = ScreenState()
    for key in keys:
        asked = state.asked
        state, action = press(state, key, view)
        if isinstance(action, CancelJobs):
            assert (asked, key.lower()) == (action, "y")
        check_fit(state, view, width, height)


def check_fit(state: ScreenState, view: Shown, width: int, height: int) -> list[str]:
    if state.page is Page.OVERVIEW:
        lines = frame(view.tally, width, height, state, can_quit=view.can_quit)
        assert len(lines) <= max(1, height - 1)
    else:
        lines = page(state, view, "/sweep/" + WIDE, width, height)
        assert len(lines) == height
    assert all(cell_len(line.plain) < width for line in lines)
    assert not any(char in line.plain for line in lines for char in "\x1b\r\n\t")
    return [line.plain for line in lines]


@pytest.mark.parametrize(("width", "height"), [(60, 12), (80, 24), (200, 50)])
def test_hints_fit_and_help_is_not_cut(width: int, height: int) -> None:
    view = shown(can_quit=True)
    last = check_fit(ScreenState(), view, width, height)[-1]
    assert last.startswith("? help  ↑↓ select  l log  c cancel")
    assert ("q quit" in last) == (width > 60)
    lines = check_fit(ScreenState(Page.HELP, (Page.OVERVIEW,)), view, width, height)
    assert not any("…" in line for line in lines)
    bottom = check_fit(after(["?", "end"], view)[0], view, width, height)
    assert "suspend; `fg` continues" in "\n".join(bottom)


def test_terminal_is_left_after_a_yes_and_nothing_else() -> None:
    view = shown()
    state, actions = after(["d"], view)
    assert (state.asked, actions) == (Detach(), [])
    assert after(["y"], view, state)[1] == [Detach()]
    for key in KEYS:
        if key not in "yY":
            answered, actions = after([key], view, state)
            assert (answered.asked, answered.said, actions) == (None, "the sweep stays here", [])
    screen = SweepScreen(view.tally)
    assert screen.serve(["d", "y"], (80, 24), recorded([])) is None, "a pasted yes is not an answer"
    assert screen.state.asked == Detach()
    lines = frame(view.tally, 60, 12, state)
    assert lines[-1].plain == "leave this terminal, and let the sweep continue? y/n"


def test_screen_that_can_be_quit_has_no_key_to_detach() -> None:
    assert after(["d"], shown(can_quit=True)) == (START, [])
    assert "d" in [keys for keys, _ in help_of(SweepTally(), can_quit=False)]
    assert "d" not in [keys for keys, _ in help_of(SweepTally(), can_quit=True)]


def test_keys_that_do_not_exist_here_are_not_explained() -> None:
    assert "q  Ctrl-C" not in [keys for keys, _ in help_of(SweepTally(), can_quit=False)]
    assert "q  Ctrl-C" in [keys for keys, _ in help_of(SweepTally(), can_quit=True)]


def test_a_search_has_no_key_to_retry_trials() -> None:
    view = shown(SweepStarted(0.0, 20, GPUS, None, is_search=True), failed(1))
    state, actions = after("fr", view)
    assert (state.page, actions) == (Page.FAILURES, [])
    assert "retry" not in footer(state, view.tally, 100).plain
    assert "retry" not in str(help_of(view.tally, can_quit=False))
    told = read_line(write_state(view.tally))
    assert isinstance(told, SweepTally)
    assert told.is_search, "a view that is opened later knows it, too"
    grid = shown(failed(1))
    assert "r retry" in footer(after("f", grid)[0], grid.tally, 100).plain
    assert "retry the jobs" in str(help_of(grid.tally, can_quit=False))


def test_question_and_prompt_replace_the_hints_on_any_terminal() -> None:
    view = shown()
    for width, height in ((60, 12), (40, 3), (80, 2)):
        asked, _ = after(["down", "c"], view)
        assert check_fit(asked, view, width, height)[-1] == "cancel job 5 (lr=5)? y/n"
        typing, _ = after(["c", *"1,2,3,4,5,6,7,8,9"], view)
        assert check_fit(typing, view, width, height)[-1].endswith("9")


def test_selected_job_is_always_visible() -> None:
    jobs = [started(number) for number in range(40)]
    view = shown(*jobs, rows=5)
    for number in range(40):
        lines = frame(view.tally, 60, 12, ScreenState(job=number))
        row = next(line for line in lines if f"#{number} " in f"{line.plain} ")
        assert any(span.style == "reverse" for span in row.spans)
    assert sum("more" in line.plain for line in lines) == 1


def test_all_of_the_selected_failure_is_shown() -> None:
    view = shown(failed(1), failed(2), failed(3), failed(4, "KeyError: 'a long story " + "x" * 200 + " end'"))
    top = check_fit(after("f", view)[0], view, 60, 12)
    assert top[0] == "failures: 4 jobs in 2 different ways"
    assert "2 more jobs failed in the same way: 2, 3" in "".join(line[:59] for line in top)
    second = check_fit(after(["f", "down"], view)[0], view, 60, 12)
    assert second[1] == "job 1 (lr=1) (and 2 more) ValueError: nan"
    assert " end'; log: /sweep/4/train.log" in "".join(second)


# The log


@pytest.fixture
def long_log(tmp_path: Path) -> str:
    path = tmp_path / "job.log"
    path.write_text("".join(f"line {number} {'x' * 90}\n" for number in range(20_000)))
    return str(path)


def open_log(path: str, state: ScreenState) -> Shown:
    return shown(started(3), log=read_window(path, state.at), rows=10)


def first_line(path: str, state: ScreenState) -> str:
    window = read_window(path, state.at)
    return " ".join(window.lines(state.at, 10)[0].split()[:2])


def test_log_is_scrolled_from_its_end_to_its_beginning_and_back(long_log: str) -> None:
    state = ScreenState(Page.LOG, (Page.OVERVIEW,), log=3)
    assert first_line(long_log, state) == "line 19990"
    (state, _) = press(state, "up", open_log(long_log, state))
    assert first_line(long_log, state) == "line 19989"
    for expected in range(19980, 18000, -9):
        (state, _) = press(state, "page up", open_log(long_log, state))
        assert first_line(long_log, state) == f"line {expected}"
    (state, _) = press(state, "home", open_log(long_log, state))
    assert first_line(long_log, state) == "line 0"
    for expected in range(9, 1800, 9):
        (state, _) = press(state, "page down", open_log(long_log, state))
        assert first_line(long_log, state) == f"line {expected}"
    (state, _) = press(state, "end", open_log(long_log, state))
    assert state.at is None


def test_log_stays_where_it_is_read_while_it_grows(long_log: str) -> None:
    state = ScreenState(Page.LOG, (Page.OVERVIEW,), log=3)
    (state, _) = press(state, "page up", open_log(long_log, state))
    before = read_window(long_log, state.at).lines(state.at, 10)
    with open(long_log, "a") as file:
        file.write("more\n" * 30_000)
    assert read_window(long_log, state.at).lines(state.at, 10) == before
    following = ScreenState(Page.LOG, (Page.OVERVIEW,), log=3)
    assert first_line(long_log, following) == "more"
    (state, _) = press(state, "down", open_log(long_log, state))
    assert read_window(long_log, state.at).lines(state.at, 10)[:-1] == before[1:]


def test_scrolling_down_to_the_end_follows_it(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    path.write_text("".join(f"line {number}\n" for number in range(15)))
    state = ScreenState(Page.LOG, (Page.OVERVIEW,), log=3)
    (state, _) = press(state, "up", open_log(str(path), state))
    assert state.at is not None
    (state, _) = press(state, "down", open_log(str(path), state))
    assert state.at is None


def test_a_large_log_is_read_in_part(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    with path.open("wb") as file:
        file.truncate(300 * 2**20)  # a sparse file, and one line
        file.seek(0, 2)
        file.write(b"\nthe end\n")
    assert read_window(str(path), None).lines(None, 1) == ["the end"]
    window = read_window(str(path), 10**8)
    assert sum(map(len, window.raw)) <= 2 * REACH
    state = ScreenState(Page.LOG, (Page.OVERVIEW,), log=3)
    for _ in range(5):  # pieces of one line: it moves nevertheless
        before = state.at
        (state, _) = press(state, "page up", open_log(str(path), state))
        assert state.at is not None
        assert before is None or state.at < before
    for _ in range(3):
        before = state.at
        (state, _) = press(state, "down", open_log(str(path), state))
        assert state.at is not None
        assert state.at > before


def test_logs_that_cannot_be_shown_say_why(tmp_path: Path) -> None:
    fifo, empty = tmp_path / "fifo", tmp_path / "empty"
    empty.touch()
    os.mkfifo(fifo)
    for path, why in ((fifo, "not a file"), (empty, "empty"), (tmp_path / "no", "No such file"), (None, "no log")):
        assert why in read_window(None if path is None else str(path), None).problem
    assert "invalid" in read_window("a\0b", None).problem


def test_two_logs_of_a_maps_job_are_told_apart() -> None:
    assert files_of("/sweep/7/stderr.txt") == [("stdout", "/sweep/7/stdout.txt"), ("stderr", "/sweep/7/stderr.txt")]
    assert files_of("/sweep/7/train.log") == [("log", "/sweep/7/train.log")]
    assert files_of(None) == []
    view = Shown(tally_of(), (), 10, None, 2)
    state, _ = after(["l", "7", "enter", "tab"], view)
    assert state.file == 1
    assert after(["tab"], view, state)[0].file == 0
    from_failures, _ = after(["f", "enter"], Shown(tally_of(failed(1)), (), 10, None, 2))
    assert from_failures.file == -1, "the last one: stderr"


@pytest.mark.parametrize(
    ("text", "column", "expected"),
    [("abcdef", 2, "cdef"), ("学習率", 2, "習率"), ("学習率", 1, " 習率"), ("ne\u0308x", 2, "x"), ("ab", 9, "")],
)
def test_columns_are_cut_off_without_splitting_characters(text: str, column: int, expected: str) -> None:
    assert from_column(text, column) == expected


# What the terminal sends


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        (b"\x1b[A\x1bOB\x1b[5~\x1b[6~", ["up", "down", "page up", "page down"]),
        (b"\x1b[H\x1b[1~\x1b[4~\x1bOF", ["home", "home", "end", "end"]),
        (b"jq\r\x7f\t", ["j", "q", "enter", "backspace", "tab"]),
        (b"\x1b[15~\x1b[1;5C\x00", []),
        (b"\x1bq", ["escape", "q"]),
        ("é学".encode(), ["é", "学"]),
        (b"\xff\xfep", ["p"]),
    ],
)
def test_keys_are_decoded_however_they_arrive(sent: bytes, keys: list[str]) -> None:
    assert KeyDecoder().feed(sent) == keys
    decoder = KeyDecoder()
    parts = [key for byte in sent for key in decoder.feed(bytes([byte]))]
    assert parts == keys


def test_escape_is_a_key_if_nothing_follows() -> None:
    decoder = KeyDecoder()
    assert decoder.feed(b"x\x1b") == ["x"]
    assert decoder.flush() == ["escape"]
    assert decoder.flush() == []
    assert decoder.feed(b"\x1b[") == []
    assert decoder.feed(b"B") == ["down"]


@given(st.lists(st.binary(max_size=8), max_size=20))
def test_any_bytes_are_decoded(parts: list[bytes]) -> None:
    decoder = KeyDecoder()
    for part in parts:
        assert all(key == "escape" or key.isprintable() for key in decoder.feed(part))
    assert decoder.flush() in ([], ["escape"])


@pytest.mark.parametrize(("can_quit", "ctrl_c"), [(False, "stop the sweep"), (True, "quit this screen")])
def test_help_says_what_ctrl_c_does_here(can_quit: bool, ctrl_c: str) -> None:
    (what,) = (what for keys, what in help_of(SweepTally(), can_quit=can_quit) if "Ctrl-C" in keys)
    assert what.startswith(ctrl_c)
