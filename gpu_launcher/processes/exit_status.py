"""Describes how a process ended, and the likely cause."""

from __future__ import annotations

import os
import signal

_OUT_OF_MEMORY = "most likely by the kernel, because the host ran out of memory at that time (see `dmesg`)"
_LIKELY = {
    signal.SIGKILL: "most often the host ran out of memory (see `dmesg`), or a user killed it",
    signal.SIGSEGV: "a crash in native code; `PYTHONFAULTHANDLER=1` shows where",
    signal.SIGBUS: "often /dev/shm is full: data loader workers need more shared memory",
    signal.SIGABRT: "native code gave up, often on a failed assertion or a CUDA error",
    signal.SIGFPE: "an arithmetic error in native code",
    signal.SIGILL: "native code was built for another processor",
    signal.SIGXCPU: "the limit on CPU time was reached",
}


def describe_exit(status: int, circumstances: str = "", *, out_of_memory: bool = False) -> str:
    """Describe the end of a process that left no result: `was killed by SIGKILL after 12 s on GPU 2: most often ...`.

    `status` is the value that `os.waitpid` returns. `circumstances` are inserted between what happened and its likely
    cause. `out_of_memory` says that the kernel killed processes at the time because memory ran out.
    """
    if os.WIFSIGNALED(status):
        signum = os.WTERMSIG(status)
        likely = _OUT_OF_MEMORY if out_of_memory else _LIKELY.get(signum)  # type: ignore[call-overload]
        return f"was killed by {_name(signum)}{circumstances}" + (f": {likely}" if likely else "")
    return f"ended with exit code {os.WEXITSTATUS(status)}{circumstances} before it returned a value"


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"
