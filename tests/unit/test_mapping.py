"""The pure parts of `gpu-launcher map`: placeholders, grids, records, values."""

from __future__ import annotations

import csv
import io
import json
import math
import pickle
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_launcher.cli.mapping.grid import Grid, read_grid
from gpu_launcher.cli.mapping.record_reader import LONGEST, Bad, Record, RecordReader
from gpu_launcher.cli.mapping.run_process import last_object
from gpu_launcher.cli.mapping.template import GPU, Template
from gpu_launcher.cli.mapping.values import Written, digest, text, to_json, words
from gpu_launcher.errors import OptionError, UsageError

# Placeholders


def filled(*words: str, shell: bool = False, **params: Any) -> list[str]:
    return Template.parse(words, shell=shell).fill(params, 7, "2,3")


def test_placeholders_become_parameters() -> None:
    assert filled("a", "{lr}", "--x={lr},{n}", lr=0.1, n="b c") == ["a", "0.1", "--x=0.1,b c"]
    assert filled("{index}", "{gpu}") == ["7", "2,3"]
    assert filled("a", "{json}", lr=0.001, s='"é') == ["a", '{"lr": 0.001, "s": "\\"é"}']
    assert filled("a", "", "{{lr}}", "{{{lr}}}", lr=1) == ["a", "", "{lr}", "{1}"]
    assert filled("{model.lr}", **{"model.lr": 1}) == ["1"]


def test_values_that_are_no_text_are_written_as_json_has_them() -> None:
    values = {"a": True, "b": None, "c": [1, "x"], "d": {"e": 0.5}, "f": math.inf, "g": Written.read("1e-3")}
    words = [f"{{{name}}}" for name in values]
    assert filled(*words, **values) == ["true", "null", '[1, "x"]', '{"e": 0.5}', "Infinity", "1e-3"]
    assert json.loads(filled("{json}", **values)[0]) == {**values, "g": 0.001}


def test_flags_are_a_name_and_a_value_each() -> None:
    assert filled("a", "{flags}", lr=0.1, name="", s="b c") == ["a", "--lr", "0.1", "--name", "", "--s", "b c"]
    assert filled("{flags}", yes=True, no=False, nothing=None, text="true") == ["--yes", "--text", "true"]
    assert filled("{flags}", n=-1, s="--help") == ["--n=-1", "--s=--help"]


@pytest.mark.parametrize(
    ("words", "shell", "problem"),
    [
        ([], False, "there is no command"),
        (["python", "a.py"], False, "no placeholder"),
        (["{{json}}"], False, "no placeholder"),
        (["awk", "{print {x}}"], False, "without its partner"),
        (["a", "x}"], False, "without its partner"),
        (["--x={flags}"], False, "a word of its own"),
        (["echo '{x}'"], True, "stands between quotes (')"),
        (['echo "a', '{x}"'], True, 'stands between quotes (")'),
        (['echo "$(echo "{x}")"'], True, 'stands between quotes (")'),
        (["echo `{x}`"], True, "stands between backquotes (`)"),
        (['echo "`{x}`"'], True, "stands between backquotes (`)"),
        (["echo # {x}"], True, "stands in a comment"),
        (["echo $(( {x} + 1 ))"], True, "stands in arithmetic"),
        (['echo "$((1 + ({x})))"'], True, "stands in arithmetic"),
        (["(( {x} ))"], True, "stands in arithmetic"),
        (["echo ${x}"], True, "stands behind a $: write ${{NAME}}"),
        (["cat <<EOF\n{x}\nEOF"], True, "stands behind <<"),
        (["cat <<-'EOF'\n{x}\nEOF"], True, "stands behind <<"),
        (["echo $'it\\'s'; echo {x}"], True, "stands behind $'...'"),
        (["echo \\{x}"], True, "stands behind a backslash"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(words: list[str], shell: bool, problem: str) -> None:
    with pytest.raises(UsageError) as refused:
        Template.parse(words, shell=shell)
    assert problem in str(refused.value)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


def test_parameters_have_to_fit() -> None:
    template = Template.parse(["{lr}", "{index}"])
    assert template.misfit({"lr": 1, "n": 2}) is None
    assert template.misfit({"n": 2, "m": 1}) == (
        "{lr} in the command names no parameter; there are m, n (for plain braces write {{ and }})"
    )
    assert "there are none" in (template.misfit({}) or "")
    assert "could be the parameter index" in (template.misfit({"lr": 1, "index": 2}) or "")
    assert Template.parse(["{json}"]).misfit({"index": 2, "a": "\0"}) is None, "it is not needed, and JSON can have it"
    assert "null character" in (template.misfit({"lr": "a\0b"}) or "")
    assert "null character" in (Template.parse(["{flags}"]).misfit({"a": "\0"}) or "")


texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=20)


@given(texts, texts, texts)
@settings(max_examples=300, deadline=None)
def test_any_word_comes_through_when_its_braces_are_doubled(before: str, value: str, after: str) -> None:
    def doubled(word: str) -> str:
        return word.replace("{", "{{").replace("}", "}}")

    assert filled("a", f"{doubled(before)}{{x}}{doubled(after)}", x=value) == ["a", f"{before}{value}{after}"]


@given(st.lists(texts, min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_values_arrive_intact_through_a_shell(values: list[str]) -> None:
    params = {f"p{number}": value for number, value in enumerate(values)}
    words = ["printf", "'%s\\0'", *[f"{{{name}}}" for name in params], "{json}", "'it''s'", "$((1+1))"]
    command = Template.parse(words, shell=True).fill(params, 0, "")
    done = subprocess.run(command, capture_output=True, check=True)
    *arrived, as_json, quoted, computed, _ = done.stdout.decode().split("\0")
    assert arrived == values
    assert json.loads(as_json) == params
    assert (quoted, computed) == ("its", "2")


def test_a_dry_run_shows_what_a_shell_would_be_given() -> None:
    params = {"s": "a b", "n": 1}
    assert Template.parse(["x", "{s}", "{gpu}", "--n={n}"]).line(params, 0, GPU) == "x 'a b' {gpu} --n=1"
    assert Template.parse(["x {s} | y {gpu}"], shell=True).line(params, 0, GPU) == "x 'a b' | y {gpu}"


# Grids


def test_a_grid_is_written_as_hydra_writes_sweeps() -> None:
    grid = read_grid(["lr=1e-3,1e-4", "n=range(1,4)", "s='a, b',c", "t=true,null", "l=[1,'x'],{y:2}", "e="])
    assert dict(grid.axes) == {
        "lr": (0.001, 0.0001),
        "n": (1, 2, 3),
        "s": ("a, b", "c"),
        "t": (True, None),
        "l": ([1, "x"], {"y": 2}),
        "e": ("",),
    }
    assert len(grid) == 2 * 3 * 2 * 2 * 2


def test_the_last_parameter_varies_fastest_and_no_combination_is_held() -> None:
    grid = read_grid(["a=1,2", "b=x,y,z"])
    assert [tuple(grid[index].values()) for index in range(len(grid))] == [
        (1, "x"), (1, "y"), (1, "z"), (2, "x"), (2, "y"), (2, "z")
    ]  # fmt: skip
    assert list(grid[0]) == ["a", "b"]
    wide = Grid(tuple((f"p{number}", tuple(range(1000))) for number in range(4)))
    assert list(wide[len(wide) - 1].values()) == [999] * 4


@pytest.mark.parametrize(
    ("given_", "problem"),
    [
        (["lr"], "is not NAME=VALUES"),
        (["lr=interval(0,1)"], "a grid needs single values"),
        (["lr=glob(*)"], "a grid needs single values"),
        (["+lr=1"], "without +"),
        (["~lr=1"], "without +"),
        (["a@b=1"], "without +"),
        (["lr=1", "lr=2"], "lr is given twice"),
        (["lr=("], "is not NAME=VALUES"),
        (["lr=range(1,1)"], "has no value"),
        ([f"p{number}=range(10000)" for number in range(4)], "combinations"),
    ],
)
def test_what_is_no_grid_is_refused(given_: list[str], problem: str) -> None:
    with pytest.raises(OptionError, match=r".") as refused:
        read_grid(given_)
    assert refused.value.option == "param"
    assert problem in str(refused.value)


# Records


def read(data: bytes, *, of_csv: bool = False, pieces: int = 1 << 20) -> list[Record | Bad]:
    reader = RecordReader(of_csv=of_csv)
    found = [one for at in range(0, len(data), pieces) for one in reader.feed(data[at : at + pieces])]
    return [*found, *reader.end()]


def test_json_lines_are_read_and_bad_ones_named() -> None:
    data = b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": }\n[1]\n\xff\n{"b": "\\u00e9"}\n{"c": 1'
    for pieces in (1, 3, 1000):
        assert read(data, pieces=pieces) == [
            Record(1, {"a": 1}),
            Bad(3, "is not JSON: Expecting value at column 7"),
            Bad(4, 'is not a JSON object, such as {"lr": 0.1}, but [1]'),
            Bad(5, "is not UTF-8"),
            Record(6, {"b": "é"}),
            Bad(7, "is not JSON: Expecting ',' delimiter at column 8; the input ends in the middle of it"),
        ]
    assert read(b'{"a": 1}') == [Record(1, {"a": 1})], "the last line needs no end"
    assert read(b"") == []
    (deep,) = read(b"[" * 100_000)
    assert isinstance(deep, Bad)


def test_csv_has_numbers_and_everything_else_is_text() -> None:
    data = b'a,b\r\n1,x\n1e-3,"y, ""z""\nw"\n\n007,true\n1.10,-0\n1e999,\n'
    for pieces in (1, 5, 1000):
        found = read(data, of_csv=True, pieces=pieces)
        assert [(one.line, one.params) for one in found if isinstance(one, Record)] == [
            (2, {"a": 1, "b": "x"}),
            (3, {"a": 0.001, "b": 'y, "z"\nw'}),
            (6, {"a": "007", "b": "true"}),
            (7, {"a": 1.1, "b": "-0"}),
            (8, {"a": "1e999", "b": ""}),
        ]
    assert [text(one.params["a"]) for one in found if isinstance(one, Record)] == ["1", "1e-3", "007", "1.10", "1e999"]


def test_bad_csv_is_named() -> None:
    assert read(b"a,b\n1\n1,2,3\n1,2\n", of_csv=True) == [
        Bad(2, "has 1 fields, and the first line names 2"),
        Bad(3, "has 3 fields, and the first line names 2"),
        Record(4, {"a": 1, "b": 2}),
    ]
    assert read(b'a,b\n1,"2\n3,4\n', of_csv=True) == [Bad(2, "has a quote that is never closed")]
    assert read(b'a\n"x"y\n1\n', of_csv=True) == [Bad(2, "is not CSV: ',' expected after '\"'"), Record(3, {"a": 1})]
    for names in (b"a,a\n1,2\n", b"a,\n1,2\n", b"\xff,b\n1,2\n"):
        (bad,) = read(names, of_csv=True)
        assert isinstance(bad, Bad)
        assert bad.all, "nothing after it means anything"


def test_a_record_without_an_end_is_not_held() -> None:
    reader = RecordReader(of_csv=False)
    for _ in range(LONGEST // 2**20 + 2):
        assert list(reader.feed(b"x" * 2**20)) == []
        assert len(reader._held) <= LONGEST + 2**20
    assert list(reader.feed(b'\n{"a": 1}\n')) == [Bad(1, "is longer than 16 MiB"), Record(2, {"a": 1})]
    of_csv = RecordReader(of_csv=True)
    assert list(of_csv.feed(b'a\n"')) == []
    found = [one for _ in range(LONGEST // 2**20 + 2) for one in of_csv.feed((b"x" * 1023 + b"\n") * 2**10)]
    (bad,) = [one for one in found if isinstance(one, Bad) and one.all]
    assert "not closed" in bad.problem


cells = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=8)


@given(st.lists(st.lists(cells, min_size=2, max_size=2), max_size=8), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_what_csv_writes_is_read_again_however_it_arrives(rows: list[list[str]], pieces: int) -> None:
    written = io.StringIO()
    csv.writer(written, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *rows])
    found = read(written.getvalue().encode(), of_csv=True, pieces=pieces)
    assert [[text(value) for value in one.params.values()] for one in found if isinstance(one, Record)] == rows


# Values


def test_json_is_on_one_line_whoever_reads_lines() -> None:
    value = {"a": "\x85\u2028\u2029\n\r\x0b\x0c\x1c\\u2028 é", "b": "\ud800"}
    for part in (value, {"a": value["a"]}):
        assert len(to_json(part).splitlines()) == 1
        assert json.loads(to_json(part)) == part


def test_digests_tell_combinations_apart() -> None:
    assert words({"learning_rate": 0.001, "s": "a b"}) == ["learning_rate=0.001", "s=a b"]
    assert digest({"a": 1}) != digest({"a": "1"})
    assert digest({"a": Written.read("1e-3")}) == digest(json.loads(json.dumps({"a": 0.001})))


def test_the_last_json_object_counts() -> None:
    assert last_object(b'{"a": 1}\nnot\n{"b": 2}\nepoch done\n5\n{bad\n') == {"b": 2}
    assert last_object(b"100\n") is None
    assert last_object(b"") is None
