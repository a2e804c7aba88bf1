"""`gpu-launcher rerun` with real maps: the printed command is pasted into a shell."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.waiting import until

if TYPE_CHECKING:
    from conftest import Cli  # type: ignore[import-not-found]

pytestmark = pytest.mark.thorough

SIMULATED = ("--devices", "simulated:2", "--dir", "out")
SHOW = 'import os, sys; print(sys.argv[1:], os.getcwd(), len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))'


def shell(line: str, directory: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environ = {**environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"}
    command = ["sh", "-c", line]
    return subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize("kind", ["words", "shell"])
def test_run_of_a_map_runs_again_by_the_printed_command(cli: Cli, tmp_path: Path, kind: str) -> None:
    words = [sys.executable, "-c", SHOW, "{v}", "{flags}", "{json}", "{index}"]
    if kind == "shell":
        words = ["--shell", "--", f"{shlex.join(words[:3])} {' '.join(words[3:])} | cat"]
    else:
        words = ["--", *words]
    records = tmp_path / "records.jsonl"
    records.write_text('{"v": "it\'s $HOME"}\n{"v": "a  \\"b\\" ü"}\n{"v": 1.5}\n')
    asked = shlex.join(["gpu-launcher", "map", *SIMULATED, "--gpus", "2", "--from", "records.jsonl", *words])
    done = shell(asked, tmp_path, cli.environ)
    assert done.returncode == 0, done.stderr
    (tmp_path / "elsewhere").mkdir()
    for number in range(3):
        told = shell(f"gpu-launcher rerun {number} --dir ../out", tmp_path / "elsewhere", cli.environ)
        assert (told.returncode, told.stderr, len(told.stdout.splitlines())) == (0, "", 1), told
        assert f"cd {tmp_path} && gpu-launcher run --gpus 2 --devices simulated:2 -- " in told.stdout
        again = shell(told.stdout, tmp_path / "elsewhere", cli.environ)
        assert (again.returncode, again.stdout) == (0, (tmp_path / "out" / str(number) / "stdout.txt").read_text()), (
            told.stdout + again.stderr
        )
        ran = shell(f"gpu-launcher rerun {number} --run --dir ../out", tmp_path / "elsewhere", cli.environ)
        assert (ran.returncode, ran.stdout) == (0, again.stdout), ran.stderr


def test_exit_code_is_that_of_the_command_also_while_the_map_runs(cli: Cli, tmp_path: Path) -> None:
    command = "test {n} = 0 && exit 3; touch begun; until test -e go; do sleep 0.05; done"
    asked = shlex.join(["gpu-launcher", "map", *SIMULATED, "--param", "n=0,1", "--shell", "--", command])
    environ = {**cli.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{cli.environ['PATH']}"}
    with subprocess.Popen(
        ["sh", "-c", f"exec {asked}"], cwd=tmp_path, env=environ, stderr=subprocess.DEVNULL
    ) as running:
        try:
            until(lambda: (tmp_path / "begun").exists(), "run 1 does not begin")
            done = shell("gpu-launcher rerun 0 --run", tmp_path, cli.environ)
            assert done.returncode == 3, done.stderr
        finally:
            (tmp_path / "go").touch()
        assert running.wait(250) == 1


def test_what_cannot_run_again_is_one_line(cli: Cli, tmp_path: Path) -> None:
    asked = shlex.join(["gpu-launcher", "map", *SIMULATED, "--param", "n=0,1", "--", "true", "{n}"])
    assert shell(asked, tmp_path, cli.environ).returncode == 0

    def refused(arguments: str, code: int = 1) -> str:
        done = shell(f"gpu-launcher rerun {arguments}", tmp_path, cli.environ)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1), done
        return done.stderr.removeprefix("gpu-launcher: ")

    assert refused("x", 2).startswith("'x' is not a job's number")
    assert refused("0-1", 2) == "'0-1' names several jobs: give one\n"
    assert refused("7") == "out has no job 7 (recorded until now: jobs 0-1)\n"
    assert refused("7 --dir nowhere").startswith("nowhere does not exist: ")
    (tmp_path / "empty").mkdir()
    assert refused("7 --dir empty").startswith("empty is not the directory of a sweep: ")
    settings = tmp_path / "out" / ".gpu_launcher" / "map.json"
    settings.chmod(0o664)
    assert "map.json can be written by other users (mode 664), who may have written the command" in refused("0 --run")
    settings.write_text(settings.read_text().replace('"{n}"', '"{m}"'))
    assert refused("0") == "what out records about job 0 is damaged, so its command is unknown\n"
    settings.write_text("{")
    assert "map.json is damaged, so the command to run is unknown" in refused("0")
