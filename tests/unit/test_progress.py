"""Plain lines, the closing summary, and the words both displays are made of."""

from __future__ import annotations

import errno
import io
import math
import os
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_launcher.allocation.explain import MINE, OUTER, explain_wait
from gpu_launcher.jobs.events import (
    Event,
    JobEnded,
    JobStarted,
    JobWaiting,
    Notice,
    Outcome,
    StopRequested,
    SweepEnded,
    SweepStarted,
)
from gpu_launcher.jobs.progress import PlainProgress, open_progress
from gpu_launcher.jobs.progress.alike import ranges
from gpu_launcher.jobs.progress.estimate import time_left
from gpu_launcher.jobs.progress.log_window import log_tail
from gpu_launcher.leases import LeaseView, PoolView
from gpu_launcher.model import WHOLE, Device, DeviceKind, Owner
from gpu_launcher.text import one_line
from gpu_launcher.wording import duration, join_labels, rough_duration

if TYPE_CHECKING:
    from pathlib import Path

GPUS = tuple(Device(f"GPU-{i}", i, "NVIDIA H100 80GB HBM3", DeviceKind.GPU) for i in range(4))


def lines_of(*events: Event) -> list[str]:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    for event in events:
        progress.handle(event)
    progress.close()
    return stream.getvalue().splitlines()


def started(total: int = 8) -> SweepStarted:
    return SweepStarted(100.0, total, GPUS, None)


def ended(
    number: int, outcome: Outcome = Outcome.COMPLETED, seconds: float | None = 12.3, **given: str | None
) -> JobEnded:
    message, log = given.get("message"), given.get("log")
    return JobEnded(110.0, number, f"lr={number}", GPUS[:1], outcome, seconds, message, log)


def test_a_sweep_begins_with_what_runs_on_what() -> None:
    assert lines_of(started())[0] == "[gpu_pool] 8 jobs on 4 GPUs (NVIDIA H100 80GB HBM3)"


def test_simulated_devices_are_announced_as_simulated() -> None:
    devices = tuple(Device(f"s{i}", i, "made up", DeviceKind.SIMULATED) for i in range(8))
    assert lines_of(SweepStarted(0.0, 1, devices, 2))[0] == (
        "[gpu_pool] 1 job on 8 simulated GPUs, at most 2 at a time"
    )


def test_each_event_is_one_line_that_names_the_job() -> None:
    lines = lines_of(
        started(),
        Notice(100.0, "no GPU found"),
        JobStarted(100.0, 3, "lr=0.1 hidden=32", GPUS[1:2], "multirun/3/job.log"),
        JobWaiting(100.0, 4, "lr=1", "GPU 0 is held by alice", wanted="2 GPUs"),
        ended(3),
    )
    assert lines[1:5] == [
        "[gpu_pool] no GPU found",
        "[gpu_pool] job 3 (lr=0.1 hidden=32) started on GPU 1, log: multirun/3/job.log",
        "[gpu_pool] waits for 2 GPUs: GPU 0 is held by alice; job 4 (lr=1)",
        "[gpu_pool] job 3 (lr=3) completed in 12.3 s (1/8 done)",
    ]


def test_a_job_without_overrides_or_devices_or_log_is_named_by_its_number_alone() -> None:
    assert lines_of(started(), JobStarted(100.0, 0, "", (), None))[1] == "[gpu_pool] job 0 started"


def test_a_job_on_several_devices_names_all_of_them() -> None:
    line = lines_of(started(), JobStarted(100.0, 0, "x=1", GPUS[:2], None))[1]
    assert line.endswith("started on GPU 0, GPU 1")


def test_the_same_wait_is_told_once() -> None:
    wait = JobWaiting(100.0, 4, "lr=1", "held by alice")
    assert sum("waits" in line for line in lines_of(started(), wait, wait, wait)) == 1


def test_a_wait_that_is_taken_back_is_told_again_when_it_returns() -> None:
    wait, over = (JobWaiting(100.0, 4, "lr=1", reason) for reason in ("held by alice", ""))
    assert sum("waits" in line for line in lines_of(started(), wait, over, wait)) == 2


def test_a_failure_shows_its_cause_and_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text("".join(f"line {i}\n" for i in range(50)) + "  \x1b[31mValueError\x1b[0m: nan\n\n\n")
    event = ended(3, Outcome.FAILED, 0.8, message="ValueError: nan", log=str(log))
    lines = lines_of(started(), event)
    assert lines[1] == f"[gpu_pool] job 3 (lr=3) FAILED after 0.8 s (1/8 done): ValueError: nan; log: {log}"
    assert lines[2:12] == [*(f"    | line {i}" for i in range(41, 50)), "    |   ValueError: nan"]
    assert lines[12].startswith("[gpu_pool] 8 jobs: 1 failed")


def test_a_cause_that_names_the_log_is_not_followed_by_it_again() -> None:
    event = ended(3, Outcome.FAILED, 0.8, message="killed by SIGKILL; see m/3/job.log", log="m/3/job.log")
    assert lines_of(started(), event)[1].count("m/3/job.log") == 1


def test_a_cause_that_says_when_is_not_preceded_by_it() -> None:
    event = ended(3, Outcome.FAILED, 812.0, message="was killed by SIGKILL after 13m 32s on GPU 2")
    line = "[gpu_pool] job 3 (lr=3) FAILED (1/8 done): was killed by SIGKILL after 13m 32s on GPU 2"
    assert lines_of(started(), event)[1] == line


def test_a_failure_before_the_start_has_no_duration() -> None:
    event = ended(3, Outcome.FAILED, None, message="could not override 'lrr'")
    assert lines_of(started(), event)[1].endswith("job 3 (lr=3) FAILED (1/8 done): could not override 'lrr'")


def test_overrides_cannot_break_the_line_or_drive_the_terminal() -> None:
    line = lines_of(started(), JobStarted(1.0, 0, "a=\x1b[2J\x1b]0;owned\x07b\nc\td\udce9", (), None))[1]
    assert line == "[gpu_pool] job 0 (a=b c d\\udce9) started"


def test_the_summary_counts_and_names_the_failed_jobs_once() -> None:
    events = [ended(i) for i in range(6)]
    failed = ended(6, Outcome.FAILED, 0.8, message="ValueError: nan", log="multirun/6/job.log")
    lines = lines_of(
        started(), *events, failed, ended(7, Outcome.CANCELLED, None), SweepEnded(292.0), SweepEnded(300.0)
    )
    assert lines[-2:] == [
        "[gpu_pool] 8 jobs: 6 completed, 1 failed, 1 not run in 3m 12s",
        "  job 6 (lr=6) FAILED after 0.8 s: ValueError: nan; log: multirun/6/job.log",
    ]
    assert sum("8 jobs:" in line for line in lines) == 1


def test_the_summary_names_twenty_failed_jobs_and_counts_the_rest() -> None:
    failures = [ended(i, Outcome.FAILED, 1.0, message=f"no {'x' * (i // 4)}") for i in range(100)]
    lines = lines_of(started(100), *failures, SweepEnded(200.0))
    assert lines[-1] == "  ... and 20 more"
    assert len([line for line in lines if line.startswith("  job")]) == 20


def alike(
    number: int, message: str = "raised ValueError: nan", log: str | None = None, origin: str = "a.py:3"
) -> JobEnded:
    return JobEnded(110.0, number, f"lr={number}", GPUS[:1], Outcome.FAILED, 0.5 + number, message, log, origin)


def test_the_same_failure_of_forty_jobs_is_told_once(tmp_path: Path) -> None:
    logs = [tmp_path / str(i) / "job.log" for i in range(40)]
    for log in logs:
        log.parent.mkdir()
        log.write_text("".join(f"line {i}\n" for i in range(9)))
    failures = [alike(i, f"raised ValueError: {log.parent}/x 0x7f{i:02}", str(log)) for i, log in enumerate(logs)]
    lines = lines_of(started(41), *failures, ended(40), SweepEnded(200.0))
    assert len([line for line in lines if line.startswith("    | ")]) == 9
    assert len([line for line in lines if "): same as job 0; log: " in line]) == 39
    assert lines[-3:] == [
        "[gpu_pool] 41 jobs: 1 completed, 40 failed in 1m 40s",
        f"  job 0 (lr=0) FAILED after 0.5 s: raised ValueError: {tmp_path}/0/x 0x7f00; log: {tmp_path}/0/job.log",
        "  39 jobs FAILED as job 0 did: 1-39",
    ]


@pytest.mark.parametrize(
    ("other", "origin"),
    [
        ("raised ValueError: inf", "a.py:3"),
        ("raised TypeError: nan", "a.py:3"),
        ("raised ValueError: nan", "a.py:4"),
        ("raised ValueError: nan 2", "a.py:3"),
    ],
)
def test_failures_that_differ_are_both_told(other: str, origin: str) -> None:
    lines = lines_of(started(), alike(0), alike(1, other, origin=origin), SweepEnded(200.0))
    assert other in lines[2]
    assert len([line for line in lines if line.startswith("  job")]) == 2


def test_a_log_is_not_shown_again_where_the_same_line_raised_another_message(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text("Traceback\n")
    failures = [alike(i, f"raised ValueError: lr is {i}", str(log)) for i in range(3)]
    lines = lines_of(started(), *failures, alike(3, "raised ValueError: lr is 1", str(log), "b.py:1"))
    assert lines.count("    | Traceback") == 2


@pytest.mark.parametrize(
    "said",
    [
        "was killed by SIGSEGV after {duration} on {devices}",
        "raised OSError: {directory}/model.pt is missing",
        "raised RuntimeError: job {number} is lost",
        "raised KeyError: <object at 0x7f{number:02}aa>",
        "raised OSError: /tmp/tmp{number:08}/lock",
        "raised RuntimeError: DataLoader worker (pid {number}) was killed",
    ],
)
def test_what_differs_from_job_to_job_does_not_make_another_failure(said: str) -> None:
    failures = []
    for i in range(3):
        known = {"duration": duration(5.0 + i), "devices": f"GPU {i}", "directory": f"/m/{i}", "number": i}
        message, log = said.format(**known), f"/m/{i}/job.log"
        failures.append(JobEnded(9.0, i, "", GPUS[i : i + 1], Outcome.FAILED, 5.0 + i, message, log))
    assert len([line for line in lines_of(started(), *failures) if "same as job 0" in line]) == 2


def test_first_jobs_that_all_fail_alike_are_remarked_upon_once() -> None:
    hint = "[gpu_pool] the first 4 jobs all failed, in the same way as job 0; Ctrl-C stops the sweep"
    assert lines_of(started(), *(alike(i) for i in range(8))).count(hint) == 1
    assert hint not in lines_of(started(), ended(9), *(alike(i) for i in range(7)))
    assert hint not in lines_of(started(), alike(0), alike(1, "other"), *(alike(i) for i in range(2, 8)))
    assert hint not in lines_of(started(4), *(alike(i) for i in range(4)))


def test_first_jobs_whose_messages_differ_by_a_number_fail_alike() -> None:
    hint = "[gpu_pool] the first 4 jobs all failed, in the same way as job 0; Ctrl-C stops the sweep"
    assert hint in lines_of(started(), *(alike(i, f"raised ValueError: nan at step {i}") for i in range(8)))
    jobs = (alike(i, f"raised ValueError: nan at step {i}", origin=f"a.py:{i}") for i in range(8))
    assert hint not in lines_of(started(), *jobs)


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_every_number(numbers: set[int]) -> None:
    text = ranges(numbers)
    if not text.endswith("..."):
        pieces = [list(map(int, piece.split("-"))) for piece in text.split(", ") if piece]
        assert {n for piece in pieces for n in range(piece[0], piece[-1] + 1)} == numbers


def test_a_sweep_stopped_by_a_command_names_the_command_that_kills_its_jobs() -> None:
    lines = lines_of(started(), StopRequested(110.0, 2, 10.0, False, "`gpu-launcher stop`"))
    assert (
        "[gpu_pool] stopping after `gpu-launcher stop`: waiting up to 10 s for 2 jobs"
        " (`gpu-launcher stop --now` to kill them)"
    ) in lines


def test_an_interrupted_sweep_says_how_many_jobs_finished() -> None:
    lines = lines_of(
        started(),
        ended(0),
        ended(1, Outcome.FAILED, 2.0, message="no"),
        StopRequested(110.0, 2, 10.0, False, "SIGINT"),
        StopRequested(111.0, 2, 10.0, True, "SIGINT"),
        *(ended(i, Outcome.CANCELLED, 5.0) for i in (2, 3)),
        *(ended(i, Outcome.CANCELLED, None) for i in (4, 5, 6, 7)),
        SweepEnded(112.0),
    )
    assert lines[3:] == [
        "[gpu_pool] stopping: waiting up to 10 s for 2 jobs (Ctrl-C again to kill them)",
        "[gpu_pool] stopping: killing 2 jobs",
        "[gpu_pool] job 2 (lr=2) cancelled after 5.0 s (3/8 done)",
        "[gpu_pool] job 3 (lr=3) cancelled after 5.0 s (4/8 done)",
        "[gpu_pool] 8 jobs: 1 completed, 1 failed, 2 cancelled, 4 not run in 12.0 s"
        " (stopped by SIGINT: 2 of 8 finished)",
        "  job 1 (lr=1) FAILED after 2.0 s: no",
    ]


def test_a_sweep_that_breaks_off_counts_its_unfinished_jobs() -> None:
    assert lines_of(started(), ended(0))[-1] == "[gpu_pool] 8 jobs: 1 completed, 7 unfinished in 10.0 s"


def test_closing_a_display_that_saw_no_sweep_says_nothing() -> None:
    assert lines_of() == []


class Broken(io.StringIO):
    """A stream that takes one line and then fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.tried = 0

    def write(self, text: str) -> int:
        self.tried += 1
        if self.tried > 1:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.EBADF])
def test_a_sweep_outlives_the_one_who_reads_about_it(code: int) -> None:
    stream = Broken(OSError(code, os.strerror(code)))
    progress = PlainProgress(stream)
    for event in (started(), ended(0), ended(1)):
        progress.handle(event)
    progress.close()
    assert stream.tried == 2


def test_a_full_disk_costs_lines_and_not_the_sweep() -> None:
    stream = Broken(OSError(errno.ENOSPC, "full"))
    progress = PlainProgress(stream)
    for event in (started(), ended(0), ended(1)):
        progress.handle(event)
    assert stream.tried == 3


def test_a_closed_stream_ends_the_display_quietly() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.handle(started())
    stream.close()
    progress.handle(ended(0))
    progress.close()


def test_any_other_error_of_the_stream_is_raised() -> None:
    progress = PlainProgress(Broken(OSError(errno.EINVAL, "what")))
    progress.handle(started())
    with pytest.raises(OSError, match="what"):
        progress.handle(ended(0))


def test_what_an_encoding_lacks_is_escaped() -> None:
    raw = io.BytesIO()
    progress = PlainProgress(io.TextIOWrapper(raw, encoding="ascii"))
    progress.handle(started())
    progress.handle(JobStarted(1.0, 0, "name=学", (), None))
    assert b"job 0 (name=\\u5b66) started\n" in raw.getvalue()


def test_a_pipe_gets_plain_lines_and_rich_stays_unimported() -> None:
    script = (
        "import sys; from gpu_launcher.jobs.progress import open_progress, PlainProgress;"
        "assert isinstance(open_progress(), PlainProgress); assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stderr=subprocess.PIPE)


def test_a_program_without_stderr_gets_a_silent_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    progress = open_progress()
    progress.handle(started())
    progress.close()


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def terminal(encoding: str = "utf-8") -> TextIO:
    return Terminal(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize(
    ("environ", "encoding"),
    [
        ({"TERM": "dumb"}, "utf-8"),
        ({}, "utf-8"),
        ({"TERM": "xterm", "CI": "true"}, "utf-8"),
        ({"TERM": "xterm"}, "ascii"),
    ],
)
def test_a_terminal_that_cannot_show_the_live_view_gets_plain_lines(environ: dict[str, str], encoding: str) -> None:
    assert isinstance(open_progress(terminal(encoding), environ), PlainProgress)


@pytest.mark.parametrize("ci", ["", "0", "false"])
def test_a_capable_terminal_gets_the_live_view(ci: str) -> None:
    assert type(open_progress(terminal(), {"TERM": "xterm", "CI": ci})).__name__ == "LiveProgress"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (-1, "0.0 s"),
        (1.23, "1.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1m 00s"),
        (192, "3m 12s"),
        (3599.7, "1h 00m"),
        (7500, "2h 05m"),
        (100 * 3600, "4d 04h"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "a few seconds"),
        (31, "about 35 s"),
        (58, "about 1m"),
        (125, "about 2m 30s"),
        (599, "about 10m"),
        (3599, "about 1h 00m"),
        (7300, "about 2h 05m"),
    ],
)
def test_estimates_are_as_coarse_as_they_are_uncertain(seconds: float, text: str) -> None:
    assert rough_duration(seconds) == text


@given(st.floats(0, 8e7))
def test_a_duration_never_outgrows_its_column(seconds: float) -> None:
    assert len(duration(seconds, tenths=False)) <= 8


@given(st.text())
def test_one_line_is_one_printable_line(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in line)
    line.encode("utf-8")


@pytest.mark.parametrize("path", [None, "/does/not/exist", "/", "/dev/zero", "/dev/null", "bad\0path"])
def test_a_log_that_is_not_to_be_had_has_no_end(path: str | None) -> None:
    assert log_tail(path) == []


def test_a_fifo_in_place_of_a_log_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert log_tail(str(tmp_path / "fifo")) == []


def test_only_the_end_of_a_huge_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    with log.open("wb") as file:
        file.truncate(1 << 40)
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe last line\n")
    assert log_tail(str(log))[-1] == "the last line"


def test_a_binary_log_comes_back_as_harmless_text(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_bytes(bytes(range(256)) * 500)
    for line in log_tail(str(log)):
        assert one_line(line) == line.strip()
        assert len(line) <= 300


def test_a_progress_bar_in_a_log_shows_its_last_state(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_bytes(b"start\r\n 10%|#   |\r 50%|##  |\r100%|####|\r\ndone\n")
    assert log_tail(str(log)) == ["start", "100%|####|", "done"]


positive = st.floats(0, 1e9, allow_nan=False)


@given(st.lists(positive), st.lists(positive), st.integers(0, 10_000), st.integers(0, 200))
def test_the_time_left_is_unknown_or_a_sane_number(
    finished: list[float], running: list[float], waiting: int, parallel: int
) -> None:
    seconds = time_left(finished, running, waiting, parallel)
    assert seconds is None or (math.isfinite(seconds) and seconds >= 0)
    if not finished and (running or waiting):
        assert seconds is None


@given(st.lists(st.floats(0.1, 1e4), min_size=1), st.integers(0, 100), st.integers(1, 64))
def test_more_waiting_jobs_never_shorten_the_time_left(finished: list[float], waiting: int, parallel: int) -> None:
    fewer, more = (time_left(finished, [], number, parallel) for number in (waiting, waiting + parallel))
    assert more is not None
    assert fewer is not None
    assert more >= fewer


def test_the_first_short_job_does_not_promise_an_early_end() -> None:
    assert time_left([2.0], [3.0] * 7, 100, 8) is None


@pytest.mark.parametrize(
    ("running", "waiting", "parallel", "expected"),
    [
        ([0, 0, 0, 0], 4, 4, 20),
        ([5], 0, 1, 5),
        ([0, 0, 0, 0], 1, 4, 20),
        ([], 8, 4, 20),
        ([], 0, 4, 0),
        ([11], 0, 1, None),
    ],
)
def test_the_time_left_of_regular_jobs_is_exact(
    running: list[float], waiting: int, parallel: int, expected: float | None
) -> None:
    assert time_left([10.0, 10.0], running, waiting, parallel) == expected


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([], ""),
        (["GPU 0"], "GPU 0"),
        (["GPU 0", "GPU 1"], "GPU 0, GPU 1"),
        (["GPU 0", "GPU 1", "GPU 2", "GPU 3"], "GPU 0-3"),
        (["GPU 0", "GPU 2", "GPU 3", "GPU 4", "GPU 7"], "GPU 0, GPU 2-4, GPU 7"),
        (["GPU 9", "GPU 10", "GPU 11"], "GPU 9-11"),
        (["GPU 3", "GPU 2", "GPU 1"], "GPU 3, GPU 2, GPU 1"),
        (["simulated GPU 0", "GPU 1", "CPU slot 2"], "simulated GPU 0, GPU 1, CPU slot 2"),
        (["A", "A 1", "x y", "GPU 1:0", "GPU 1:1", "GPU 1:2"], "A, A 1, x y, GPU 1:0, GPU 1:1, GPU 1:2"),
        (["GPU 0", f"GPU {'9' * 5000}"], f"GPU 0, GPU {'9' * 5000}"),  # of a manifest that someone else has written
    ],
)
def test_devices_in_a_row_are_named_as_a_range(labels: list[str], names: str) -> None:
    assert join_labels(labels) == names


def view_of(*leases: tuple[str, str, tuple[int, ...]]) -> PoolView:
    views = [
        LeaseView(str(i), dict.fromkeys((GPUS[n].uuid for n in held), WHOLE), Owner(i, user, command), None)
        for i, (user, command, held) in enumerate(leases)
    ]
    return PoolView((), tuple(views), 0)


def test_a_wait_says_since_when_devices_are_held() -> None:
    now = datetime.now().replace(second=0, microsecond=0)
    long_ago = datetime(2026, 3, 4, 5, 6)
    holders = [("anna", "a.py #0", (0,)), ("anna", "a.py #1", (1,)), ("bert", "b.py", (2,)), ("odd", "c.py", (3,))]
    leases = view_of(*holders).leases
    times = (now.timestamp(), now.timestamp() + 9, long_ago.timestamp(), 1e300)
    pool = PoolView((), tuple(replace(lease, since=time) for lease, time in zip(leases, times, strict=True)), 0)
    assert explain_wait(pool, GPUS, (), None, {}).reason == (
        f"GPU 0, GPU 1 held by anna (a.py) since {now:%H:%M}; GPU 2 held by bert (b.py) since Mar 04 05:06; "
        "GPU 3 held by odd (c.py)"
    )


@pytest.mark.parametrize(("program", "holder"), [(0, MINE), (7, OUTER)])
def test_a_wait_tells_a_lease_that_a_job_was_given_from_its_own(program: int, holder: str) -> None:
    pool = view_of(("anna", "a.py #0", (0,)), ("anna", "b.py", (1,)))  # by process 0
    wait = explain_wait(pool, GPUS, (), None, {}, mine={"0"}, program=program)
    assert wait.reason == f"GPU 0 held by {holder}; GPU 1 held by anna (b.py)"


@pytest.mark.parametrize(
    ("leases", "reason"),
    [
        ([("anna", "train.py #7 lr=0.1", (0,))], "GPU 0 held by anna (train.py #7 lr=0.1)"),
        (
            [("anna", f"train.py #{n} model=big lr={n}", (n,)) for n in (2, 0, 1, 3)],
            "GPU 0-3 held by anna (train.py)",
        ),
        (
            [("anna", "a.py #1", (1,)), ("bert", "b.py #0 x=1", (0,)), ("bert", "b.py #1 x=2", (2,))],
            "GPU 1 held by anna (a.py #1); GPU 0, GPU 2 held by bert (b.py)",
        ),
        ([("anna", "x" * 99, (0, 1, 2))], f"GPU 0-2 held by anna ({'x' * 30}…{'x' * 29})"),
    ],
)
def test_a_wait_names_each_holder_once_with_its_devices(leases: list[Any], reason: str) -> None:
    assert explain_wait(view_of(*leases), GPUS, (), None, {}).reason == reason
