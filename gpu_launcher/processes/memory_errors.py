"""Telling from an exception that a GPU's memory ran out. No GPU library is imported: classes are known by name."""

from __future__ import annotations

import re
from collections.abc import Iterator

_CLASSES = {"torch": {"OutOfMemoryError"}, "tensorflow": {"ResourceExhaustedError"}, "cupy": {"OutOfMemoryError"}}
_MESSAGES = re.compile(
    r"CUDA out of memory"  # torch before it had a class for it
    r"|CUDA error: out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|HIP out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|RESOURCE_EXHAUSTED: .*(?:[Oo]ut of memory|allocat)"  # XLA, so JAX
    r"|OOM when allocating tensor"  # TensorFlow
)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from or wraps, says so."""
    return any(_says_so(one) for one in _family(error))


def tells_of_gpu_memory(printed: str) -> bool:
    """Whether what a program printed, such as a traceback, says so."""
    return _MESSAGES.search(printed) is not None or "torch.OutOfMemoryError" in printed


def _says_so(error: BaseException) -> bool:
    for kind in type(error).__mro__:
        if kind.__name__ in _CLASSES.get(kind.__module__.partition(".")[0], ()):
            return True
    if isinstance(error, (MemoryError, OSError)):
        return False  # of the host
    try:
        return _MESSAGES.search(str(error)) is not None
    except Exception:  # an exception of the user's that cannot be shown says nothing
        return False


def _family(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and what it wraps if it is an exception group."""
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
