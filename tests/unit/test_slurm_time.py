"""What squeue says about the time of an allocation, and what that leaves for jobs."""

from __future__ import annotations

import time

import pytest

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.term import Term
from gpu_launcher.model import Request
from gpu_launcher.nodes import slurm_time
from gpu_launcher.nodes.slurm_time import EARLY_SECONDS, read_time, term_of_allocation


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04", 93784.0),
        ("2:03:04", 7384.0),
        ("1:59", 119.0),
        ("0:00", 0.0),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_time_is_read_as_squeue_shows_it(text, seconds):
    assert read_time(text) == seconds


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Call it with what squeue prints, about allocation 7, in which this process runs."""

    def says(printed: str) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(slurm_time, "SQUEUE_SECONDS", 100.0)  # this machine may be busy
        program = tmp_path / "squeue"
        program.write_text(f'#!/bin/sh\n[ "$*" = "--noheader --format=%L %l --jobs=7" ] && echo {printed}\n')
        program.chmod(0o755)

    return says


def test_jobs_can_run_until_slurm_may_interrupt_them(squeue):
    squeue("1:00:00 2:00:00")
    before = time.monotonic()
    term = term_of_allocation(40.0, None)
    assert before <= term.ends - (3600 - 40 - EARLY_SECONDS) <= time.monotonic()
    assert term.length == 7200 - 40 - EARLY_SECONDS
    assert term_of_allocation(40.0, "6") == Term(pytest.approx(term.ends, abs=60), term.length)


def test_step_in_the_heads_own_allocation_never_gets_more_time_than_is_left(squeue):
    squeue("1:00:00 2:00:00")
    assert term_of_allocation(0.0, "7").length == 3600 - EARLY_SECONDS


@pytest.mark.parametrize("printed", ["UNLIMITED UNLIMITED", "1:00 UNLIMITED", "", "1:00"])
def test_allocation_without_an_end_does_not_limit_jobs(squeue, printed):
    squeue(printed)
    assert term_of_allocation(0.0, None) is None


def test_term_is_unknown_outside_an_allocation_and_without_squeue(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert term_of_allocation(0.0, None) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert term_of_allocation(0.0, None) is None
    assert slurm_time.SQUEUE_SECONDS < 10, "the head must hear the agent again by then"


def test_request_that_no_allocation_can_run_is_refused():
    term = Term(ends=0.0, length=3500.0)
    term.refuse(Request(1, timeout=3500.0))
    term.refuse(Request(1))
    with pytest.raises(OptionError, match=r"^--timeout: 1h 00m is longer than jobs can run on this node .*58m 20s"):
        term.refuse(Request(1, timeout=3600.0), "--{}".format)
