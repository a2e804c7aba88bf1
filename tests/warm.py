"""Runs Python programs in forks of a process that has already imported their modules.

A short program spends most of its time on starting the interpreter and on imports. A fork differs from a fresh
interpreter in what is imported, in /proc/<pid>/cmdline, in the zeros after its environment in /proc/<pid>/environ, and
in that all forks have one hash seed. Tests of these start a fresh interpreter.

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
import ctypes
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
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gpu_launcher.processes.linux import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REPOSITORY = Path(__file__).parents[1]
USED_BY_SWEEPS = (
    "hydra",
    "hydra._internal.hydra",
    "hydra_plugins.gpu_pool_launcher._launch",
    "alembic.command",
    "gpu_launcher.studies.sweep_search",
    "optuna.samplers",
    "sqlalchemy.dialects.sqlite",
)
"""Modules that sweeps of Hydra import, and those that searches do."""
USED_BY_CALLS = (
    "gpu_launcher.executors.parallel_map",
    "gpu_launcher.executors.pool_executor",
    "gpu_launcher.studies.optimize",
)
"""Modules that executors, `parallel_map` and `optimize` import."""
REQUEST_BYTES = 100_000
"""Maximum number of bytes of a request."""
ENVIRONMENT_BYTES = 16_384
"""Maximum number of bytes of the environment of a program that is forked."""
ROOM = "WARM_ROOM"
"""Variable that reserves room in the warm process's environment block for that of a fork."""
ENVIRONMENT = 47
"""Index of env_start among the fields of /proc/self/stat after the command name; env_end follows. In proc_pid_stat(5),
it is field 50."""
READ_AT_START = ("PYTHON", "LD_", "LC_", "LANG", "GPU_LAUNCHER_LOG")
"""Prefixes of variables that are read when the interpreter starts or modules are imported."""


INTERRUPTED = threading.Event()
"""Whether the program in this process ended with KeyboardInterrupt."""


class WarmProgram:
    """A running program. It has what the tests need of a `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], status: int, streams: Sequence[int] = ()) -> None:
        """`status` is the pipe from its keeper. `streams` are the read ends of the pipes from its stdout and stderr."""
        self.args = [sys.executable, *arguments]
        self.returncode: int | None = None
        self._status = open(status, "rb", buffering=0)
        pid = self._status.read(16)
        assert pid, "the warm process has ended"
        self.pid = int(pid)
        self._streams = [open(stream, errors="replace") for stream in streams]
        self._read = [bytearray() for _ in streams]
        self.stdout, self.stderr = self._streams or (None, None)

    def __enter__(self) -> WarmProgram:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams:
            stream.close()
        self.wait()

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str]:
        """Read its output to the end, and wait for it. Raises TimeoutExpired, after which it can be called again."""
        end = None if timeout is None else time.monotonic() + timeout
        open_ones = {stream.fileno(): place for place, stream in enumerate(self._streams) if not stream.closed}
        while open_ones:
            left = None if end is None else max(0.0, end - time.monotonic())
            ready, _, _ = select.select(list(open_ones), [], [], left)
            if not ready:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            for number in ready:
                data = os.read(number, 2**16)
                self._read[open_ones[number]] += data
                if not data:
                    self._streams[open_ones.pop(number)].close()
        self.wait(None if end is None else max(0.0, end - time.monotonic()))
        texts = (bytes(data).decode(errors="replace") for data in self._read or (b"", b""))
        out, err = (text.replace("\r\n", "\n").replace("\r", "\n") for text in texts)
        return out, err

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
            self.returncode = int(self._status.read(16) or -signal.SIGKILL)  # nothing if its keeper was killed with it
            self._status.close()
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # its keeper is about to say that it has ended
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        """Send it SIGTERM, unless it has ended."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)


Program = WarmProgram | subprocess.Popen[bytes]
TextProgram = WarmProgram | subprocess.Popen[str]


class Warm:
    """A process that has imported `modules`. It starts with the first program."""

    def __init__(self, modules: Sequence[str], environ: Mapping[str, str]) -> None:
        self._modules = modules
        self._environ = dict(environ)
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
    ) -> Program:
        """Start `python script ...` or `python -m module ...` with these descriptors, by default with empty input."""
        if self._can_fork(arguments, environ):
            return self._fork(arguments, environ, stdin, stdout, stderr, cwd)
        command = [sys.executable, *arguments]
        empty = subprocess.DEVNULL if stdin is None else stdin
        streams = {"stdin": empty, "stdout": stdout, "stderr": stderr}
        return subprocess.Popen(
            command, env=environ, cwd=cwd, preexec_fn=partial(die_with_parent, os.getpid()), **streams
        )

    def _can_fork(self, arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
        is_script = arguments[0] == "-m" or not arguments[0].startswith("-")
        fits = len(block(environ)) <= ENVIRONMENT_BYTES and sum(map(len, arguments)) < REQUEST_BYTES // 2
        return is_script and fits and read_at_start(environ) == read_at_start(self._environ)

    def _fork(
        self,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        stdin: int | None,
        stdout: int,
        stderr: int,
        cwd: str | Path | None,
        streams: Sequence[int] = (),
    ) -> WarmProgram:
        request = pickle.dumps((list(arguments), dict(environ), str(cwd or Path.cwd())))
        status, told = os.pipe()
        with open(os.devnull, "rb") as nothing:
            stdin = nothing.fileno() if stdin is None else stdin
            socket.send_fds(self._connect(), [request], [stdin, stdout, stderr, told])
        os.close(told)
        return WarmProgram(arguments, status, streams)

    def start_piped(
        self, arguments: Sequence[str], environ: Mapping[str, str], cwd: str | Path | None = None
    ) -> TextProgram:
        """Start `python script ...` or `python -m module ...` with pipes for its output, which is read as text."""
        if not self._can_fork(arguments, environ):
            command = [sys.executable, *arguments]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
            ends = partial(die_with_parent, os.getpid())
            return subprocess.Popen(
                command, env=environ, cwd=cwd, text=True, errors="replace", preexec_fn=ends, **pipes
            )
        (out, to_out), (err, to_err) = os.pipe(), os.pipe()
        try:
            return self._fork(arguments, environ, None, to_out, to_err, cwd, (out, err))
        finally:
            os.close(to_out)
            os.close(to_err)

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
                environ = {**self._environ, ROOM: "x" * ENVIRONMENT_BYTES}
                self._process = subprocess.Popen(
                    [*command, *self._modules], env=environ, pass_fds=[theirs.fileno()], cwd=REPOSITORY
                )
        return self._socket

    def close(self) -> None:
        if self._socket is not None and self._process is not None:
            self._socket.close()
            self._process.wait()


def read_at_start(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(READ_AT_START)}


def block(environ: Mapping[str, str]) -> bytes:
    """Return an environment as the kernel keeps it."""
    return b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environ.items())


def serve() -> None:
    """Fork a program for each request, until the other end of the socket is closed."""
    atexit.register(end_by_interrupt)  # before the modules register theirs, so that it is called last
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
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # its id is not used again until it has been waited for
    assert ended is not None
    os.write(told, b"%16d" % (ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status))
    os._exit(0)


def become(streams: list[int], arguments: list[str], environ: dict[str, str], cwd: str) -> NoReturn:
    """Turn this process into `python script ...` or `python -m module ...`."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    show_environment(environ)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    sys.orig_argv = [sys.executable, *arguments]
    module = arguments[1] if arguments[0] == "-m" else None
    sys.argv = arguments[1:] if module else arguments
    sys.path[0] = cwd if module else str(Path(arguments[0]).absolute().parent)
    code: object = 0
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
            INTERRUPTED.set()
    sys.exit(code)


def show_environment(environ: Mapping[str, str]) -> None:
    """Make /proc/<pid>/environ show `environ`, as in a fresh interpreter.

    The kernel shows the memory in which the environment was when the program started (proc_pid_environ(5)). Nothing
    refers to that memory any more: its variables were removed, and setenv(3) allocates copies.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[ENVIRONMENT]), int(fields[ENVIRONMENT + 1])
    data = block(environ)
    assert len(data) <= end - start
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, data, len(data))


def run_script(path: str) -> None:
    """Run a script as `__main__`. Reuses the existing module, because other modules may have imported it."""
    names = sys.modules["__main__"].__dict__
    names.clear()
    about = {"__doc__": None, "__package__": None, "__loader__": None, "__spec__": None, "__cached__": None}
    names.update(about, __name__="__main__", __file__=str(Path(path).absolute()), __builtins__=builtins)
    exec(compile(Path(path).read_bytes(), names["__file__"], "exec", dont_inherit=True), names)


def end_by_interrupt() -> None:
    """End as Python does after KeyboardInterrupt."""
    if INTERRUPTED.is_set():
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
