"""How long a sweep still takes."""

from __future__ import annotations

import heapq
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def time_left(finished: Sequence[float], running: Sequence[float], waiting: int, parallel: int) -> float | None:
    """Seconds until the last job ends, or None while nothing is known.

    `finished` are the durations of jobs that ran to their end, `running` the times that the running ones have run so
    far, `waiting` is how many have not started, and `parallel` how many run at a time.

    A running job is expected to last as long as those finished jobs did that lasted longer than it has so far; a
    waiting one as long as the average; and each starts where a place becomes free first. The first jobs to finish are
    the short ones: while more jobs have outlasted all of them than have finished, nothing is known. Not promised: when
    a job that outlasts every finished one will end. It is expected at once, and alone it makes the answer None.
    """
    if not running and waiting <= 0:
        return 0.0
    longest = max(finished, default=0.0)
    outlasting = [elapsed for elapsed in running if elapsed > longest]
    if len(outlasting) > len(finished) or not finished:
        return None
    average = fmean([*finished, *outlasting])
    places = [_remaining(finished, elapsed) for elapsed in running]
    places += [0.0] * (parallel - len(places))
    places = places or [0.0]
    if waiting > 16 * len(places):
        # After this many rounds the places are evenly filled, and this is called several times a second.
        return max(max(places), (sum(places) + waiting * average) / len(places)) or None
    heapq.heapify(places)
    for _ in range(waiting):
        heapq.heapreplace(places, places[0] + average)
    return max(places) or None


def _remaining(finished: Sequence[float], elapsed: float) -> float:
    longer = [duration for duration in finished if duration > elapsed]
    return fmean(longer) - elapsed if longer else 0.0
