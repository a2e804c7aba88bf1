"""Studies in SQLite files, used by real processes at once, some of which are killed."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import random
import signal
import sqlite3
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.trial import TrialState
from sqlalchemy import event

import gpu_launcher
from gpu_launcher.errors import StorageError
from gpu_launcher.studies import files
from gpu_launcher.studies.storage import MAX_TRIALS_PER_STATEMENT, store_reports

FORK = multiprocessing.get_context("fork")
PATIENCE = 60.0
"""Seconds until a test gives up on what should happen soon."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


class Processes:
    """Forked processes, each of which does its work and answers with what that returned."""

    def __init__(self, work: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> None:
        start = FORK.Event()
        self.running = []
        for given in arguments:
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=_answer, args=(theirs, start, work, given))
            process.start()
            theirs.close()
            self.running.append((process, ours))
        start.set()

    def answers(self) -> list[Any]:
        """What each returned; None for one that was killed."""
        answers = []
        for process, connection in self.running:
            assert connection.poll(PATIENCE), "a process hangs"
            try:
                problem, answer = connection.recv()
            except EOFError:
                problem, answer = None, None
            process.join(PATIENCE)
            assert problem is None, problem
            answers.append(answer)
        return answers

    def kill(self) -> None:
        for process, _ in self.running:
            process.kill()
            process.join(PATIENCE)


def _answer(connection: Connection, start: Any, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    start.wait(PATIENCE)
    try:
        connection.send((None, work(*given)))
    except BaseException:
        connection.send((traceback.format_exc(), None))


def together(number: int, work: Callable[..., Any], *given: Any) -> list[Any]:
    """What `work` returns in that many processes, which begin at the same moment."""
    processes = Processes(work, [given] * number)
    try:
        return processes.answers()
    finally:
        processes.kill()


def opened(file: Path, **options: Any) -> optuna.Study:
    return optuna.create_study(
        storage=gpu_launcher.storage(file),
        study_name="study",
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(),
        **options,
    )


def check(file: Path) -> None:
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def engine_of(storage: BaseStorage) -> Any:
    assert isinstance(storage, RDBStorage)
    return storage.engine


def test_every_connection_has_wal_a_minute_of_patience_and_does_not_wait_for_the_disk(file: Path) -> None:
    engine = engine_of(gpu_launcher.storage(file))
    with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            pragmas = ("journal_mode", "synchronous", "busy_timeout")
            found = [connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() for pragma in pragmas]
            assert found == ["wal", 1, 60_000]


def run_all(file: Path) -> list[int]:
    study = opened(file)
    mine = []
    while True:
        trial = study.ask()
        if "fixed_params" not in study.trials[trial.number].system_attrs:
            study.tell(trial, state=TrialState.FAIL)
            return mine
        mine.append(trial.suggest_int("number", 0, 100))
        study.tell(trial, float(mine[-1]))


def test_sixty_enqueued_trials_asked_for_by_eight_processes_run_once_each(file: Path) -> None:
    """With Optuna's own SQLite storage 6 to 14 of them run twice, also in WAL mode; benchmarks/storage.py shows it."""
    study = opened(file)
    for number in range(60):
        study.enqueue_trial({"number": number})
    assert Counter(number for mine in together(8, run_all, file) for number in mine) == Counter(range(60))
    states = Counter(trial.state for trial in study.trials)
    assert states == {TrialState.COMPLETE: 60, TrialState.FAIL: 8}
    check(file)


def half_made(file: Path) -> None:
    """As a program leaves it that was killed while it made the tables."""
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE studies (study_id INTEGER NOT NULL PRIMARY KEY, study_name VARCHAR(512) UNIQUE)")


def ask_and_tell(file: Path) -> int:
    study = opened(file)
    trial = study.ask()
    study.tell(trial, 1.0)
    return trial.number


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(lambda file: None, id="nothing", marks=pytest.mark.thorough),
        pytest.param(Path.touch, id="empty", marks=pytest.mark.thorough),
        pytest.param(half_made, id="half made"),
    ],
)
def test_eight_processes_make_one_database_at_once(file: Path, before: Callable[[Path], None]) -> None:
    before(file)
    assert sorted(together(8, ask_and_tell, file)) == list(range(8))
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("SELECT count(*) FROM version_info").fetchall() == [(1,)]
        assert database.execute("SELECT count(*) FROM alembic_version").fetchall() == [(1,)]
    check(file)
    assert {path.name.removesuffix("-wal").removesuffix("-shm") for path in file.parent.iterdir()} == {"study.db"}


def test_optunas_own_database_is_switched_to_wal_as_soon_as_nobody_writes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = RDBStorage(f"sqlite:///{file}")
    optuna.create_study(storage=theirs, study_name="study")
    theirs.engine.dispose()
    with closing(sqlite3.connect(file)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        pauses = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            writer.rollback()

        monkeypatch.setattr(files.time, "sleep", pause)
        ours = gpu_launcher.storage(file)
        assert pauses
        with engine_of(ours).connect() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    assert [study.study_name for study in ours.get_all_studies()] == ["study"]


def work_until_killed(file: Path, witness: Path, commits: int | None) -> None:
    """Tell trials, each after writing it to the witness, and die in the middle of a transaction if told when."""
    study = opened(file)
    left = commits

    def die(connection: object) -> None:
        nonlocal left
        if left is not None:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    event.listen(engine_of(study._storage._backend), "commit", die)
    descriptor = os.open(witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    while True:
        trial = study.ask()
        value = trial.suggest_float("x", 0, 1)
        store_reports(study._storage, {trial._trial_id: dict.fromkeys(range(20), value)})
        study.tell(trial, value)
        os.write(descriptor, f"{trial.number} {value!r}\n".encode())


@pytest.mark.thorough
def test_processes_killed_while_they_write_lose_nothing_that_was_told_and_disturb_nobody(tmp_path: Path) -> None:
    file, witness = tmp_path / "study.db", tmp_path / "witness"
    opened(file)
    survivor = Processes(work_until_killed, [(file, witness, None)])
    random.seed(7)
    try:
        for round in range(5):
            # One dies at a known point with its changes written and not committed, two wherever they happen to be.
            victims = Processes(work_until_killed, [(file, witness, 5 + round), *[(file, witness, None)] * 2])
            died, _ = victims.running[0]
            died.join(PATIENCE)
            assert died.exitcode == -signal.SIGKILL
            time.sleep(random.uniform(0, 0.3))
            victims.kill()
            check(file)
            before = len(witness.read_text().splitlines())
            deadline = time.monotonic() + PATIENCE
            while len(witness.read_text().splitlines()) < before + 3:
                assert time.monotonic() < deadline, "the survivor does not go on"
                time.sleep(0.01)
    finally:
        survivor.kill()
    check(file)
    told = {trial.number: trial for trial in opened(file).get_trials(states=[TrialState.COMPLETE])}
    lines = [line.split() for line in witness.read_text().splitlines()]
    assert len({number for number, _ in lines}) == len(lines) >= 15
    for number, value in lines:
        trial = told[int(number)]
        assert trial.value == trial.params["x"] == float(value)
        assert set(trial.intermediate_values.items()) == {(step, float(value)) for step in range(20)}


def test_a_forked_child_uses_the_storage_with_connections_of_its_own(file: Path) -> None:
    study = opened(file)
    study.tell(study.ask(), 0.0)

    def use() -> int:
        trial = study.ask()
        study.tell(trial, 1.0)
        return trial.number

    numbers = together(3, use)
    study.tell(study.ask(), 2.0)
    assert sorted(numbers) == [1, 2, 3]
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 5
    check(file)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_forked_while_another_thread_writes_is_refused_the_file_and_harms_nothing(file: Path) -> None:
    storage = gpu_launcher.storage(file)
    engine = engine_of(storage)
    writing, written = threading.Event(), threading.Event()

    def write() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO studies (study_name) VALUES ('theirs')")
            writing.set()
            assert written.wait(PATIENCE)

    def refused() -> str:
        for use in (storage.get_all_studies, lambda: gpu_launcher.storage(file)):
            with pytest.raises(StorageError, match="when this process was forked") as raised:
                use()
        return str(raised.value)

    thread = threading.Thread(target=write)
    thread.start()
    assert writing.wait(PATIENCE)
    try:
        (message,) = together(1, refused)
    finally:
        written.set()
        thread.join()
    assert "spawn" in message
    assert [study.study_name for study in storage.get_all_studies()] == ["theirs"]
    check(file)


def test_a_pickled_storage_opens_the_same_file_with_the_same_locking(file: Path) -> None:
    study = opened(file)
    study.enqueue_trial({"number": 3})
    again = pickle.loads(pickle.dumps(gpu_launcher.storage(file)))
    begun: list[str] = []
    event.listen(engine_of(again), "before_cursor_execute", lambda *given: begun.append(given[2]))
    trial = optuna.load_study(study_name=None, storage=again).ask()
    assert trial.suggest_int("number", 0, 9) == 3
    assert "BEGIN IMMEDIATE" in begun


def test_names_that_mean_something_to_urls_or_formats_are_just_names(tmp_path: Path) -> None:
    directory = tmp_path / "lr={x},a b%20#?"
    directory.mkdir()
    study = opened(directory / "s{SCHEMA_VERSION}.db")
    study.tell(study.ask(), 1.0)
    assert [path.name for path in directory.iterdir() if path.suffix == ".db"] == ["s{SCHEMA_VERSION}.db"]


def test_a_relative_name_stays_the_same_file_when_the_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = gpu_launcher.storage("sqlite:///study.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    engine_of(storage).dispose()
    optuna.create_study(storage=storage)
    assert list(Path().iterdir()) == []


def test_studies_are_cached_and_storages_pass_through(file: Path) -> None:
    assert type(opened(file)._storage) is optuna.storages._CachedStorage
    for given in (InMemoryStorage(), RDBStorage(f"sqlite:///{file}"), gpu_launcher.storage(file)):
        assert gpu_launcher.storage(given) is given
    assert isinstance(gpu_launcher.storage(None), InMemoryStorage)


def append(file: Path) -> int:
    study = optuna.create_study(
        storage=gpu_launcher.storage(f"journal:///{file}"), study_name="study", load_if_exists=True
    )
    return study.ask().number


def test_a_journal_file_is_shared_by_processes(tmp_path: Path) -> None:
    assert sorted(together(4, append, tmp_path / "study.log")) == [0, 1, 2, 3]


STORAGES: dict[str, Callable[[Path], BaseStorage]] = {
    "ours": lambda file: gpu_launcher.storage(file),
    "optuna's SQLite": lambda file: RDBStorage(f"sqlite:///{file}"),
    "journal": lambda file: gpu_launcher.storage(f"journal:///{file}"),
    "memory": lambda file: InMemoryStorage(),
}


@pytest.mark.parametrize("make", STORAGES.values(), ids=STORAGES)
def test_reports_stored_in_bulk_are_read_through_the_study_and_finished_trials_take_none(
    file: Path, make: Callable[[Path], BaseStorage]
) -> None:
    study = optuna.create_study(storage=make(file))
    running, told = study.ask(), study.ask()
    study.tell(told, 1.0)
    study.enqueue_trial({"x": 1.0})
    first, second, waiting = (trial._trial_id for trial in study.trials)
    reports = {first: {0: 0.5, 7: math.inf, 8: math.nan}, second: {0: 0.5}, waiting: {0: 0.5}, 10_000: {0: 0.5}}
    assert store_reports(study._storage, reports) == {second, waiting, 10_000}
    assert store_reports(study._storage, {first: {0: 0.25, 1: -1.0}, second: {}}) == set()
    found = study.trials[0].intermediate_values
    assert math.isnan(found.pop(8))
    assert found == {0: 0.25, 1: -1.0, 7: math.inf}
    assert [trial.intermediate_values for trial in study.trials[1:]] == [{}, {}]
    store_reports(study._storage, {first: {9: 4.5}})
    study.tell(running, state=TrialState.PRUNED)
    assert study.trials[0].value == 4.5, "the last report"
    assert store_reports(study._storage, {first: {10: 0.0}}) == {first}
    assert store_reports(study._storage, {}) == set()


def test_all_reports_are_stored_in_one_transaction_however_many_they_are(file: Path) -> None:
    study = opened(file)
    storage = study._storage._backend
    trials = [study.ask()._trial_id for _ in range(20)]
    commits: list[str] = []
    event.listen(engine_of(storage), "commit", lambda connection: commits.append("commit"))
    reports = {trial: {step: float(step) for step in range(MAX_TRIALS_PER_STATEMENT + 5)} for trial in trials}
    for _ in range(2):
        assert store_reports(storage, reports) == set()
    assert commits == ["commit"] * 2
    assert [trial.intermediate_values for trial in study.trials] == list(reports.values())


def test_a_trial_told_by_somebody_else_meanwhile_takes_no_more_reports(file: Path) -> None:
    """Who tells has to wait until the reports are stored; who reports finds the trial told."""
    study, dashboard = opened(file), opened(file)
    trial = study.ask()
    dashboard.tell(trial.number, state=TrialState.FAIL)
    assert store_reports(study._storage, {trial._trial_id: {0: 1.0}}) == {trial._trial_id}
    assert study.trials[0].intermediate_values == {}
