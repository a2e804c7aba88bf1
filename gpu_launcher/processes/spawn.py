"""`spawn`: fresh interpreters, for programs from which it is not safe to fork.

The fork server is then a small interpreter of its own that only forks and execs, so that supervision is the same; each
job is a fresh interpreter that loads the program from a cloudpickle.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NoReturn

PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


def command(function: str, *arguments: int) -> list[str]:
    """Command line of an interpreter that calls a function of this module, with this interpreter's own flags.

    The package is found where this process found it, also when that is not on the default path.
    """
    code = (
        f"import sys; sys.path.insert(0, {PACKAGE_PARENT!r}); "
        f"from gpu_launcher.processes import spawn; spawn.{function}{arguments!r}"
    )
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", code]


def serve_spawning(control: int, launcher: int, payload: int, /) -> NoReturn:
    """The fork server's process. `payload` is a memory file with the pickled Interpreter state and program."""
    from gpu_launcher.processes.server import serve

    def run_job(channel: socket.socket) -> NoReturn:
        for descriptor in (channel.fileno(), payload):
            os.set_inheritable(descriptor, True)
        line = command("work_spawned", channel.fileno(), payload)
        os.execv(line[0], line)

    serve(socket.socket(fileno=control), launcher, run_job)
    os._exit(0)


def work_spawned(channel: int, payload: int, /) -> NoReturn:
    """A job's process."""
    from gpu_launcher.processes.worker import CapturedStdio, work

    stdio = CapturedStdio()
    for descriptor in (channel, payload):
        os.set_inheritable(descriptor, False)
    path, main, program = pickle.loads(os.pread(payload, os.fstat(payload).st_size, 0))
    os.close(payload)
    sys.path[:] = path
    _impersonate_main(main)
    work(socket.socket(fileno=channel), stdio, lambda: pickle.loads(program))


def _impersonate_main(attributes: dict[str, object]) -> None:
    """Let `__main__` say which script or module it is, as libraries ask that start it again."""
    main = sys.modules["__main__"]
    for name, value in attributes.items():
        setattr(main, name, value)


def describe_interpreter(program: bytes) -> bytes:
    """What `work_spawned` needs: module search path, identity of `__main__`, and the cloudpickled program."""
    main = sys.modules["__main__"]
    attributes: dict[str, object] = {"__file__": getattr(main, "__file__", None)}
    spec = getattr(main, "__spec__", None)
    attributes["__spec__"] = spec and ModuleSpec(spec.name, loader=None, origin=spec.origin)
    return pickle.dumps((sys.path, attributes, program))
