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

_PACKAGE = Path(__file__).resolve().parents[1] / "__init__.py"

# Nothing may come from the working directory, which `-c` puts first on the path: a `pickle.py` lies there easily. And
# the package is this very one, which need not be on the default path.
_BOOTSTRAP = """
import sys
sys.path[:] = filter(None, sys.path)
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("gpu_launcher", {package!r})
package = sys.modules["gpu_launcher"] = module_from_spec(spec)
spec.loader.exec_module(package)
from gpu_launcher.processes import spawn
spawn.{function}{arguments}
"""


def command(function: str, *arguments: int) -> list[str]:
    """Command line of an interpreter that calls a function of this module, with this interpreter's own flags."""
    code = _BOOTSTRAP.format(package=str(_PACKAGE), function=function, arguments=arguments)
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", code]


def serve_spawning(control: int, launcher: int, payload: int, captured: int, /) -> NoReturn:
    """The fork server's process. `payload` is a memory file with the pickled Interpreter state and program."""
    from gpu_launcher.processes.fork_server import serve

    def run_job(channel: socket.socket) -> NoReturn:
        for descriptor in (channel.fileno(), payload):
            os.set_inheritable(descriptor, True)
        line = command("work_spawned", channel.fileno(), payload)
        os.execv(line[0], line)

    serve(socket.socket(fileno=control), launcher, run_job, captured=bool(captured))
    os._exit(0)


def work_spawned(channel: int, payload: int, /) -> NoReturn:
    """A job's process."""
    from gpu_launcher import debug_log
    from gpu_launcher.processes import pickling, random_generators
    from gpu_launcher.processes.job_output import JobOutput
    from gpu_launcher.processes.worker import work

    output = JobOutput()
    for descriptor in (channel, payload):
        os.set_inheritable(descriptor, False)
    path, main, log, program, generators = pickle.loads(os.pread(payload, os.fstat(payload).st_size, 0))
    os.close(payload)
    sys.path[:] = path
    os.environ.pop(debug_log.VARIABLE, None)  # ours named the launch's log; a sweep in the job has a log of its own
    os.environ.update(log)
    vars(sys.modules["__main__"]).update(main)
    random_generators.expect_globals(generators)
    work(socket.socket(fileno=channel), output, lambda: pickling.load(program))


def describe_interpreter(program: bytes, generators: bytes) -> bytes:
    """What `work_spawned` needs: search path, identity of `__main__`, log, program and generators, dumped."""
    from gpu_launcher import debug_log

    main = sys.modules["__main__"]
    # Which script or module it is, as libraries ask that start it again.
    attributes: dict[str, object] = {"__file__": getattr(main, "__file__", None)}
    spec = getattr(main, "__spec__", None)
    attributes["__spec__"] = spec and ModuleSpec(spec.name, loader=None, origin=spec.origin)
    log = {name: value for name, value in os.environ.items() if name == debug_log.VARIABLE}
    return pickle.dumps((sys.path, attributes, log, program, generators))
