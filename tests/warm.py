"""Runs Python programs in forks of a process that has already imported their modules.

A short program spends most of its time on starting the interpreter and on imports. A fork differs from a fresh
interpreter in what is imported, in /proc/<pid>/cmdline and in /proc/<pid>/environ, so tests of these start a fresh
interpreter.

    test --- socket: arguments, environment, directory, streams -----------> warm process
                                                                                 | fork
        <--- pipe: process id, exit status ---------------------------------- keeper, which waits
                                                                                 | fork
                                                                             program

Programs end with the keeper, and keepers with the warm process, which ends with the test.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import importlib
import os
import pickle
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from gpu_launcher.processes.linux import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

USED_BY_SWEEPS = ("hydra", "hydra._internal.hydra", "hydra_plugins.gpu_pool_launcher._launch", "optuna")
"""Modules that every sweep of Hydra imports, and optuna."""
REQUEST_BYTES = 100_000
READ_AT_START = ("PYTHON", "LD_", "LC_", "LANG")
"""Prefixes of variables that the interpreter or the loader reads only when it starts."""


class WarmProgram:
    """A running program. It has what the tests need of a `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], status: int) -> None:
        """`status` is the pipe from its keeper."""
        self.args = [sys.executable, *arguments]
        self.returncode: int | None = None
        self._status = open(status, "rb", buffering=0)
        self.pid = int(self._status.read(16))

    def poll(self) -> int | None:
        """Return its exit status, or None if it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit status. Raises TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._status.read(16))
            self._status.close()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


class Warm:
    """A process that has imported `modules`. It starts with the first program."""

    def __init__(self, modules: Sequence[str], environ: Mapping[str, str]) -> None:
        self._modules = modules
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(
        self,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        *,
        stdout: int,
        stderr: int,
        stdin: int | None = None,
        cwd: str | Path | None = None,
    ) -> WarmProgram | subprocess.Popen[bytes]:
        """Start `python script ...` or `python -m module ...` with these descriptors, by default with empty input."""
        cwd = str(cwd or Path.cwd())
        request = pickle.dumps((list(arguments), dict(environ), cwd))
        with open(os.devnull, "rb") as nothing:
            stdin = nothing.fileno() if stdin is None else stdin
            if len(request) > REQUEST_BYTES or read_at_start(environ) != read_at_start(self._environ):
                command = [sys.executable, *arguments]
                return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=environ, cwd=cwd)
            status, told = os.pipe()
            socket.send_fds(self._connect(), [request], [stdin, stdout, stderr, told])
        os.close(told)
        return WarmProgram(arguments, status)

    def run(
        self, arguments: Sequence[str], environ: Mapping[str, str], timeout: float, cwd: str | Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `python script ...` or `python -m module ...` to its end, and capture its output."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            program = self.start(arguments, environ, stdout=out.fileno(), stderr=err.fileno(), cwd=cwd)
            try:
                code = program.wait(timeout)
            except BaseException:
                program.kill()
                raise
            out.seek(0)
            err.seek(0)
            shown = [stream.read().decode(errors="replace") for stream in (out, err)]
            return subprocess.CompletedProcess(program.args, code, *shown)

    def _connect(self) -> socket.socket:
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, "-c", "from tests.warm import serve; serve()", str(theirs.fileno())]
                self._process = subprocess.Popen(
                    [*command, *self._modules], env=self._environ, pass_fds=[theirs.fileno()]
                )
        return self._socket

    def close(self) -> None:
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait()


def read_at_start(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(READ_AT_START)}


def serve() -> None:
    """Fork a program for each request, until the other end of the socket is closed."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers end by themselves
    while True:
        request, descriptors, _, _ = socket.recv_fds(connection, REQUEST_BYTES, 4)
        if not request:
            return
        if os.fork() == 0:
            connection.close()
            keep(descriptors, *pickle.loads(request))
        for descriptor in descriptors:
            os.close(descriptor)


def keep(descriptors: list[int], arguments: list[str], environ: dict[str, str], cwd: str) -> NoReturn:
    """Fork the program, and send its process id and then its exit status."""
    die_with_parent(os.getppid())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, told = descriptors
    me = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        die_with_parent(me)
        become(streams, arguments, environ, cwd)
    os.write(told, b"%16d" % pid)
    _, status = os.waitpid(pid, 0)
    os.write(told, b"%16d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def become(streams: list[int], arguments: list[str], environ: dict[str, str], cwd: str) -> NoReturn:
    """Turn this process into `python script ...` or `python -m module ...`."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.orig_argv = [sys.executable, *arguments]
    module = arguments[1] if arguments[0] == "-m" else None
    sys.argv = arguments[1:] if module else arguments
    sys.path[0] = cwd if module else str(Path(arguments[0]).absolute().parent)
    code: object = 0
    interrupted = threading.Event()
    atexit.register(end_by_interrupt, interrupted)  # first, so that it is called last
    try:
        if module:
            runpy._run_module_as_main(module)
        else:
            run_script(arguments[0])
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        frames = error.__traceback__
        while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        sys.excepthook(type(error), error.with_traceback(frames), frames)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            interrupted.set()
    sys.exit(code)


def run_script(path: str) -> None:
    """Run a script as `__main__`: in the module of that name, which others may have imported."""
    names = sys.modules["__main__"].__dict__
    names.clear()
    about = {"__doc__": None, "__package__": None, "__loader__": None, "__spec__": None, "__builtins__": builtins}
    names.update(about, __name__="__main__", __file__=str(Path(path).absolute()))
    exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), names)


def end_by_interrupt(interrupted: threading.Event) -> None:
    """End as Python does after KeyboardInterrupt."""
    if interrupted.is_set():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
