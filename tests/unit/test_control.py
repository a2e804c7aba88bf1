"""The protocol of a sweep's control socket, and ranges of job numbers."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.jobs.control import (
    MAX_NUMBER,
    MAX_RANGES,
    AskStatus,
    CancelJobs,
    ContinueSweep,
    LimitDevices,
    PauseSweep,
    Ranges,
    Steering,
    StopSweep,
    WatchSweep,
    merged,
    named,
    overlap,
    ranges_of,
    read_answer,
    read_ranges,
    read_request,
    spell,
    without,
    write_answer,
    write_refusal,
    write_request,
)

REQUESTS: list[Steering] = [
    AskStatus(),
    WatchSweep(),
    CancelJobs(((7, 7), (9, 12))),
    StopSweep(),
    StopSweep(now=True),
    PauseSweep(),
    ContinueSweep(),
]
REQUESTS += [LimitDevices(4), LimitDevices(None)]
numbers = st.sets(st.integers(0, 40))


def members(ranges: Ranges) -> set[int]:
    return {number for first, last in ranges for number in range(first, last + 1)}


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_request_is_read_as_it_was_written(request_: Steering) -> None:
    line = write_request(request_)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert read_request(line) == request_


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"version": 1},
        {"version": 1, "do": "dance"},
        {"version": 1, "do": ["cancel"]},
        {"version": 1, "do": "cancel"},
        {"version": 1, "do": "cancel", "jobs": []},
        {"version": 1, "do": "cancel", "jobs": 7},
        {"version": 1, "do": "cancel", "jobs": [7]},
        {"version": 1, "do": "cancel", "jobs": [[7]]},
        {"version": 1, "do": "cancel", "jobs": [[7, 6]]},
        {"version": 1, "do": "cancel", "jobs": [[-1, 6]]},
        {"version": 1, "do": "cancel", "jobs": [[True, 6]]},
        {"version": 1, "do": "cancel", "jobs": [[0, MAX_NUMBER + 1]]},
        {"version": 1, "do": "cancel", "jobs": [[0, 0]] * (MAX_RANGES + 1)},
        {"version": 1, "do": "stop"},
        {"version": 1, "do": "stop", "now": "yes"},
        {"version": 1, "do": "limit"},
        {"version": 1, "do": "limit", "devices": 0},
        {"version": 1, "do": "limit", "devices": "4"},
        {"version": 2, "do": "status"},
        {"version": "1", "do": "status"},
        [1],
        7,
    ],
    ids=lambda content: str(content)[:60],
)
def test_anything_else_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        read_request(json.dumps(content).encode())


@given(st.binary(max_size=200))
def test_garbage_is_refused_with_a_message(data: bytes) -> None:
    with pytest.raises(ValueError, match="control request"):
        read_request(data)


def test_request_of_another_version_is_refused_with_both_versions() -> None:
    with pytest.raises(ValueError, match="reads control requests of version 1, not 2"):
        read_request(b'{"version": 2, "do": "status"}')


def test_ranges_of_a_request_are_put_in_order() -> None:
    request = read_request(b'{"version": 1, "do": "cancel", "jobs": [[9, 12], [7, 7], [8, 10]]}')
    assert request == CancelJobs(((7, 12),))


def test_answers_are_read_as_they_were_written() -> None:
    assert read_answer(write_answer({"running": 2})) == {"version": 1, "ok": True, "running": 2}
    assert read_answer(write_refusal("no")) == {"version": 1, "ok": False, "problem": "no"}
    for line in (b"", b"{}\n", b'{"version": 2, "ok": true}\n', b'{"version": 1, "ok": 1}\n'):
        with pytest.raises(ValueError, match=r"\w"):
            read_answer(line)


@given(numbers, numbers)
def test_ranges_hold_the_numbers_that_they_should(some: set[int], others: set[int]) -> None:
    ranges, more = ranges_of(some), ranges_of(others)
    assert members(ranges) == some
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(ranges)), "merged"
    assert members(merged([*ranges, *more])) == some | others
    assert members(without(ranges, more)) == some - others
    assert members(overlap(ranges, 10, 20)) == some & set(range(10, 21))
    assert named(ranges, others) == sorted(some & others)


@pytest.mark.parametrize(
    ("texts", "ranges"),
    [
        (["7"], ((7, 7),)),
        (["7", "9-12"], ((7, 7), (9, 12))),
        (["9-12,3", "4"], ((3, 4), (9, 12))),
        (["1-3", "2-5"], ((1, 5),)),
    ],
)
def test_numbers_are_read_as_users_write_them(texts: list[str], ranges: Ranges) -> None:
    assert read_ranges(texts) == ranges


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1-", "1-x", "3-1", "1,,2", "²", "1.5", str(MAX_NUMBER + 1), "9" * 5000]
)
def test_text_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a job's number|ends before it begins") as refused:
        read_ranges([text])
    assert len(str(refused.value)) < 200


def test_too_many_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="1001 ranges are too many"):
        read_ranges([str(2 * number) for number in range(MAX_RANGES + 1)])


def test_ranges_are_spelled_for_people() -> None:
    assert spell(((7, 7),)) == "job 7"
    assert spell(((3, 3), (9, 12))) == "jobs 3, 9-12"
    assert spell(((3, 4),)) == "jobs 3-4"
    assert spell(tuple((2 * number, 2 * number) for number in range(20))).endswith(", 22, ...")
