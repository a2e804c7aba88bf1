"""Programs that tests fork from a warm process behave like fresh ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.warm import TextProgram, Warm

ABOUT = """
import os, pickle, sys
from pathlib import Path

class Own: ...

def environment():
    return sorted(filter(None, Path("/proc/self/environ").read_bytes().split(b"\\0")))

print([__name__, __file__, __spec__, environment.__code__.co_filename, sys.argv, sys.path[0], os.getcwd()])
print(sorted(os.environ.items()), environment())
print(type(pickle.loads(pickle.dumps(Own()))) is Own)
if os.fork() == 0:
    print("child", environment())
    sys.stdout.flush()
    os._exit(0)
os.wait()
print("to stderr", file=sys.stderr)
sys.exit(3)
"""
CTRL_C = """
import atexit, logging, sys, time
atexit.register(print, "exit handler")
print("begun", flush=True)
time.sleep(600)
"""


@pytest.fixture
def warm() -> Iterator[Warm]:
    warm = Warm(["logging"], os.environ)
    yield warm
    warm.close()


def fresh(script: Path, environ: dict[str, str]) -> TextProgram:
    command, pipe = [sys.executable, script.name, "word"], subprocess.PIPE
    return subprocess.Popen(command, env=environ, cwd=script.parent, stdout=pipe, stderr=pipe, text=True)


def test_program_sees_what_a_fresh_one_does(tmp_path: Path, warm: Warm) -> None:
    script = tmp_path / "about.py"
    script.write_text(ABOUT)
    environ = {**os.environ, "LONG": "x" * 5_000, "EMPTY": ""}
    said = []
    for program in (fresh(script, environ), warm.start_piped([script.name, "word"], environ, tmp_path)):
        with program:
            said.append((*program.communicate(timeout=100), program.returncode))
    assert said[0] == said[1]
    assert said[0][1:] == ("to stderr\n", 3)


def test_program_ends_as_a_fresh_one_when_it_is_interrupted(tmp_path: Path, warm: Warm) -> None:
    script = tmp_path / "script.py"
    script.write_text(CTRL_C)
    environ = dict(os.environ)
    for program in (fresh(script, environ), warm.start_piped([script.name, "word"], environ, tmp_path)):
        with program:
            assert program.stdout is not None
            assert program.stdout.readline() == "begun\n"
            with pytest.raises(subprocess.TimeoutExpired):
                program.communicate(timeout=0.01)
            assert program.poll() is None
            program.send_signal(signal.SIGINT)
            out, err = program.communicate(timeout=100)
            assert (out, program.returncode) == ("exit handler\n", -signal.SIGINT)
            assert err.splitlines()[-1] == "KeyboardInterrupt"
            program.kill()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_program_that_a_signal_ended_may_be_signalled_again(tmp_path: Path, warm: Warm, signum: signal.Signals) -> None:
    (tmp_path / "script.py").write_text("import time\ntime.sleep(600)\n")
    program = warm.start_piped(["script.py"], os.environ, tmp_path)
    with program:
        for _ in range(1000):
            program.send_signal(signum)
        assert program.wait(100) == -signum
        program.terminate()


def test_programs_end_with_the_warm_process(tmp_path: Path) -> None:
    warm = Warm([], os.environ)
    (tmp_path / "script.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    program = warm.start_piped(["script.py"], os.environ, tmp_path)
    assert program.stdout is not None
    assert program.stdout.readline() == "begun\n"
    warm.close()
    with program:
        assert program.stdout.readline() == ""
