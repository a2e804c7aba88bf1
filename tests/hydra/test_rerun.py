"""`gpu-launcher rerun` with real sweeps of Hydra: the printed command is pasted into a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST
from tests.hydra.conftest import environment

pytestmark = pytest.mark.thorough

PROGRAM = """
import json, os
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

HERE = Path.cwd()

@hydra.main(version_base=None, config_path=None)
def main(cfg: DictConfig) -> float:
    of_hydra = HydraConfig.get()
    seen = {
        "config": OmegaConf.to_container(cfg),
        "number": int(of_hydra.job.num),
        "verbose": str(of_hydra.verbose),
        "devices": len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")),
        "output": of_hydra.runtime.output_dir,
    }
    with open(HERE / "seen.jsonl", "a") as file:
        file.write(json.dumps(seen) + "\\n")
    return 0.0

main()
"""

Shell = Callable[[str], "subprocess.CompletedProcess[str]"]
Sweep = Callable[..., None]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The directory in which sweeps are started."""
    directory = tmp_path / "it's here"
    directory.mkdir()
    (directory / "train.py").write_text(PROGRAM)
    return directory


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Run a command line in another directory than that of the sweep."""
    environ = environment(tmp_path)
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def shell(line: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", "-c", line]
        return subprocess.run(
            command, cwd=elsewhere, env=environ, capture_output=True, text=True, timeout=500, check=False
        )

    return shell


@pytest.fixture
def sweep(run: Any, here: Path, tmp_path: Path) -> Sweep:
    def sweep(*arguments: str) -> None:
        pool = {"GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool")}
        done = run(here, ("train.py",), "-m", "hydra.sweep.dir=sweep", *arguments, **pool)
        assert done.returncode == 0, done.stderr

    return sweep


def seen(here: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (here / "seen.jsonl").read_text().splitlines()]


def check_rerun(shell: Shell, here: Path, number: int) -> str:
    """Paste the command that `rerun` prints. It must do what the job did, in a new directory. Returns the command."""
    before = seen(here)
    (job,) = (one for one in before if one["number"] == number)
    told = shell(f'gpu-launcher rerun {number} --dir "../it\'s here/sweep"')
    assert (told.returncode, told.stderr, len(told.stdout.splitlines())) == (0, "", 1), told
    left = sorted((here / "sweep" / str(number)).rglob("*"))
    done = shell(told.stdout)
    assert done.returncode == 0, (told.stdout, done.stderr)
    (*others, again) = seen(here)
    assert others == before
    assert {**again, "output": job["output"]} == job
    assert Path(again["output"]).parent == here / "sweep" / "rerun" / str(number)
    assert sorted((here / "sweep" / str(number)).rglob("*")) == left
    return told.stdout


@pytest.mark.parametrize(("sweeper", "numbers"), [("basic", [2]), ("grid_async", [0, 1, 2, 3])])
def test_job_of_a_grid_runs_again_by_the_printed_command(
    sweep: Sweep, shell: Shell, here: Path, sweeper: str, numbers: list[int]
) -> None:
    texts = ["'a b'", "'$HOME'", "'it\\'s `x` \"y\" ; ü'", "'{a: [1]}'"]
    of_hydra = ("hydra.verbose=[a]", "hydra.launcher.gpus=2")
    sweep(f"hydra/sweeper={sweeper}", "+password=hunter22", f"+text={','.join(texts)}", *of_hydra)
    lines = [check_rerun(shell, here, number) for number in numbers]
    assert all(" && gpu-launcher run --gpus 2 --devices simulated:4 -- " in line for line in lines)
    assert "password=hunter22" in lines[0], "as it was typed"
    before = len(seen(here))
    done = shell('gpu-launcher rerun 2 --run --dir "../it\'s here/sweep"')
    assert done.returncode == 0, done.stderr
    assert len(seen(here)) == before + 1
    assert seen(here)[-1]["config"]["text"] == 'it\'s `x` "y" ; ü'


def test_trial_of_a_search_runs_again_by_the_printed_command(sweep: Sweep, shell: Shell, here: Path) -> None:
    search = ("hydra/sweeper=optuna_async", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1")
    sweep(*search, "+x=interval(0.0,1.0)")
    check_rerun(shell, here, 1)


def test_what_cannot_run_again_is_one_line(sweep: Sweep, shell: Shell, here: Path) -> None:
    sweep("+text='a\nb',c", "hydra/sweeper=grid_async")

    def refused(*arguments: str) -> str:
        done = shell(f'gpu-launcher rerun --dir "../it\'s here/sweep" {" ".join(arguments)}')
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done
        return done.stderr.removeprefix("gpu-launcher: ")

    assert "sweep has no job 9 (recorded until now: jobs 0-1)" in refused("9")
    assert refused("0").startswith("the command of job 0 has characters that cannot be printed in one line: ")
    done = shell('gpu-launcher rerun 0 --run --dir "../it\'s here/sweep"')
    assert (done.returncode, seen(here)[-1]["config"]["text"]) == (0, "a\nb"), done.stderr
    manifest = here / "sweep" / DIRECTORY / MANIFEST
    manifest.chmod(0o666)
    assert "can be written by other users (mode 666), who may have written the command: " in refused("1", "--run")
    assert shell('gpu-launcher rerun 1 --dir "../it\'s here/sweep"').returncode == 0
    kept = [line for line in manifest.read_text().splitlines() if '"alone"' not in line]
    manifest.write_text("\n".join(kept))
    assert "does not record how its jobs are run by a command: it was started from Python" in refused("1")
