"""The process in which optuna-dashboard shows one study. It is started and asked by `dashboard.py`.

It has limited memory. `study_process.py` says why a study is read by a process of its own, and how that is asked.

optuna-dashboard knows a study by its number in the database, which is 1 in almost all of them, and its URLs have no
room for more. So the database is seen through views that give the study the number of its sweep.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import sqlite3
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

from gpu_launcher.studies.report_curves import connect_to_read

MAX_MEMORY_BYTES = 4 * 2**30
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
TABLES = ("studies", "study_directions", "study_user_attributes", "study_system_attributes", "trials")
"""Optuna's tables that have the number of the study."""

_Answer = tuple[int, list[tuple[str, str]], bytes]
Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def main() -> None:
    """Answer requests until standard input is closed. Arguments: the file of the study, and its number in URLs."""
    file, number = Path(sys.argv[1]), int(sys.argv[2])
    os.environ.update(dict.fromkeys(THREADS, "1"))  # each thread of a numerical library takes address space
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    app: Wsgi | None = None
    for line in sys.stdin.buffer:
        problem = io.StringIO()
        logging.basicConfig(stream=problem, format="%(message)s", level=logging.ERROR, force=True)
        answer: _Answer = (500, [], b"")
        try:
            app = app or _open(file, number)
            answer = _answer(app, json.loads(line), problem)
        except Exception as error:  # from the libraries, about the study: the server shows it
            problem.write(str(_cause(error)))
        status, headers, body = answer
        about = {"status": status, "headers": headers, "length": len(body), "problem": problem.getvalue()[:2000]}
        output.write(json.dumps(about).encode() + b"\n" + body)
        output.flush()


def _open(file: Path, number: int) -> Wsgi:
    """Make optuna-dashboard's application for a study."""
    from optuna_dashboard import wsgi

    from gpu_launcher.studies.storage import read_only_storage

    app: Wsgi = wsgi(read_only_storage(lambda: _connect(file, number)))
    return app


def _connect(file: Path, number: int) -> sqlite3.Connection:
    """Open the database so that it has only the study with the latest trial, with another number."""
    database = connect_to_read(file)
    database.execute("PRAGMA temp_store = MEMORY")
    latest = "SELECT study_id FROM main.trials ORDER BY trial_id DESC LIMIT 1"
    study = f"coalesce(({latest}), (SELECT max(study_id) FROM main.studies))"
    for table in TABLES:
        columns = [name for _, name, *_ in database.execute(f"PRAGMA main.table_info({table})")]
        if "study_id" not in columns:
            raise sqlite3.DatabaseError("it lacks the tables of a study")
        shown = ", ".join(f"{number} AS study_id" if name == "study_id" else _quoted(name) for name in columns)
        database.execute(f"CREATE TEMP VIEW {table} AS SELECT {shown} FROM main.{table} WHERE study_id = {study}")
    return database


def _answer(app: Wsgi, environ: dict[str, Any], problem: io.StringIO) -> _Answer:
    environ |= {"REQUEST_METHOD": "GET", "wsgi.input": io.BytesIO(), "wsgi.errors": problem}
    setup_testing_defaults(environ)
    started: list[tuple[str, list[tuple[str, str]]]] = []
    body = b"".join(app(environ, lambda status, headers, *error: started.append((status, headers))))
    status, headers = started[-1]
    return int(status[:3]), headers, body


def _cause(error: BaseException) -> BaseException:
    """What SQLite or a file said. SQLAlchemy and Optuna each put an exception of their own around it."""
    return error if error.__cause__ is None else _cause(error.__cause__)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
