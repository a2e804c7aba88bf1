"""Tests `gpu-launcher guide`, and that help and messages name pages that it prints.

tests/docs/test_walkthroughs.py follows the guide.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

import gpu_launcher
from gpu_launcher.cli.main import program
from hydra_plugins.gpu_pool_launcher.config import HELP as LAUNCHER
from hydra_plugins.optuna_async_sweeper.config import HELP as SWEEPER

if TYPE_CHECKING:
    from conftest import Cli  # type: ignore[import-not-found]

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "guide.md"
PAGES = {path.stem: path for path in [*DOCS.glob("*.md"), *DOCS.glob("howto/*.md")]}


def test_guide_prints_the_page(cli: Cli) -> None:
    assert cli.lines("guide") == PAGE.read_text().splitlines()


def test_guide_is_one_page() -> None:
    assert len(PAGE.read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", ["nodes", "leave"])
def test_guide_prints_any_page(cli: Cli, name: str) -> None:
    assert cli.lines("guide", name) == PAGES[name].read_text().splitlines()


def test_names_of_pages_differ() -> None:
    assert len(PAGES) == len(list(DOCS.rglob("*.md")))


def test_unknown_page_prints_the_names_of_all(cli: Cli) -> None:
    done = cli("guide", "nowhere")
    assert done.returncode == 2
    assert set(PAGES) <= set(re.findall(r"\w[\w-]*", done.stderr)), "each needs a link in gpu_launcher/cli/pages"
    assert "got 'nowhere'" in done.stderr


def shown() -> dict[str, str]:
    """What the help of commands and options and the docstrings of the Python API say, by name."""
    found = {f"launcher {name}": text for name, text in LAUNCHER.items()}
    found |= {f"sweeper {name}": text for name, text in SWEEPER.items()}
    for command in program.commands.values():
        found[str(command.name)] = command.help or ""
        options = [one for one in command.params if isinstance(one, click.Option)]
        found |= {f"{command.name} {one.opts[0]}": one.help or "" for one in options}
    for name in gpu_launcher.__all__:
        value = getattr(gpu_launcher, name)
        found[name] = value.__doc__ or ""
        found |= {f"{name}.{one}": getattr(value, one).__doc__ or "" for one in dir(value) if one[0] != "_"}
    return found


def test_help_and_docstrings_name_pages_that_guide_prints() -> None:
    named = {
        (what, page) for what, text in shown().items() for page in re.findall(r"gpu-launcher guide ([a-z]\w*)", text)
    }
    assert {page for _, page in named} >= {"nodes", "notifications", "status", "steering", "resume", "results", "leave"}
    assert {(what, page) for what, page in named if page not in PAGES} == set()


def test_help_and_docstrings_name_no_file_that_only_a_clone_has() -> None:
    assert {what: text for what, text in shown().items() if re.search(r"docs/|README|(?<!AGENTS)\.md\b", text)} == {}
