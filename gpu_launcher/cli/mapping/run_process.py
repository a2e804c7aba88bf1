"""Runs one command in its process: prepares the directory, waits for devices, writes the outcome."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_launcher.cli.mapping.map_directory import MapDirectory, RunDirectory
from gpu_launcher.cli.mapping.template import Template
from gpu_launcher.cli.mapping.values import Params
from gpu_launcher.json_data import values_in
from gpu_launcher.model import Request
from gpu_launcher.processes.exceptions import NO_TERMINAL
from gpu_launcher.processes.exit_status import describe_exit
from gpu_launcher.processes.messages import Report
from gpu_launcher.processes.out_of_memory import tells_of_gpu_memory
from gpu_launcher.processes.worker import ATTEMPT, JobContext
from gpu_launcher.safe_files import open_regular, write_whole
from gpu_launcher.wording import duration

LOOKED_AT = 2**20
"""Number of bytes at the end of a run's output that are searched for the last JSON object."""


WANTED_TERMINAL = ("EOFError: EOF when reading a line", "bdb.BdbQuit")
"""Beginnings of the last line of a Python program that asked for input without a terminal."""

_INTERPRETER = re.compile(r"(?:python|pypy)[0-9.]*|(?:ba|da|z)?sh|Rscript|julia|perl|ruby")


@dataclass(frozen=True, slots=True)
class CommandProgram:
    """The program of a map's runs. It is called once, in each run's process."""

    template: Template
    place: MapDirectory
    request: Request
    directory: Path
    """Working directory of the commands."""
    path: str
    """The head's `$PATH`, so that the name of a program means the same on all nodes."""

    def check(self) -> str | None:
        """Why this machine cannot run the commands, as a sentence; None if it can."""
        return why_not_runnable(self.template, self.directory, self._search_path())

    def _search_path(self) -> str:
        own = search_path()
        return own if own == self.path else f"{self.path}{os.pathsep}{own}"

    def __call__(self, number: int, spec: Params, context: JobContext) -> Report:
        """Run the command with the parameters `spec`."""
        run = self.place.run(number)
        try:
            run.prepare(spec, int(os.environ[ATTEMPT]))
            context.prepared(self.request, run.stderr)
        except OSError as error:
            return _not_started(f"could not be prepared: {_why(error)}")
        context.wait()
        os.environ["PATH"] = self._search_path()
        arrived = _leave_signals_to_the_command()
        try:
            run.begin()
            words = self.template.fill(spec, number, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
            outcome = self._run(words, run, arrived)
        except (OSError, ValueError) as error:
            return _not_started(f"could not be started: {_why(error)}")
        try:
            write_whole(run.outcome, f"{json.dumps(outcome)}\n".encode())
        except OSError as error:
            problem = f"could not write its outcome, to be found to have ended: {_why(error)}"
            return Report(False, problem, json.dumps(outcome).encode())
        printed = "" if outcome["outcome"] == "completed" else _end(run.stderr).decode(errors="replace")
        last = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
        return Report(
            outcome["outcome"] == "completed",
            f"{outcome['message']}; {NO_TERMINAL}" if last.startswith(WANTED_TERMINAL) else outcome["message"],
            json.dumps(outcome).encode(),
            out_of_memory=outcome["outcome"] == "failed" and tells_of_gpu_memory(printed),
            origin=last,
            values=values_in(outcome["output"] or {}) if outcome["outcome"] == "completed" else {},
            killed=outcome["exit_code"] < 0,
        )

    def _run(self, words: list[str], run: RunDirectory, arrived: list[int]) -> dict[str, Any]:
        """Run the command and return its outcome. Raises OSError if it cannot be started."""
        with open(open_regular(run.stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as stdout:
            began = time.monotonic()
            if arrived:
                raise InterruptedError("it was interrupted before")
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stdout, cwd=self.directory)
        # Signals that arrived while the command was being started did not reach it.
        for signum in tuple(arrived):
            process.send_signal(signum)
        code = process.wait()
        took = time.monotonic() - began
        return {
            "outcome": "failed" if code else "completed",
            "exit_code": code,
            "message": _message(code, took),
            "duration": round(took, 3),
            "output": last_object(_end(run.stdout)),
        }


def search_path() -> str:
    """Where this process searches programs."""
    return os.environ.get("PATH", os.defpath)


def why_not_runnable(template: Template, directory: Path, path: str) -> str | None:
    """Why the program or script of a command cannot be run, as a sentence; None if it can.

    `directory` is the working directory of the command, and `path` has the directories in which programs are searched.
    """
    if template.shell:
        return None
    plain = ["".join(word) if all(isinstance(piece, str) for piece in word) else None for word in template.words]  # type: ignore[arg-type]
    program = plain[0]
    if program is None:
        return None
    file = str(directory / program) if "/" in program else program
    if not program or shutil.which(file, path=path) is None:
        return (
            f"{program!r} cannot be run: "
            + ("it is not executable" if Path(file).is_file() else "there is no such program")
            + (f" (meant is {sys.executable} {program}?)" if program.endswith(".py") else "")
        )
    script = plain[1] if len(plain) > 1 else None
    is_script = script and _INTERPRETER.fullmatch(Path(program).name) and not script.startswith("-")
    if script and is_script and not (directory / script).exists() and not _found_by(program, script, path):
        return f"{script!r}, which {program} is to run, does not exist in {directory}"
    return None


def _found_by(program: str, script: str, path: str) -> bool:
    """Whether `program` is a shell that finds the script in `path`."""
    if not Path(program).name.endswith("sh") or "/" in script:
        return False
    return any((Path(directory or ".") / script).is_file() for directory in path.split(os.pathsep))


def _leave_signals_to_the_command() -> list[int]:
    """Keep signals from ending this process; return a list that collects each signal that arrives.

    The command gets the same signals, and they end it. Signals are handled instead of ignored because exec keeps
    ignored signals but resets handlers. SIGHUP stays ignored under nohup(1).
    """
    arrived: list[int] = []
    heeded = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        heeded.append(signal.SIGHUP)
    for signum in heeded:
        signal.signal(signum, lambda number, frame: arrived.append(number))
    return arrived


def _message(code: int, took: float) -> str | None:
    if code == 0:
        return None
    return describe_exit(-code, f" after {duration(took)}") if code < 0 else f"ended with exit code {code}"


def _not_started(problem: str) -> Report:
    return Report(False, problem, b"")


def _why(error: OSError | ValueError) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror


def _end(path: Path) -> bytes:
    """The end of a file; empty if it cannot be read."""
    try:
        with open(open_regular(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOOKED_AT))
            return file.read(LOOKED_AT)
    except OSError:
        return b""


def last_object(printed: bytes) -> dict[str, Any] | None:
    """The JSON object on the last printed line that is one; None if there is none."""
    for line in reversed(printed.splitlines()):
        if line.strip().startswith(b"{"):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                return found
    return None
