"""Retry a study's database while it is unavailable: jobs run on, and what is to be written waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError

MAX_OUTAGE_SECONDS = 600.0
"""How long a failing database is retried. What a connection waits for others' locks comes on top."""
PAUSES = (0.5, 1.0, 2.0, 5.0)
"""Seconds between two attempts; the last one again and again."""

P = ParamSpec("P")
T = TypeVar("T")


class StorageRetry:
    """Repeats operations that fail because of the database, and tells the user once in each outage."""

    def __init__(
        self,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`say` gets a line for the user; `clock` and `sleep` are in seconds."""
        self._say = say
        self._clock = clock
        self._sleep = sleep

    def retrying(self, operation: Callable[P, T]) -> Callable[P, T]:
        """The same operation, which raises StorageInternalError only after MAX_OUTAGE_SECONDS.

        An operation whose transaction was committed although it failed is done twice. If that creates a trial of which
        nobody knows, the next sweep fails it.
        """

        @wraps(operation)
        def retried(*arguments: P.args, **options: P.kwargs) -> T:
            began = self._clock()
            attempts = 0
            while True:
                try:
                    result = operation(*arguments, **options)
                except StorageInternalError as error:
                    if self._clock() - began > MAX_OUTAGE_SECONDS:
                        raise
                    if not attempts:
                        self._say(f"study database unavailable ({_reason(error)}); running jobs continue, retrying")
                    self._sleep(PAUSES[min(attempts, len(PAUSES) - 1)])
                    attempts += 1
                else:
                    if attempts:
                        self._say("study database available again")
                    return result

        return retried


def _reason(error: BaseException) -> str:
    """The driver's words, from which SQLAlchemy made others, from which Optuna made none that help."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or repr(error)).splitlines()[0]
