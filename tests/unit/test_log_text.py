"""Tests of parts of logs as text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_launcher.web import log_text
from gpu_launcher.web.log_text import LogPart, read_part, readable, search


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[bytes], int]]:
    descriptors = []

    def write(content: bytes) -> int:
        (tmp_path / "log").write_bytes(content)
        descriptors.append(os.open(tmp_path / "log", os.O_RDONLY))
        return descriptors[-1]

    yield write
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_text, "PART_BYTES", 10)
    monkeypatch.setattr(log_text, "SEARCH_BYTES", 16)
    monkeypatch.setattr(log_text, "MAX_QUERY", 2)


def test_the_last_part_begins_with_a_whole_line(opened: Callable[[bytes], int]) -> None:
    assert read_part(opened(b"one\ntwo\nthree\nfour\n")) == LogPart("four\n", 14, 19, 19)


def test_a_part_before_another_ends_where_that_begins(opened: Callable[[bytes], int]) -> None:
    descriptor = opened(b"one\ntwo\nthree\nfour\n")
    assert read_part(descriptor, end=14) == LogPart("three\n", 8, 14, 19)
    assert read_part(descriptor, end=8) == LogPart("one\ntwo\n", 0, 8, 19)


def test_a_part_after_another_has_whole_lines_and_the_last_one_as_it_is(opened: Callable[[bytes], int]) -> None:
    descriptor = opened(b"one\ntwo\nthree\nfo")
    assert read_part(descriptor, 0) == LogPart("one\ntwo\n", 0, 8, 16)
    assert read_part(descriptor, 8) == LogPart("three\n", 8, 16, 16, "fo", 2)
    assert read_part(descriptor, 8).next == 14
    assert read_part(descriptor, 99) == LogPart("", 16, 16, 16)


def test_a_line_longer_than_a_part_is_shown_in_parts(opened: Callable[[bytes], int]) -> None:
    descriptor = opened(b"x" * 25)
    assert read_part(descriptor, 0).end == 10
    assert read_part(descriptor).start == 15


@pytest.mark.parametrize(
    ("written", "text", "tail", "next"),
    [
        (b"a\n1%\r2%\r3%", "a\n", "3%", 8),  # a progress bar
        (b"a\n1%\r2%\r", "a\n", "2%", 5),
        (b"1%\r", "", "1%", 0),
        (b"a\n\x1b[31mr\xc3", "a\n", "r\N{REPLACEMENT CHARACTER}", 2),  # half of a character
        (b"x" * 9, "xxxxxxxxx", "", 9),
    ],
)
def test_a_line_that_is_being_written_is_apart(
    opened: Callable[[bytes], int], monkeypatch: pytest.MonkeyPatch, written: bytes, text: str, tail: str, next: int
) -> None:
    monkeypatch.setattr(log_text, "MAX_TAIL", 8)
    part = read_part(opened(written), 0)
    assert (part.text, part.tail, part.next, part.end) == (text, tail, next, len(written))


def test_lines_are_found_from_the_end_across_blocks(opened: Callable[[bytes], int]) -> None:
    descriptor = opened(b"".join(b"%d ab\n" % number for number in range(10)) + b"no\n")
    assert [found.text for found in search(descriptor, "AB")] == [f"{number} ab" for number in range(10)]
    assert [found.at for found in search(descriptor, "ab", 2)] == [40, 45]
    assert search(descriptor, "zz") == []


def test_the_end_of_a_line_longer_than_a_block_is_searched(opened: Callable[[bytes], int]) -> None:
    assert len(search(opened(b"x" * 22 + b"ab" + b"xx\nno\n"), "ab")) == 1


def test_what_lies_across_two_blocks_of_a_line_is_found_once(opened: Callable[[bytes], int]) -> None:
    for before in range(40):
        assert len(search(opened(b"x" * before + b"ab" + b"x" * (40 - before)), "ab")) == 1


def test_a_search_ends_in_a_log_without_line_breaks(opened: Callable[[bytes], int]) -> None:
    assert len(search(opened(b"x" * 100), "xx")) >= 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x1b[31mred\x1b[0m\n", "red\n"),
        (b"\x1b]0;title\x07a", "a"),
        (b" 10%\r 20%\r 30%\nend\r\n", " 30%\nend\n"),
        (b"a\x00b\x08\x7f", "a\N{REPLACEMENT CHARACTER}b" + 2 * "\N{REPLACEMENT CHARACTER}"),
        ("left \u202eright".encode(), "left \N{REPLACEMENT CHARACTER}right"),
        (b"\xff\xfe", 2 * "\N{REPLACEMENT CHARACTER}"),
        (b"<b>&amp;", "<b>&amp;"),
    ],
)
def test_text_is_what_a_terminal_would_show(data: bytes, text: str) -> None:
    assert readable(data) == text
