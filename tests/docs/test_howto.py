"""The how-to pages do what they show, and the page of messages shows those of the code."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import gpu_launcher.errors
from hydra_plugins.gpu_pool_launcher.config import HELP as LAUNCHER
from hydra_plugins.optuna_async_sweeper.config import HELP as SWEEPER
from tests.docs.test_walkthroughs import DOCS, blocks, follow, pattern, write_programs

ROOT = DOCS.parent
HOWTO = DOCS / "howto"

TEMPLATE = {
    "configs/train.yaml": """
# @package _global_
defaults:
  - _self_
  - trainer: default.yaml
  - hydra: default.yaml
  - hparams_search: null
task_name: train
paths:
  log_dir: logs
model:
  optimizer:
    lr: 0.001
data:
  batch_size: 64
""",
    "configs/trainer/default.yaml": "devices: 1\n",
    "configs/trainer/ddp.yaml": "defaults:\n  - default\ndevices: 4\n",
    "configs/hydra/default.yaml": """
defaults:
  - override hydra_logging: default
  - override job_logging: colorlog
sweep:
  dir: ${paths.log_dir}/${task_name}/multiruns/${now:%Y-%m-%d}_${now:%H-%M-%S}
  subdir: ${hydra.job.num}
""",
    "configs/hydra/job_logging/colorlog.yaml": "defaults:\n  - default\n",
    "configs/hparams_search/mnist_optuna.yaml": """
# @package _global_
defaults:
  - override /hydra/sweeper: optuna
hydra:
  mode: MULTIRUN
  sweeper:
    _target_: hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper
    n_jobs: 1
    direction: maximize
    n_trials: 4
    sampler:
      _target_: optuna.samplers.TPESampler
      seed: 1234
    params:
      model.optimizer.lr: interval(0.0001, 0.1)
      data.batch_size: choice(32, 64)
""",
    "src/train.py": """
import hydra


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg):
    return cfg.model.optimizer.lr * cfg.data.batch_size


if __name__ == "__main__":
    main()
""",
}
"""The lightning-hydra-template, as far as its configs meet the launcher and the sweeper."""


def apply(diff: str, directory: Path) -> int:
    """Change files as the page's diff says. Return the number of lines that it adds."""
    added = 0
    for part in re.split(r"^--- a/", diff, flags=re.M)[1:]:
        name, hunks = re.match(r"(\S+)\n\+\+\+ b/\1\n(.*)", part, flags=re.DOTALL).groups()
        file = directory / name
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.M)[1:]:
            lines = hunk.splitlines()
            before = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            after = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
            assert file.read_text().count(before) == 1, before
            file.write_text(file.read_text().replace(before, after))
            added += sum(line[0] == "+" for line in lines)
    return added


@pytest.mark.parametrize(
    "name", ["howto/best_run", "howto/hydra_zen", "howto/leave", "howto/out_of_memory", "notifications"]
)
def test_the_commands_of_the_page_print_what_it_says(name: str, tmp_path: Path) -> None:
    if name == "howto/hydra_zen":
        pytest.importorskip("hydra_zen")
    text = (DOCS / f"{name}.md").read_text()
    write_programs(text, tmp_path)
    assert follow(text, tmp_path) >= 3


def test_four_lines_make_the_template_use_the_launcher_and_the_sweeper(tmp_path: Path) -> None:
    for name, content in TEMPLATE.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content.lstrip("\n"))
    text = (HOWTO / "lightning_hydra_template.md").read_text()
    (diff,) = blocks(text, "diff")
    assert apply(diff, tmp_path) == 4
    assert follow(text, tmp_path) == 4


def test_the_cells_of_a_notebook_print_what_the_page_says(tmp_path: Path) -> None:
    text = (HOWTO / "notebooks.md").read_text()
    expected = "".join(block for block in blocks(text, "text") if "..." not in block)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "HYDRA_"))}
    environment |= {"GPU_LAUNCHER_POOL_DIR": str(tmp_path / "pool"), "PYTHONWARNINGS": "ignore"}
    # From stdin the cells have no file, and with a thread calls are spawned: both as in a notebook.
    thread = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    done = subprocess.run(
        [sys.executable, "-"],
        input=thread + "".join(blocks(text, "python")),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, expected), done.stderr
    assert "jobs start in fresh interpreters (spawn)" in done.stderr


def test_a_shared_server_is_set_up_as_the_page_says(tmp_path: Path) -> None:
    text = (HOWTO / "shared_server.md").read_text()
    set_up = blocks(text, "bash")[0].replace("/var/lib/gpu-launcher", str(tmp_path / "pool"))
    subprocess.run(["bash", "-c", set_up], check=True, cwd=tmp_path)
    assert follow(text, tmp_path) == 4


def test_options_in_the_tables_of_migration_exist() -> None:
    text = (HOWTO / "migrating.md").read_text()
    others = {"_target_", "auto", "env", "fork", "gpu_pool", "null", "optuna_async", "spawn", "srun"}
    of = {"joblib": LAUNCHER, "submitit": LAUNCHER, "The official Optuna sweeper": SWEEPER, "Ray's launcher": LAUNCHER}
    for section in text.split("\n## ")[1:]:
        title, _, table = section.partition("\n")
        for row in re.findall(r"^\| `.*", table, flags=re.M):
            named = set(re.findall(r"`([a-z_]+)(?:=[^`]*)?`", row.split(" | ")[1]))
            assert named - others <= set(of[title]), row


def literals() -> str:
    """The text of all strings in the code but docstrings, with a line break for each placeholder."""
    found = []
    for package in ("gpu_launcher", "hydra_plugins"):
        for file in sorted((ROOT / package).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(file.read_text())))
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            strings = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
            found += [node.value for node in strings if isinstance(node.value, str)]
    return "\n".join(found)


def test_messages_on_the_page_are_those_of_the_code() -> None:
    code = literals()
    text = (DOCS / "faq.md").read_text()
    cells = [row.split(" | ")[0] for row in re.findall(r"^\| `.*", text.split("\n## Errors in Python")[0], flags=re.M)]
    assert len(cells) > 80
    unknown = []
    for message in (message for cell in cells for message in re.findall(r"`([^`]+)`", cell)):
        for part in (part.strip(" :;,()") for part in message.split("...")):
            if part and part not in code:
                unknown.append(part)
    assert unknown == []


def test_every_class_of_error_is_explained() -> None:
    text = (DOCS / "faq.md").read_text()
    classes = {
        name
        for name, value in vars(gpu_launcher.errors).items()
        if isinstance(value, type) and issubclass(value, gpu_launcher.errors.GpuLauncherError)
    }
    assert {name for name in classes if f"`{name}`" not in text} == set()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: gpu_launcher.Pool(devices="gpu9").lease(),
        lambda: gpu_launcher.PoolExecutor(max_workers=0),
        lambda: gpu_launcher.parallel_map([], None, 3),
        lambda: gpu_launcher.storage("redis://there"),
        lambda: gpu_launcher.load_results("/proc/version"),
    ],
)
def test_message_of_an_error_is_in_the_list_that_the_site_has(mistake: Callable[[], object]) -> None:
    conf = runpy.run_path(str(DOCS / "conf.py"))
    source = [(DOCS / "faq.md").read_text()]
    conf["add_error_messages"](None, "docs/faq", source)
    listed = source[0].partition("## The message of each error")[2].splitlines()
    with pytest.raises(Exception) as raised:  # noqa: PT011
        mistake()
    assert [one for one in listed if " " in one and re.search(pattern(one), str(raised.value))], raised.value
