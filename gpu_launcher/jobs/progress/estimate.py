"""Estimates a sweep's remaining time."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def time_left(finished: Sequence[float], running: Sequence[float], waiting: int, parallel: int) -> float | None:
    """Estimate the seconds until the last job ends. Returns None while there is too little data.

    `finished` are the durations of finished jobs; `running` are the times for which the running jobs have run so far.
    `waiting` jobs have not started, and `parallel` jobs run at a time.

    A running job is expected to last as long as the average finished job that lasted longer than it has so far. A
    waiting job is expected to last as long as the average job, and takes the place that becomes free first. Because
    short jobs finish first, the result is None while more jobs have outlasted all finished ones than have finished.

    Not promised: the end of a job that outlasts every finished one. It is expected to end at once, and if it is the
    only job left, the result is None.
    """
    if not running and waiting <= 0:
        return 0.0
    longest = max(finished, default=0.0)
    outlasting = [elapsed for elapsed in running if elapsed > longest]
    if len(outlasting) > len(finished) or not finished:
        return None
    average = _mean([*finished, *outlasting])
    places = [_remaining(finished, elapsed) for elapsed in running]
    places += [0.0] * (parallel - len(places))
    places = places or [0.0]
    if waiting > 16 * len(places):
        # After this many rounds the places are evenly filled. The function is called several times a second.
        return max(max(places), (sum(places) + waiting * average) / len(places)) or None
    heapq.heapify(places)
    for _ in range(waiting):
        heapq.heapreplace(places, places[0] + average)
    return max(places) or None


def _remaining(finished: Sequence[float], elapsed: float) -> float:
    longer = [duration for duration in finished if duration > elapsed]
    return _mean(longer) - elapsed if longer else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)  # `statistics` takes 9 ms to import
