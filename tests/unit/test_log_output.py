"""What `gpu-launcher log` prints while a job runs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from gpu_launcher.cli.log_output import print_log
from gpu_launcher.devices.simulated import simulated_devices
from gpu_launcher.errors import ManifestError
from gpu_launcher.jobs.events import JobEnded, JobRetried, JobStarted, Outcome
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.recorder import Recorder
from tests.waiting import until


class RunningSweep:
    """A sweep of one job, which the test plays."""

    def __init__(self, directory: Path, log: Path) -> None:
        self.log = log
        self.recorder = Recorder(directory, [Job(0, "", [])], "train.py")

    def start(self, text: str) -> None:
        self.log.write_text(text)
        self.recorder.handle(JobStarted(0.0, 0, "", simulated_devices(1), str(self.log)))

    def add(self, text: str) -> None:
        with self.log.open("a") as file:
            file.write(text)

    def retry(self) -> None:
        aside = self.log.with_name("job.attempt-1.log")
        self.log.rename(aside)
        self.recorder.handle(JobRetried(0.0, 0, "", 1.0, "failed", str(aside), 2, 3, 1))

    def end(self) -> None:
        self.recorder.handle(JobEnded(0.0, 0, "", (), Outcome.COMPLETED, 1.0, None, str(self.log)))
        self.recorder.close()


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[RunningSweep]:
    sweep = RunningSweep(tmp_path, tmp_path / "job.log")
    yield sweep
    sweep.recorder.close()


def test_followed_log_has_all_attempts_once(sweep: RunningSweep, tmp_path: Path) -> None:
    out = io.BytesIO()
    sweep.start("one\n")
    with ThreadPoolExecutor() as pool:
        followed = pool.submit(print_log, str(tmp_path), 0, out, follow=True)
        try:
            until(lambda: out.getvalue() == b"one\n" or followed.done())
            sweep.add("Traceback\n")
            sweep.retry()
            wait([followed], 0.5)
            assert not followed.done(), "it waits for the next attempt"
            sweep.start("two\n")
            until(lambda: out.getvalue().endswith(b"two\n") or followed.done())
            sweep.add("done\n")
        finally:
            sweep.end()
        followed.result()
    assert out.getvalue() == b"one\nTraceback\ntwo\ndone\n"


def test_last_lines_before_a_retry_at_once_are_printed(sweep: RunningSweep, tmp_path: Path) -> None:
    out = io.BytesIO()
    sweep.start("one\n")
    with ThreadPoolExecutor() as pool:
        followed = pool.submit(print_log, str(tmp_path), 0, out, follow=True)
        until(lambda: out.getvalue() == b"one\n" or followed.done())
        sweep.add("Traceback\n")
        sweep.retry()
        sweep.start("two\n")
        sweep.end()
        followed.result()
    assert out.getvalue() == b"one\nTraceback\ntwo\n"


def test_retry_that_never_comes_ends_with_its_sweep(sweep: RunningSweep, tmp_path: Path) -> None:
    out = io.BytesIO()
    sweep.start("one\n")
    sweep.retry()
    sweep.recorder.close()
    print_log(str(tmp_path), 0, out, follow=True)
    assert out.getvalue() == b"one\n"


def test_log_that_shrinks_is_printed_from_its_beginning(sweep: RunningSweep, tmp_path: Path) -> None:
    out = io.BytesIO()
    sweep.start("a long line\n")
    with ThreadPoolExecutor() as pool:
        followed = pool.submit(print_log, str(tmp_path), 0, out, follow=True)
        until(lambda: out.getvalue() or followed.done())
        sweep.log.write_text("short\n")
        until(lambda: out.getvalue().endswith(b"short\n") or followed.done())
        sweep.end()
        followed.result()
    assert out.getvalue() == b"a long line\nshort\n"


def test_map_in_a_directory_of_another_name_has_both_outputs(tmp_path: Path) -> None:
    run = tmp_path / "map" / "0"
    run.mkdir(parents=True)
    (tmp_path / "link").symlink_to("map")
    sweep = RunningSweep(tmp_path / "map", tmp_path / "link/0/stderr.txt")
    (run / "stdout.txt").write_text("printed\n")
    sweep.start("warned\n")
    sweep.end()
    for name in ("map", "link"):
        out = io.BytesIO()
        print_log(str(tmp_path / name), 0, out, follow=False)
        assert out.getvalue() == b"printed\nwarned\n"


def test_job_without_a_log_is_refused(sweep: RunningSweep, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"has no log: it has not been started"):
        print_log(str(tmp_path), 0, io.BytesIO(), follow=False)
    with pytest.raises(ManifestError, match=r"has no job 7 yet \(it has job 0 so far\)"):
        print_log(str(tmp_path), 7, io.BytesIO(), follow=False)
    sweep.recorder.close()
    with pytest.raises(ManifestError, match=r"has no job 7 \(it has job 0\)"):
        print_log(str(tmp_path), 7, io.BytesIO(), follow=True)
