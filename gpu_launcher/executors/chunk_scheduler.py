"""Decides which records are dealt next and which results can be returned. Pure state: nothing here waits.

A record is read when there is a worker for it. From the oldest record whose result has not been returned to the newest
one that was read, there are never more records than the window. So any number of records takes constant memory, whether
results are ordered or not.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

CHUNK_SECONDS = 0.03
"""Target duration of a chunk: long enough that handing it over costs little, short enough that no worker waits long."""
LAST_CHUNK_SECONDS = 0.003
"""Minimum duration of the last chunks. They become small so that all workers end at about the same time."""
PREFETCH_BELOW_SECONDS = 0.1
"""Seconds per record below which a worker gets a chunk ahead.

For slower records the handover costs little, and a chunk ahead might wait while another worker is idle.
"""
GROWTH = 32
"""Maximum factor by which the size of chunks grows at once."""
MAX_CHUNK_RECORDS = 8192
MAX_CHUNK_BYTES = 2**20
"""Maximum bytes of a chunk's pickled records, or of its pickled results, as estimated from earlier ones."""
WINDOW = 1000
"""Minimum size of the window in records, unless they are large."""
WINDOW_BYTES = 2**28
"""Maximum bytes of the records in the window, as estimated from earlier ones."""
READ_SECONDS = 0.005
"""Seconds after which a chunk is dealt although it is not full, because records are slow to read."""


@dataclass(slots=True)
class Chunk:
    """Consecutive records that are dealt together, as far as their results are not known."""

    first: int
    """Index of the first record."""
    records: list[Any]
    tries: int = 0
    """How many workers died at it. If not 0, the chunk has one record."""

    def done(self, count: int) -> None:
        """Remove the first `count` records, whose results are known."""
        self.first += count
        del self.records[:count]


@dataclass(frozen=True, slots=True)
class RaisedByRecord:
    """The exception that ends the iteration, in the place of a record's result."""

    error: BaseException
    cause: BaseException | None


class ChunkScheduler:
    """Deals records and puts their results in order."""

    def __init__(
        self,
        records: Iterator[Any],
        *,
        ordered: bool,
        read_ahead: int | None,
        clock: Callable[[], float],
        length: int | None = None,
    ) -> None:
        """Prepare to deal `records`.

        `length` is their expected number, or None. `read_ahead` is the user's choice of the window, or None.
        """
        self._records = records
        self._ordered = ordered
        self._read_ahead = read_ahead
        self._clock = clock
        self._length = length
        self.exhausted = False
        """Whether no more records will be read."""
        self.error: BaseException | None = None
        """The exception that `records` raised, if it did."""
        self.read = 0
        """Number of records that were read."""
        self.finished = 0
        """Number of records whose result is known."""
        self.taken = 0
        """Number of results that were returned."""
        self._hand: list[tuple[int, Chunk]] = []
        """Chunks to deal, read or given back: a heap."""
        self._seconds = self._records_in_them = 0.0
        """Decaying sums: the time of recent records, and their number."""
        self._weight = 0.0
        """Estimated bytes per record, or per result if that is more."""
        self._size = 1
        """Number of records of the next chunk."""
        self._most = MAX_CHUNK_RECORDS
        self._out_of_order: dict[int, list[Any] | RaisedByRecord] = {}
        """Results that wait for earlier ones, by index."""
        self._next = 0
        """Index of the next result in order."""
        self._ready: deque[list[Any] | RaisedByRecord] = deque()
        """Results that can be returned, in parts."""
        self._offset = 0
        """How many results of the first part were returned."""

    # Records

    @property
    def in_hand(self) -> int:
        """Number of chunks that wait to be dealt."""
        return len(self._hand)

    @property
    def ahead(self) -> int:
        """Maximum number of chunks that a worker may have at a time."""
        return 2 if self._records_in_them and self._pace < PREFETCH_BELOW_SECONDS else 1

    @property
    def _pace(self) -> float:
        """Seconds per record."""
        return max(self._seconds, 1e-9) / self._records_in_them

    def deal(self, workers: int) -> Chunk | None:
        """Return the next chunk for one of `workers` workers. None if there is none now."""
        if not self._hand:
            self._read(self._fair(workers), workers)
        return heapq.heappop(self._hand)[1] if self._hand else None

    def _fair(self, workers: int) -> int:
        """Return the size of the next chunk. Towards the end, chunks are small enough for all workers to get some."""
        left = (self._length or 0) - self.read
        if left <= 0 or not self._records_in_them:
            return self._size
        return min(self._size, max(left // (2 * workers), int(LAST_CHUNK_SECONDS / self._pace), 1))

    def has(self, chunks: int, workers: int) -> bool:
        """Whether at least `chunks` chunks wait to be dealt. Reads records for that, each as a chunk of its own."""
        while len(self._hand) < chunks:
            if not self._read(1, workers):
                return False
        return True

    def give_back(self, chunk: Chunk) -> None:
        """Put a chunk back, to be dealt."""
        if chunk.records:
            heapq.heappush(self._hand, (chunk.first, chunk))

    def separate(self, chunk: Chunk) -> None:
        """Put the records of a chunk back, to be dealt one by one."""
        for index, record in enumerate(chunk.records, chunk.first):
            self.give_back(Chunk(index, [record], chunk.tries))

    def one_by_one(self) -> None:
        """Deal all records one by one from now on."""
        self._most = 1

    def lost(self, chunks: Iterable[Chunk], at: range) -> Chunk | None:
        """Take back the `chunks` of a worker that died at one of the records `at`. Returns the suspects.

        The other records are to be dealt again. A single suspect has one more try behind it. If there are several, it
        is not known at which one the worker died. None if it died without a record.
        """
        suspects = None
        for chunk in chunks:
            begin, end = at.start - chunk.first, at.stop - chunk.first
            if at and 0 <= begin < len(chunk.records):
                records = chunk.records[begin:end]
                suspects = Chunk(at.start, records, chunk.tries + (len(records) == 1))
                self.give_back(Chunk(chunk.first, chunk.records[:begin]))
                self.give_back(Chunk(at.start + len(records), chunk.records[end:]))
            else:
                self.give_back(chunk)
        return suspects

    def _read(self, count: int, workers: int) -> bool:
        """Read a chunk of at most `count` records. Returns whether there was one."""
        window = self._window(workers)
        share = max(1, window // (2 * workers))  # the other workers need a part of the window, too
        count = min(count, share, window - (self.read - self.taken))
        if self.exhausted or count < 1:
            return False
        records: list[Any] = []
        until = self._clock() + READ_SECONDS
        piece = 1
        try:
            while len(records) < count and (not records or self._clock() < until):
                before = len(records)
                wanted = min(piece, count - before)
                records.extend(itertools.islice(self._records, wanted))  # if it raises, records read before are kept
                if len(records) < before + wanted:
                    self.exhausted = True
                    break
                piece *= 2
        except Exception as error:  # the user's generator may raise anything
            self.exhausted = True
            self.error = error
        self.give_back(Chunk(self.read, records))
        self.read += len(records)
        return bool(records)

    def _window(self, workers: int) -> int:
        if self._read_ahead is not None:
            return self._read_ahead
        return max(2 * workers, min(max(WINDOW, 4 * workers * self._size), self._that_weigh(WINDOW_BYTES)))

    def _that_weigh(self, size: int) -> int:
        return max(1, int(size / max(self._weight, 1.0)))

    def measured(self, count: int, seconds: float, size: int) -> None:
        """Take note that `count` records took `seconds`, and their results `size` bytes. Adapts the size of chunks."""
        self._seconds = self._seconds / 2 + seconds
        self._records_in_them = self._records_in_them / 2 + count
        self.weighed(count, size)
        fitting = min(int(CHUNK_SECONDS / self._pace), self._that_weigh(MAX_CHUNK_BYTES), self._most)
        self._size = max(1, min(fitting, self._size * GROWTH))

    def weighed(self, count: int, size: int) -> None:
        """Take note that `count` records, or results, take `size` bytes."""
        weight = size / count
        self._weight = max(weight, (self._weight + weight) / 2)

    # Results

    def put(self, first: int, values: list[Any], raised: dict[int, RaisedByRecord]) -> None:
        """Take the results of records from index `first`. Those in `raised`, by position, end the iteration."""
        self.finished += len(values)
        begin = 0
        for position in sorted(raised):
            self.exhausted = True  # the iteration will end here, so no more records are needed
            self._put(first + begin, values[begin:position])
            self._put(first + position, raised[position])
            begin = position + 1
        self._put(first + begin, values[begin:] if begin else values)

    def _put(self, first: int, part: list[Any] | RaisedByRecord) -> None:
        if isinstance(part, list) and not part:
            return
        if not self._ordered:
            self._ready.append(part)
            return
        self._out_of_order[first] = part
        while (part_now := self._out_of_order.pop(self._next, None)) is not None:
            self._ready.append(part_now)
            self._next += len(part_now) if isinstance(part_now, list) else 1

    @property
    def ready(self) -> bool:
        """Whether `take` can be called."""
        return bool(self._ready)

    @property
    def over(self) -> bool:
        """Whether all records were read and have their results."""
        return self.exhausted and self.finished == self.read

    def take(self, most: int) -> list[Any]:
        """Return the next results, at most `most`. Raises the exception with which a record ends the iteration."""
        part = self._ready[0]
        if isinstance(part, RaisedByRecord):
            raise part.error from part.cause
        if not self._offset and len(part) <= most:
            taken = part
            self._ready.popleft()
        else:
            taken = part[self._offset : self._offset + most]
            self._offset += len(taken)
            if self._offset == len(part):
                self._ready.popleft()
                self._offset = 0
        self.taken += len(taken)
        return taken
