"""Tables as the benchmarks print them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table


def new_table(title: str, columns: tuple[str, ...]) -> Table:
    """An empty table, whose first column is text."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def figures(*values: float) -> tuple[str, ...]:
    """Three digits that count."""
    return tuple(f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}" for value in values)


def judge(targets: Iterable[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """Compare what was measured with what is to be reached: description, limit, and value, which may not exceed it."""
    return [
        {"target": what, "limit": limit, "measured": value, "reached": value <= limit} for what, limit, value in targets
    ]


def show_targets(console: Console, judged: list[dict[str, Any]]) -> None:
    """Print the result of `judge`."""
    made = new_table("targets", ("what", "at most", "measured", ""))
    for row in judged:
        verdict = "[green]reached[/green]" if row["reached"] else "[red]missed[/red]"
        made.add_row(row["target"], *figures(row["limit"], row["measured"]), verdict)
    console.print(made)


def show_machine(console: Console, about: dict[str, Any]) -> None:
    """Print the result of `machine.describe`."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    console.print(
        f"{about['date']}: {about['cores']} cores, {about['memory_gib']} GiB, Linux {about['kernel']}, "
        f"Python {about['python']}, load {' '.join(map(str, about['load_average']))}\n{versions}",
        highlight=False,
    )
