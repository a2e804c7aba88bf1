"""What is dealt next and what comes out, under random histories: the state alone, without any process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_launcher.executors.chunk_scheduler import (
    CHUNK_SECONDS,
    LAST_CHUNK_SECONDS,
    MAX_CHUNK_BYTES,
    WINDOW,
    Chunk,
    ChunkScheduler,
    RaisedByRecord,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scheduler(
    records: Any,
    *,
    ordered: bool = True,
    read_ahead: int | None = None,
    clock: Clock | None = None,
    length: int | None = None,
) -> ChunkScheduler:
    return ChunkScheduler(iter(records), ordered=ordered, read_ahead=read_ahead, clock=clock or Clock(), length=length)


@given(
    count=st.integers(0, 100),
    ordered=st.booleans(),
    read_ahead=st.none() | st.integers(1, 40),
    said=st.none() | st.integers(0, 200),
    dice=st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_every_record_comes_out_once_whatever_dies_and_in_order_if_that_is_wanted(
    count: int, ordered: bool, read_ahead: int | None, said: int | None, dice: Any
) -> None:
    deal = scheduler(range(count), ordered=ordered, read_ahead=read_ahead, length=said)
    working: list[list[Chunk]] = [[] for _ in range(3)]
    results: list[int] = []
    deaths: dict[int, int] = {}
    """How many workers died at it when it had been begun alone."""
    while not (deal.over and not deal.ready):
        assert deal.read - deal.taken <= (read_ahead or WINDOW)
        moves = ["deal", "part", "die", "take", "separate"]
        move = dice.choice(moves)
        worker = dice.choice(working)
        if move == "deal" and len(worker) < deal.ahead:
            if (chunk := deal.deal(3)) is not None:
                worker.append(chunk)
            elif not any(working) and not deal.ready:
                assert deal.over, "nobody has anything to do, and it is not over"
        elif move == "part" and worker:
            chunk = worker[0]
            done = dice.randint(1, len(chunk.records))
            first, records = chunk.first, chunk.records[:done]
            chunk.done(done)
            if not chunk.records:
                worker.pop(0)
            deal.measured(done, done * dice.choice([1e-6, 1e-3, 0.2]), 10 * done)
            deal.put(first, list(records), {})
        elif move == "die" and worker and dice.random() < 0.3:
            chunk = worker[0]
            at = range(0)
            if dice.random() < 0.8:
                begin = chunk.first + dice.randrange(len(chunk.records))
                at = range(begin, begin + dice.randint(1, 5))
            suspects = deal.lost(worker, at)
            worker.clear()
            assert (suspects is None) == (not at)
            if suspects is not None:
                begun = [number for number in at if number < chunk.first + len(chunk.records)]
                assert (suspects.first, suspects.records) == (at.start, begun)
                if len(begun) == 1:
                    deaths[at.start] = deaths.get(at.start, 0) + 1
                    assert suspects.tries == deaths[at.start]
                else:
                    assert suspects.tries == 0, "nothing is blamed for what another record may have done"
                if suspects.tries == 2:
                    deal.put(at.start, begun, {})
                else:
                    deal.separate(suspects)
        elif move == "separate" and worker:
            deal.separate(worker.pop())
        elif move == "take" and deal.ready:
            results += deal.take(dice.randint(1, 50))
    assert (results if ordered else sorted(results)) == list(range(count))


def test_what_the_records_raise_keeps_those_before() -> None:
    def records() -> Iterator[int]:
        yield from range(5)
        raise ValueError("half-way")

    deal = scheduler(records())
    deal.measured(1, 1e-6, 1)
    chunk = deal.deal(2)
    assert chunk is not None
    assert chunk.records == [0, 1, 2, 3, 4]
    assert str(deal.error) == "half-way"
    assert deal.exhausted
    assert not deal.over


def test_chunks_grow_until_they_take_long_enough() -> None:
    deal = scheduler(range(10**6))
    sizes = []
    for _ in range(8):
        chunk = deal.deal(1)
        assert chunk is not None
        sizes.append(len(chunk.records))
        deal.measured(len(chunk.records), len(chunk.records) * 1e-4, 0)
        deal.put(chunk.first, chunk.records, {})
        while deal.ready:
            deal.take(10**6)
    assert sizes[:3] == [1, 32, 300]
    assert sizes[-1] * 1e-4 == pytest.approx(CHUNK_SECONDS, rel=0.02)


@pytest.mark.parametrize("workers", [2, 8])
def test_where_the_end_is_known_the_last_chunks_are_small(workers: int) -> None:
    pace, count = 1e-4, 3000
    deal = scheduler(range(count), length=count)
    deal.measured(1000, 1000 * pace, 0)
    sizes = []
    while (chunk := deal.deal(workers)) is not None:
        deal.measured(len(chunk.records), len(chunk.records) * pace, 0)
        deal.put(chunk.first, chunk.records, {})
        while deal.ready:
            deal.take(count)
        left = count - sum(sizes)
        sizes.append(len(chunk.records))
        assert sizes[-1] <= max(left / (2 * workers), LAST_CHUNK_SECONDS / pace)
    assert sum(sizes) == count
    assert min(sizes[:-1]) == int(LAST_CHUNK_SECONDS / pace)


def test_of_a_small_window_no_worker_gets_so_much_that_others_have_nothing() -> None:
    deal = scheduler(range(1000), read_ahead=16)
    deal.measured(100, 100 * 1e-3, 0)
    chunks = [deal.deal(4) for _ in range(8)]
    assert [len(chunk.records) for chunk in chunks if chunk is not None] == [2] * 8
    assert deal.deal(4) is None


@pytest.mark.parametrize("said", [0, 500])
def test_a_length_that_is_too_small_is_not_believed(said: int) -> None:
    deal = scheduler(range(10_000), length=said)
    deal.measured(1000, 1000 * 1e-4, 0)
    sizes = []
    while (chunk := deal.deal(2)) is not None:
        sizes.append(len(chunk.records))
        deal.measured(len(chunk.records), len(chunk.records) * 1e-4, 0)
        deal.put(chunk.first, chunk.records, {})
        while deal.ready:
            deal.take(10_000)
    assert sum(sizes) == 10_000
    assert sizes[-2] == pytest.approx(CHUNK_SECONDS / 1e-4, abs=1)


def test_slow_and_large_records_are_dealt_one_by_one() -> None:
    slow = scheduler(range(100))
    slow.measured(1, 1.0, 10)
    assert slow.ahead == 1
    large = scheduler(range(100))
    large.measured(1, 1e-6, 2 * MAX_CHUNK_BYTES)
    for deal in (slow, large):
        chunk = deal.deal(2)
        assert chunk is not None
        assert len(chunk.records) == 1


def test_a_chunk_goes_out_as_it_is_when_records_are_slow_in_coming() -> None:
    clock = Clock()

    def records() -> Iterator[int]:
        for number in range(1000):
            clock.now += 1
            yield number

    deal = scheduler(records(), clock=clock)
    deal.measured(1, 1e-6, 1)
    chunk = deal.deal(1)
    assert chunk is not None
    assert len(chunk.records) == 1


def test_an_error_to_be_raised_comes_in_its_place() -> None:
    deal = scheduler(range(10))
    for _ in range(3):
        deal.deal(1)
    error = ValueError("at 1")
    deal.put(1, [None], {0: RaisedByRecord(error, RuntimeError("why"))})
    assert not deal.ready
    deal.put(0, ["zero"], {})
    assert deal.take(10) == ["zero"]
    with pytest.raises(ValueError, match="at 1"):
        deal.take(10)
    assert deal.deal(1) is None, "no more records are begun"
