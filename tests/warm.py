"""Runs `python -m` programs in forks of a process that has already imported their modules.

A short program spends most of its time on starting the interpreter and on imports. A fork differs from a fresh
interpreter in what is imported and in /proc/<pid>/cmdline, so tests of these start a fresh interpreter.

    test --- socket: module, arguments, environment, directory, streams ---> warm process
                                                                                 | fork
        <--- pipe: process id, exit status ---------------------------------- keeper, which waits
                                                                                 | fork
                                                                             program
"""

from __future__ import annotations

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
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REQUEST_BYTES = 100_000
READ_AT_START = ("PYTHON", "LD_", "LC_", "LANG")
"""Prefixes of variables that the interpreter or the loader reads only when it starts."""


class Warm:
    """A process that has imported `modules`. It starts at the first `run`."""

    def __init__(self, modules: Sequence[str], environ: Mapping[str, str]) -> None:
        self._modules = modules
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def run(
        self, module: str, arguments: Sequence[str], environ: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m module` to its end, with empty input, and capture its output."""
        command = [sys.executable, "-m", module, *arguments]
        request = pickle.dumps((module, list(arguments), dict(environ), str(Path.cwd())))
        if len(request) > REQUEST_BYTES or read_at_start(environ) != read_at_start(self._environ):
            return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout, check=False)
        status, told = os.pipe()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(status, "rb", buffering=0) as said:
            streams = [os.open(os.devnull, os.O_RDONLY), out.fileno(), err.fileno(), told]
            socket.send_fds(self._connect(), [request], streams)
            os.close(streams[0])
            os.close(told)
            pid = int(said.read(16))
            if not select.select([said], [], [], timeout)[0]:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, timeout)
            code = int(said.read(16))
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, code, out.read().decode(), err.read().decode())

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


def keep(descriptors: list[int], module: str, arguments: list[str], environ: dict[str, str], cwd: str) -> NoReturn:
    """Fork the program, and send its process id and then its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, told = descriptors
    pid = os.fork()
    if pid == 0:
        os.close(told)
        become(streams, module, arguments, environ, cwd)
    os.write(told, b"%16d" % pid)
    _, status = os.waitpid(pid, 0)
    os.write(told, b"%16d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def become(streams: list[int], module: str, arguments: list[str], environ: dict[str, str], cwd: str) -> NoReturn:
    """Turn this process into `python -m module`."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    random.seed()
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    sys.path[0] = cwd
    code = 0
    try:
        runpy._run_module_as_main(module)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)
