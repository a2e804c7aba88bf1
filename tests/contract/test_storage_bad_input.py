"""What cannot be a storage: one message each, that says what it is about, why, and what to do."""

from __future__ import annotations

import os
import pickle
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

import gpu_launcher
from gpu_launcher.errors import GpuLauncherError, StorageError


def problem(storage: Any, **options: Any) -> str:
    """The message; it survives pickling."""
    with pytest.raises(StorageError) as raised:
        gpu_launcher.storage(storage, **options)
    again = pickle.loads(pickle.dumps(raised.value))
    assert isinstance(again, GpuLauncherError)
    assert (again.storage, again.problem) == (raised.value.storage, raised.value.problem)
    assert "\n" not in str(again)
    return str(again)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlit:///study.db", "storage sqlit:///study.db: there is no database 'sqlit': is it sqlite://?"),
        (
            "postgres://ada:secret@host/x",
            "storage postgres://ada:***@host/x: there is no database 'postgres': is it po",
        ),
        ("zzz://x", "a URL begins with sqlite, journal, postgresql, mysql"),
        ("sqlite://study.db", "'study.db' would be a host: write sqlite:///study.db"),
        ("journal://study.log", "'study.log' would be a host: write journal:///study.log"),
        ("sqlite:study.db", "is not a URL: write sqlite:///study.db"),
        ("sqlite:/study.db", "is not a URL: write sqlite:///study.db"),
        ("postgresql:/host/x", "is not a URL: write postgresql://host/x"),
        ("sqlite://", "is in memory, and lost with the program: name a file, such as sqlite:///study.db"),
        ("sqlite:///:memory:", "is in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "is in memory"),
        ("sqlite:///study.db?timeout=5", "options after `?` are not supported"),
        ("journal:///", "names no file"),
        ("redis://localhost", "JournalRedisBackend"),
        ("study", "is neither a URL nor the name of a SQLite file (which ends in .db, .sqlite, .sqlite3)"),
        ("", "write sqlite:///study.db"),
        (".db", "is neither a URL nor the name"),
        (b"study.db", "is neither a URL nor a path nor an Optuna storage"),
        (5, "is neither a URL nor a path nor an Optuna storage"),
        ("a b://x", "is not a URL: write database://user:password@host:port/name"),
        ("mysql+nobody://x", "there is no database 'mysql' with the driver 'nobody'"),
        ("postgresql+asyncpg://ada:{secret}@host/x", "double each brace"),
        ("postgresql+asyncpg://ada:secret@host:port/x", "a number for the port"),
    ],
)
def test_a_url_with_a_mistake_is_answered_with_what_was_meant(
    url: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = problem(url)
    assert words in message
    assert "secret" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_is_not_installed_is_named_and_where_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    message = problem("postgresql+psycopg2://ada:secret@localhost/study")
    assert message == (
        "storage postgresql+psycopg2://ada:***@localhost/study: psycopg2 is not installed, which this URL needs: "
        "pip install 'psycopg2-binary'"
    )


def of_another_application(file: Path) -> None:
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE photos (x)")
        database.execute("CREATE TABLE studies (x)")


def of_a_later_optuna(file: Path) -> None:
    with closing(optuna.storages.RDBStorage(f"sqlite:///{file}").engine.raw_connection()) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
        database.commit()


def of_an_earlier_optuna(file: Path) -> None:
    with closing(optuna.storages.RDBStorage(f"sqlite:///{file}").engine.raw_connection()) as database:
        database.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
        database.commit()


def damaged(file: Path) -> None:
    of_another_application(file)
    contents = bytearray(file.read_bytes())
    contents[100:4096] = b"\xff" * (4096 - 100)
    file.write_bytes(contents)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: file.write_text("hello " * 100), "is not a SQLite database: name another file"),
        (of_another_application, "another application (with tables photos): name another file"),
        (of_a_later_optuna, "pip install -U optuna"),
        (of_an_earlier_optuna, "optuna storage upgrade --storage sqlite:///"),
        (damaged, "is damaged: see `sqlite3"),
        (Path.mkdir, "is a directory: name a file in it"),
    ],
    ids=["text", "another application", "later Optuna", "earlier Optuna", "damaged", "directory"],
)
def test_a_file_that_is_no_study_is_refused_and_left_as_it_is(
    make: Callable[[Path], Any], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "study.db"
    make(file)
    message = problem(f"sqlite:///{file}")
    assert message.startswith(f"storage {file}: ")
    assert words in message


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_a_directory_that_is_not_there_is_named(scheme: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"directory {tmp_path}/nowhere does not exist: make it" in problem(f"{scheme}:///{tmp_path}/nowhere/study")
    assert f"{tmp_path}/file is a file, where a directory should be" in problem(f"{scheme}:///{tmp_path}/file/study")


@pytest.mark.parametrize("text", ["hello\nthere\n", "{}\n{}\n", "[1]\n[2]\n", "\x00\xff\n\n"])
def test_a_journal_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "study.log").write_text(text, encoding="latin-1")
    assert "is not one of Optuna's journals: name another file" in problem(f"journal:///{tmp_path}/study.log")


@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "lustre"])
def test_sqlite_on_a_network_file_system_is_refused_with_the_remedy_and_a_journal_is_not(
    kind: str, tmp_path: Path
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n22 21 0:40 / {tmp_path}/home rw shared:1 - {kind} server:/ rw\n"
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "home" / "study.db")
    for file in (tmp_path / "home" / "study.db", tmp_path / "link.db"):
        message = problem(file, mountinfo=mounts)
        assert f"is on a network file system ({kind})" in message
        assert "name a file in a local directory, or use PostgreSQL (postgresql://)" in message
    assert list((tmp_path / "home").iterdir()) == []
    gpu_launcher.storage(f"journal:///{tmp_path}/home/study.log", mountinfo=mounts)
    gpu_launcher.storage(tmp_path / "study.db", mountinfo=mounts)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that any user can reach."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def as_nobody(url: str) -> str:
    """The message, for a user whom modes concern."""
    code = (
        "import os, sys, gpu_launcher.studies.storage as it\n"
        "from gpu_launcher.errors import StorageError\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: it.storage(sys.argv[1])\n"
        "except StorageError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_what_the_user_cannot_write_is_refused_at_once_and_not_at_the_first_trial(scheme: str, public: Path) -> None:
    file = public / "study"
    gpu_launcher.storage(f"{scheme}:///{file}")
    file.chmod(0o444)
    user = 65534 if os.geteuid() == 0 else os.geteuid()
    message = as_nobody(f"{scheme}:///{file}")
    assert f"storage {file}: cannot be written by user {user}: change its mode" in message
    file.chmod(0o666)
    public.chmod(0o555)
    assert f"directory {public} cannot be written by user {user}" in as_nobody(f"{scheme}:///{file}")
    if scheme == "sqlite" and user == 65534:
        public.chmod(0o700)
        assert f"cannot be reached by user {user}" in as_nobody(f"{scheme}:///{file}")
    public.chmod(0o755)


def test_a_database_that_somebody_keeps_locked_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "study.db"
    monkeypatch.setattr("gpu_launcher.studies.connections.BUSY_TIMEOUT", 0.1)
    monkeypatch.setattr("gpu_launcher.studies.files.BUSY_TIMEOUT", 0.1)
    with closing(sqlite3.connect(file)) as database:
        database.execute("BEGIN EXCLUSIVE")
        assert f"another program has kept it locked for 0 s: find it with `lsof {file}`" in problem(file)


def test_a_directory_that_somebody_keeps_locked_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_launcher.studies.files import opening

    monkeypatch.setattr("gpu_launcher.studies.files.BUSY_TIMEOUT", 0.1)
    with opening(tmp_path / "other.db"):
        assert f"another program has locked the directory {tmp_path}" in problem(tmp_path / "study.db")
    gpu_launcher.storage(tmp_path / "study.db")


def test_importing_gpu_launcher_imports_neither_optuna_nor_sqlalchemy() -> None:
    code = (
        "import sys, gpu_launcher; print([name for name in sys.modules if name in ('optuna', 'sqlalchemy')]);"
        "print(gpu_launcher.storage.__name__, hasattr(gpu_launcher, 'nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, check=True)
    assert done.stdout == "[]\nstorage False\n"
