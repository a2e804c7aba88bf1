"""A database that cannot be used for a while: jobs run on, and what is to be written waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage

PATIENCE = 600.0
"""Seconds for which a failing database is asked again. What a connection waits for others' locks comes on top."""
PAUSES = (0.5, 1.0, 2.0, 5.0)
"""Seconds between two tries; the last one again and again."""

P = ParamSpec("P")
T = TypeVar("T")


class Bearing:
    """Repeats what failed because of the database, and tells the user once in each time of trouble."""

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

    def over(self, operation: Callable[P, T]) -> Callable[P, T]:
        """The same operation, which raises StorageInternalError only after `PATIENCE`.

        One whose transaction was committed although it failed is done twice. A trial that was asked for in this way,
        and that nobody knows of, is settled by the next sweep.
        """

        @wraps(operation)
        def borne(*arguments: P.args, **options: P.kwargs) -> T:
            began = self._clock()
            tries = 0
            while True:
                try:
                    result = operation(*arguments, **options)
                except StorageInternalError as error:
                    if self._clock() - began > PATIENCE:
                        raise
                    if not tries:
                        self._say(f"the study's database cannot be used: {_reason(error)}. Jobs run on, the rest waits")
                    self._sleep(PAUSES[min(tries, len(PAUSES) - 1)])
                    tries += 1
                else:
                    if tries:
                        self._say("the study's database can be used again")
                    return result

        return borne

    def over_all(self, storage: BaseStorage) -> None:
        """Have every operation of a storage object borne."""
        for name in sorted(BaseStorage.__abstractmethods__):
            setattr(storage, name, self.over(getattr(storage, name)))


def _reason(error: BaseException) -> str:
    """The driver's words, from which SQLAlchemy made others, from which Optuna made none that help."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or repr(error)).splitlines()[0]
