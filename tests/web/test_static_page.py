"""`gpu-launcher results --html`: a sweep's page as a file. tests/web/test_browser.py opens it in a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from html import unescape
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.cli.result_page import write_page
from gpu_launcher.errors import OptionError, UnsupportedVersionError
from gpu_launcher.jobs.launches import DIRECTORY, MANIFEST
from gpu_launcher.jobs.result_table import load_results
from gpu_launcher.studies.report_curves import STUDY_FILE
from gpu_launcher.web.catalogue import SweepReader
from gpu_launcher.web.static_page import MAX_CHARTED_VALUES, static_page
from tests.web.serving import CLI, SCRIPT, write_large_sweep, write_sweep
from tests.web.studies import close, write_study

PROGRAM = """
import hydra


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    return (cfg.x - 1) ** 2


if __name__ == "__main__":
    main()
"""
LAUNCHER = ("hydra/launcher=gpu_pool", "hydra.launcher.devices=simulated:2", "hydra.sweep.dir=runs")
KINDS: dict[str, Sequence[str]] = {
    "grid": (sys.executable, "train.py", "-m", *LAUNCHER, "hydra.launcher.direction=minimize", "+x=1,2,3"),
    "search": (
        *(sys.executable, "train.py", "-m", *LAUNCHER),
        *("hydra/sweeper=optuna_async", "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=minimize"),
        "+x=interval(0.5,2)",
    ),
    "map": (
        *(*CLI, "map", "--devices", "simulated:2", "--dir", "runs", "--param", "x=range(1,4)", "--"),
        *(sys.executable, "print.py", "{x}"),
    ),
}


def run(command: Sequence[str], directory: Path) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GPU_LAUNCHER")}
    environ = {**kept, "GPU_LAUNCHER_POOL_DIR": str(directory / "pool"), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=directory, env=environ, capture_output=True, text=True, timeout=500, check=False)


def data_of(page: str) -> dict[str, Any]:
    """The data of a static page."""
    found = re.search(r'<script type="application/gzip" id="data">([^<]*)</script>', page)
    assert found is not None
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return data


def texts_of(data: dict[str, Any], name: str) -> list[str]:
    """The cells of a column."""
    column = next(column for column in data["columns"] if column["name"] == name)
    texts = [text if isinstance(text, str) else text[1] for text in column["texts"]]
    return [texts[place] for place in column["cells"]]


def page_of(directory: Path, **options: Any) -> str:
    return static_page(SweepReader(directory).read_whole(), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_page_shows_a_sweep_of_each_kind(tmp_path: Path, kind: str) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    (tmp_path / "print.py").write_text("import json, sys; print(json.dumps({'value': int(sys.argv[1])}))")
    done = run(KINDS[kind], tmp_path)
    assert done.returncode == 0, done.stderr
    done = run((*CLI, "results", "runs", "--html", "report.html"), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "report.html\n", "")
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<tr id="job-(\d+)"', page) == ["0", "1", "2"]
    assert ("Best:" in page) == (kind != "map")
    data = data_of(page)
    table = load_results(tmp_path / "runs")
    assert texts_of(data, "outcome") == ["completed"] * 3
    assert texts_of(data, "x") == [f"{row.params['x']:.6g}" for row in table]
    assert texts_of(data, "value") == [f"{row.values['value']:.6g}" for row in table]
    assert [chart["title"] for chart in data["charts"]["value"]][:2] == ["value and parameters", "value over time"]


def test_a_static_page_has_failures_and_how_to_continue(tmp_path: Path) -> None:
    page = page_of(write_sweep(tmp_path / "runs").directory)
    assert re.search(r'href="#job-2">2 jobs</a>: <code>raised ValueError', page)
    assert re.search(r">cd [^ ]+ &amp;&amp; python train.py -m<", page)
    assert 'href="#?state=failed"' in page


def test_names_in_a_static_page_are_text(tmp_path: Path) -> None:
    page = page_of(write_sweep(tmp_path / SCRIPT.replace("/", "")).directory)
    assert page.count("<script>alert") == 0
    assert "&lt;script&gt;alert(1)" in page
    own, _, _ = page.partition('<script type="application/gzip"')
    assert "<script" not in own


def test_a_static_page_runs_its_own_scripts_and_loads_nothing(tmp_path: Path) -> None:
    page = page_of(write_sweep(tmp_path / "runs").directory)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    admitted = re.findall(r"'sha256-([^']*)'", unescape(policy[1]))
    parts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL) + re.findall(
        r"<style>(.*?)</style>", page, re.DOTALL
    )
    assert [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts] == admitted
    assert len(parts) == 4
    assert unescape(policy[1]).startswith("default-src 'none'; script-src 'sha256-")
    markup = re.sub(r"<(script|style|pre)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "http:" not in markup
    assert "https:" not in markup
    assert not re.findall(r'(?:src|href)="(?!#|data:)', markup)
    assert "hx-" not in markup


def test_a_static_page_without_values_has_no_charts(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "runs").directory
    manifest = sweep / DIRECTORY / MANIFEST
    manifest.write_text(manifest.read_text().replace('"loss"', '"other"').replace("1.5", '"text"'))
    page = page_of(sweep)
    assert len(page) < 100_000
    assert "Apache" not in page
    assert data_of(page)["charts"] == {}


def test_a_static_page_has_the_curves_of_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, file = write_sweep(tmp_path / "runs"), tmp_path / "report.html"
    close(write_study(sweep.directory, [{0: 1.5, 1: float("nan")}, {}, {3: 1 / 3}]))
    write_page(sweep.directory, file, None, None)
    page = file.read_text()
    (chart,) = data_of(page)["reports"]
    assert [line["data"] for line in chart["option"]["series"]] == [[[0, 1.5], [1, None]], [[3, 0.333333]]]
    assert '<h2 id="reports-title">Reports</h2>' in page
    assert "the page has no reports" not in capsys.readouterr().err
    (sweep.directory / STUDY_FILE).write_text("not a database")
    write_page(sweep.directory, file, None, None)
    page = file.read_text()
    assert data_of(page)["reports"] == []
    assert "Reports" not in page
    assert "the page has no reports: storage" in capsys.readouterr().err


def test_curves_of_a_sweep_without_values_are_drawn(tmp_path: Path) -> None:
    sweep, file = write_sweep(tmp_path / "runs"), tmp_path / "report.html"
    manifest = sweep.directory / DIRECTORY / MANIFEST
    manifest.write_text(manifest.read_text().replace('"loss"', '"other"').replace("1.5", '"text"'))
    close(write_study(sweep.directory, [{0: 1.5}]))
    write_page(sweep.directory, file, None, None)
    page = file.read_text()
    assert len(data_of(page)["reports"]) == 1
    assert "Licence of Apache ECharts" in page
    assert "function chartsIn" in page
    assert len(page) > 1_000_000


def test_sort_and_value_are_what_is_shown_first(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "runs").directory
    page = page_of(sweep, sort="-loss", value="loss")
    assert re.findall(r'<tr id="job-(\d+)"', page) == ["1", "0", "2", "3", "4"]
    assert data_of(page)["sort"] == "-loss"
    with pytest.raises(OptionError, match=r"^sort: there is no column 'speed'"):
        page_of(sweep, sort="speed")
    with pytest.raises(OptionError, match=r"^value: there is no column 'speed'"):
        page_of(sweep, value="speed")


def test_charts_of_the_first_values_are_kept(tmp_path: Path) -> None:
    large = write_large_sweep(tmp_path / "runs", 3).directory
    manifest = large / DIRECTORY / MANIFEST
    more = ", ".join(f'"m{number}": 1' for number in range(MAX_CHARTED_VALUES))
    manifest.write_text(manifest.read_text().replace('"loss"', f'{more}, "loss"'))
    page = page_of(large, value="loss")
    assert list(data_of(page)["charts"])[:2] == ["loss", "m0"]
    assert len(data_of(page)["charts"]) == MAX_CHARTED_VALUES
    assert "There are no charts of 1 more value:" in page


def test_a_page_of_20_000_jobs_has_them_all(tmp_path: Path) -> None:
    page = page_of(write_large_sweep(tmp_path / "runs", 20_000).directory)
    assert texts_of(data_of(page), "lr")[-1] == "19999"
    assert len(re.findall("<tr id=", page)) == 100
    assert len(page) < 4_000_000


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    write_sweep(tmp_path / "runs")
    (tmp_path / "report.html").write_text("old")
    code = "from resource import *; setrlimit(RLIMIT_FSIZE, (100_000, getrlimit(RLIMIT_FSIZE)[1]))"
    code += "; from gpu_launcher.cli.main import main; main()"
    command = (sys.executable, "-c", code, "results", "runs", "--html", "report.html")
    done = run(command, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu-launcher: --html: report.html cannot be written: File too large\n"
    assert (tmp_path / "report.html").read_text() == "old"
    write_page(tmp_path / "runs", tmp_path / "report.html", None, None)
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "runs"]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    write_sweep(tmp_path / "runs")
    with pytest.raises(OptionError, match=r"^html: .*report\.txt does not end in \.html$"):
        write_page(tmp_path / "runs", tmp_path / "report.txt", None, None)
    with pytest.raises(OptionError, match=r"^html: .* cannot be written: No such file or directory$"):
        write_page(tmp_path / "runs", tmp_path / "no" / "report.html", None, None)


def test_without_jinja2_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sweep(tmp_path / "runs")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UnsupportedVersionError, match=r"^jinja2 is not installed: `pip install 'jinja2"):
        write_page(tmp_path / "runs", tmp_path / "report.html", None, None)
    assert not (tmp_path / "report.html").exists()
