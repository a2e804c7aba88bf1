"""Files that were open when jobs were forked, with a real fork server and several jobs that read at the same time."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gzip
import mmap
import os
import pickle
import random
import select
import sqlite3
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_launcher.model import Request
from gpu_launcher.processes import inherited_files
from gpu_launcher.processes.fork_server_client import ForkServer
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.processes.messages import Grant, JobExited, Report, receive

PATIENCE = 60.0
CONTENT = random.Random(0).randbytes(200_000)
libc = ctypes.CDLL(None, use_errno=True)
libc.fopen.restype = ctypes.c_void_p


def in_jobs(work: Callable[[int], Any], jobs: int = 3, meanwhile: Callable[[], Any] = lambda: None) -> list[Any]:
    """What `work` returns in jobs that run at the same time; `meanwhile` runs here before they begin."""

    def program(number: int, spec: object, context: Any) -> Report:
        context.prepared(Request(1), None)
        context.wait()
        return Report(True, None, pickle.dumps(work(number)))

    with tempfile.TemporaryDirectory() as directory:
        server = ForkServer(program, "fork", captured=False)
        try:
            meanwhile()
            results = [Path(directory, f"{number}.result") for number in range(jobs)]
            started = [server.start(number, None, result) for number, result in enumerate(results)]
            for process in started:
                assert select.select([process.job], [], [], PATIENCE)[0]
                receive(process.job)
            for process in started:
                process.grant(Grant({}), ())
            for process in started:
                assert select.select([process.supervisor], [], [], PATIENCE)[0]
                assert receive(process.supervisor)[0] == JobExited(0)
                process.close()
            return [pickle.loads(Report.load(result.read_bytes()).payload) for result in results]
        finally:
            server.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.bin"
    path.write_bytes(CONTENT)
    return path


# Generated: many files, opened in many ways


@dataclass
class Opened:
    """A file that is open, however it was opened."""

    read: Callable[[int], bytes]
    seek: Callable[[int], Any]
    tell: Callable[[], int]
    close: Callable[[], Any]


def of_python(file: Any) -> Opened:
    return Opened(file.read, file.seek, file.tell, file.close)


def of_descriptor(descriptor: int) -> Opened:
    def seek(position: int) -> int:
        return os.lseek(descriptor, position, os.SEEK_SET)

    return Opened(
        lambda size: os.read(descriptor, size),
        seek,
        lambda: os.lseek(descriptor, 0, os.SEEK_CUR),
        lambda: os.close(descriptor),
    )


def of_c(path: Path, mode: bytes) -> Opened:
    stream = ctypes.c_void_p(libc.fopen(os.fsencode(path), mode))

    def read(size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        got = libc.fread(buffer, 1, size, stream)
        return buffer.raw[:got]

    return Opened(
        read,
        lambda position: libc.fseek(stream, ctypes.c_long(position), 0),
        lambda: int(libc.ftell(stream)),
        lambda: libc.fclose(stream),
    )


def deleted(path: Path) -> Opened:
    file = open(path, "rb")
    path.unlink()
    return of_python(file)


def anonymous(make: Callable[[], int]) -> Callable[[Path], Opened]:
    def opened(path: Path) -> Opened:
        descriptor = make()
        os.write(descriptor, path.read_bytes())
        os.lseek(descriptor, 0, os.SEEK_SET)
        return of_descriptor(descriptor)

    return opened


def with_flags(flags: int) -> Callable[[Path], Opened]:
    return lambda path: of_descriptor(os.open(path, flags))


WAYS: dict[str, Callable[[Path], Opened]] = {
    "unbuffered": lambda path: of_python(open(path, "rb", buffering=0)),
    "buffered": lambda path: of_python(open(path, "rb")),
    "small buffer": lambda path: of_python(open(path, "rb", buffering=7)),
    "update": lambda path: of_python(open(path, "r+b")),
    "append and read": lambda path: of_python(open(path, "a+b")),
    "descriptor": with_flags(os.O_RDONLY),
    "no follow": with_flags(os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK),
    "C stream": lambda path: of_c(path, b"r"),
    "C stream to update": lambda path: of_c(path, b"r+"),
    "deleted": deleted,
    "memory file": anonymous(lambda: os.memfd_create("data")),
    "temporary": anonymous(lambda: os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR)),
    "gzip": lambda path: of_python(gzip.GzipFile(path.with_suffix(".gz"))),
    "zip": lambda path: of_python(zipfile.ZipFile(path.with_suffix(".zip")).open("member")),
}


def check_reads(file: Opened, content: bytes, chance: random.Random, reads: int = 60) -> list[str]:
    """Read at random; returns what was wrong, the position at the beginning included."""
    wrong = []
    position = file.tell()
    for _ in range(reads):
        if chance.random() < 0.7:
            position = chance.randrange(len(content))
            file.seek(position)
        expected = content[position : position + chance.choice((1, 3, 100, 5000))]
        got = file.read(len(expected))
        if got != expected[: len(got)] or (expected and not got):
            wrong.append(f"{len(expected)} bytes at {position}")
        position += len(got)
        if file.tell() != position:
            wrong.append(f"position {file.tell()} instead of {position}")
    return wrong


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ways=st.lists(st.sampled_from(sorted(WAYS)), min_size=4, max_size=12),
    seed=st.integers(0, 2**32),
    moved=st.booleans(),
)
def test_jobs_read_what_is_in_each_file_wherever_they_seek(ways, seed, moved):
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as cleanup:
        files = []
        for number, way in enumerate(ways):
            content = CONTENT[chance.randrange(1000) :][: chance.randrange(1, 60_000)]
            path = Path(directory, f"{number}.bin")
            path.write_bytes(content)
            if way == "gzip":
                path.with_suffix(".gz").write_bytes(gzip.compress(content, 1))
            elif way == "zip":
                with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
                    archive.writestr("member", content)
            file = WAYS[way](path)
            cleanup.callback(file.close)
            file.seek(0)
            size = chance.choice((0, 1, 500))
            assert file.read(size) == content[:size]
            files.append((way, file, content, file.tell()))

        def work(job: int) -> list[str]:
            own = random.Random(seed + job)
            wrong = [f"{way} begins at {file.tell()}" for way, file, _, began in files if file.tell() != began]
            for way, file, content, _ in own.sample(files, len(files)):
                wrong += [f"{way}: {problem}" for problem in check_reads(file, content, own)]
            return wrong

        def meanwhile() -> None:
            for _, file, content, _ in files if moved else ():
                file.seek(chance.randrange(len(content)))

        assert in_jobs(work, meanwhile=meanwhile) == [[], [], []]


# One kind at a time


def test_a_file_continues_in_each_job_where_the_program_was(data):
    with open(data, "rb", buffering=0) as raw, open(data, "rb") as buffered:
        raw.read(10)
        buffered.read(20)
        expected = (CONTENT[10:15], CONTENT[20:30_000])
        assert in_jobs(lambda job: (raw.read(5), buffered.read(29_980))) == [expected] * 3


def test_the_program_may_move_on_once_jobs_can_be_started(data):
    with open(data, "rb", buffering=0) as file:
        assert in_jobs(lambda job: file.read(5), meanwhile=lambda: file.seek(1000)) == [CONTENT[:5]] * 3
        assert file.read(5) == CONTENT[1000:1005]


def test_jobs_of_one_supervisor_and_of_a_new_server_begin_alike(data, tmp_path):
    def program(number, spec, context):
        context.prepared(Request(1), None)
        context.wait()
        return Report(True, None, file.read(5))

    def run(server: ForkServer, number: int) -> bytes | None:
        process = server.start(number, None, tmp_path / f"{number}.result")
        receive(process.job)
        process.grant(Grant({}), ())
        assert receive(process.supervisor)[0] == JobExited(0)
        server.finished(process)
        return Report.load((tmp_path / f"{number}.result").read_bytes()).payload

    with open(data, "rb", buffering=0) as file:
        file.seek(7)
        server = ForkServer(program, "fork", captured=False)
        payloads = [run(server, 0), run(server, 1)]
        server.restart(lambda: None)
        payloads.append(run(server, 2))
        server.close()
    assert payloads == [CONTENT[7:12]] * 3


def test_each_job_lists_a_whole_directory_that_was_being_listed(tmp_path):
    names = {f"{number}" for number in range(3000)}
    for name in names:
        (tmp_path / name).touch()
    with os.scandir(tmp_path) as entries:
        seen = {next(entries).name for _ in range(10)}
        assert in_jobs(lambda job: {entry.name for entry in entries}) == [names - seen] * 3


def test_descriptors_made_with_dup_share_a_position_within_a_job(data):
    first = os.open(data, os.O_RDONLY)
    second, third = os.dup(first), os.open(data, os.O_RDONLY)
    try:

        def work(job: int) -> list[bytes]:
            return [os.read(descriptor, 3) for descriptor in (first, second, third)]

        assert in_jobs(work) == [[CONTENT[:3], CONTENT[3:6], CONTENT[:3]]] * 3
    finally:
        for descriptor in (first, second, third):
            os.close(descriptor)


def test_flags_of_the_descriptor_and_of_the_file_stay(data):
    descriptors = [
        os.open(data, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK),
        os.open(data, os.O_RDONLY | os.O_NOATIME),
        os.open(data, os.O_RDONLY),
    ]
    os.set_inheritable(descriptors[1], True)

    def flags(job: int) -> list[int]:
        return [fcntl.fcntl(one, what) for one in descriptors for what in (fcntl.F_GETFL, fcntl.F_GETFD)]

    expected = flags(0)
    assert in_jobs(flags, jobs=1) == [expected]
    for descriptor in descriptors:
        os.close(descriptor)


def test_memory_maps_stay_shared_with_the_program(data):
    shared = np.memmap(data, mode="r+", dtype=np.uint8)
    with open(data, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:

        def work(job: int) -> int:
            mapped[job] = shared[100 + job] = job + 1
            return int(shared[1000])

        assert in_jobs(work) == [CONTENT[1000]] * 3
        assert (bytes(mapped[:3]), bytes(shared[100:103])) == (b"\1\2\3", b"\1\2\3")


def test_a_lock_of_the_program_is_not_released_by_a_job(data):
    with open(data, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def work(job: int) -> bool:
            fcntl.flock(file, fcntl.LOCK_UN)
            with open(data, "rb") as another, contextlib.suppress(BlockingIOError):
                fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            return True

        assert in_jobs(work) == [True] * 3


def test_locks_of_the_program_outlive_the_start_of_its_jobs(data):
    with open(data, "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)

        def work(job: int) -> bool:
            with contextlib.suppress(BlockingIOError, PermissionError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            return True

        assert in_jobs(work) == [True] * 3


def test_lines_of_jobs_in_a_file_for_writing_are_all_kept(tmp_path):
    path = tmp_path / "log.txt"
    with open(path, "w") as text, open(tmp_path / "log.bin", "wb") as binary:
        text.write("header\n")
        binary.write(b"header\n")

        def work(job: int) -> None:
            for line in range(50):
                print("job", job, "line", line, file=text, flush=line % 2 == 0)
                binary.write(b"%d %d\n" % (job, line))

        in_jobs(work)
        text.write("end\n")
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("header", "end")
    assert sorted(lines[1:-1]) == sorted(f"job {job} line {line}" for job in range(3) for line in range(50))
    lines = (tmp_path / "log.bin").read_text().splitlines()
    assert lines[0] == "header"
    assert sorted(lines[1:]) == sorted(f"{job} {line}" for job in range(3) for line in range(50))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user who may not open a file")
def test_a_job_that_may_not_open_a_file_again_says_so(data, capfd, notice):
    data.chmod(0o600)
    with open(data, "rb", buffering=0) as file:
        os.seteuid(65534)
        libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, without which /proc is root's
        try:
            said = notice()
            in_jobs(lambda job: file.seek(job), jobs=1)
        finally:
            os.seteuid(0)
    assert said is not None
    assert f"{data}, which they may not open again. Remedy: " in said
    assert f"this job shares its position in {data} with other jobs: Permission denied" in capfd.readouterr().err


# What the user is told


@pytest.fixture
def notice(tmp_path: Path) -> Callable[[], str | None]:
    """The notice about files of the test, and not those that an earlier one has left to the garbage collector."""

    def notice() -> str | None:
        noted = OpenFiles.of_this_process()
        noted._files = [file for file in noted._files if file.name.startswith((str(tmp_path), "/memfd:data"))]
        return noted.notice()

    return notice


def test_files_for_reading_or_writing_only_cause_no_notice(data, tmp_path, notice):
    with (
        open(data, "rb"),
        open(tmp_path / "log", "w"),
        open(tmp_path / "more", "a+"),
        open(tmp_path / "lock", "w+") as lock,
        os.fdopen(os.memfd_create("data"), "r+b"),
        os.scandir(tmp_path),
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        memory = np.memmap(data, mode="r+", dtype=np.uint8)
        with open(data, "r+b"):
            assert notice() is None
        del memory


def test_files_that_jobs_may_overwrite_are_named(tmp_path, notice):
    with contextlib.ExitStack() as cleanup:
        for number in range(5):
            cleanup.enter_context(open(tmp_path / f"{number}.bin", "w+b"))
        names = ", ".join(str(tmp_path / f"{number}.bin") for number in range(3))
        assert notice() == (
            f"files that are open when the jobs start: jobs that write to {names} and 2 more may overwrite each "
            "other's data. Remedy: close such files before the jobs start, and open them inside each job"
        )


def named(database: str) -> str:
    return (
        f"files that are open when the jobs start: jobs must not use the program's connection to {database}. Remedy: "
        "close such files before the jobs start, and open them inside each job"
    )


def test_a_connection_to_sqlite_is_named(tmp_path, notice):
    database = sqlite3.connect(tmp_path / "runs.db")
    database.execute("CREATE TABLE runs (x)")
    said = notice()
    database.close()
    assert said == named(f"{tmp_path / 'runs.db'} (SQLite)")


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("HDF5", b"\x89HDF\r\n\x1a\n"),
        ("LMDB", bytes(16) + b"\xde\xc0\xef\xbe"),
        ("LMDB", b"\xde\xc0\xef\xbe"),
        ("GDBM", b"\xcf\x9a\x57\x13"),
    ],
)
def test_an_open_database_is_named_with_its_kind(tmp_path, kind, start, notice):
    path = tmp_path / "data"
    path.write_bytes(start + bytes(100))
    with open(path, "r+b") as file, open(path, "r+b"), mmap.mmap(file.fileno(), 0):
        fcntl.flock(file, fcntl.LOCK_EX)  # as libraries do
        assert notice() == named(f"{path} ({kind})")
    with open(path, "rb"):
        assert notice() is None


def test_file_that_is_closed_while_the_notice_is_made_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").write_bytes(b"SQLite format 3\0" + bytes(100))
    file = open(tmp_path / "data", "r+b")
    noted = OpenFiles.of_this_process()
    look = inherited_files._format

    def close_after(one: inherited_files._File) -> str | None:
        found = look(one)
        file.close()  # as the garbage collector does
        return found

    monkeypatch.setattr(inherited_files, "_format", close_after)
    monkeypatch.setattr(inherited_files, "_may_open", lambda one: True)
    assert str(tmp_path / "data") in (noted.notice() or "")
