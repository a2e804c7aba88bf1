"""How a process ended, in words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from gpu_launcher.processes.exit_status import describe_exit

REAL_TIME = signal.SIGRTMIN + 3


def status_of(code: str) -> int:
    process = subprocess.Popen([sys.executable, "-c", code])
    _, status = os.waitpid(process.pid, 0)
    process.returncode = 0
    return status


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os; os._exit(0)", "ended with exit code 0 before it returned a value"),
        ("import os; os._exit(41)", "ended with exit code 41 before it returned a value"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL: most often the host ran out of memory"),
        ("import os; os.kill(os.getpid(), 15)", "was killed by SIGTERM"),
        ("import os; os.kill(os.getpid(), 7)", "was killed by SIGBUS: often /dev/shm is full"),
        ("import os; os.abort()", "was killed by SIGABRT: native code gave up"),
        ("import ctypes; ctypes.string_at(0)", "was killed by SIGSEGV: a crash in native code"),
    ],
)
def test_the_end_of_a_real_process_is_said_with_its_likely_cause(code, words):
    assert describe_exit(status_of(code)).startswith(words)


def test_circumstances_come_before_the_likely_cause():
    said = describe_exit(signal.SIGKILL, " after 12.0 s on GPU 2")
    assert said.startswith("was killed by SIGKILL after 12.0 s on GPU 2: most often")
    assert describe_exit(3 << 8, " after 1.0 s") == "ended with exit code 3 after 1.0 s before it returned a value"


def test_a_signal_without_a_name_is_called_by_its_number():
    assert describe_exit(REAL_TIME) == f"was killed by signal {REAL_TIME}"


def test_a_core_dump_does_not_change_the_words():
    assert describe_exit(signal.SIGQUIT | 0x80) == "was killed by SIGQUIT"
