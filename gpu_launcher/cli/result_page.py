"""Writes a sweep's page into a file, for `gpu-launcher results --html`."""

from __future__ import annotations

from pathlib import Path

from gpu_launcher.cli.streams import tell
from gpu_launcher.errors import OptionError, StorageError
from gpu_launcher.jobs.manifest import read_chosen_sweep
from gpu_launcher.requirements import check_version
from gpu_launcher.safe_files import write_whole
from gpu_launcher.studies.report_curves import read_curves


def write_page(directory: Path | None, file: Path, sort: str | None, value: str | None) -> None:
    """Write the page of a sweep. A file that exists is replaced.

    Raises OptionError, ManifestError, and UnsupportedVersionError if jinja2 is not installed.
    """
    if file.suffix.lower() != ".html":
        raise OptionError("html", f"{file} does not end in .html")
    check_version("jinja2")

    from gpu_launcher.web.catalogue import SweepReader
    from gpu_launcher.web.charts import report_charts
    from gpu_launcher.web.static_page import static_page

    chosen, _ = read_chosen_sweep(directory)
    sweep = SweepReader(chosen.resolve()).read_whole()
    try:
        curves, has_more = read_curves(sweep.directory)
    except StorageError as error:
        curves, has_more = [], False
        tell(f"the page has no reports: {error}")
    text = static_page(sweep, report_charts(sweep.table, curves, are_all=not has_more), sort=sort, value=value)
    try:
        write_whole(file, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise OptionError("html", f"{file} cannot be written: {error.strerror}") from error
