"""A job for each way to end: `+kind=...`."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
import recording  # noqa: F401
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class MainError(Exception):
    """An exception whose constructor makes the message, as many do."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")


class PlainMainError(Exception):
    pass


class UnpicklableError(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class UnloadableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


class WordlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class OddError(BaseException):
    pass


class UnloadableValue:
    def __reduce__(self) -> Any:
        return (int, ("not a number",))


class Witness(Callback):
    def on_job_end(self, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        Path(config.hydra.runtime.output_dir, "job_end").write_text(f"{job_return.status.name} {os.getpid()}")


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "300"])


def daemon() -> None:
    """Start a daemon by the classic double fork, in another session. Returns when it runs."""
    heard, said = os.pipe()
    if os.fork() == 0:
        os.setsid()
        pid = os.fork()
        if pid == 0:
            os.execlp("sleep", "sleep", "300")
        Path("daemon.pid").write_text(str(pid))
        os._exit(0)
    os.close(said)
    os.wait()
    assert os.read(heard, 1) == b"", "the daemon has executed its program, which closed the last copy"
    os.close(heard)


class GpuArray:
    """An object that pickles as CuPy's arrays do. CuPy is not installed, and the head must not need it."""

    def __reduce__(self) -> Any:
        core = sys.modules["cupy._core.core"] = ModuleType("cupy._core.core")
        sys.modules["cupy"] = sys.modules["cupy._core"] = ModuleType("cupy")
        core.array = array = lambda numbers: numbers  # type: ignore[attr-defined]
        array.__module__, array.__qualname__ = "cupy._core.core", "array"
        return array, ([1, 2],)


def recurse(n: int) -> int:
    return recurse(n + 1) + 1


def with_cause() -> None:
    try:
        {}["the cause"]
    except KeyError as error:
        raise ValueError("the effect") from error


def forked_child() -> bool:
    """Fork. Returns in the child once the parent has left its result and ended."""
    parent = os.getpid()
    if os.fork():
        return False
    while os.getppid() == parent:
        time.sleep(0.005)
    return True


LEFT_OPEN: list[Any] = []


def leave_buffers() -> None:
    """Write data that is still in Python's and C's buffers when the job ends."""
    LEFT_OPEN.extend([open("left_open.txt", "w"), open("left_open.bin", "wb")])
    LEFT_OPEN[0].write("kept")
    LEFT_OPEN[1].write(b"kept")
    ctypes.CDLL(None).printf(b"from C\n")


def fail(kind: str) -> Any:
    if kind == "exception":
        with_cause()
    elif kind == "main_exception":
        raise MainError(7)
    elif kind == "plain_main_exception":
        raise PlainMainError("plain")
    elif kind == "unpicklable_exception":
        raise UnpicklableError("holds a lock")
    elif kind == "unloadable_exception":
        raise UnloadableError("one", "two")
    elif kind == "wordless_exception":
        raise WordlessError
    elif kind == "base_exception":
        raise OddError("odd")
    elif kind == "interrupt":
        raise KeyboardInterrupt
    elif kind == "memory":
        raise MemoryError
    elif kind == "recursion":
        return recurse(0)
    elif kind == "exit3":
        sys.exit(3)
    elif kind == "exit0":
        sys.exit(0)
    elif kind == "os_exit5":
        os._exit(5)
    elif kind == "os_exit0":
        os._exit(0)
    elif kind == "segfault":
        ctypes.string_at(0)
    elif kind == "sigkill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "abort":
        os.abort()
    elif kind == "lock":
        return threading.Lock()
    elif kind == "unloadable":
        return UnloadableValue()
    elif kind == "child":
        Path("child.pid").write_text(str(sleeper().pid))
    elif kind == "daemon":
        daemon()
    elif kind == "pool":
        pool = multiprocessing.get_context("fork").Pool(2)
        Path("pool.pid").write_text(str(pool._pool[0].pid))  # type: ignore[attr-defined]
        return sum(pool.map(abs, [-1, -2]))  # and never closes it
    elif kind == "fork_exit":
        if forked_child():
            sys.exit(0)
    elif kind == "fork_return":
        if forked_child():
            return "the child's"
    elif kind == "buffers":
        leave_buffers()
    elif kind == "gpu_array":
        return GpuArray()
    elif kind == "gpu_exception":
        raise RuntimeError("with", GpuArray())
    elif kind == "bytes":
        os.write(1, b"not UTF-8: \xff\xfe\x00\n")
        raise RuntimeError("after bytes")
    return kind


@hydra.main(version_base=None, config_path="conf", config_name="deaths")
def main(cfg: DictConfig) -> Any:
    if cfg.kind == "cfg":
        cfg._set_flag(["readonly", "struct", "allow_objects"], [False, False, True])
        cfg.lock = threading.Lock()
    return fail(cfg.kind)


if __name__ == "__main__":
    main()
