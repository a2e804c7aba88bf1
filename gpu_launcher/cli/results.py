"""`gpu-launcher results`: a table of what the jobs of a sweep returned."""

from __future__ import annotations

from pathlib import Path

import click

from gpu_launcher.cli import options


@click.command()
@options.sweep
@options.value(
    "--sort",
    "COLUMN",
    "Column to sort by: the lowest first, or with -COLUMN the highest first. Missing values come last. Default: "
    "number.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="NUMBER",
    help="Number of jobs to show. Without --sort: the best, if it is known whether low or high values are best.",
)
@options.value("--pivot", "NAME,NAME", "Show the mean value for each combination of two columns, such as lr,seed.")
@options.value("--value", "COLUMN", "Value to pivot, to plot, or to show first in --html. Default: the only one.")
@options.value("--plot", "FILE", "Draw the value by parameter and over time into FILE.html, FILE.png or FILE.svg.")
@options.value("--html", "FILE", "Write the sweep's page into FILE.html: table, failures and charts.")
@click.option("--csv", "how", flag_value="csv", help="Print CSV.")
@click.option("--json", "how", flag_value="json", help="Print JSON; `gpu-launcher guide results` describes it.")
@click.option("--jsonl", "how", flag_value="jsonl", help="Print a line of JSON for each job.")
def results(
    directory: Path | None,
    sort: str | None,
    top: int | None,
    pivot: str | None,
    value: str | None,
    plot: str | None,
    html: str | None,
    how: str | None,
) -> None:
    """Show what the jobs of a sweep or a map returned.

    DIR is the directory of a sweep (hydra.sweep.dir) or of a map (--dir), by default of the newest one below the
    current directory. A row for each job has the parameters that differ between the jobs, and the values: numbers that
    a Hydra job returns, or the JSON that a map's command prints. It can be shown while the sweep runs.

    Examples:

    \b
      gpu-launcher results
      gpu-launcher results multirun/2026-11-21/09-00-00 --sort value --top 10
      gpu-launcher results --sort -accuracy --csv > results.csv
      gpu-launcher results --pivot lr,seed
      gpu-launcher results --plot results.html
      gpu-launcher results --html report.html
    """
    import gc

    from gpu_launcher.cli.printing import print_json, print_jsonl, print_lines, print_text, terminal_width
    from gpu_launcher.cli.result_lines import cells, lines, pivot_lines, rows_to_json, to_json
    from gpu_launcher.errors import OptionError
    from gpu_launcher.jobs.pivot import pivoted
    from gpu_launcher.jobs.result_table import load_results

    if plot is not None and (pivot is not None or how is not None):
        raise OptionError("plot", "cannot be combined with --pivot, --csv, --json or --jsonl")
    if html is not None and any(given is not None for given in (top, pivot, plot, how)):
        raise OptionError("html", "cannot be combined with --top, --pivot, --plot, --csv, --json or --jsonl")
    if value is not None and plot is None and pivot is None and html is None:
        raise OptionError("value", "is for --html, --pivot and --plot only")
    gc.disable()  # thousands of rows are made and kept: searching them for garbage would be a fifth of the time
    if html is not None:
        from gpu_launcher.cli.result_page import write_page

        write_page(directory, Path(html), sort, value)
        print_lines([[(html, "")]])
        return
    table = load_results(directory)
    total = len(table)
    if sort is not None:
        table = table.sorted_by(sort)
    elif top is not None:
        table = table.best_first()
    if top is not None:
        table = table.top(top)
    if plot is not None:
        from gpu_launcher.cli.result_plot import draw

        draw(table, Path(plot), value)
        print_lines([[(plot, "")]])
    elif pivot is not None:
        found = pivoted(table, pivot, value)
        match how:
            case "csv":
                print_text(found.to_csv())
            case "json":
                print_json(cells(found))
            case "jsonl":
                print_jsonl(cells(found))
            case _:
                print_lines(pivot_lines(found, terminal_width()))
    else:
        match how:
            case "csv":
                print_text(table.to_csv())
            case "json":
                print_json(to_json(table))
            case "jsonl":
                print_jsonl(rows_to_json(table))
            case _:
                print_lines(lines(table, terminal_width(), total))
