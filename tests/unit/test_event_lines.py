"""What a head sends to those who watch its sweep."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import pytest

from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.jobs.event_lines import MAX_STATE_FAILURES, read_line, write_event, write_state
from gpu_launcher.jobs.events import (
    Event,
    JobEnded,
    JobRetried,
    JobReturned,
    JobsRequeued,
    JobStarted,
    JobWaiting,
    NodesChanged,
    Notice,
    Outcome,
    OutOfContact,
    SearchStatus,
    StopRequested,
    SweepEnded,
    SweepStarted,
    Throttled,
)
from gpu_launcher.jobs.figures import Figures
from gpu_launcher.jobs.progress.tally import SweepTally

GPUS = tuple(replace(device, node="gpu1", cpus=(0, 1)) for device in simulated_devices(2))
FAILED = JobEnded(9.0, 1, "x=1", GPUS[1:], Outcome.FAILED, 4.0, "ValueError: nan", "1/job.log", "main:3", ("sleep",))
EVENTS: list[Event] = [
    SweepStarted(1.0, 9, GPUS, 2),
    SweepStarted(1.0, None, (), None),
    Notice(2.0, "a notice"),
    SearchStatus(2.5, (("best", "0.1"), ("trials", "3"))),
    Throttled(2.5, paused=False, devices=1, text="at most 1 device"),
    JobWaiting(3.0, 0, "x=0", "held by anna", GPUS[:1], "2 GPUs"),
    JobStarted(4.0, 0, "x=0", GPUS[:1], "0/job.log", 4711),
    JobStarted(5.0, 1, "x=1", GPUS[1:], None),
    JobRetried(6.0, 1, "x=1", 1.0, "crashed", None, 2, 3, 1),
    JobStarted(7.0, 1, "x=1", GPUS[1:], None),
    JobStarted(7.0, 2, "x=2", (), None),
    JobReturned(8.0, 2, "x=2"),
    NodesChanged(8.0, GPUS, "gpu1 joined"),
    OutOfContact(8.0, frozenset({"gpu1"}), frozenset({0})),
    FAILED,
    replace(FAILED, number=3),
    replace(FAILED, number=4, message="KeyError"),
    JobEnded(9.5, 5, "x=5", (), Outcome.COMPLETED, 2.0, None, None),
    JobEnded(9.5, 6, "x=6", (), Outcome.PRUNED, 2.0, None, None),
    JobEnded(9.5, 7, "x=7", (), Outcome.CANCELLED, None, None, None),
    JobsRequeued(9.7, frozenset({1, 7}), 1, 1, "jobs 1, 7 run again"),
    StopRequested(10.0, 1, 10.0, False, "SIGINT"),
    SweepEnded(11.0, ("results: sweep",)),
]


def lines(tally: SweepTally) -> Any:
    """All that displays show of a state."""
    return tally.summary(), tally.running, tally.time_left(), tally.waits, tally.facts, tally.throttled, tally.now


def test_every_event_is_read_as_it_was_written() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))
    for event in EVENTS:
        line = write_event(event)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert read_line(line) == event


def test_state_and_the_events_after_it_are_as_good_as_all_events() -> None:
    for known in range(len(EVENTS) + 1):
        whole, tally = SweepTally(), SweepTally()
        for event in EVENTS[:known]:
            tally.take(event)
        read = read_line(write_state(tally))
        assert isinstance(read, SweepTally)
        for event in EVENTS:
            whole.take(event)
        for event in EVENTS[known:]:
            read.take(event)
        assert lines(read) == lines(whole)


def test_figures_are_not_sent() -> None:
    line = write_event(replace(FAILED, figures=Figures({"loss": 0.5}, 1, 2)))
    assert read_line(line) == FAILED
    with pytest.raises(ValueError, match="is not a"):
        read_line(json.dumps({**json.loads(line), "figures": {"values": {"loss": 0.5}}}).encode())


def test_state_names_a_limited_number_of_failures() -> None:
    tally = SweepTally()
    for number in range(MAX_STATE_FAILURES + 50):
        tally.take(replace(FAILED, number=number, message=f"problem of kind {'x' * number}"))
    read = read_line(write_state(tally))
    assert isinstance(read, SweepTally)
    assert read.summary() == tally.summary()
    assert len(read.failures.groups) == MAX_STATE_FAILURES


def test_texts_become_lines_without_control_characters() -> None:
    event = read_line(write_event(Notice(0.0, "one\x1b[31m\ntwo\u202e" + "x" * 10_000)))
    assert isinstance(event, Notice)
    assert event.text.startswith("one two xxx")
    assert len(event.text) <= 4096
    tally = SweepTally(closing=("a\x1b]0;title\x07b",), running={0: JobStarted(0.0, 0, "x\r=0", (), None)})
    read = read_line(write_state(tally))
    assert isinstance(read, SweepTally)
    assert read.closing == ("ab",)
    assert read.running[0].label == "x =0"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("event", "Bang"),
        ("event", ["JobEnded"]),
        ("time", None),
        ("time", float("nan")),
        ("time", -1),
        ("time", 1e300),
        ("number", True),
        ("number", 2**70),
        ("number", "1"),
        ("label", 1),
        ("devices", {}),
        ("devices", [1]),
        ("devices", [{}]),
        ("outcome", "exploded"),
        ("outcome", ["failed"]),
        ("duration", "long"),
        ("left_behind", [None]),
    ],
)
def test_strange_events_are_refused(name: str, value: object) -> None:
    content = json.loads(write_event(FAILED))
    with pytest.raises(ValueError):  # noqa: PT011  (its message is not shown)
        read_line(json.dumps({**content, name: value}).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", []),
        ("state", {}),
        ("running", {"1": {}}),
        ("failures", [[1]]),
        ("failures", [[{}, []]]),
        ("failures", [[json.loads(write_event(FAILED)), [2**63]]]),
        ("durations", [None]),
        ("ran_together", [1.5]),
    ],
)
def test_strange_states_are_refused(name: str, value: object) -> None:
    content = json.loads(write_state(SweepTally()))
    assert isinstance(read_line(json.dumps(content).encode()), SweepTally)
    with pytest.raises(ValueError):  # noqa: PT011  (its message is not shown)
        read_line(json.dumps({**content, name: value}).encode())


@pytest.mark.parametrize("line", [b"", b"[]", b"nan", b"\xff", b"[" * 100_000, b"{}"], ids=lambda line: str(line[:9]))
def test_other_lines_are_refused(line: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (its message is not shown)
        read_line(line)
