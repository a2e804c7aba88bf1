"""Commands that run one job alone: that shells read them back, and what they ask the pool for."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_launcher.cli.mapping.template import Template
from gpu_launcher.jobs.alone import AloneCommand, pool_options
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.manifest import alone_commands, read
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.requests import read_request

AWKWARD = st.text(st.sampled_from(" '\"$`\\!#&;|<>(){}*?~-=ü中x") | st.characters(blacklist_categories=("C", "Z")))
ECHO = "import json, sys; print(json.dumps(sys.argv[1:]))"


@given(st.lists(AWKWARD))
def test_shell_reads_the_overrides_back(values: list[str]) -> None:
    overrides = [f"x{number}={value}" for number, value in enumerate(values)]
    common = AloneCommand(("--gpus", "1"), ("python", "train.py"), "/a b")
    line = common.with_overrides([*overrides, "hydra.verbose=true"], 7).line("/")
    assert line is not None
    words = shlex.split(line.removeprefix("cd '/a b' && "))
    own = [*overrides, "hydra.job.num=7"]
    assert words == ["gpu-launcher", "run", "--gpus", "1", "--", "python", "train.py", *own]


@pytest.mark.parametrize("value", ["a\nb", "a\x1b[31mb", "a\u202eb", "\udc80"])
def test_what_one_line_cannot_show_is_not_printed(value: str) -> None:
    assert AloneCommand((), ("p", value), "/").line("/") is None
    assert AloneCommand((), ("p",), f"/{value}").line("/") is None


@pytest.mark.parametrize("shell", [False, True])
@settings(max_examples=25)
@given(value=AWKWARD, name=st.sampled_from(["v", "v w"]))
def test_run_of_a_map_gets_its_values_and_its_devices(shell: bool, value: str, name: str) -> None:
    words = [sys.executable, "-S", "-c", ECHO, "{v}", "-{v}-", "{json}", "{index}", "gpu={gpu}", "{flags}"]
    text = " ".join([shlex.quote(sys.executable), "-S -c", shlex.quote(ECHO), *words[4:]])
    template = Template.parse([text] if shell else words, shell=shell)
    params = {"v": value, name: value}
    environ = {"CUDA_VISIBLE_DEVICES": "GPU-1 $x'"}
    by_hand = subprocess.run(template.by_hand(params, 5), env=environ, capture_output=True, check=True).stdout
    filled = template.fill(params, 5, environ["CUDA_VISIBLE_DEVICES"])
    assert by_hand == subprocess.run(filled, env={}, capture_output=True, check=True).stdout


def test_run_of_a_map_needs_no_shell_without_devices() -> None:
    assert Template.parse(["p", "{v}"]).by_hand({"v": "$x"}, 0) == ["p", "$x"]


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, "--gpus 1"),
        ({"gpus": 0}, "--gpus 0"),
        ({"gpus": 2, "memory": "20GiB"}, "--gpus 2 --memory 20480MiB"),
        ({"gpus": 0.57}, "--gpus 0.57"),
        ({"memory": 1048577}, "--memory 1048577"),
        ({"memory": "auto"}, "--gpus 1"),
    ],
)
def test_command_asks_for_what_the_job_asked_for(asked: dict[str, object], options: str) -> None:
    request = read_request(asked, learns=True)
    written = pool_options(request, "auto", None)
    assert " ".join(written) == options
    read_back = read_request(dict(zip((name[2:] for name in written[::2]), written[1::2], strict=True)))
    assert (read_back.gpus, read_back.share) == (request.gpus, request.share)


def test_command_uses_the_devices_and_the_pool_of_the_sweep() -> None:
    assert pool_options(None, [0, "GPU-1"], "p", None) == (
        *("--gpus", "1", "--devices", "0,GPU-1", "--busy-memory", "null", "--pool-dir", "p"),
    )


def test_each_launch_records_its_command(tmp_path: Path) -> None:
    first = AloneCommand(("--gpus", "1"), ("python", "a.py"), "/a")
    second = AloneCommand((), ("python", "b.py", "x='a\nb'"), "/b")
    Recorder(tmp_path, [Job(0, "", ["x=1"]), Job(1, "", ["x=2"])], "a.py", alone=first).close()
    Recorder(tmp_path, [Job(1, "", ["x=2"])], "b.py", alone=second).close()
    commands = alone_commands(tmp_path)
    assert [commands[entry.launch] for entry in read(tmp_path).values()] == [first, second]
