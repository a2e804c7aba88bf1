"""Forks of this process, before which every lending of it is brought in order."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from typing import Protocol

from gpu_launcher.processes.signals import uninterrupted


class ForkListener(Protocol):
    """What is told of forks."""

    def before_fork(self) -> bool:
        """Nothing may be half-done in a child. Returns whether `after_fork` is to be called."""

    def after_fork(self) -> None:
        """In the parent, go on."""

    def in_child(self) -> None:
        """Be another process."""


_serial = itertools.count()
_known: weakref.WeakValueDictionary[int, ForkListener] = weakref.WeakValueDictionary()
_registry = threading.Lock()
_forking = threading.local()


def register(lending: ForkListener) -> None:
    """From now on `lending` is told of forks, for as long as somebody has it."""
    with _registry:
        _known[next(_serial)] = lending


def _before_fork() -> None:
    with uninterrupted():
        _registry.acquire()
        _forking.locked = [lending for _, lending in sorted(_known.items()) if lending.before_fork()]


def _after_fork() -> None:
    with uninterrupted():
        for lending in _forking.locked:
            lending.after_fork()
        _forking.locked = []
        _registry.release()


def _in_child() -> None:
    global _registry
    _registry = threading.Lock()
    for lending in list(_known.values()):
        lending.in_child()
    _forking.locked = []


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
