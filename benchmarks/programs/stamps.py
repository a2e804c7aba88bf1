"""Where the time between two jobs goes: notes the time at points inside the launcher, in all of its processes.

It knows private names, and fails loudly when they change. Works where jobs are forks of the program that installs it.
"""

import functools
import json
import os
import time
from typing import Any

from hydra.core import utils as hydra_utils

from gpu_launcher.jobs.loop import JobLoop
from gpu_launcher.processes import supervisor, tree, worker
from hydra_plugins.gpu_pool_launcher import _program

_target = -1


def install(path: str) -> None:
    """Write a line of JSON to `path` for each stamp from now on."""
    global _target
    _target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    # In the job
    _wrap(_program.HydraProgram, "__call__", before="forked", number=lambda _, number, *rest: number)
    _wrap(_program.HydraProgram, "_run", before="composed")
    _wrap(worker.JobContext, "wait", before="waits", after="woken")
    _wrap(hydra_utils, "_flush_loggers", before="returned")
    _wrap(_program, "pack", before="hydra done", after="packed")
    _wrap(worker, "write_whole", before="pickled", after="written")
    _wrap(worker, "_finish", after="finished")
    # In its supervisor: `_note(self, pid, status)`
    _wrap(tree.ProcessTree, "_note", before="reaped", pid=lambda _, pid, *rest: pid)
    _wrap(supervisor, "send", before="reported", pid=lambda *rest: None)
    # In the launching program
    _wrap(JobLoop, "_ended", before="exited", number=lambda _, number: number)
    _wrap(JobLoop, "_go", before="claimed", after="granted", number=lambda _, number: number)


def _wrap(owner: Any, name: str, *, before: str = "", after: str = "", number: Any = None, pid: Any = None) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        who = {"number": number(*args) if number else None, "pid": pid(*args) if pid else os.getpid()}
        if before:
            _stamp(before, **who)
        result = function(*args, **kwargs)
        if after:
            _stamp(after, **who)
        return result

    setattr(owner, name, wrapper)


def _stamp(name: str, **who: Any) -> None:
    os.write(_target, (json.dumps({"name": name, "time": time.monotonic_ns(), **who}) + "\n").encode())
