"""Tests every finding of `gpu-launcher doctor`, with its level and remedy."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import re
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hydra.errors import CompactHydraException

import gpu_launcher
from gpu_launcher.cli.checks.program_check import examine_program
from gpu_launcher.cli.checks.project import examine_project
from gpu_launcher.errors import UnsupportedVersionError
from gpu_launcher.requirements import check_version, satisfies
from hydra_plugins.optuna_async_sweeper.sweeper import OptunaAsyncSweeper

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Cli, Lab  # type: ignore[import-not-found]

DOCUMENT = (Path(__file__).parents[2] / "docs" / "status.md").read_text()


def examine(cli: Cli, *arguments: str, **environ: str) -> tuple[int, list[tuple[str, str, str, str]]]:
    """The exit code, and the findings as check, level, text and remedy."""
    done = cli("doctor", "--json", *arguments, **environ)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    findings = [(one["check"], one["level"], one["text"], one["remedy"] or "") for one in report["findings"]]
    levels = [level for _, level, _, _ in findings]
    assert (report["problems"], report["warnings"]) == (levels.count("problem"), levels.count("warning"))
    assert done.returncode == (1 if report["problems"] else 0)
    return done.returncode, findings


def of(findings: list[tuple[str, str, str, str]], check: str, level: str) -> list[tuple[str, str]]:
    return [(text, remedy) for its, how, text, remedy in findings if (its, how) == (check, level)]


@pytest.mark.smoke
def test_a_healthy_machine_has_nothing_but_ok(lab: Lab) -> None:
    code, findings = examine(lab.cli)
    assert code == 0
    assert {level for _, level, _, _ in findings} == {"ok"}
    assert ("NVIDIA driver 570.86.15, NVML 12.570.86.15, CUDA up to 12.8", "") in of(findings, "driver", "ok")
    assert ("GPU 0-3: NVIDIA H100 80GB HBM3, 80 GiB", "") in of(findings, "gpus", "ok")
    assert ("3 leases and 2 tickets live in it", "") in of(findings, "pool", "ok")


def test_without_a_driver_it_warns_and_works(cli: Cli) -> None:
    code, findings = examine(cli)
    assert code == 0
    ((text, remedy),) = of(findings, "driver", "warning")
    assert re.match(r"no NVIDIA driver found \(.*\): sweeps run on \d+ CPU slot", text)
    assert "--gpus all" in remedy


def test_a_driver_that_does_not_work_is_a_problem(lab: Lab) -> None:
    lab.machine.now("init.error 18")
    code, findings = examine(lab.cli)
    assert code == 1
    ((text, remedy),) = of(findings, "driver", "problem")
    assert text.startswith("the machine's GPUs cannot be read: NVML says")
    assert remedy.startswith("reboot")


def test_compute_modes_and_mig_without_instances_are_warned_of(lab: Lab) -> None:
    lab.machine.now("1.compute_mode 2", "2.compute_mode 3", "3.mig 1")
    code, findings = examine(lab.cli)
    assert code == 0
    prohibited, mig = (found for found in of(findings, "gpus", "warning") if "set aside" in found[0])
    assert prohibited == (
        "GPU 1 is set aside: it is set to compute mode PROHIBITED",
        "`nvidia-smi -i 1 -c DEFAULT` (as root) allows jobs",
    )
    assert mig[0] == "GPU 3 is set aside: it is in MIG mode and has no MIG instances"
    assert mig[1].startswith("`nvidia-smi mig -i 3 -cgi")
    assert any("GPU 2 is set to compute mode EXCLUSIVE_PROCESS" in text for text, _ in of(findings, "gpus", "warning"))


@pytest.mark.smoke
def test_a_lost_gpu_and_one_with_memory_errors_are_problems(lab: Lab) -> None:
    lab.machine.now("1.*.error 15", "2.ecc 3")
    code, findings = examine(lab.cli)
    assert code == 1
    memory, lost = sorted(of(findings, "gpus", "problem"), reverse=True)
    assert lost[0].startswith("GPU 1 is set aside: it does not answer")
    assert memory == (
        "GPU 2 is set aside: it has had 3 uncorrectable memory errors",
        "`nvidia-smi --gpu-reset -i 2` (as root, while no program uses it), or reboot",
    )


def test_mig_instances_are_listed(cli: Cli, machine: Any) -> None:
    instances = machine.instance(0, 0, "MIG-a") + machine.instance(0, 1, "MIG-b")
    machine.has("count 1", *machine.gpu(0, "GPU-a", "mig 1"), *instances)
    _, findings = examine(cli)
    assert any(text.startswith("MIG 0:0, MIG 0:1: ") for text, _ in of(findings, "gpus", "ok"))


@pytest.mark.parametrize(
    ("mask", "level", "text"),
    [
        ("0,2", "ok", "CUDA_VISIBLE_DEVICES='0,2' leaves GPU 0, GPU 2 of 4 devices"),
        ("0,9", "problem", "'9' names no single GPU of this machine: CUDA leaves it out; it leaves GPU 0 of 4 devices"),
        ("1,1", "problem", "GPU 1 is named twice, for which CUDA hides all GPUs; it leaves no device"),
        ("-1", "warning", "CUDA_VISIBLE_DEVICES='-1' hides all 4 GPUs of the machine"),
    ],
)
def test_a_mask_is_explained_and_its_mistakes_are_problems(lab: Lab, mask: str, level: str, text: str) -> None:
    code, findings = examine(lab.cli, CUDA_VISIBLE_DEVICES=mask)
    assert code == (level == "problem")
    ((found, remedy),) = of(findings, "mask", level)
    assert text in found
    assert (remedy == "") == (level == "ok")


def test_a_mask_of_unlike_gpus_that_may_be_read_otherwise_is_warned_of(cli: Cli, machine: Any) -> None:
    machine.has("count 2", *machine.gpu(0, "GPU-a", name="NVIDIA A"), *machine.gpu(1, "GPU-b", name="NVIDIA B"))
    _, findings = examine(cli, CUDA_VISIBLE_DEVICES="0")
    ((text, remedy),) = of(findings, "mask", "warning")
    assert "was read in PCI bus order" in text
    assert remedy == "set that, or name GPUs by UUID"
    assert of(examine(cli, CUDA_VISIBLE_DEVICES="0", CUDA_DEVICE_ORDER="PCI_BUS_ID")[1], "mask", "ok")


def test_before_the_first_sweep_the_directory_is_not_made_and_not_missed(cli: Cli) -> None:
    _, findings = examine(cli)
    assert ("it is not there yet: the first sweep makes it, open to every user", "") in of(findings, "pool", "ok")
    assert any("(named by GPU_LAUNCHER_POOL_DIR), on " in text for text, _ in of(findings, "pool", "ok"))
    assert not cli.pool.exists()


def test_it_leaves_nothing_behind_in_the_pool(cli: Cli) -> None:
    cli.hold(["simulated:1", 1, None, 0, "train.py"])
    before = sorted((cli.pool / "queue").iterdir())
    examine(cli)
    assert sorted((cli.pool / "queue").iterdir()) == before


@pytest.mark.parametrize(
    ("mode", "level", "text"),
    [
        (0o1777, "ok", "every user of the machine takes part"),
        (0o2775, "ok", "others get an error"),
        (0o0777, "warning", "every user can remove others' files"),
        (0o0700, "warning", "takes part; others get an error"),
    ],
)
def test_who_may_use_the_directory_is_told(cli: Cli, mode: int, level: str, text: str) -> None:
    (cli.pool / "queue").mkdir(parents=True)
    for directory in (cli.pool, cli.pool / "queue"):
        directory.chmod(mode)
    _, findings = examine(cli)
    ((found, remedy),) = [one for one in of(findings, "pool", level) if one[0].startswith(f"mode {mode:04o}, owner ")]
    assert text in found
    assert remedy.startswith("`chmod 1777 " if level == "warning" else "")


def test_a_queue_with_a_mode_of_its_own_is_warned_of(cli: Cli) -> None:
    (cli.pool / "queue").mkdir(parents=True)
    cli.pool.chmod(0o1777)
    (cli.pool / "queue").chmod(0o755)
    _, findings = examine(cli)
    ((text, remedy),) = of(findings, "pool", "warning")
    assert text == f"{cli.pool}/queue has mode 0755, unlike the directory it is in"
    assert remedy == f"`chmod 1777 {cli.pool}/queue`"


def test_a_file_in_the_directorys_place_is_a_problem(cli: Cli) -> None:
    cli.pool.touch()
    code, findings = examine(cli)
    assert code == 1
    ((text, remedy),) = of(findings, "pool", "problem")
    assert text == f"pool directory {cli.pool}: is not a directory"
    assert remedy.startswith("remove what is there")


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that other users can reach, unlike pytest's own."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as several users")
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        yield Path(parent)


EXAMINE_AS = """
import json, os, sys
from gpu_launcher.cli.checks.pool_check import examine_pool
os.setuid(60001)
print(json.dumps([[one.level.value, one.text, one.remedy] for one in examine_pool(sys.argv[1])]))
"""


def examined_as_another_user(pool: Path) -> list[list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", EXAMINE_AS, str(pool)], capture_output=True, text=True, check=True, timeout=500
    )
    findings: list[list[str]] = json.loads(done.stdout)
    return findings


@pytest.mark.root
def test_a_pool_that_this_user_cannot_write_is_a_problem_and_its_content_is_told_all_the_same(reachable: Path) -> None:
    (reachable / "pool/queue").mkdir(parents=True)
    findings = examined_as_another_user(reachable / "pool")
    ((_, text, remedy),) = [found for found in findings if found[0] == "problem"]
    assert text == f"pool directory {reachable}/pool: cannot be written by user 60001"
    assert "chmod 1777" in remedy
    assert ["ok", "0 leases and 0 tickets live in it", None] in findings


@pytest.mark.root
def test_a_pool_that_this_user_cannot_make_is_a_problem(reachable: Path) -> None:
    ((_, text, _),) = [found for found in examined_as_another_user(reachable / "pool") if found[0] == "problem"]
    assert text == f"{reachable}/pool is not there, and this user may not make it"


def test_who_keeps_the_pool_locked_is_named(cli: Cli) -> None:
    (cli.pool / "queue").mkdir(parents=True)
    descriptor = os.open(cli.pool / "queue", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        code, findings = examine(cli)
    finally:
        os.close(descriptor)
    assert code == 1
    ((text, remedy),) = of(findings, "pool", "problem")
    assert re.match(rf"nothing is granted, because it is kept locked by process {os.getpid()} \(.*\)$", text)
    assert remedy == f"end it (kill {os.getpid()})"


def test_a_lease_of_another_version_is_a_problem(cli: Cli) -> None:
    cli.hold(["simulated:1", 1, None, 0, "newer.py"])
    for name in (cli.pool / "queue").glob("[lt][ew]*-*"):
        name.write_text('{"format": 99}')
    code, findings = examine(cli)
    assert code == 1
    assert "cannot be read, so that every device counts as held" in of(findings, "pool", "problem")[0][0]


def test_files_of_dead_programs_are_counted_and_no_problem(cli: Cli) -> None:
    holder = cli.hold(["simulated:1", 1, None, 0, "train.py"])
    holder.kill()
    holder.communicate()
    code, findings = examine(cli)
    assert code == 0
    assert any("1 left by programs that died" in text for text, _ in of(findings, "pool", "ok"))


def test_versions_and_the_plugin_are_told(cli: Cli) -> None:
    _, findings = examine(cli)
    (packages,) = [text for text, _ in of(findings, "packages", "ok")]
    assert re.search(r"gpu-launcher \S+, hydra-core \S+ \(supported: >=1\.3\.2,<1\.5\)", packages)
    assert re.search(r"optuna \S+ \(supported: >=4\.8,<6\)", packages)
    assert of(findings, "plugin", "ok") == [("Hydra finds hydra/launcher=gpu_pool", "")]
    assert of(findings, "python", "ok")


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("1.3.2", ">=1.3.2,<1.5", True),
        ("1.4.0rc3", ">=1.3.2,<1.5", True),
        ("1.5.0", ">=1.3.2,<1.5", False),
        ("1.3.1", ">=1.3.2,<1.5", False),
        ("1.3.2.post1", ">=1.3.2", True),
        ("13.615.71", ">=12.535", True),
        ("4.8", ">=4.8.0,!=4.9", True),
        ("4.9.0", ">=4.8,!=4.9", False),
        ("anything", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, wanted: str, fits: bool) -> None:
    assert satisfies(version, wanted) is fits


def test_a_hydra_that_is_too_old_and_a_missing_optuna_are_problems(cli: Cli, tmp_path: Path) -> None:
    metadata = tmp_path / "site/hydra_core-1.2.0.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: hydra-core\nVersion: 1.2.0\n")
    code, findings = examine(cli, PYTHONPATH=f"{tmp_path}/site{os.pathsep}{cli.environ['PYTHONPATH']}")
    assert code == 1
    assert of(findings, "packages", "problem") == [
        ("hydra-core 1.2.0 is not supported", "`pip install 'hydra-core>=1.3.2,<1.5'`")
    ]


def test_a_plugin_that_hides_all_others_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "site/hydra_plugins").mkdir(parents=True)
    (tmp_path / "site/hydra_plugins/__init__.py").touch()
    _, findings = examine(cli, PYTHONPATH=f"{tmp_path}/site{os.pathsep}{cli.environ['PYTHONPATH']}")
    ((text, remedy),) = of(findings, "plugin", "problem")
    assert f"because {tmp_path}/site/hydra_plugins/__init__.py hides all other plugins" in text
    assert remedy.startswith("remove that file")


def test_threads_from_the_start_of_python_on_mean_spawn_and_are_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    code, findings = examine(cli, PYTHONPATH=f"{tmp_path}{os.pathsep}{cli.environ['PYTHONPATH']}")
    assert code == 0
    ((text, remedy),) = of(findings, "start method", "warning")
    assert text.startswith("spawn: threads run in every Python program here")
    assert "sitecustomize.py" in remedy


def test_a_low_limit_of_open_files_is_warned_of(cli: Cli) -> None:
    done = subprocess.run(
        ["bash", "-c", f"ulimit -Sn 128; exec {sys.executable} -m gpu_launcher.cli doctor"],
        env=cli.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [line for line in done.stdout.splitlines() if "ulimit" in line]
    assert re.match(r"warning +open files +ulimit -n is 128: .*; remedy: `ulimit -n \d+`$", line)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study file with the tables of Optuna's that `doctor` looks at."""
    path = tmp_path / "study of ours?.db"
    with closing(sqlite3.connect(path)) as database:
        for table in ("studies", "trials", "version_info"):
            database.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY)")
        database.execute("INSERT INTO studies DEFAULT VALUES")
        database.commit()
    return path


def set_wal(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")


def test_a_study_in_wal_mode_is_ok_and_nothing_is_made_beside_it(cli: Cli, study: Path) -> None:
    set_wal(study)
    before = sorted(study.parent.iterdir())
    code, findings = examine(cli, "--study", str(study))
    assert code == 0
    texts = [text for text, _ in of(findings, "study", "ok")]
    assert texts[0] == f"{study} has 1 Optuna study and 0 trials"
    assert texts[1] == "its journal mode is WAL: one program writes while others read"
    assert sorted(study.parent.iterdir()) == before


def test_a_study_with_a_rollback_journal_is_a_problem_with_a_remedy_that_works(cli: Cli, study: Path) -> None:
    code, findings = examine(cli, "--study", f"sqlite:///{study}")
    assert code == 1
    ((text, remedy),) = of(findings, "study", "problem")
    assert text.startswith("its journal mode is not WAL")
    assert remedy == f"`sqlite3 {study} 'PRAGMA journal_mode=WAL'`, while no program uses it"


def test_a_study_in_use_is_read_with_what_is_still_in_its_log(cli: Cli, study: Path) -> None:
    set_wal(study)
    with closing(sqlite3.connect(study)) as database:
        database.execute("INSERT INTO trials DEFAULT VALUES")
        database.commit()
        code, findings = examine(cli, "--study", str(study))
    assert code == 0
    assert of(findings, "study", "ok")[0][0].endswith("has 1 Optuna study and 1 trials")


@pytest.mark.parametrize(
    ("content", "level", "text"),
    [
        (None, "problem", "cannot be read: No such file or directory"),
        (b"{}", "problem", "is not a SQLite database"),
        (b"SQLite format 3\0" + b"\1" * 200, "problem", "cannot be read by SQLite"),
    ],
)
def test_what_is_no_study_is_named(cli: Cli, tmp_path: Path, content: bytes | None, level: str, text: str) -> None:
    path = tmp_path / "other.db"
    if content is not None:
        path.write_bytes(content)
    code, findings = examine(cli, "--study", str(path))
    assert code == 1
    assert any(text in found and remedy for found, remedy in of(findings, "study", level))


def test_another_database_is_warned_of(cli: Cli, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as database:
        database.execute("CREATE TABLE mine (id INTEGER)")
    set_wal(tmp_path / "other.db")
    code, findings = examine(cli, "--study", str(tmp_path / "other.db"))
    assert code == 0
    assert "without an Optuna study" in of(findings, "study", "warning")[0][0]


def test_lines_in_a_pipe_have_level_check_text_and_remedy(lab: Lab) -> None:
    done = lab.cli("doctor", CUDA_VISIBLE_DEVICES="0,9")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert line == (
        "problem  mask          CUDA_VISIBLE_DEVICES='0,9': '9' names no single GPU of this machine: CUDA leaves it "
        "out; it leaves GPU 0 of 4 devices; remedy: change or unset CUDA_VISIBLE_DEVICES"
    )
    assert re.fullmatch(r"1 problem, 0 warnings, \d+ ok", done.stdout.splitlines()[-1])
    assert "\x1b" not in done.stdout


def test_the_document_has_every_check_and_the_keys_of_the_json(lab: Lab) -> None:
    documented = DOCUMENT[DOCUMENT.index("| check | what is checked |") :]
    checks = set(re.findall(r"^\| `([^`]+)` \|", documented, re.MULTILINE))
    _, findings = examine(lab.cli, "--study", "none.db", "--nodes", "local")
    assert {check for check, *_ in findings} == checks
    example = json.loads(re.findall(r"```json\n(.*?)```", documented, re.DOTALL)[0])
    report = json.loads(lab.cli("doctor", "--json").stdout)
    assert list(report) == list(example)
    assert list(report["findings"][0]) == list(example["findings"][0])


def test_the_document_shows_the_findings_of_a_healthy_machine(lab: Lab) -> None:
    (documented,) = re.findall(r"```text\n(ok .*?)```", DOCUMENT, re.DOTALL)
    checks = re.compile(r"^ok {7}(\S+(?: \S+)*) {2}", re.MULTILINE)
    # Only the names of checks are compared: whether there is systemd, or a PID namespace, depends on this machine.
    assert set(checks.findall("\n".join(lab.cli.lines("doctor")))) == set(checks.findall(documented))


def test_lines_of_the_official_sweeper_are_found_in_a_project(tmp_path: Path) -> None:
    configs = tmp_path / "configs" / "hparams_search"
    configs.mkdir(parents=True)
    template = Path(__file__).parents[1] / "hydra" / "programs" / "template" / "configs" / "hparams_search"
    (configs / "mnist.yaml").write_text((template / "optuna.yaml").read_text())
    for others in ("outputs/.hydra", ".venv", "multirun"):
        (tmp_path / others).mkdir(parents=True)
        (tmp_path / others / "hydra.yaml").write_text((template / "optuna.yaml").read_text())
    (tmp_path / "configs" / "model.yaml").write_text("loader:\n  n_jobs: 1\n")
    (tmp_path / "configs" / "picture.yaml").write_bytes(b"\xff\xfe\0")
    found = [(one.text, one.remedy or "") for one in examine_project(tmp_path)]
    (target, delete), (cap, add) = found
    assert target.startswith("configs/hparams_search/mnist.yaml:10 sets the official sweeper's _target_")
    assert delete.startswith("delete the line")
    assert cap.startswith("configs/hparams_search/mnist.yaml:13 limits a search to n_jobs: 1")
    assert "hydra.sweeper.n_jobs=null" in add


@pytest.mark.parametrize(
    ("path", "text", "findings"),
    [
        ("conf/hydra/sweeper/mine.yaml", "n_jobs: 2\n", 1),
        ("conf/other/mine.yaml", "n_jobs: 2\n", 0),
        ("train.yml", "hydra:\n  sweeper:\n\n    # parallel\n    n_jobs: 4  # of two\n    n_trials: 3\n", 1),
        ("train.yaml", "hydra:\n  sweeper:\n    n_jobs: null\n  launcher:\n    n_jobs: 3\n", 0),
        (
            "a.yaml",
            "hydra:\n  sweeper:\n    '_target_': x\n    _target_ : 'hydra_plugins.hydra_optuna_sweeper.a.B'\n",
            1,
        ),
        ("a.yaml", "# _target_: hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper\n", 0),
        ("empty.yaml", "", 0),
    ],
)
def test_only_such_lines_are_found(tmp_path: Path, path: str, text: str, findings: int) -> None:
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    assert len(list(examine_project(tmp_path))) == findings


def test_an_unsupported_optuna_is_answered_as_the_doctor_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "optuna-4.5.0.dist-info").mkdir()
    (tmp_path / "optuna-4.5.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: optuna\nVersion: 4.5.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = (one for one in examine_program() if "optuna 4.5.0" in one.text and one.level.value == "problem")
    with pytest.raises(UnsupportedVersionError) as error:
        check_version("optuna")
    assert str(error.value) == f"{finding.text}: {finding.remedy}"
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    with pytest.raises(UnsupportedVersionError):
        _ = gpu_launcher.optimize
    with pytest.raises(CompactHydraException, match=r"hydra/sweeper=optuna_async: optuna 4\.5\.0 is not supported"):
        OptunaAsyncSweeper().sweep([])
