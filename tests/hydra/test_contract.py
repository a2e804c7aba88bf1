"""Tests what Hydra promises to jobs, and what this launcher adds, as jobs see it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Run = Callable[..., subprocess.CompletedProcess[str]]
PROGRAMS = Path(__file__).parent / "programs"


@dataclass
class Sweep:
    method: str
    directory: Path
    ran: subprocess.CompletedProcess[str]

    def job(self, number: int) -> Path:
        return self.directory / "sweep" / f"job-{number}"

    def read(self, file: str) -> Any:
        return json.loads((self.directory / file).read_text())

    def found(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self.read(f"sweep/job-{number}/found.json")
        return found

    @property
    def launcher(self) -> int:
        pid: int = self.read("multirun_start.json")["pid"]
        return pid


@pytest.fixture(scope="module", params=["fork", "spawn"])
def sweep(request: pytest.FixtureRequest, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep of two jobs, on one device and on two. Each job starts the program again, as DDP does."""
    directory = tmp_path_factory.mktemp(request.param)
    ran = run(
        directory,
        "contract.py",
        "--config-dir",
        os.path.relpath(PROGRAMS / "more", directory),
        "-m",
        "hydra.job.chdir=true",
        "+extra=found",
        f"hydra.launcher.start_method={request.param}",
        "hydra.job.name=renamed",
        "trainer.devices=1,2",
        "rerun=true",
    )
    assert ran.returncode == 0, ran.stderr
    return Sweep(request.param, directory, ran)


@pytest.fixture(params=[0, 1])
def number(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


@pytest.mark.smoke
def test_a_job_knows_its_number_its_directory_and_its_overrides(sweep: Sweep, number: int) -> None:
    found = sweep.found(number)
    assert found["num"] == number
    assert found["id"] == str(number)
    assert found["job_name"] == "renamed"
    assert found["output_dir"] == found["run_dir"] == str(sweep.job(number))
    assert found["mode"] == "MULTIRUN"
    assert found["overrides"] == ["+extra=found", f"trainer.devices={number + 1}", "rerun=True"]
    assert (sweep.job(number) / ".hydra" / "config.yaml").exists()
    assert (sweep.directory / "sweep" / "multirun.yaml").exists()


def test_what_the_options_mean_is_not_repeated_in_the_config_that_each_job_leaves(sweep: Sweep, number: int) -> None:
    left = yaml.safe_load((sweep.job(number) / ".hydra" / "hydra.yaml").read_text())["hydra"]["launcher"]
    assert left["start_method"] == sweep.method
    assert not left["help"]


def test_a_job_changes_directory_when_told_so(sweep: Sweep, number: int) -> None:
    found = sweep.found(number)
    assert found["cwd"] == str(sweep.job(number))
    assert found["original_cwd"] == str(sweep.directory)


def test_config_directory_resolvers_and_closures_reach_the_job(sweep: Sweep, number: int) -> None:
    found = sweep.found(number)
    assert found["cfg"] == {
        "trainer": {"devices": number + 1},
        "captured": "by a closure of a resolver",
        "rerun": True,
        "extra": {"found": "in the search path"},
    }
    assert found["captured"] == "by a closure"


def test_a_value_of_a_class_of_main_comes_back_as_one_of_its_instances(sweep: Sweep) -> None:
    for number, job in enumerate(sweep.read("returns.json")):
        assert job["status"] == "COMPLETED"
        assert job["value"] == f"Result(number={number})"
        assert job["is_mains"]


def test_main_is_the_users_script(sweep: Sweep, number: int) -> None:
    assert sweep.found(number)["name_of_main"] == str(PROGRAMS / "contract.py")


def test_a_job_is_a_process_in_a_session_of_its_own_without_input(sweep: Sweep, number: int) -> None:
    found = sweep.found(number)
    assert found["pid"] not in (sweep.launcher, sweep.found(1 - number)["pid"])
    assert found["session"] == found["pid"]
    assert found["stdin"] == "/dev/null"


def test_the_config_is_composed_in_the_job_and_imports_are_not_repeated_in_a_fork(sweep: Sweep, number: int) -> None:
    found = sweep.found(number)
    if sweep.method == "fork":
        assert found["composed_in"] == [found["pid"]]
        assert found["imported_in"] == sweep.launcher != found["pid"]
        assert "fresh interpreters" not in sweep.ran.stderr
    else:
        assert found["imported_in"] == found["pid"]
        assert "jobs start in fresh interpreters (spawn): start_method=spawn" in sweep.ran.stderr
    assert (sweep.job(number) / "job.log").read_text().startswith("printed while composing\n")
    assert "printed while composing" not in sweep.ran.stdout


def test_callbacks_of_the_job_run_in_it_and_those_of_the_sweep_in_the_launcher(sweep: Sweep, number: int) -> None:
    for file in ("job_start", "job_end"):
        assert sweep.read(f"sweep/job-{number}/{file}.json")["pid"] == sweep.found(number)["pid"]
    assert sweep.read("multirun_end.json")["pid"] == sweep.launcher


@pytest.mark.smoke
def test_each_job_has_as_many_devices_as_its_own_config_says_and_nobody_elses(sweep: Sweep) -> None:
    masks = [sweep.found(number)["environment"]["CUDA_VISIBLE_DEVICES"].split(",") for number in (0, 1)]
    assert [len(mask) for mask in masks] == [1, 2]
    shown = sweep.ran.stdout + sweep.ran.stderr
    if shown.rindex("started on") < shown.index("completed in"):  # otherwise a busy machine ran one after the other
        assert len({*masks[0], *masks[1]}) == 3
    assert "7" not in {*masks[0], *masks[1]}, "env_set does not take a device"


def test_the_mask_is_set_before_callbacks_and_before_what_hydras_config_reads(sweep: Sweep, number: int) -> None:
    found = sweep.found(number)["environment"]
    mask = found["CUDA_VISIBLE_DEVICES"]
    expected = {"CUDA_VISIBLE_DEVICES": mask, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert sweep.read(f"sweep/job-{number}/job_start.json")["environment"] == expected
    assert found["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert found["SEEN_BY_ENV_SET"] == mask
    assert found["NUMBER"] == str(number)
    assert "logged" in (sweep.job(number) / f"on-gpu-{mask}.log").read_text()


@pytest.mark.smoke
def test_the_log_has_everything_that_the_job_and_its_children_print(sweep: Sweep, number: int) -> None:
    log = (sweep.job(number) / "job.log").read_text()
    printed = ["to stdout", "to stderr", "by C", "by a child"]
    assert [words for words in printed if f"printed {words}\n" not in log] == []
    assert "logged" in log
    assert log.endswith("unfinished")
    assert "printed" not in sweep.ran.stdout + sweep.ran.stderr


def test_a_job_can_start_the_program_again_by_its_argv(sweep: Sweep, number: int) -> None:
    again = sweep.read(f"sweep/job-{number}/again/found.json")
    found = sweep.found(number)
    assert Path(found["argv"][0]) == PROGRAMS / "contract.py"
    assert again["mode"] == "RUN"
    assert again["output_dir"] == str(sweep.job(number) / "again")
    for same in ("cfg", "num", "id", "job_name"):
        assert again[same] == found[same], same
    mask = found["environment"]["CUDA_VISIBLE_DEVICES"]
    assert again["environment"]["SEEN_BY_ENV_SET"] == mask


def test_exit_handlers_run_where_they_were_registered(sweep: Sweep, number: int) -> None:
    assert (sweep.job(number) / "at_exit").read_text() == f"{sweep.found(number)['pid']}\n"
    assert (sweep.directory / "program_at_exit").read_text() == f"{sweep.launcher}\n"
    assert (sweep.directory / "program_finalized").read_text() == f"{sweep.launcher}\n"
    # The program itself checks that its TemporaryDirectory still exists after the sweep.


def test_numpys_global_stream_differs_from_job_to_job_unless_it_was_seeded(
    sweep: Sweep, seeded: Sweep, number: int
) -> None:
    assert sweep.found(0)["random"] != sweep.found(1)["random"]
    assert seeded.found(0)["random"] == seeded.found(1)["random"]


@pytest.fixture(scope="module")
def seeded(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep of three jobs without devices, one at a time. Its config comes from `--config-name` and a search path."""
    directory = tmp_path_factory.mktemp("seeded")
    ran = run(
        directory,
        "contract.py",
        "--config-name=other",
        "-m",
        "hydra.launcher.gpus=0",
        "hydra.launcher.max_parallel=1",
        f"hydra.searchpath=[file://{PROGRAMS / 'more'}]",
        "+extra=found",
        "rerun=true,false,false",
        SEED="1",
    )
    assert ran.returncode == 0, ran.stderr
    return Sweep("fork", directory, ran)


def test_a_job_without_devices_sees_none(seeded: Sweep) -> None:
    for number in range(3):
        assert seeded.found(number)["environment"]["CUDA_VISIBLE_DEVICES"] == ""


def test_max_parallel_caps_what_runs_at_a_time(seeded: Sweep) -> None:
    first, second, third = sorted(seeded.found(number)["time"] for number in range(3))
    assert first[1] <= second[0]
    assert second[1] <= third[0]


def test_config_name_and_search_path_reach_the_job_and_what_it_starts(seeded: Sweep) -> None:
    for found in (seeded.found(0), seeded.read("sweep/job-0/again/found.json")):
        assert found["cfg"] == {"other": True, "rerun": True, "extra": {"found": "in the search path"}}


def test_a_directory_may_be_named_after_the_jobs_devices(run: Run, tmp_path: Path) -> None:
    subdir = "hydra.sweep.subdir=${hydra.job.num}-on-${oc.env:CUDA_VISIBLE_DEVICES}"
    ran = run(
        tmp_path, "contract.py", "--config-name=other", "-m", subdir, "rerun=false,false", CUDA_VISIBLE_DEVICES="6"
    )
    assert ran.returncode == 0, ran.stderr
    for number in (0, 1):
        (found,) = (json.loads(file.read_text()) for file in tmp_path.glob(f"sweep/{number}-on-*/found.json"))
        directory = f"sweep/{number}-on-{found['environment']['CUDA_VISIBLE_DEVICES']}"
        assert found["output_dir"] == found["run_dir"] == str(tmp_path / directory)
        assert "printed to stdout" in (tmp_path / "sweep" / f"{number}.job.log").read_text()
        assert f"sweep/{number}.job.log" in ran.stderr
    assert not list(tmp_path.glob("sweep/*-on-6")), "the mask of the launching program is not a job's"


@pytest.mark.parametrize("arguments", [["--info", "plugins"]])
def test_hydra_lists_the_launcher(run: Run, tmp_path: Path, arguments: list[str]) -> None:
    assert "GpuPoolLauncher" in run(tmp_path, "contract.py", *arguments).stdout


def test_hydra_shows_the_options_with_their_help(run: Run, tmp_path: Path) -> None:
    shown = run(tmp_path, "contract.py", "--cfg", "hydra", "-p", "hydra.launcher", "hydra/launcher=gpu_pool").stdout
    for option in ("devices: auto", "max_parallel: null", "start_method: auto", "grace: 10.0", "pool_dir: null"):
        assert f"\n{option}\n" in shown
    assert "\n  grace: Seconds that jobs get to end by themselves" in shown


def test_the_shell_completes_the_options(run: Run, tmp_path: Path) -> None:
    line = "python contract.py hydra/launcher=gpu_pool hydra.launcher."
    completed = run(tmp_path, "contract.py", "-sc", "query=bash", COMP_LINE=line)
    offered = completed.stdout.split()
    for option in ("devices", "gpus", "max_parallel", "start_method", "grace", "pool_dir"):
        assert f"hydra.launcher.{option}=" in offered, completed
