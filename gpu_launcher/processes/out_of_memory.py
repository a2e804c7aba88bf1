"""Recognises that memory ran out: a GPU's by an exception or printed output, the host's by the kernel's counters.

GPU libraries are not imported; their exception classes are recognised by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_CLASSES = {"torch": {"OutOfMemoryError"}, "tensorflow": {"ResourceExhaustedError"}, "cupy": {"OutOfMemoryError"}}
_MESSAGES = re.compile(
    r"CUDA out of memory"  # torch before it had a class for it
    r"|CUDA error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|HIP out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|RESOURCE_EXHAUSTED: .*(?:[Oo]ut of memory|allocat)"  # XLA, so JAX
    r"|OOM when allocating tensor"  # TensorFlow
)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether `error`, an exception that led to it, or one that it wraps says that a GPU ran out of memory."""
    return any(_says_so(one) for one in _family(error))


def tells_of_gpu_memory(printed: str) -> bool:
    """Whether a program's output, such as a traceback, says that a GPU ran out of memory."""
    return _MESSAGES.search(printed) is not None or "torch.OutOfMemoryError" in printed


def _says_so(error: BaseException) -> bool:
    for kind in type(error).__mro__:
        if kind.__name__ in _CLASSES.get(kind.__module__.partition(".")[0], ()):
            return True
    if isinstance(error, (MemoryError, OSError)):
        return False  # about the host, not a GPU
    try:
        return _MESSAGES.search(str(error)) is not None
    except Exception:  # the user's exception cannot be converted to text
        return False


def _family(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, the exceptions that led to it, and those that it wraps if it is an exception group."""
    seen: set[int] = set()
    found: list[object] = [error]
    while found:
        one = found.pop()
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        found += [one.__cause__, None if one.__suppress_context__ else one.__context__]
        wrapped = getattr(one, "exceptions", ())
        if isinstance(wrapped, (tuple, list)):
            found += wrapped


def oom_kills(root: Path = Path("/")) -> int:
    """Return how many processes the kernel has killed so far because the host ran out of memory; 0 if unknown.

    The count is that of this process's cgroup if possible, otherwise that of the machine. It is `oom_kill` in
    `memory.events` of a version 2 cgroup (Documentation/admin-guide/cgroup-v2.rst in the kernel's source) or in
    proc_vmstat(5).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("0::"):
            count = _counter(root / "sys/fs/cgroup" / line[3:].lstrip("/") / "memory.events")
            if count is not None:
                return count
    return _counter(root / "proc/vmstat") or 0


def _counter(file: Path) -> int | None:
    try:
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return None
