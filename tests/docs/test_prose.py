"""What users read is plain English: pages, help, options and messages do not contain words that are often misused.

The check knows words, not style. CONTRIBUTING.md says how to write.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTEAD = {
    r"to be had": "available",
    r"mend(s|ed|ing)?": "fix",
    r"heed(s|ed|ing)?": "obey, or read",
    r"lest": "so that ... not",
    r"whoever": "anyone who",
    r"somebody": "someone, or another user",
    r"nobody": "no user, no program",
    r"what is left": "the rest",
    r"so many": "too many, or the number",
    r"go(es)? on": "continue",
    r"(?<!to )runs? on(?= *[;,.:|])": "continue",
    r"for want of": "without, or because there is no",
    r"cannot be meant": "is invalid",
    r"(?<!there )(is|are|was|were) no (?!longer\b|more\b|less\b|other\b)\w+": "is not a ...",
    r"forthwith|thereof|therein|whence|wherein|whereupon|whilst": "plain words",
}
"""Patterns, and what to write instead."""

PAGES = [
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern))
]
PROGRAMS = [
    path
    for directory in ("gpu_launcher", "hydra_plugins", "examples")
    for path in sorted((ROOT / directory).rglob("*.py"))
]


def findings(text: str) -> list[str]:
    return [
        f"{found.group()!r} in {text[max(0, found.start() - 40) : found.end() + 40]!r}: write {instead}"
        for pattern, instead in INSTEAD.items()
        for found in re.finditer(rf"\b({pattern})(?!\w)", text, flags=re.IGNORECASE | re.MULTILINE)
    ]


def texts(program: Path) -> Iterator[str]:
    """Docstrings, which are also the help of commands, options and messages."""
    for node in ast.walk(ast.parse(program.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_are_plain_english(path: Path) -> None:
    assert findings(path.read_text()) == []


def test_help_options_and_messages_are_plain_english() -> None:
    assert [f"{path}: {one}" for path in PROGRAMS for text in texts(path) for one in findings(text)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2 GPUs not to be had", 1),
        ("'x' is no whole number", 1),
        ("There is no GPU, and there are no jobs.", 0),
        ("It is no longer used.", 0),
        ("running jobs go on, the others run on; mend that", 3),
        ("Recommend machines to run on.", 0),
    ],
)
def test_the_check_finds_what_it_should(text: str, found: int) -> None:
    assert len(findings(text)) == found
