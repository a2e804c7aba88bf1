"""`gpu-launcher guide`: a page for coding agents."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
def guide() -> None:
    """Print a guide for coding agents and scripts.

    One page of Markdown: how to check the machine, run commands and many jobs without blocking, read results as JSON,
    and steer. The same page as docs/guide.md.

    Examples:

    \b
      gpu-launcher guide
      gpu-launcher guide >> AGENTS.md
    """
    # guide.md is a symbolic link to docs/guide.md. The wheel contains a copy.
    print(Path(__file__).with_name("guide.md").read_text(encoding="utf-8"), end="")
