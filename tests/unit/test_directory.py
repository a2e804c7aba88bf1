"""The lock of a sweep's directory, and who logs where."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs import directory as module
from gpu_launcher.jobs.directory import DirectoryLock, LogFiles
from gpu_launcher.jobs.manifest import Entry, State
from gpu_launcher.model import Request
from gpu_launcher.processes.messages import JobPrepared


def take(directory: Path, notice: Callable[[str], None] = lambda text: None) -> DirectoryLock:
    return DirectoryLock.take(directory, "train.py", "wait for it", notice)


def child(function: Callable[[int], None]) -> tuple[int, int]:
    """Fork a process that is given the writing end of a pipe; its id, and the reading end."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            function(write)
        finally:
            os._exit(0)
    os.close(write)
    return pid, read


def said(read: int) -> str:
    with os.fdopen(read) as pipe:
        return pipe.read()


def attempt(directory: Path, write: int) -> None:
    try:
        take(directory)
    except ManifestError as error:
        os.write(write, str(error).encode())
    else:
        os.write(write, b"taken")


def from_another_process(directory: Path) -> str:
    pid, read = child(lambda write: attempt(directory, write))
    answer = said(read)
    os.waitpid(pid, 0)
    return answer


def test_another_process_is_refused_while_the_lock_is_held(tmp_path: Path) -> None:
    lock = take(tmp_path / "new" / "sweep")
    refused = f"{tmp_path}/new/sweep is being run by process {os.getpid()} (train.py): wait for it"
    assert from_another_process(tmp_path / "new" / "sweep") == refused
    lock.close()
    assert from_another_process(tmp_path / "new" / "sweep") == "taken"


def test_exclusive_lock_is_refused_to_the_process_that_has_it(tmp_path: Path) -> None:
    lock = take(tmp_path)
    with pytest.raises(ManifestError, match=f"is being run by process {os.getpid()} .train.py.: wait for it"):
        DirectoryLock.take(tmp_path, "train.py", "wait for it", exclusive=True)
    lock.close()
    DirectoryLock.take(tmp_path, "train.py", "wait for it", exclusive=True).close()


def test_closed_lock_that_is_still_referred_to_is_taken_anew(tmp_path: Path) -> None:
    closed = take(tmp_path)
    closed.close()
    again = take(tmp_path)
    assert again is not closed
    assert "is being run by" in from_another_process(tmp_path)


def test_a_process_shares_its_lock_with_itself_until_nobody_has_it(tmp_path: Path) -> None:
    first = take(tmp_path)
    second = take(tmp_path / "." / ".." / tmp_path.name)
    assert second is first
    del first
    gc.collect()
    assert "is being run by" in from_another_process(tmp_path)
    del second
    gc.collect()
    assert from_another_process(tmp_path) == "taken"


def test_a_killed_launch_has_its_directory_until_its_children_end(tmp_path: Path) -> None:
    def launch(write: int) -> None:
        lock = take(tmp_path)
        left = os.fork()
        if left:
            os.write(write, str(left).encode())
            os.kill(os.getpid(), signal.SIGKILL)
        os.close(write)
        time.sleep(60)
        lock.close()

    pid, read = child(launch)
    left = int(said(read))
    os.waitpid(pid, 0)
    notices: list[str] = []

    def end(text: str) -> None:
        notices.append(text)
        os.kill(left, signal.SIGKILL)

    lock = take(tmp_path, end)
    assert notices == [f"waiting for the processes of an earlier launch in {tmp_path} to end"]
    lock.close()


def test_processes_that_do_not_end_are_an_error_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.2)
    first = take(tmp_path)
    path = tmp_path / ".gpu_launcher" / "lock"
    path.write_text(json.dumps({**json.loads(path.read_text()), "start": 1}))  # another process had this number
    assert "do not end: `fuser" in from_another_process(tmp_path)
    first.close()


def test_of_many_processes_that_start_together_one_gets_the_directory(tmp_path: Path) -> None:
    for number in range(30):
        directory = tmp_path / str(number)
        begin, go = os.pipe()
        end, done = os.pipe()

        def contend(write: int, pipes: tuple[int, ...] = (begin, go, end, done), directory: Path = directory) -> None:
            begin, go, end, done = pipes
            os.close(go)
            os.close(done)
            os.read(begin, 1)
            try:
                lock = take(directory)
            except ManifestError as error:
                os.write(write, str(error).encode())
                os.close(write)
            else:
                os.write(write, f"process {os.getpid()}".encode())
                os.close(write)
                os.read(end, 1)
                lock.close()

        children = [child(contend) for _ in range(6)]
        os.close(begin)
        os.close(end)
        os.close(go)
        answers = [said(read) for _, read in children]
        os.close(done)
        for pid, _ in children:
            os.waitpid(pid, 0)
        (winner,) = [answer for answer in answers if answer.startswith("process")]
        assert all(winner in answer for answer in answers)


def log(directory: Path, name: str = "job.log") -> JobPrepared:
    directory.mkdir(parents=True, exist_ok=True)
    status = directory.stat()
    return JobPrepared(Request(1), str(directory / name), 1, None, (status.st_dev, status.st_ino))


def logs(directory: Path, earlier: dict[int, Entry] | None = None) -> LogFiles:
    return LogFiles(directory, earlier or {}, shared="SHARED", used="USED")


def test_jobs_in_one_directory_get_logs_of_their_own_and_one_notice(tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(tmp_path / "a")
    files = logs(tmp_path)
    assert files.claim(0, log(tmp_path / "a")) == (f"{tmp_path}/a/job.log", [])
    assert files.claim(1, log(tmp_path / "b")) == (f"{tmp_path}/b/job.log", [])
    shared = f"jobs 0 and 2 share the output directory {tmp_path}/alias: SHARED"
    assert files.claim(2, log(tmp_path / "alias")) == (f"{tmp_path}/alias/2.job.log", [shared])
    assert files.claim(3, log(tmp_path / "a" / ".." / "a"))[0].endswith("/3.job.log")
    assert files.claim(0, log(tmp_path / "a")) == (f"{tmp_path}/a/job.log", []), "its next attempt"
    assert files.claim(2, log(tmp_path / "a")) == (f"{tmp_path}/a/2.job.log", []), "its next attempt"


def test_logs_with_names_of_their_own_share_a_directory_silently(tmp_path: Path) -> None:
    files = logs(tmp_path)
    for number in range(3):
        name = f"{number}.job.log"
        assert files.claim(number, log(tmp_path, name)) == (str(tmp_path / name), [])


def test_a_log_that_an_earlier_launch_left_is_kept(tmp_path: Path) -> None:
    prepared = log(tmp_path / "0")
    path = tmp_path / "0" / "job.log"
    path.write_text("earlier")
    earlier = {0: Entry(0, "", [], "x", State.FAILED, attempts=2, log=str(path)), 1: Entry(1, "", [], "x", State.LOST)}
    files = logs(tmp_path, earlier)
    assert files.claim(0, prepared) == (
        str(path),
        [f"{tmp_path} has 2 jobs (1 failed, 1 lost) from an earlier sweep: USED"],
    )
    assert not path.exists()
    assert (tmp_path / "0" / "job.attempt-2.log").read_text() == "earlier"
    path.write_text("first attempt")
    assert files.claim(0, prepared) == (str(path), [])
    assert path.exists(), "what becomes of attempts of this launch is decided elsewhere"


def test_a_resumed_job_does_not_take_the_log_of_one_that_completed(tmp_path: Path) -> None:
    path = tmp_path / "job.log"
    earlier = {0: Entry(0, "", [], "x", State.COMPLETED, attempts=1, log=str(path))}
    assert logs(tmp_path, earlier).claim(3, log(tmp_path))[0] == str(tmp_path / "3.job.log")
