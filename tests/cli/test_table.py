"""Tests that tables fit any given width, and are complete without one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from gpu_launcher.cli.render import StatusText
from gpu_launcher.cli.table import Column, Row, cut, lay_out, plain

COLUMNS = (Column("NAME"), Column("SIZE", right=True, optional=2), Column("USER", optional=1), Column("COMMAND"))
WORDS = st.text(st.characters(categories=("L", "N", "P")), max_size=30)
ROWS = st.lists(
    st.builds(Row, st.tuples(st.text("ab", max_size=6), st.text("12", max_size=4), st.text("xy", max_size=6), WORDS))
    | st.builds(Row, st.tuples(st.text("ab", max_size=6)), st.tuples(WORDS, st.just("red")), st.integers(0, 1)),
    min_size=1,
    max_size=8,
)


@given(ROWS, st.integers(40, 120), st.booleans())
def test_no_line_is_wider_than_the_terminal(rows: list[Row], width: int, one_line_each: bool) -> None:
    for line in lay_out(COLUMNS, rows, width, one_line_each=one_line_each):
        assert cell_len(plain(line)) <= width


@given(ROWS)
def test_without_a_width_every_row_has_one_line_with_all_its_cells(rows: list[Row]) -> None:
    lines = [plain(line) for line in lay_out(COLUMNS, rows, None)]
    assert len(lines) == len(rows) + 1
    assert lines[0].split() == ["NAME", "SIZE", "USER", "COMMAND"]
    for row, line in zip(rows, lines[1:], strict=True):
        assert all((cell or "-") in line for cell in row.cells)


def test_columns_without_content_go_then_optional_ones_then_the_end_of_the_last() -> None:
    rows = [Row(["one", "12", "", "a long command line"]), Row(["three", "1", "", "b"])]
    assert [plain(line) for line in lay_out(COLUMNS, rows, 60)] == [
        "NAME   SIZE  COMMAND",
        "one      12  a long command line",
        "three     1  b",
    ]
    assert [plain(line) for line in lay_out(COLUMNS, rows, 24)] == [
        "NAME   COMMAND",
        "one    a long command l\u2026",
        "three  b",
    ]


def test_what_stands_in_place_of_columns_is_wrapped_below_itself() -> None:
    rows = [
        Row(["one", "12", "me", "x"]),
        Row(["one", "12"], ("it is used by somebody else for a while", "red"), known=1),
    ]
    assert [plain(line) for line in lay_out(COLUMNS, rows, 36)] == [
        "NAME  SIZE  USER  COMMAND",
        "one     12  me    x",
        "        12  it is used by somebody",
        "            else for a while",
    ]


def test_wide_characters_are_counted_as_terminals_show_them() -> None:
    assert cut("\u6f22\u5b57\u6f22\u5b57", 5) == "\u6f22\u5b57\u2026"


@given(st.integers(0, 20), st.integers(0, 60), st.integers(0, 60), st.integers(0, 60), st.integers(3, 60))
def test_a_report_is_never_higher_than_the_terminal(
    head: int, devices: int, queue: int, nodes: int, height: int
) -> None:
    report = StatusText(
        [[("h", "")]] * (head + 1), [[("d", "")]] * (devices + 1), [[("q", "")]] * (queue + 1), [[("n", "")]] * nodes
    )
    lines = report.within(height)
    assert len(lines) <= height
    assert len(report.lines()) > height or lines == report.lines()
