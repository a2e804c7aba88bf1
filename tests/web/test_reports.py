"""The curves of what jobs report, on the page of a search: read from its study, which another user may have written."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from gpu_launcher.errors import StorageError
from gpu_launcher.studies.report_curves import MAX_CURVES, MAX_POINTS, STUDY_FILE, read_curves
from tests.web.serving import SCRIPT, WebServer, WrittenSweep, title_of
from tests.web.studies import close, found_sweep, write_study


def execute(directory: Path, *statements: str) -> None:
    with closing(sqlite3.connect(directory / STUDY_FILE)) as database, database:
        for statement in statements:
            database.execute(statement)


def contents(directory: Path) -> dict[str, bytes]:
    """The files, without what SQLite keeps in shared memory, which names readers."""
    return {file.name: b"" if file.name.endswith("-shm") else file.read_bytes() for file in directory.iterdir()}


def series(server: WebServer, sweep: WrittenSweep) -> dict[str, list[list[float | None]]]:
    charts = json.loads(server(f"{sweep.url}/reports").text)
    return {line["name"]: line["data"] for chart in charts for line in chart["option"]["series"]}


def test_reports_are_curves_of_their_jobs(server: WebServer, sweeps: Path) -> None:
    search = found_sweep(server, sweeps / "search")
    study = write_study(search.directory, [{0: 1.5, 1: 0.5}, {}, {3: float("nan"), 4: 1 / 3}], told=1)
    found = series(server, search)
    assert list(found.values()) == [[[0, 1.5], [1, 0.5]], [[3, None], [4, 0.333333]]]
    assert [name.partition("=")[0] for name in found] == ["job 0: lr", "job 2: lr"]
    later = optuna.trial.Trial(study, study.trials[1]._trial_id)
    later.report(2.0, 7)
    assert len(series(server, search)) == 3
    close(study)
    assert len(series(server, search)) == 3


def test_a_sweep_without_a_study_has_no_curves(server: WebServer, sweep: WrittenSweep) -> None:
    assert server(f"{sweep.url}/reports").text == "[]"
    assert server("/sweeps/0000000000000000/reports").status == 404


def test_a_fifo_beside_the_study_is_not_opened(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server = serving()
    hostile, search = (found_sweep(server, tmp_path / name) for name in ("hostile", "search"))
    for found in (hostile, search):
        close(write_study(found.directory, [{0: 1.5}]))
    (hostile.directory / f"{STUDY_FILE}-wal").touch()
    os.mkfifo(hostile.directory / f"{STUDY_FILE}-shm")
    for found in (hostile, search):
        assert list(series(server, found).values()) == [[[0, 1.5]]]


def test_a_database_with_a_name_without_end_is_no_fault(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server = serving()
    hostile = found_sweep(server, tmp_path / "hostile")
    name = "UPDATE sqlite_master SET name = printf('%.*c', 200000, 'x'), sql = 'CREATE TABLE x('"
    execute(hostile.directory, "CREATE TABLE x(a)", "PRAGMA writable_schema = ON", name)
    reply = server(f"{hostile.url}/reports")
    assert (reply.status, "cannot be read: malformed database schema" in reply.text) == (503, True)
    assert len(reply.text) < 10_000


HOLD = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)  # with which the kernel asks for the file
descriptor = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
signal.pause()
"""


@pytest.mark.thorough
def test_a_study_that_cannot_be_opened_is_given_up(serving: Callable[..., WebServer], tmp_path: Path) -> None:
    server = serving()
    hostile, search = (found_sweep(server, tmp_path / name) for name in ("hostile", "search"))
    for found in (hostile, search):
        close(write_study(found.directory, [{0: 1.5}]))
    # As if its owner had replaced it by a FIFO after it was looked at: it is a regular file, and opening it waits.
    command = (sys.executable, "-c", HOLD, str(hostile.directory / STUDY_FILE))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            reply = server(f"{hostile.url}/reports")
            assert (reply.status, "did not answer within" in reply.text) == (503, True)
            assert list(series(server, search).values()) == [[[0, 1.5]]]
        finally:
            holder.kill()
    assert list(series(server, hostile).values()) == [[[0, 1.5]]]


def test_of_a_long_curve_some_points_are_read(tmp_path: Path) -> None:
    study = write_study(tmp_path, [{0: 1.0}, {5: 2.0}])
    rows = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 20000) "
    rows += "INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type) "
    execute(tmp_path, rows + "SELECT 1, i * 3, i, 'FINITE' FROM n")
    curves, has_more = read_curves(tmp_path)
    assert not has_more
    long, short = sorted(curves, key=lambda curve: curve.number)
    assert MAX_POINTS / 2 < len(long.points) <= MAX_POINTS
    assert (long.points[0], long.points[-1]) == ((0, 1.0), (60_000, 20_000.0))
    assert list(long.points) == sorted(long.points)
    assert short.points == ((5, 2.0),)
    close(study)


def test_running_jobs_and_the_latest_others_are_read(tmp_path: Path) -> None:
    study = write_study(tmp_path, [{0: 1.0}] * (MAX_CURVES + 20), told=MAX_CURVES + 20)
    execute(tmp_path, "UPDATE trials SET state = 'RUNNING' WHERE number IN (3, 4)")
    curves, has_more = read_curves(tmp_path)
    assert has_more
    assert [curve.number for curve in curves] == [4, 3, *range(MAX_CURVES + 19, 21, -1)]
    close(study)


@pytest.mark.parametrize("is_open", [True, False])
def test_reading_changes_no_file(tmp_path: Path, is_open: bool) -> None:
    study = write_study(tmp_path, [{0: 1.0}])
    if not is_open:
        close(study)
        assert list(contents(tmp_path)) == [STUDY_FILE]
    before = contents(tmp_path)
    assert read_curves(tmp_path)[0][0].points == ((0, 1.0),)
    assert contents(tmp_path) == before
    if is_open:
        close(study)


def test_reading_writes_into_no_file_named_like_the_databases_own(tmp_path: Path) -> None:
    study = write_study(tmp_path / "search", [{0: 1.0}])
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (STUDY_FILE, f"{STUDY_FILE}-wal"):
        shutil.copy(tmp_path / "search" / name, copy / name)
    close(study)
    before = contents(copy)
    read_curves(copy)
    assert contents(copy) == before
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious " * 10_000)
    os.link(precious, copy / f"{STUDY_FILE}-shm")
    assert read_curves(copy)[0][0].points == ((0, 1.0),)
    assert precious.read_bytes() == b"precious " * 10_000


def link(file: Path) -> None:
    close(write_study(file.parent / "elsewhere", [{0: 1.0}]))
    file.symlink_to(file.parent / "elsewhere" / STUDY_FILE)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (link, "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (Path.mkdir, "is not a regular file"),
        (lambda file: file.write_bytes(b"SQLite format 3\0" + b"x" * 5000), "cannot be read"),
        (lambda file: file.write_text(SCRIPT), "cannot be read"),
    ],
)
def test_what_is_not_a_database_is_not_read(
    server: WebServer, sweeps: Path, request: pytest.FixtureRequest, make: Callable[[Path], Any], problem: str
) -> None:
    search = found_sweep(server, sweeps / request.node.name.replace("/", ""))
    make(search.directory / STUDY_FILE)
    reply = server(f"{search.url}/reports", HX_Request="true")
    assert (reply.status, problem in reply.text) == (503, True)
    assert reply.headers["content-type"].startswith("text/plain")
    assert title_of(server(search.url))


@pytest.mark.parametrize(
    "statements",
    [
        ("UPDATE trial_intermediate_values SET step = x'00'",),
        ("UPDATE trial_intermediate_values SET step = 1e300, intermediate_value = 'text'",),
        ("UPDATE trial_intermediate_values SET intermediate_value = zeroblob(1000000)",),
        ("UPDATE trials SET number = NULL",),
        ("UPDATE trials SET number = 'text'",),
        ("DROP TABLE trial_intermediate_values", "CREATE TABLE trial_intermediate_values (other)"),
    ],
)
def test_unexpected_values_are_a_problem_of_the_study(tmp_path: Path, statements: tuple[str, ...]) -> None:
    close(write_study(tmp_path, [{0: 1.0}]))
    execute(tmp_path, *statements)
    with pytest.raises(StorageError, match="cannot be read"):
        read_curves(tmp_path)


def test_views_are_not_read(tmp_path: Path) -> None:
    close(write_study(tmp_path, [{0: 1.0}]))
    endless = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT i AS trial_id, i AS step FROM n"
    execute(tmp_path, "DROP TABLE trial_intermediate_values", f"CREATE VIEW trial_intermediate_values AS {endless}")
    assert read_curves(tmp_path) == ([], False)


def test_a_database_that_takes_too_much_work_is_given_up(tmp_path: Path) -> None:
    close(write_study(tmp_path, [{0: 1.0}]))
    columns = "trial_intermediate_value_id, trial_id, step, intermediate_value, intermediate_value_type"
    numbers = "WITH RECURSIVE n(i) AS (VALUES (10) UNION ALL SELECT i + 1 FROM n WHERE i < 20000)"
    execute(
        tmp_path,
        "DROP TABLE trial_intermediate_values",  # without its index, each trial takes a search through all
        f"CREATE TABLE trial_intermediate_values ({columns})",
        f"{numbers} INSERT INTO trial_intermediate_values SELECT i, -1, i, 1.0, 'FINITE' FROM n",
        f"{numbers} INSERT INTO trials (number, study_id, state) SELECT i, 1, 'RUNNING' FROM n",
    )
    with pytest.raises(StorageError, match="interrupted"):
        read_curves(tmp_path)
