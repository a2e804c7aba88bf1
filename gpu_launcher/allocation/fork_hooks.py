"""Calls lease brokers around a fork of their process, to finish before it and to start again in the child."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from typing import Protocol

from gpu_launcher.processes.signals import uninterrupted


class ForkListener(Protocol):
    """An object that is called around forks."""

    def before_fork(self) -> bool:
        """Finish and lock, so that the child inherits a consistent state. Return whether to call `after_fork`."""

    def after_fork(self) -> None:
        """Unlock. Called in the parent."""

    def in_child(self) -> None:
        """Drop everything that belongs to the parent. Called in the child."""


_serial = itertools.count()
_known: weakref.WeakValueDictionary[int, ForkListener] = weakref.WeakValueDictionary()
_registry = threading.Lock()
_forking = threading.local()


def register(listener: ForkListener) -> None:
    """Call `listener` around forks as long as it is referenced."""
    with _registry:
        _known[next(_serial)] = listener


def _before_fork() -> None:
    with uninterrupted():
        _registry.acquire()
        _forking.locked = [listener for _, listener in sorted(_known.items()) if listener.before_fork()]


def _after_fork() -> None:
    with uninterrupted():
        for listener in _forking.locked:
            listener.after_fork()
        _forking.locked = []
        _registry.release()


def _in_child() -> None:
    global _registry
    _registry = threading.Lock()
    for listener in list(_known.values()):
        listener.in_child()
    _forking.locked = []


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
