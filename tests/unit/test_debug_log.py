"""The log of what gpu-launcher decides."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpu_launcher import debug_log

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO) \S+ ([a-z]+( \d+)?)\[\d+\] [a-z_.]+: .*")

# The user's logging prints everything to stdout and disables the loggers that it does not know, as Hydra's does.
PROGRAM = """
import logging.config, os, sys
from gpu_launcher.debug_log import get_logger, set_role
log = get_logger("jobs.loop")
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
logging.config.dictConfig({"version": 1, "disable_existing_loggers": True})
log.info("password=hunter22 \\x1b[31mred\\nnot a line of its own")
for number in range(6):
    if os.fork() == 0:
        set_role(f"job {number}")
        for step in range(200):
            log.debug("step %d of job %d: %s", step, number, "x" * 300)
        os._exit(0)
for _ in range(6):
    os.wait()
"""


def run(program: str, variable: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, debug_log.VARIABLE: variable}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=500)


def test_lines_of_many_processes_are_whole_clean_and_ours_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "our.log"
    done = run(PROGRAM, f"debug:{file}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    lines = file.read_text().splitlines()
    assert len(lines) == 1 + 6 * 200
    assert all(LINE.fullmatch(line) for line in lines)
    assert lines[0].endswith("password=*** red not a line of its own")


def test_level_limits_what_is_logged(tmp_path: Path) -> None:
    assert run(PROGRAM, f"info:{tmp_path / 'our.log'}").returncode == 0
    assert len((tmp_path / "our.log").read_text().splitlines()) == 1


def test_without_a_file_lines_go_to_standard_error() -> None:
    done = run("from gpu_launcher.debug_log import get_logger as g; g('pool').info('hello')", "info")
    assert LINE.fullmatch(done.stderr.rstrip("\n"))
    assert done.stderr.endswith(" pool: hello\n")


def test_sweep_log_is_a_file_of_its_own(tmp_path: Path) -> None:
    """Other users may write to a sweep's directory."""
    program = (
        f"from gpu_launcher.debug_log import *; log_into(Path({str(tmp_path)!r})); get_logger('pool').info('hello')"
    )
    victim, log = tmp_path / "victim", tmp_path / debug_log.FILE
    victim.touch()
    log.symlink_to(victim)
    assert "cannot write the log" in run(program, "debug").stderr
    log.unlink()
    os.mkfifo(log)
    assert "cannot write the log" in run(program, "debug").stderr
    log.unlink()
    mask = os.umask(0)
    try:
        assert run(program, "debug").stderr == ""
    finally:
        os.umask(mask)
    assert victim.read_bytes() == b""
    assert log.read_text().endswith(" pool: hello\n")
    assert log.stat().st_mode & 0o777 == 0o644


def test_standard_error_that_nobody_reads_delays_nothing() -> None:
    program = "from gpu_launcher.debug_log import get_logger as g\nfor _ in range(9999): g('pool').info('x' * 99)"
    reader, writer = os.pipe()
    environment = {**os.environ, debug_log.VARIABLE: "info"}
    subprocess.run([sys.executable, "-c", program], env=environment, stderr=writer, timeout=60, check=True)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("variable", ["debgu", "debgu:/x", ":/x", "1"])
def test_invalid_value_is_named_and_nothing_is_logged(variable: str) -> None:
    with pytest.raises(ValueError, match=f"GPU_LAUNCHER_LOG='{variable}' is invalid: must be debug, info"):
        debug_log.read_variable(variable)


def test_program_with_an_invalid_value_runs_on() -> None:
    done = run("from gpu_launcher.debug_log import get_logger as g; g('pool').error('hello'); print('done')", "loud")
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu-launcher: GPU_LAUNCHER_LOG='loud' is invalid: ")


def test_value_names_a_level_and_perhaps_a_file(tmp_path: Path) -> None:
    assert debug_log.read_variable("debug") == (logging.DEBUG, None)
    assert debug_log.read_variable("Info:") == (logging.INFO, None)
    assert debug_log.read_variable(f"warning:{tmp_path}/a:b") == (logging.WARNING, tmp_path / "a:b")


def test_nothing_is_logged_without_the_variable() -> None:
    assert not debug_log.get_logger("jobs.loop").isEnabledFor(logging.CRITICAL)
    assert debug_log.environment() == {}


def test_actions_of_the_pages_are_logged_with_what_they_said(tmp_path: Path) -> None:
    program = "import pathlib; from gpu_launcher.web.actions import act; act(pathlib.Path(%r), 'pause', {})"
    done = run(program % str(tmp_path), "info")
    assert LINE.fullmatch(done.stderr.rstrip("\n"))
    assert f" web.actions: pause of {tmp_path}: refused: " in done.stderr
