"""Tests `gpu-launcher guide`. tests/docs/test_walkthroughs.py follows the page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Cli  # type: ignore[import-not-found]

PAGE = Path(__file__).parents[2] / "docs" / "guide.md"


def test_guide_prints_the_page(cli: Cli) -> None:
    assert cli.lines("guide") == PAGE.read_text().splitlines()


def test_guide_is_one_page() -> None:
    assert len(PAGE.read_text().splitlines()) <= 80
