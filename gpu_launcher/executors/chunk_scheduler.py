"""Which records are dealt next, and which results may come out, as pure state: nothing here waits or starts anything.

A record is read when there is somebody for it, and few are in hand at any time: between the oldest record whose result
has not come out and the newest one that was read there are never more than the window, so that any number of records
takes constant memory, in order or not.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

CHUNK_SECONDS = 0.03
"""Seconds that a chunk is to take: so much that handing it over does not count, so little that none waits for it."""
LAST_CHUNK_SECONDS = 0.003
"""Seconds that the last chunks take at least. They become small, so that all workers end at about the same time."""
PREFETCH_BELOW_SECONDS = 0.1
"""Seconds per record from which a worker gets nothing ahead: the handover does not count, and somebody may be idle."""
GROWTH = 32
"""By how much a chunk may be larger than those before."""
MAX_CHUNK_RECORDS = 8192
MAX_CHUNK_BYTES = 2**20
"""What a chunk's records, or its results, may take, pickled, as far as can be told beforehand."""
WINDOW = 1000
"""Records in hand that are always allowed, unless they are large."""
WINDOW_BYTES = 2**28
READ_SECONDS = 0.005
"""Seconds after which a chunk goes out as it is, because records are slow in coming."""


@dataclass(slots=True)
class Chunk:
    """Records that are dealt together: those that nothing is known of yet."""

    first: int
    """Index of the first one."""
    records: list[Any]
    tries: int = 0
    """How many workers died at it. It then is one record."""

    def done(self, count: int) -> None:
        """The first ones have been dealt with."""
        self.first += count
        del self.records[:count]


@dataclass(frozen=True, slots=True)
class RaisedByRecord:
    """In the place of a record's result: what the iteration is to end with."""

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
        """Deal `records`, of which there are `length`, as far as is known and may be believed.

        `read_ahead` is the window if it is not ours to choose.
        """
        self._records = records
        self._ordered = ordered
        self._read_ahead = read_ahead
        self._clock = clock
        self._length = length
        self.exhausted = False
        """Whether nothing more will be read."""
        self.error: BaseException | None = None
        """What ended the records, if they did not end by themselves."""
        self.read = 0
        self.finished = 0
        """Records of which the result is known."""
        self.taken = 0
        """Results that have come out."""
        self._hand: list[tuple[int, Chunk]] = []
        """What was read, or comes back, and is to be dealt; a heap."""
        self._seconds = self._records_in_them = 0.0
        """What records took lately, and how many they were."""
        self._weight = 0.0
        """Bytes per record, or per result if that is more."""
        self._size = 1
        self._most = MAX_CHUNK_RECORDS
        self._out_of_order: dict[int, list[Any] | RaisedByRecord] = {}
        self._next = 0
        self._ready: deque[list[Any] | RaisedByRecord] = deque()
        self._offset = 0
        """How many results of the first one that is ready have come out."""

    # Records

    @property
    def in_hand(self) -> int:
        """How many chunks wait to be dealt."""
        return len(self._hand)

    @property
    def ahead(self) -> int:
        """How many chunks a worker may have at a time."""
        return 2 if self._records_in_them and self._pace < PREFETCH_BELOW_SECONDS else 1

    @property
    def _pace(self) -> float:
        """Seconds per record."""
        return max(self._seconds, 1e-9) / self._records_in_them

    def deal(self, workers: int) -> Chunk | None:
        """The next records for a worker, of which there are so many; None if there are none now."""
        if not self._hand:
            self._read(self._fair(workers), workers)
        return heapq.heappop(self._hand)[1] if self._hand else None

    def _fair(self, workers: int) -> int:
        """How many records to deal, of those that are left to be read."""
        left = (self._length or 0) - self.read
        if left <= 0 or not self._records_in_them:
            return self._size
        return min(self._size, max(left // (2 * workers), int(LAST_CHUNK_SECONDS / self._pace), 1))

    def has(self, chunks: int, workers: int) -> bool:
        """Whether so many chunks are to be dealt, once enough is read. What is read for that are single records."""
        while len(self._hand) < chunks:
            if not self._read(1, workers):
                return False
        return True

    def give_back(self, chunk: Chunk) -> None:
        """It is to be dealt again."""
        if chunk.records:
            heapq.heappush(self._hand, (chunk.first, chunk))

    def separate(self, chunk: Chunk) -> None:
        """Its records are to be dealt one by one."""
        for index, record in enumerate(chunk.records, chunk.first):
            self.give_back(Chunk(index, [record], chunk.tries))

    def one_by_one(self) -> None:
        """From now on all records are."""
        self._most = 1

    def lost(self, chunks: Iterable[Chunk], at: range) -> Chunk | None:
        """These were a worker's that died at one of `at`; returns those, and deals the others again.

        One has a try behind it. Of several nobody knows which it was.
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
        """Read a chunk of at most so many; whether there was any."""
        window = self._window(workers)
        share = max(1, window // (2 * workers))  # the others need some of it, too
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
                records.extend(itertools.islice(self._records, wanted))  # what it got stays there if it raises
                if len(records) < before + wanted:
                    self.exhausted = True
                    break
                piece *= 2
        except Exception as error:  # whatever the user's generator raises
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
        """So many records took so long, and their results so many bytes."""
        self._seconds = self._seconds / 2 + seconds
        self._records_in_them = self._records_in_them / 2 + count
        self.weighed(count, size)
        fitting = min(int(CHUNK_SECONDS / self._pace), self._that_weigh(MAX_CHUNK_BYTES), self._most)
        self._size = max(1, min(fitting, self._size * GROWTH))

    def weighed(self, count: int, size: int) -> None:
        """So many records, or results, take so many bytes."""
        weight = size / count
        self._weight = max(weight, (self._weight + weight) / 2)

    # Results

    def put(self, first: int, values: list[Any], raised: dict[int, RaisedByRecord]) -> None:
        """Take the results of records from `first` on, of which some, by position, end the iteration instead."""
        self.finished += len(values)
        begin = 0
        for position in sorted(raised):
            self.exhausted = True  # why begin more
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
        """Whether something can be taken."""
        return bool(self._ready)

    @property
    def over(self) -> bool:
        """Whether all records there will ever be have their results."""
        return self.exhausted and self.finished == self.read

    def take(self, most: int) -> list[Any]:
        """The next results, at most so many. Raises what a record is to end the iteration with."""
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
