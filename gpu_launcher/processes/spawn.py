"""Starts jobs as fresh interpreters (`spawn`), for programs from which it is not safe to fork.

The fork server is then a small interpreter of its own that only forks and execs, so supervision does not change. Each
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
from typing import NoReturn, cast

_PACKAGE = Path(__file__).resolve().parents[1] / "__init__.py"

# Nothing may be imported from the working directory, which `-c` puts first on the path: it may contain a `pickle.py`.
# The package is loaded from this file's location, because it may not be on the default path.
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
    """Command line of an interpreter with the flags of this one that calls a function of this module."""
    code = _BOOTSTRAP.format(package=str(_PACKAGE), function=function, arguments=arguments)
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    return [sys.executable, *flags, "-c", code]


def serve_spawning(control: int, launcher: int, payload: int, captured: int, /) -> NoReturn:
    """Run as the fork server. `payload` is a memory file with the result of `describe_interpreter`."""
    from gpu_launcher.processes.fork_server import serve

    def run_job(channel: socket.socket) -> NoReturn:
        for descriptor in (channel.fileno(), payload):
            os.set_inheritable(descriptor, True)
        line = command("work_spawned", channel.fileno(), payload)
        os.execv(line[0], line)

    serve(socket.socket(fileno=control), launcher, run_job, captured=bool(captured))
    os._exit(0)


def work_spawned(channel: int, payload: int, /) -> NoReturn:
    """Run as a job. `channel` is its channel to the node, and `payload` is that of `serve_spawning`."""
    from gpu_launcher.processes import pickling
    from gpu_launcher.processes.job_output import JobOutput
    from gpu_launcher.processes.worker import work

    output = JobOutput()
    for descriptor in (channel, payload):
        os.set_inheritable(descriptor, False)
    program = resemble(os.pread(payload, os.fstat(payload).st_size, 0))
    os.close(payload)
    work(socket.socket(fileno=channel), output, lambda: pickling.load(program))


def resemble(description: bytes) -> bytes:
    """Make this interpreter resemble the one that `describe_interpreter` described. Returns the pickled program."""
    from gpu_launcher import debug_log
    from gpu_launcher.processes import random_generators

    path, main, log, program, generators = pickle.loads(description)
    sys.path[:] = path
    os.environ.pop(debug_log.VARIABLE, None)  # the server's names the launch's log; a sweep in the job has its own log
    os.environ.update(log)
    vars(sys.modules["__main__"]).update(main)
    random_generators.expect_globals(generators)
    return cast("bytes", program)


def pickled_program(program: object, option: str, situation: str, otherwise: str) -> bytes:
    """Pickle a program for `describe_interpreter`. Raises OptionError if that is not possible.

    `option` is the user's name of the option that is to blame, `situation` says why the program is sent elsewhere, and
    `otherwise` what the user can do instead.
    """
    from gpu_launcher.errors import OptionError
    from gpu_launcher.processes import pickling
    from gpu_launcher.processes.unpicklable import found_at

    try:
        return pickling.dump(pickling.Afresh(program))  # the script is not run again in the jobs
    except OptionError:  # the program explains better itself what is wrong with it
        raise
    except Exception as error:  # whatever the user's objects raise when they are pickled
        raise OptionError(
            option,
            f"{situation}, to which the program cannot be sent: {type(error).__name__}: {error}"
            f"{found_at({'': program})}. Remedy: make it inside the function that the jobs run, or {otherwise}",
        ) from error


def describe_interpreter(program: bytes, generators: bytes) -> bytes:
    """Pickle what `resemble` needs: search path, identity of `__main__`, log, program and generators."""
    from gpu_launcher import debug_log

    main = sys.modules["__main__"]
    # Libraries that start the program again look here for its script or module.
    attributes: dict[str, object] = {"__file__": getattr(main, "__file__", None)}
    spec = getattr(main, "__spec__", None)
    attributes["__spec__"] = spec and ModuleSpec(spec.name, loader=None, origin=spec.origin)
    log = {name: value for name, value in os.environ.items() if name == debug_log.VARIABLE}
    return pickle.dumps((sys.path, attributes, log, program, generators))
