"""The table of results: what varies, its columns, sorting, the best job, pivots, CSV. From manifests made here."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher import load_results
from gpu_launcher.cli.result_lines import lines, pivot_lines, to_json
from gpu_launcher.cli.result_plot import draw
from gpu_launcher.cli.table import plain, width_of
from gpu_launcher.errors import ManifestError, OptionError, UnsupportedVersionError
from gpu_launcher.jobs.events import JobEnded, JobStarted, Outcome
from gpu_launcher.jobs.figures import Figures
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST
from gpu_launcher.jobs.pivot import pivoted
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.jobs.result_panels import panels
from gpu_launcher.jobs.result_table import ResultTable, params_of, typed, write_csv, write_results
from gpu_launcher.model import Device, DeviceKind

GPU = Device("GPU-1", 1, "a GPU", DeviceKind.GPU)
ELSEWHERE = Device("GPU-2", 0, "a GPU", DeviceKind.GPU, node="gpu2")


def sweep(
    directory: Path,
    specs: Sequence[Any],
    values: Mapping[int, dict[str, Any]],
    *,
    directions: Sequence[str] = (),
    objectives: Sequence[str] = (),
    anew: bool = False,
    outcomes: Mapping[int, Outcome] = {},
    device: Device = GPU,
) -> ResultTable:
    """A sweep whose jobs ran for 2 s, one after another. Jobs without an outcome or values wait."""
    clock = iter(range(1000, 10_000))
    jobs = [Job(number, "", spec) for number, spec in enumerate(specs)]
    recorder = Recorder(
        directory,
        jobs,
        "train.py",
        directions=directions,
        objectives=objectives,
        anew=anew,
        wall_clock=lambda: 2.0 * next(clock),
    )
    for job in jobs:
        number = job.number
        if number in values or number in outcomes:
            log = str(directory / str(number) / "job.log")
            figures = Figures(values.get(number, {}), 2**30 + number, 5 * 2**30)
            outcome = outcomes.get(number, Outcome.COMPLETED)
            message = "raised ValueError" if outcome is Outcome.FAILED else None
            recorder.handle(JobStarted(0.0, number, "", (device,), log))
            ended = JobEnded(0.0, number, "", (device,), outcome, 2.0, message, log, figures=figures)
            recorder.handle(ended)
    return load_results(directory)


def grid(directory: Path) -> ResultTable:
    specs = [[f"+lr={lr}", f"seed={seed}", "model=big"] for lr in ("1e-2", "1e-3") for seed in (1, 2)]
    return sweep(directory, specs, {0: {"value": 0.5}, 1: {"value": 0.25}, 2: {"value": 2}, 3: {"value": math.nan}})


def numbers(table: ResultTable) -> list[int]:
    return [row.number for row in table]


def test_row_has_all_that_is_known_about_a_job(tmp_path: Path) -> None:
    table = sweep(tmp_path, [["lr=1e-3"], ["lr=2"]], {0: {"loss": 0.5}}, outcomes={1: Outcome.FAILED}, device=ELSEWHERE)
    first, second = table
    assert (first.number, first.outcome, first.params, first.values) == (0, "completed", {"lr": 0.001}, {"loss": 0.5})
    assert (first.duration, first.attempts, first.message) == (2.0, 1, None)
    assert (first.peak_memory, first.peak_device_memory) == (2**30, 5 * 2**30)
    assert (first.devices, first.node, first.directory) == (("gpu2 GPU 0",), "gpu2", str(tmp_path / "0"))
    assert (second.outcome, second.values, second.message) == ("failed", {}, "raised ValueError")
    assert table[1] is second
    assert table[-1:] == (second,)


def test_job_cancelled_before_it_had_devices_has_no_memory_and_no_directory(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, [Job(number, "", []) for number in range(3)], "train.py")
    figures = Figures(peak_memory=2**26)
    logs = [str(tmp_path / str(number) / "job.log") for number in range(3)]
    recorder.handle(JobStarted(0.0, 2, "", (), logs[2]))
    for number, outcome in enumerate((Outcome.CANCELLED, Outcome.FAILED, Outcome.CANCELLED)):
        recorder.handle(JobEnded(0.0, number, "", (), outcome, None, "why", logs[number], figures=figures))
    prepared, failed, ran = load_results(tmp_path)
    assert (prepared.outcome, prepared.peak_memory, prepared.directory) == ("cancelled", None, None)
    assert (failed.peak_memory, failed.directory) == (2**26, str(tmp_path / "1")), "its log says why"
    assert (ran.peak_memory, ran.directory) == (2**26, str(tmp_path / "2"))


def test_parameters_that_differ_are_columns(tmp_path: Path) -> None:
    table = grid(tmp_path)
    assert (table.varying, table.value_names) == (("lr", "seed"), ("value",))
    assert [column.name for column in table.columns][6:9] == ["lr", "seed", "value"]


def test_all_parameters_of_the_only_job_are_columns(tmp_path: Path) -> None:
    assert sweep(tmp_path, [{"lr": 1, "name": "a"}], {}).varying == ("lr", "name")


def test_parameter_that_one_job_lacks_differs(tmp_path: Path) -> None:
    table = sweep(tmp_path, [["lr=1"], ["lr=1", "seed=null"], "not a list", [3]], {})
    assert table.varying == ("lr", "seed")
    assert [row.params for row in table] == [{"lr": 1}, {"lr": 1, "seed": None}, {}, {}]


def test_columns_with_the_name_of_another_say_what_they_are(tmp_path: Path) -> None:
    table = sweep(tmp_path, [["outcome=1", "loss=1"], ["outcome=2", "loss=2"]], {0: {"loss": 3, "node": 4}})
    assert {*table.param_columns, *table.value_columns} == {"params.outcome", "loss", "values.loss", "values.node"}
    assert numbers(table.sorted_by("-params.outcome")) == [1, 0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("-1_000", -1000), ("007", "007"), ("1e-3", 0.001), (".5", 0.5), ("inf", math.inf), ("true", True),
        ("Null", None), ("'a b'", "a b"), ('"7"', "7"), ("", ""), ("[1,2]", "[1,2]"), ("3x", "3x"),
        ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_override_is_read_as_hydra_reads_it(text: str, value: object) -> None:
    assert typed(text) == value
    assert type(typed(text)) is type(value)


def test_secrets_are_hidden() -> None:
    assert params_of(["+db.password=hunter2", "seed=1"]) == {"db.password": "***", "seed": 1}
    assert params_of({"api_key": "abcdef", "n": 3}) == {"api_key": "***", "n": 3}


def test_what_is_missing_or_nan_is_sorted_last(tmp_path: Path) -> None:
    table = sweep(
        tmp_path, [[f"n={n}"] for n in range(5)], {0: {"v": 2}, 1: {"v": math.nan}, 2: {"v": 1.5}, 4: {"v": 3}}
    )
    assert numbers(table.sorted_by("v")) == [2, 0, 4, 1, 3]
    assert numbers(table.sorted_by("-v")) == [4, 0, 2, 1, 3]
    assert numbers(table.sorted_by("-v").top(2)) == [4, 0]
    assert numbers(table.sorted_by("-number")) == [4, 3, 2, 1, 0]


def test_texts_are_sorted_after_numbers(tmp_path: Path) -> None:
    table = sweep(tmp_path, [["n=b"], ["n=2"], ["n=a"], ["n=[1]"]], {})
    assert numbers(table.sorted_by("n")) == [1, 3, 2, 0]


def test_unknown_column_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    table = grid(tmp_path)
    with pytest.raises(
        OptionError, match=r"^sort: there is no column 'loss': choose from number, .* lr, seed, value, "
    ):
        table.sorted_by("loss")
    with pytest.raises(OptionError, match=r"^sort: there is no column 'loss'"):
        table.sorted_by("-loss")


@pytest.mark.parametrize(("direction", "best"), [("minimize", 1), ("maximize", 2)])
def test_best_job_completed_with_the_best_number(tmp_path: Path, direction: str, best: int) -> None:
    values = {0: {"v": 0.5}, 1: {"v": 0.25}, 2: {"v": 2}, 3: {"v": math.nan}, 4: {"v": -9}, 5: {"v": math.inf}}
    outcomes = {4: Outcome.PRUNED, 5: Outcome.FAILED}
    specs = [[f"n={n}"] for n in range(6)]
    table = sweep(tmp_path, specs, values, directions=[direction], outcomes=outcomes)
    assert table.directions == {"v": direction}
    assert table.best is not None
    assert table.best.number == best
    assert write_results(tmp_path, best_of=range(6)) == ([f"best: {values[best]['v']}, job {best} (n={best})"], [])
    assert write_results(tmp_path) == ([], [])


def test_best_job_is_not_one_of_an_earlier_sweep_in_the_same_directory(tmp_path: Path) -> None:
    sweep(tmp_path, [["n=1"], ["n=2"], ["n=3"]], {0: {"v": 1}, 1: {"v": 2}, 2: {"v": 0}}, directions=["minimize"])
    assert write_results(tmp_path, best_of=range(2)) == (["best: 1, job 0 (n=1)"], [])
    assert write_results(tmp_path, best_of=range(5, 6)) == ([], [])


@pytest.mark.parametrize("directions", [(), ("minimize", "minimize")])
def test_nothing_is_best_where_the_direction_is_not_known(tmp_path: Path, directions: tuple[str, ...]) -> None:
    table = sweep(tmp_path, [["n=1"]], {0: {"v": 1}}, directions=directions)
    assert table.best is None
    with pytest.raises(OptionError, match=r"^top: it is not known which value is best: give --sort v "):
        table.best_first()


def test_several_values_have_no_best_job(tmp_path: Path) -> None:
    values = {0: {"values_1": 2.0}, 1: {"values_0": 1.0, "values_1": 2.0}}
    directions, objectives = ("minimize", "maximize"), ("values_0", "values_1")
    table = sweep(tmp_path, [["n=1"], ["n=2"]], values, directions=directions, objectives=objectives)
    assert table.directions == {"values_0": "minimize", "values_1": "maximize"}
    assert table.best is None
    with pytest.raises(OptionError, match=r"^top: the values are values_1, values_0: give --sort values_1 "):
        table.best_first()


def test_several_directions_say_nothing_about_values_without_their_names(tmp_path: Path) -> None:
    values = {0: {"loss": 1.0, "accuracy": 2.0}}
    assert sweep(tmp_path, [["n=1"]], values, directions=("minimize", "maximize")).directions == {}


def test_search_whose_jobs_return_something_else_has_no_best_job(tmp_path: Path) -> None:
    specs = [["n=1"], ["n=2"], ["n=3"]]
    table = sweep(tmp_path, specs, {0: {"loss": 1.0}}, directions=["minimize"], objectives=["value"])
    assert (table.best, table.directions) == (None, {})
    values = {0: {"loss": 0.0}, 1: {"value": 2.0}, 2: {"value": 1.0}}
    table = sweep(tmp_path, specs, values, directions=["minimize"], objectives=["value"])
    assert table.best is not None
    assert table.best.number == 2
    assert [row.number for row in table.best_first()] == [2, 1, 0]


def test_sweep_that_begins_anew_leaves_out_the_jobs_of_an_earlier_one(tmp_path: Path) -> None:
    values = {number: {"value": float(number)} for number in range(3)}
    sweep(tmp_path, [["n=1"], ["n=2"], ["n=3"]], values, directions=["minimize"])
    table = sweep(tmp_path, [["m=1"]], {0: {"value": 4.0}}, anew=True)
    assert [(row.number, row.params, row.values) for row in table] == [(0, {"m": 1}, {"value": 4.0})]
    assert table.directions == {}, "those were of the earlier one"


def test_texts_are_never_best(tmp_path: Path) -> None:
    assert sweep(tmp_path, [["n=1"]], {0: {"v": "low"}}, directions=("minimize",)).best is None


def test_pivot_has_the_mean_of_each_combination(tmp_path: Path) -> None:
    specs = [{"lr": lr, "seed": seed, "rest": rest} for lr in (2, 1) for seed in ("a", "b") for rest in (0, 1)]
    values = {number: {"v": float(number)} for number in range(7)}
    pivot = pivoted(sweep(tmp_path, specs, values), "lr, seed")
    assert (pivot.rows, pivot.columns, pivot.value) == ((1, 2), ("a", "b"), "v")
    assert pivot.cells[2, "a"] == (0.0, 1.0)
    assert [plain(line).split() for line in pivot_lines(pivot, None)] == [
        ["lr", "\\", "seed", "a", "b"],
        ["1", "4.5", "(2)", "6"],
        ["2", "0.5", "(2)", "2.5", "(2)"],
    ]
    assert pivot.to_csv() == "lr,a,b\n1,4.5,6.0\n2,0.5,2.5\n"


def test_mean_of_infinities_and_of_huge_values_is_shown(tmp_path: Path) -> None:
    specs = [{"a": a, "b": 1} for a in (1, 1, 2, 2)]
    values = {0: {"v": math.inf}, 1: {"v": -math.inf}, 2: {"v": 1.7e308}, 3: {"v": 1.7e308}}
    table = sweep(tmp_path, specs, values)
    assert pivoted(table, "a,outcome").to_csv() == "a,completed\n1,nan\n2,inf\n"


def test_integer_that_no_float_can_hold_has_no_mean(tmp_path: Path) -> None:
    table = sweep(tmp_path, [{"n": 1}, {"n": 10**400}], {})
    with pytest.raises(OptionError, match=r"^value: n of job 1 is not a number that a float can hold: '1000"):
        pivoted(table, "number,outcome", "n")


def test_pivot_by_lists_and_missing_values(tmp_path: Path) -> None:
    specs = [{"layers": [1, 2], "lr": None}, {"layers": [1, 2], "lr": 1}, {"layers": [3], "lr": 1}]
    pivot = pivoted(sweep(tmp_path, specs, {0: {"v": 1}, 1: {"v": 2}}), "layers,lr")
    assert (pivot.rows, pivot.columns) == (("[1, 2]",), (1, None))


@pytest.mark.parametrize(
    ("names", "value", "problem"),
    [
        ("lr", None, "pivot: give the names of two columns, such as lr,seed, not 'lr'"),
        ("lr,seed,value", None, "pivot: give the names of two columns"),
        ("lr,model", None, "pivot: there is no column 'model'"),
        ("lr,seed", "loss", "value: there is no column 'loss'"),
        ("lr,seed", "outcome", "value: outcome of job 0 is not a number: 'completed'"),
    ],
)
def test_pivot_that_cannot_be_made_is_one_line(tmp_path: Path, names: str, value: str | None, problem: str) -> None:
    with pytest.raises(OptionError) as raised:
        pivoted(grid(tmp_path), names, value)
    assert str(raised.value).startswith(problem)


def test_value_must_be_chosen_where_there_are_several_or_none(tmp_path: Path) -> None:
    specs = [["a=1", "b=1"], ["a=2", "b=2"]]
    with pytest.raises(OptionError, match=r"^value: choose from loss, acc$"):
        pivoted(sweep(tmp_path / "two", specs, {0: {"loss": 1, "acc": 2}}), "a,b")
    with pytest.raises(OptionError, match=r"^value: no job has returned a value$"):
        pivoted(sweep(tmp_path / "none", specs, {}), "a,b")


def test_csv_has_all_columns_and_no_control_characters(tmp_path: Path) -> None:
    table = sweep(tmp_path, [{"a": "x\x1b[2J\n,y"}, {"a": [1, 2]}], {0: {"v": True}, 1: {"v\x1b": "é"}})
    text = table.to_csv()
    assert "\x1b" not in text
    head, *rows = csv.reader(io.StringIO(text))
    assert head[:7] == ["number", "outcome", "duration", "attempts", "peak_memory", "peak_device_memory", "a"]
    assert head[7:9] == ["v", "v?"]
    assert [row[6:9] for row in rows] == [["x?[2J?,y", "true", ""], ["[1, 2]", "", "é"]]


def test_lines_show_no_escape_sequences(tmp_path: Path) -> None:
    hostile = "\x1b]0;title\x07x\nnumber"
    table = sweep(tmp_path, [{hostile: hostile}, {hostile: 1}], {0: {hostile: hostile}, 1: {hostile: 2}})
    for width in (None, 60):
        for line in lines(table, width):
            assert "\x1b" not in "".join(text for text, _ in line)
            assert "\n" not in "".join(text for text, _ in line)
    for line in pivot_lines(pivoted(table, f"{hostile},number", "attempts"), 80):
        assert "\x1b" not in "".join(text for text, _ in line)


def test_lines_fit_a_terminal_and_are_complete_in_a_pipe(tmp_path: Path) -> None:
    table = grid(tmp_path)
    whole = [plain(line).split() for line in lines(table, None)]
    assert whole[0] == [
        *("number", "lr", "seed", "value", "outcome"),
        *("duration", "peak_memory", "peak_device_memory", "attempts", "node", "directory"),
    ]
    facts = ["2.0", "s", "1", "GiB", "5", "GiB", "1", "-"]
    assert whole[1] == ["0", "0.01", "1", "0.5", "completed", *facts, str(tmp_path / "0")]
    narrow = [plain(line) for line in lines(table, 40)]
    assert narrow[0].startswith(str(tmp_path)[:39])
    assert max(map(len, narrow[1:])) <= 40
    assert narrow[1].split() == ["number", "lr", "seed", "value", "outcome"]


def test_title_says_that_other_jobs_are_left_out(tmp_path: Path) -> None:
    table = grid(tmp_path)
    assert plain(lines(table, 400, len(table))[0]) == f"{tmp_path}: {len(table)} jobs"
    assert plain(lines(table.top(1), 400, len(table))[0]) == f"{tmp_path}: 1 of {len(table)} jobs"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_many_and_long_parameters_do_not_make_lines_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    specs = [[f"name={'模型' * 40 * n}", *(f"parameter{place}={n}" for place in range(20))] for n in range(2)]
    values = {n: {f"value{place}": 1.5 for place in range(9)} for n in range(2)}
    _, *shown = [plain(line) for line in lines(sweep(tmp_path, specs, values), width)]
    assert max(map(width_of, shown)) <= width
    assert shown[0].split()[0] == "number"
    assert shown[0].split()[-1] == "outcome"
    assert "value0" in shown[0]
    assert ("name" in shown[0]) == (width == 200)


def test_json_has_what_the_page_documents(tmp_path: Path) -> None:
    found = json.loads(json.dumps(to_json(grid(tmp_path))))
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text().partition("## JSON")[2]
    assert {key for key in found if key != "jobs" and f"`{key}`" not in page} == set()
    assert {key for key in found["jobs"][0] if f".{key}`" not in page} == set()


def test_results_are_written_over_those_of_an_earlier_end_only(tmp_path: Path) -> None:
    table = grid(tmp_path)
    assert write_csv(table) is None
    assert write_csv(table) is None
    assert (tmp_path / "results.csv").read_text() == table.to_csv()
    (tmp_path / "results.csv").write_text("epoch,loss\n1,2\n")
    said = f"{tmp_path}/results.csv is not a table of results, so it was not overwritten: "
    assert write_csv(table) == f"{said}to print the table: gpu-launcher results {tmp_path} --csv"
    assert (tmp_path / "results.csv").read_text() == "epoch,loss\n1,2\n"


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_results_that_cannot_be_written_cost_a_line(tmp_path: Path, kind: str) -> None:
    table = grid(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("number,outcome,duration,attempts,peak_memory,peak_device_memory\n")
    make = {"directory": lambda path: path.mkdir(), "link": lambda path: path.symlink_to(elsewhere)}
    make[kind](tmp_path / "results.csv")
    problem = write_csv(table)
    assert problem is not None
    assert problem.startswith(f"{tmp_path}/results.csv cannot be written (")
    assert len(elsewhere.read_text().splitlines()) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_results_on_a_full_disk_cost_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, os.strerror(28), str(path))

    directory = tmp_path / "a sweep"
    grid(directory)
    monkeypatch.setattr("gpu_launcher.jobs.result_table.write_whole", full)
    problem = f"{directory}/results.csv cannot be written (No space left on device): "
    assert write_results(directory) == ([], [f"{problem}to print the table: gpu-launcher results '{directory}' --csv"])


def test_manifest_that_cannot_be_read_costs_the_table(tmp_path: Path) -> None:
    grid(tmp_path)
    manifest = tmp_path / DIRECTORY / MANIFEST
    manifest.unlink()
    manifest.mkdir()
    _, (line,) = write_results(tmp_path)
    assert line.startswith(f"no table of results: {manifest} cannot be read: ")


@pytest.mark.parametrize(
    "event",
    [
        {"values": [0.5]},
        {"values": {"v": [1]}},
        {"values": {"v": None}},
        {"values": {"v": 10**30}},
        {"values": {f"v{n}": 1 for n in range(65)}},
        {"values": {"v": "x" * 201}},
        {"peak_memory": -1},
        {"peak_memory": "much"},
        {"peak_device_memory": 2**64},
    ],
)
def test_end_that_no_version_writes_counts_for_nothing(tmp_path: Path, event: dict[str, Any]) -> None:
    sweep(tmp_path, [["n=1"]], {})
    with open(tmp_path / DIRECTORY / MANIFEST) as file:
        launch = json.loads(file.readlines()[1])["launch"]
    line = {"format": 1, "launch": launch, "time": 1.0, "ended": 0, "outcome": "completed", "message": None, **event}
    with open(tmp_path / DIRECTORY / MANIFEST, "a") as file:
        file.write(json.dumps(line) + "\n")
    (row,) = load_results(tmp_path)
    assert (row.outcome, row.values, row.peak_memory) == ("waiting", {}, None)


@pytest.mark.parametrize("directions", [["best"], "minimize", [1], None])
def test_directions_that_no_version_writes_count_for_nothing(tmp_path: Path, directions: object) -> None:
    sweep(tmp_path, [["n=1"]], {0: {"v": 1}})
    with open(tmp_path / DIRECTORY / MANIFEST, "a") as file:
        file.write(json.dumps({"format": 1, "launch": "a", "time": 1.0, "directions": directions}) + "\n")
    assert load_results(tmp_path).directions == {}


def test_number_of_jobs_does_not_make_lines_too_long_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job(number, "x" * 500, [f"n={number}", "x" * 500]) for number in range(1000)]
    monkeypatch.setattr("gpu_launcher.safe_files.MAX_LINE", 2**19)
    Recorder(tmp_path, jobs, "train.py").close()
    assert numbers(load_results(tmp_path)) == list(range(1000))


def test_newest_sweep_is_loaded_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ManifestError, match="no sweep below the current directory"):
        load_results()
    grid(tmp_path / "multirun" / "a")
    assert load_results().directory == Path("multirun/a")
    assert len(load_results(str(tmp_path / "multirun" / "a"))) == 4


def test_frame_of_pandas_has_the_columns_of_the_table(tmp_path: Path) -> None:
    table = grid(tmp_path)
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(UnsupportedVersionError, match=r"^pandas is not installed: `pip install 'pandas'`$"):
            table.to_pandas()
        return
    frame = table.to_pandas()
    assert list(frame["value"])[:3] == [0.5, 0.25, 2.0]
    assert [frame.index.name, *frame.columns] == [column.name for column in table.columns]


# Plots


def test_panels_show_the_value_over_time_and_by_each_parameter(tmp_path: Path) -> None:
    specs = [{"lr": lr, "opt": opt} for lr in (1e-4, 1e-1) for opt in ("sgd", "adam")]
    name, (time, *others) = panels(sweep(tmp_path, specs, {n: {"loss": n} for n in range(3)}), None)
    assert name == "loss"
    assert (time.title, time.x, time.y) == ("seconds since the start", [2.0, 6.0, 10.0], [0, 1, 2])
    by_name = {panel.title: panel for panel in others}
    assert by_name["lr"].x == [1e-4, 1e-4, 1e-1]
    assert (by_name["lr"].is_log, by_name["opt"].is_log) == (True, False)
    assert by_name["opt"].x == ["sgd", "adam", "sgd"]
    assert by_name["opt"].labels[1] == "job 1: lr=0.0001 opt=adam"


def test_integer_that_no_float_can_hold_is_drawn_as_text(tmp_path: Path) -> None:
    table = sweep(tmp_path, [{"n": 1}, {"n": 10**400}], {0: {"v": 1}, 1: {"v": 2}})
    (_, panel) = panels(table, None)[1]
    assert (panel.x[0], panel.is_log) == ("1", False)


@pytest.mark.parametrize(
    ("file", "value", "problem"),
    [
        ("plot.pdf", None, "plot: plot.pdf does not end in .html, .png, .svg"),
        ("plot.html", "outcome", "value: outcome of job 0 is not a number"),
        ("missing/plot.html", None, "plot: missing/plot.html cannot be written: No such file or directory"),
    ],
)
def test_plot_that_cannot_be_made_is_one_line(tmp_path: Path, file: str, value: str | None, problem: str) -> None:
    with pytest.raises(OptionError) as raised:
        draw(grid(tmp_path), Path(file), value)
    assert str(raised.value).startswith(problem)


@pytest.mark.parametrize("suffix", ["html", "png", "svg"])
def test_plot_says_which_library_is_missing(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_launcher.cli.result_plot.find_spec", lambda name: None)
    library = "plotly" if suffix == "html" else "matplotlib"
    message = rf"^plot: \.{suffix} needs {library}, which is not installed: pip install {library}$"
    with pytest.raises(OptionError, match=message):
        draw(grid(tmp_path), tmp_path / f"plot.{suffix}", None)


@pytest.mark.parametrize(("suffix", "mark"), [("html", b"<html"), ("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plots_are_drawn(tmp_path: Path, suffix: str, mark: bytes) -> None:
    pytest.importorskip("plotly" if suffix == "html" else "matplotlib")
    specs = [{"lr": 10.0**-n, "name": f"<b>${n}$\x1b", "none": None if n else 1} for n in range(4)]
    draw(sweep(tmp_path, specs, {n: {"$v_": float(n)} for n in range(4)}), tmp_path / f"plot.{suffix}", None)
    assert mark in (tmp_path / f"plot.{suffix}").read_bytes()[:100]
