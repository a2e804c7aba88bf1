"""Draws the values of a sweep: by each parameter that differs, and over time. With plotly (HTML) or matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from gpu_launcher.errors import OptionError
from gpu_launcher.jobs.result_panels import Panel, panels
from gpu_launcher.jobs.result_table import ResultTable

ACROSS = 3
"""Panels in a row."""
PANEL = (4.2, 3.2)
"""Width and height of a panel, in inches."""


def draw(table: ResultTable, file: Path, value: str | None) -> None:
    """Draw a value of the jobs into a file. Raises OptionError if that is not possible."""
    savers: dict[str, tuple[str, Callable[[Sequence[Panel], str, Path], None]]] = {
        ".html": ("plotly", _save_html),
        ".png": ("matplotlib", _save_picture),
        ".svg": ("matplotlib", _save_picture),
    }
    if file.suffix.lower() not in savers:
        raise OptionError("plot", f"{file} does not end in {', '.join(savers)}")
    library, save = savers[file.suffix.lower()]
    name, shown_panels = panels(table, value)
    if find_spec(library) is None:
        raise OptionError("plot", f"{file.suffix} needs {library}, which is not installed: pip install {library}")
    try:
        save(shown_panels, name, file)
    except OSError as error:
        raise OptionError("plot", f"{file} cannot be written: {error.strerror}") from error


def _save_html(panels: Sequence[Panel], name: str, file: Path) -> None:
    from plotly.graph_objects import Scatter  # type: ignore[import-untyped, import-not-found, unused-ignore]
    from plotly.subplots import make_subplots  # type: ignore[import-untyped, import-not-found, unused-ignore]

    rows = -(-len(panels) // ACROSS)
    figure = make_subplots(rows, min(ACROSS, len(panels)))
    for place, panel in enumerate(panels):
        at = {"row": place // ACROSS + 1, "col": place % ACROSS + 1}
        texts = [_escaped(label) for label in panel.labels]
        points = Scatter(
            x=panel.x, y=panel.y, text=texts, mode="markers", showlegend=False, marker={"color": "#1f77b4"}
        )
        figure.add_trace(points, **at)
        figure.update_xaxes(title_text=_escaped(panel.title), type="log" if panel.is_log else None, **at)
        figure.update_yaxes(title_text=_escaped(name), **at)
    figure.update_layout(height=round(PANEL[1] * 96 * rows), template="plotly_white")
    figure.write_html(file)


def _escaped(text: str) -> str:
    """A text for plotly, which reads some HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _save_picture(panels: Sequence[Panel], name: str, file: Path) -> None:
    from matplotlib.figure import Figure  # type: ignore[import-untyped, import-not-found, unused-ignore]

    rows, across = -(-len(panels) // ACROSS), min(ACROSS, len(panels))
    figure = Figure(figsize=(PANEL[0] * across, PANEL[1] * rows), layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False)
    for one in axes.flat[len(panels) :]:
        one.remove()
    for panel, one in zip(panels, axes.flat, strict=False):
        one.plot(panel.x, panel.y, "o", alpha=0.7)
        one.set_xlabel(panel.title, parse_math=False)
        one.set_ylabel(name, parse_math=False)
        if panel.is_log:
            one.set_xscale("log")
    figure.savefig(file, dpi=150)
