"""Retries operations while a study's database is unavailable. Jobs keep running, and writes wait for the database."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError

MAX_OUTAGE_SECONDS = 600.0
"""Seconds for which a failing database is retried, in addition to the time that a connection waits for locks."""
PAUSES = (0.5, 1.0, 2.0, 5.0)
"""Seconds between two attempts. The last pause is repeated."""

P = ParamSpec("P")
T = TypeVar("T")


class StorageRetry:
    """Repeats operations that fail because of the database, and tells the user once per outage."""

    def __init__(
        self,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`say` is called with a line for the user; `clock` and `sleep` use seconds."""
        self._say = say
        self._clock = clock
        self._sleep = sleep

    def retrying(self, operation: Callable[P, T]) -> Callable[P, T]:
        """The same operation, except that it raises StorageInternalError only after MAX_OUTAGE_SECONDS.

        If an operation fails although its transaction was committed, it is done twice. If that creates a trial that no
        session knows, the next sweep fails it.
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
    """The driver's message. Those of SQLAlchemy and Optuna, which wrap it, help less."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or repr(error)).splitlines()[0]
