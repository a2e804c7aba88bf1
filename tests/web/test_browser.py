"""The pages in a real browser. Skipped where Playwright or Chromium is not installed or does not start."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gpu_launcher.cli.result_page import write_page
from gpu_launcher.jobs.job import Job
from gpu_launcher.jobs.recorder import Recorder
from gpu_launcher.jobs.result_table import load_results
from gpu_launcher.studies.report_curves import STUDY_FILE
from gpu_launcher.web.catalogue import id_of
from gpu_launcher.web.dashboard import study_number
from tests.web.serving import REPOSITORY, SCRIPT, WebServer, WrittenSweep, write_large_sweep, write_sweep
from tests.web.studies import close, found_sweep, write_study

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt install chromium", allow_module_level=True)

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
STATIC = REPOSITORY / "gpu_launcher" / "web" / "static"
DEADLINE = 120_000
"""Milliseconds for anything to happen on a page."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS), timeout=DEADLINE)
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start: {error}")
        yield browser
        browser.close()


def is_wrong(said: Any) -> bool:
    """Whether a page says that something is wrong. htmx also says so when a request replaces another one."""
    replaced = said.text.startswith(("htmx:sendAbort", "htmx:afterRequest"))
    return said.type in ("error", "warning") and not replaced


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages of a server. What goes wrong in a page fails the test: errors, violations, requests elsewhere."""
    wrong: list[str] = []
    contexts = []

    def open_page(server: WebServer, path: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(DEADLINE)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda said: wrong.append(said.text) if is_wrong(said) else None)
        page.on("request", lambda asked: None if f"//{server.host}/" in asked.url else wrong.append(asked.url))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(server.link)
        page.wait_for_url("**/pool")
        page.goto(f"http://{server.host}{path}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_pages_fit_every_width(
    server: WebServer, sweep: WrittenSweep, visit: Callable[..., Any], width: int, scheme: str
) -> None:
    page = visit(server, "/pool", viewport={"width": width, "height": 800}, color_scheme=scheme)
    for path in ("/pool", "/sweeps", "/new", sweep.url, f"{sweep.url}/jobs/2"):
        page.goto(f"http://{server.host}{path}")
        page.wait_for_load_state("load")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(server: WebServer, sweep: WrittenSweep, visit: Callable[..., Any], scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed: pip install axe-playwright-python"
    )
    page = visit(server, "/pool", color_scheme=scheme, bypass_csp=True)  # it puts a script into the page
    for path in ("/pool", "/sweeps", "/new", sweep.url, f"{sweep.url}/jobs/2"):
        page.goto(f"http://{server.host}{path}")
        page.wait_for_load_state("load")
        found = axe.Axe().run(page).response["violations"]
        assert [(path, violation["id"], violation["help"]) for violation in found] == []


def test_names_and_logs_are_text(server: WebServer, sweep: WrittenSweep, visit: Callable[..., Any]) -> None:
    page = visit(server, f"{sweep.url}/jobs/2")
    assert SCRIPT in page.locator("#log").inner_text()
    assert SCRIPT in page.locator("#job").inner_text()
    assert page.locator("main script").count() == 0


def test_jobs_are_filtered_and_sorted_while_typing(
    server: WebServer, sweep: WrittenSweep, visit: Callable[..., Any]
) -> None:
    page = visit(server, sweep.url)
    rows = page.locator("table.jobs tbody tr")
    playwright.expect(rows).to_have_count(5, timeout=DEADLINE)
    page.get_by_label("Search").fill("valueerror")
    playwright.expect(rows).to_have_count(2, timeout=DEADLINE)
    page.get_by_role("link", name="job", exact=True).click()
    playwright.expect(rows.first).to_contain_text("3", timeout=DEADLINE)
    assert "sort=-number" in page.url
    page.get_by_label("State").select_option("completed")
    playwright.expect(rows).to_have_count(0, timeout=DEADLINE)


def test_charts_are_drawn(server: WebServer, sweep: WrittenSweep, visit: Callable[..., Any]) -> None:
    page = visit(server, sweep.url)
    playwright.expect(page.locator("#charts canvas")).to_have_count(3, timeout=DEADLINE)


def test_reports_are_drawn_if_there_are_any(
    server: WebServer, sweeps: Path, sweep: WrittenSweep, visit: Callable[..., Any]
) -> None:
    search = found_sweep(server, sweeps / "a search")
    study = write_study(search.directory, [{0: 1.0, 1: 0.5}, {0: 2.0}])
    page = visit(server, search.url)
    playwright.expect(page.locator("#reports canvas")).to_be_visible(timeout=DEADLINE)
    playwright.expect(page.locator("#reports")).to_contain_text("What 2 jobs reported", timeout=DEADLINE)
    close(study)
    page.goto(f"http://{server.host}{sweep.url}")
    playwright.expect(page.locator("#charts canvas")).to_have_count(3, timeout=DEADLINE)
    playwright.expect(page.locator("#reports")).to_be_hidden(timeout=DEADLINE)


def test_the_study_opens_in_optuna_dashboard(
    server: WebServer, sweeps: Path, sweep: WrittenSweep, visit: Callable[..., Any]
) -> None:
    if find_spec("optuna_dashboard") is None:  # its import would change the environment of later tests
        pytest.skip("optuna-dashboard is not installed: pip install optuna-dashboard")
    search = found_sweep(server, sweeps / "a search to open")
    study = write_study(search.directory, [])
    for _ in range(20):
        trial = study.ask()
        trial.set_user_attr("note", SCRIPT)
        study.tell(trial, trial.suggest_float("lr", 0, 1))
    study.ask()
    before = (search.directory / STUDY_FILE).read_bytes()
    page = visit(server, search.url)
    page.get_by_role("link", name="optuna-dashboard").click()
    page.wait_for_url("**/dashboard/studies/*")
    playwright.expect(page.locator("body")).to_contain_text("Best Trial", timeout=DEADLINE)
    page.get_by_role("link", name="Trials (List)").click()
    playwright.expect(page.locator("body")).to_contain_text("21 Trials", timeout=DEADLINE)
    page.get_by_role("link", name="Analytics").click()
    playwright.expect(page.locator("body")).to_contain_text("Slice", timeout=DEADLINE)
    assert (search.directory / STUDY_FILE).read_bytes() == before
    close(study)


def test_html_in_optuna_dashboard_cannot_use_our_scripts(
    serving: Callable[..., WebServer], tmp_path: Path, browser: Any
) -> None:
    if find_spec("optuna_dashboard") is None:  # its import would change the environment of later tests
        pytest.skip("optuna-dashboard is not installed: pip install optuna-dashboard")
    server = serving()
    search = found_sweep(server, tmp_path / "search")
    close(write_study(search.directory, [{0: 1.0}]))
    with closing(browser.new_context()) as context:
        page = context.new_page()
        refused, posted = [], []
        page.on("console", lambda said: refused.append(said.text) if "script-src" in said.text else None)
        page.on("request", lambda asked: posted.append(asked.url) if asked.method == "POST" else None)
        page.goto(server.link, timeout=DEADLINE)
        page.wait_for_url("**/pool", timeout=DEADLINE)
        page.goto(f"http://{server.host}/dashboard/studies/{study_number(id_of(search.directory))}", timeout=DEADLINE)
        playwright.expect(page.locator("body")).to_contain_text("Best Trial", timeout=DEADLINE)
        framed = '<script src="/static/htmx.min.js"></script><form hx-post="/new/check" hx-trigger="load"></form>'
        put = "html => document.body.append(Object.assign(document.createElement('iframe'), {srcdoc: html}))"
        with page.expect_event("console", lambda said: "htmx.min.js" in said.text, timeout=DEADLINE):
            page.evaluate(put, framed)
        assert refused
        assert posted == []


def test_a_sweep_updates_until_it_ends_in_two_tabs(
    tmp_path: Path, serving: Callable[..., WebServer], visit: Callable[..., Any]
) -> None:
    server = serving()
    directory = tmp_path / "runs"
    script = f'i=0; while [ ! -e "{tmp_path}/go" ]; do i=$((i+1)); echo "step $i"; sleep 0.2; done'
    process = server.start_map(directory, script, "--devices", "simulated:2", "--param", "x=range(0,3)")
    try:
        one = visit(server, "/sweeps")
        link = one.get_by_role("link", name="runs")
        playwright.expect(link).to_be_visible(timeout=DEADLINE)
        link.click()
        playwright.expect(one.locator("#sweep")).to_contain_text("2 running", timeout=DEADLINE)
        other = visit(server, f"/sweeps/{id_of(directory)}/jobs/0?log=stdout.txt")
        playwright.expect(other.locator("#log")).to_contain_text("step 5", timeout=DEADLINE)
        one.get_by_role("button", name="Pause").click()
        playwright.expect(one.locator("#said")).to_contain_text("is paused", timeout=DEADLINE)
        continues = one.get_by_role("button", name="Continue")
        playwright.expect(continues).to_be_visible(timeout=DEADLINE)
        continues.click()
        playwright.expect(one.locator("#said")).to_contain_text("continues", timeout=DEADLINE)
        questions: list[str] = []
        one.on("dialog", lambda dialog: questions.append(dialog.message))
        one.get_by_role("textbox", name="Jobs", exact=True).fill("2")
        one.get_by_role("button", name="Cancel jobs").click()
        playwright.expect(one.locator("#said")).to_contain_text("job 2 cancelled", timeout=DEADLINE)
        one.get_by_role("button", name="Retry jobs").click()
        retried = re.compile("job 2 (runs again|has not ended)")  # not ended: it ran when it was cancelled
        playwright.expect(one.locator("#said")).to_contain_text(retried, timeout=DEADLINE)
        assert [question.partition("?")[0] for question in questions] == ["Cancel these jobs"]  # not before a retry
        one.get_by_role("button", name="Cancel jobs").click()
        playwright.expect(one.locator("#said")).to_contain_text(re.compile("job 2 .*cancelled"), timeout=DEADLINE)
        (tmp_path / "go").touch()
        playwright.expect(one.locator("#sweep")).to_contain_text("2 completed", timeout=DEADLINE)
        playwright.expect(one.get_by_role("button", name="Stop")).to_be_hidden(timeout=DEADLINE)
        playwright.expect(other.locator("#job")).to_contain_text("completed", timeout=DEADLINE)
    finally:
        (tmp_path / "go").touch()
        process.wait(100)


def test_a_sweep_is_started_from_the_form(
    tmp_path: Path, serving: Callable[..., WebServer], visit: Callable[..., Any]
) -> None:
    server = serving()
    page = visit(server, "/new")
    page.get_by_role("textbox", name="Command", exact=True).fill("echo {x}")
    page.get_by_label("Parameters").fill("x=1,2\ny=<b>")
    page.get_by_role("button", name="Check").click()
    plan = page.locator("#plan")
    playwright.expect(plan).to_contain_text("It cannot be started like this", timeout=DEADLINE)
    playwright.expect(plan).to_contain_text("y=<b>", timeout=DEADLINE)
    page.get_by_label("Parameters").fill("x=1,2")
    page.get_by_role("button", name="Check").click()
    playwright.expect(plan).to_contain_text("--param x=1,2 -- echo", timeout=DEADLINE)
    page.get_by_role("button", name="Start").click()
    playwright.expect(plan).to_contain_text("The sweep has begun", timeout=DEADLINE)
    playwright.expect(plan.get_by_role("link")).to_be_visible(timeout=DEADLINE)
    page.get_by_role("navigation").get_by_role("link", name="Sweeps").click()
    playwright.expect(page.locator("#sweeps")).to_contain_text("2 completed", timeout=DEADLINE)
    playwright.expect(page.locator("#sweeps")).to_contain_text("ended", timeout=DEADLINE)


def test_the_keyboard_reaches_the_content(server: WebServer, visit: Callable[..., Any]) -> None:
    page = visit(server, "/sweeps")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_without_javascript_there_are_tables_and_logs(
    server: WebServer, sweep: WrittenSweep, visit: Callable[..., Any]
) -> None:
    page = visit(server, sweep.url, java_script_enabled=False)
    assert page.locator("table.jobs tbody tr").count() == 5
    page.get_by_role("link", name="job 1", exact=True).click()
    assert "needle 1" in page.locator("#log").inner_text()


@pytest.fixture
def open_static(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens the static page of a sweep. What goes wrong in it fails the test, as do requests for anything else."""
    wrong: list[str] = []
    contexts = []
    file = tmp_path / "report.html"

    def opened(directory: Path, **options: Any) -> Any:
        write_page(directory, file, None, None)
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(DEADLINE)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("request", lambda asked: wrong.append(asked.url) if asked.url.partition("#")[0] not in known else None)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(file.as_uri())
        return page

    icon = (STATIC / "icon.svg").read_bytes()
    known = (file.as_uri(), f"data:image/svg+xml;base64,{base64.b64encode(icon).decode()}")
    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def jobs_in(page: Any) -> list[str]:
    """The jobs in the table of a static page."""
    texts: list[str] = page.locator("table.jobs tbody th").all_inner_texts()
    return texts


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_static_pages_fit_every_width(
    sweep: WrittenSweep, open_static: Callable[..., Any], width: int, scheme: str
) -> None:
    page = open_static(sweep.directory, viewport={"width": width, "height": 800}, color_scheme=scheme)
    playwright.expect(page.locator("#charts canvas")).to_have_count(3, timeout=DEADLINE)
    assert page.locator("h1").inner_text().endswith(sweep.directory.name)
    page.get_by_label("job 2", exact=True).click()
    playwright.expect(page.locator(".details")).to_contain_text(f"raised ValueError: {SCRIPT}", timeout=DEADLINE)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_static_page_draws_reports(tmp_path: Path, open_static: Callable[..., Any]) -> None:
    search = write_sweep(tmp_path / "search")
    close(write_study(search.directory, [{0: 1.5, 1: 0.5}]))
    page = open_static(search.directory)
    playwright.expect(page.locator("#reports canvas")).to_have_count(1, timeout=DEADLINE)
    assert "What 1 job reported by step" in page.locator("#reports figcaption").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_static_pages(sweep: WrittenSweep, open_static: Callable[..., Any], scheme: str) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed: pip install axe-playwright-python"
    )
    page = open_static(sweep.directory, color_scheme=scheme, bypass_csp=True)
    page.get_by_label("job 2", exact=True).click()
    playwright.expect(page.locator(".details")).to_be_visible(timeout=DEADLINE)
    found = axe.Axe().run(page).response["violations"]
    assert [(violation["id"], violation["help"]) for violation in found] == []


def test_jobs_of_a_static_page_are_filtered_sorted_and_found(
    sweep: WrittenSweep, open_static: Callable[..., Any]
) -> None:
    page = open_static(sweep.directory)
    rows = page.locator("table.jobs tbody tr")
    playwright.expect(page.locator("[data-key]")).not_to_have_count(0, timeout=DEADLINE)
    page.get_by_label("Search").fill("valueerror seed=1")
    playwright.expect(rows).to_have_count(2, timeout=DEADLINE)
    page.get_by_role("link", name="job", exact=True).click()
    playwright.expect(rows.first).to_contain_text("3", timeout=DEADLINE)
    assert page.evaluate("location.hash") == "#?sort=-number&text=valueerror+seed%3D1"
    page.get_by_role("link", name="1 lost").click()
    playwright.expect(rows).to_have_count(1, timeout=DEADLINE)
    assert page.get_by_label("Search").input_value() == ""
    page.go_back()
    playwright.expect(rows).to_have_count(2, timeout=DEADLINE)
    page.get_by_role("link", name="0.5, job 0").click()  # it is not among those that are shown
    playwright.expect(page.locator(".details")).to_contain_text("completed", timeout=DEADLINE)
    page.get_by_label("job 0", exact=True).click()
    playwright.expect(page.locator(".details")).to_have_count(0, timeout=DEADLINE)
    page.get_by_text("Columns", exact=True).click()
    page.get_by_label("message").check()
    playwright.expect(page.get_by_role("columnheader", name="message")).to_be_visible(timeout=DEADLINE)


def test_a_static_page_sorts_as_the_table_does(tmp_path: Path, open_static: Callable[..., Any]) -> None:
    values = ["2", "10", "-1.5", "nan", "inf", "x", "2", "A", "null", "[1]", "true", "1e-3"]
    directory = tmp_path / "mixed"
    jobs = [Job(number, "", [f"p={value}", f"q={number % 3}"]) for number, value in enumerate(values)]
    Recorder(directory, jobs, "train.py").close()
    table = load_results(directory)
    page = open_static(directory)
    for name in ("p", "-p", "q", "-q", "number", "-number", "outcome"):
        expected = [str(row.number) for row in table.sorted_by(name)]
        page.evaluate(f"location.hash = '#?sort={name}'")
        playwright.expect(page.locator("table.jobs tbody th")).to_have_text(expected, timeout=DEADLINE)


def test_a_static_page_of_many_jobs_has_pages(tmp_path: Path, open_static: Callable[..., Any]) -> None:
    page = open_static(write_large_sweep(tmp_path / "many", 20_000).directory)
    playwright.expect(page.locator("[data-key]")).not_to_have_count(0, timeout=DEADLINE)
    page.get_by_role("link", name="Next").click()
    playwright.expect(page.get_by_label("job 100", exact=True)).to_be_visible(timeout=DEADLINE)
    page.get_by_label("Search").fill("lr=1999")
    playwright.expect(page.locator("#jobs > .note")).to_have_text("11 jobs of 20000", timeout=DEADLINE)
    assert jobs_in(page) == ["1999", *map(str, range(19990, 20000))]
    page.evaluate("location.hash = '#job-15555'")
    playwright.expect(page.get_by_label("job 15555", exact=True)).to_be_focused(timeout=DEADLINE)


def test_a_static_page_opens_at_a_job_that_it_does_not_have(
    sweep: WrittenSweep, open_static: Callable[..., Any]
) -> None:
    page = open_static(sweep.directory)
    page.evaluate("location.hash = '#job-77'")
    page.reload()
    playwright.expect(page.locator("[data-key]")).not_to_have_count(0, timeout=DEADLINE)
    page.get_by_label("Search").fill("valueerror")
    playwright.expect(page.locator("table.jobs tbody tr")).to_have_count(2, timeout=DEADLINE)


def test_without_javascript_a_static_page_has_the_first_jobs(
    sweep: WrittenSweep, open_static: Callable[..., Any]
) -> None:
    page = open_static(sweep.directory, java_script_enabled=False)
    assert page.locator("table.jobs tbody tr").count() == 5
    assert "JavaScript is disabled" in page.locator("main").inner_text()
