"""Prints lines and JSON on stdout, for terminals and pipes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gpu_launcher.cli.streams import printable
from gpu_launcher.cli.table import Line, plain
from gpu_launcher.text import CONTROL

if TYPE_CHECKING:
    from rich.text import Text


def terminal_width() -> int | None:
    """The width of stdout in columns; None if it is not a terminal."""
    if not sys.stdout.isatty():
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except OSError:
        return 80


def print_lines(lines: Iterable[Line]) -> None:
    """Print lines; in colour if stdout is a terminal."""
    if not sys.stdout.isatty():
        for line in lines:
            print(printable(plain(line), sys.stdout))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for line in lines:
            console.print(to_text(line), soft_wrap=True)
    sys.stdout.flush()


def to_text(line: Line) -> Text:
    from rich.text import Text

    text = Text.assemble(*((CONTROL.sub("?", piece), style) for piece, style in line))
    text.rstrip()
    return text


def print_text(text: str) -> None:
    """Print text as it is. It must have no control characters but newlines."""
    sys.stdout.write(printable(text, sys.stdout))
    sys.stdout.flush()


def print_jsonl(values: Iterable[object]) -> None:
    for value in values:
        print(json.dumps(value))
    sys.stdout.flush()


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
    sys.stdout.flush()
