"""`gpu-launcher guide`: the documentation, for coding agents and for those who installed the package alone."""

from __future__ import annotations

from pathlib import Path

import click

# Each page is a symbolic link into docs/. The wheel contains copies.
PAGES = Path(__file__).with_name("pages")


def _pages() -> list[str]:
    return sorted(path.stem for path in PAGES.glob("*.md"))


def _complete_pages(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in _pages() if name.startswith(incomplete)]


@click.command()
@click.argument("page", default="guide", metavar="[PAGE]", shell_complete=_complete_pages)
def guide(page: str) -> None:
    """Print a guide for coding agents, or another page of the documentation.

    The guide is one page of Markdown: how to check the machine, run commands and many jobs without blocking, read
    results as JSON, and steer. PAGE names another page, such as options, nodes or faq. A name that does not exist
    prints the list of pages.

    Examples:

    \b
      gpu-launcher guide
      gpu-launcher guide >> AGENTS.md
      gpu-launcher guide nodes | less
      gpu-launcher guide faq | grep -i 'set aside'
    """
    pages = _pages()
    if page not in pages:
        raise click.BadParameter(f"must be one of {', '.join(pages)}, got {page!r}", param_hint="PAGE")
    print((PAGES / f"{page}.md").read_text(encoding="utf-8"), end="")
