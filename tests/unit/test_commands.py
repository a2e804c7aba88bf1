"""Commands that the user is told to type: what they consist of, and that a shell reads them back."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from gpu_launcher.jobs.job import Job
from hydra_plugins.gpu_pool_launcher._commands import (
    alone_command,
    closing_lines,
    continue_command,
    override,
    typed_program,
)

POOL = ["hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:4", "hydra.sweep.dir=s"]


def config(*hydra: str, sweeper: type = BasicSweeper, **own: Any) -> DictConfig:
    target = f"{sweeper.__module__}.{sweeper.__qualname__}"
    return OmegaConf.create(
        {"hydra": {"overrides": {"hydra": list(hydra)}, "sweeper": {"_target_": target}, "job": {"num": 0}}, **own}
    )


@pytest.mark.parametrize(
    ("argv", "original", "typed"),
    [
        (["train.py", "-m", "x=1"], ["python", "train.py", "-m", "x=1"], ["python", "train.py"]),
        (["/a/pkg/train.py", "-m", "x=1"], ["python3", "-m", "pkg.train", "-m", "x=1"], ["python3", "-m", "pkg.train"]),
        (
            ["train.py", "x=1"],
            ["python", "-u", "-X", "dev", "train.py", "x=1"],
            ["python", "-u", "-X", "dev", "train.py"],
        ),
        (["train.py"], ["python", "train.py"], ["python", "train.py"]),
    ],
)
def test_the_program_is_named_as_it_was_typed(argv: list[str], original: list[str], typed: list[str]) -> None:
    assert typed_program(argv, original) == typed


def test_a_console_script_is_named_without_its_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train-it"
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    original = ["/venv/bin/python3", str(script), "-m", "x=1"]
    assert typed_program([str(script), "-m", "x=1"], original) == ["train-it"]


def test_a_job_alone_has_its_overrides_and_none_of_the_sweep() -> None:
    swept = config(
        "hydra.mode=MULTIRUN", *POOL, "hydra/sweeper=grid_async", "hydra.sweeper.params={}", "hydra.verbose=a"
    )
    arguments = ["-m", "-cn", "other", "--config-dir=conf", "x=1,2", *POOL]
    command = alone_command(["python", "train.py"], arguments, swept, Job(3, "", ["x=2", "y=5"]))
    assert command == ["python", "train.py", "-cn", "other", "--config-dir=conf", "hydra.verbose=a", "x=2", "y=5"]


def test_a_job_alone_is_told_its_number_where_the_config_reads_it() -> None:
    numbered = config(seed="${hydra:job.num}")
    assert alone_command(["p"], ["-m"], numbered, Job(3, "", ["x=2"])) == ["p", "x=2", "hydra.job.num=3"]


def test_a_job_alone_is_no_sweep_where_the_config_says_so() -> None:
    assert alone_command(["p"], ["x=1,2"], config(), Job(3, "", ["x=2"])) == ["p", "x=2", "hydra.mode=RUN"]


def test_a_sweep_is_continued_by_its_command_with_directory_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["-m", "x=1,2", "hydra.sweep.dir=a", "+hydra.launcher.resume=false", "hydra.sweep.subdir=b"]
    assert continue_command(["p"], arguments, tmp_path / "a") == [
        *("p", "-m", "x=1,2", "hydra.sweep.subdir=b", "hydra.sweep.dir=a", "hydra.launcher.resume=true")
    ]


def test_what_is_told_depends_on_what_is_left(tmp_path: Path) -> None:
    jobs = [Job(number, "", [f"x={number}"]) for number in range(5)]
    assert closing_lines(config(), tmp_path, [], 0) == [
        f"results: {tmp_path}",
        f"table: gpu-launcher results {tmp_path}",
    ]
    told = closing_lines(config(), tmp_path, jobs, 9)
    assert [line.partition(":")[0] for line in told] == [
        "results",
        "table",
        "to run the rest",
        *(f"to run job {number} alone" for number in range(3)),
    ]
    told = closing_lines(config(sweeper=dict), tmp_path, jobs[:1], 9)
    assert [line.partition(":")[0] for line in told] == ["results", "table", "to run job 0 alone"], (
        "it asks for other jobs"
    )


@given(st.lists(st.text(st.characters(blacklist_categories=("C", "Z"), whitelist_characters=" "), min_size=1)))
def test_a_shell_reads_the_command_back(values: list[str]) -> None:
    spec = [f"x{number}={value}" for number, value in enumerate(values)]
    (line,) = closing_lines(config(sweeper=dict), Path("s"), [Job(0, "", spec)], 1)[2:]
    assert [word for word in shlex.split(line.partition(": ")[2]) if word.startswith("x")] == spec


@given(
    st.text(st.characters(blacklist_categories=("C",), blacklist_characters="$"), min_size=1)
    | st.text("aE1_.-/:", min_size=1)
    | st.sampled_from(["null", "True", "nan", "1e5", "1_0", "inf", "a:", "/", "x/null"])
)
def test_hydra_reads_the_directory_back(name: str) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([override("hydra.sweep.dir", name)])
    assert str(parsed.value()) == name


def test_a_command_that_cannot_be_shown_as_it_is_is_left_out(tmp_path: Path) -> None:
    jobs = [Job(0, "", ["x='a\nb'"]), Job(1, "", ["x=1"])]
    assert len(closing_lines(config(sweeper=dict), tmp_path, jobs, 2)) == 3
