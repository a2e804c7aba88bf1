"""`gpu-launcher doctor`: finds problems and names remedies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gpu_launcher.cli import options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gpu_launcher.cli.checks.finding import Finding
    from gpu_launcher.cli.table import Line
    from gpu_launcher.nodes.engines import NodeSpec

SCHEMA = 1
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}


@click.command()
@options.pool_dir
@options.value("--study", "FILE", "SQLite file of a study to check.")
@options.nodes("Node to try")
@options.as_json
def doctor(pool_dir: str | None, study: str | None, nodes: tuple[str, ...], as_json: bool) -> int:
    """Check this machine, this Python and this project for problems.

    Looks at the driver, the GPUs, the pool directory, the installed packages, the configs in the current directory, and
    a study. Each finding is ok, a warning or a problem, and says what to do about it. Changes nothing. The exit code
    is 1 if there is a problem, else 0.

    With --nodes, it also tries each node: starts an agent there as a sweep does, compares versions, looks for the
    current directory, measures the round trip of a message, lists the devices, and ends the agent.

    Examples:

    \b
      gpu-launcher doctor
      gpu-launcher doctor --study study.db
      gpu-launcher doctor --nodes ssh:gpu2 --nodes 'slurm:1 --partition=gpu'
      gpu-launcher doctor | grep -v ^ok
    """
    specs = _read_nodes(nodes)
    findings = list(_examine(pool_dir, study, specs))
    problems = sum(finding.level.value == "problem" for finding in findings)
    if as_json:
        from gpu_launcher.cli.printing import print_json

        print_json(_to_json(findings))
    else:
        from gpu_launcher.cli.printing import print_lines, terminal_width

        print_lines(_lines(findings, terminal_width()))
    return 1 if problems else 0


def _read_nodes(nodes: Sequence[str]) -> tuple[NodeSpec, ...]:
    """Read the nodes. Raises OptionError."""
    if not nodes:
        return ()
    from gpu_launcher.nodes.engines import read_nodes

    return read_nodes(nodes)


def _examine(pool_dir: str | None, study: str | None, specs: Sequence[NodeSpec]) -> Iterator[Finding]:
    import os
    from pathlib import Path

    from gpu_launcher.cli.checks.gpus import examine_gpus
    from gpu_launcher.cli.checks.pool_check import examine_pool
    from gpu_launcher.cli.checks.program_check import examine_program
    from gpu_launcher.cli.checks.project import examine_project

    yield from _safely("gpus", lambda: examine_gpus(os.environ))
    yield from _safely("pool", lambda: examine_pool(pool_dir))
    yield from _safely("program", examine_program)
    yield from _safely("project", lambda: examine_project(Path.cwd()))
    if study is not None:
        from gpu_launcher.cli.checks.study import examine_study

        yield from _safely("study", lambda: examine_study(study))
    if specs:
        from gpu_launcher.cli.checks.nodes_check import examine_nodes

        yield from _safely("nodes", lambda: examine_nodes(specs))


def _safely(check: str, examine: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check. A check that fails becomes a finding, and the other checks still run."""
    from gpu_launcher.cli.checks.finding import problem
    from gpu_launcher.errors import GpuLauncherError

    try:
        yield from examine()
    except (OSError, GpuLauncherError) as error:
        yield problem(check, f"cannot be examined: {error}")


def _lines(findings: Sequence[Finding], width: int | None) -> Iterator[Line]:
    from gpu_launcher.cli.table import wrap
    from gpu_launcher.text import one_line
    from gpu_launcher.wording import count

    column = max(len(finding.check) for finding in findings)
    for finding in findings:
        level = finding.level.value
        head = f"{level:<7}  {finding.check:<{column}}  "
        texts = [one_line(finding.text)]
        if finding.remedy:
            texts.append(f"remedy: {one_line(finding.remedy)}")
        if width is None:
            yield [(head, ""), ("; ".join(texts), "")]
            continue
        first, *more = [line for text in texts for line in wrap(text, max(20, width - len(head)))]
        yield [(f"{level:<7}", _STYLES[level]), (head[7:], ""), (first, "")]
        for line in more:
            yield [(" " * len(head), ""), (line, "")]
    yield []
    levels = [finding.level.value for finding in findings]
    totals = [count(levels.count("problem"), "problem"), count(levels.count("warning"), "warning")]
    yield [(f"{', '.join(totals)}, {levels.count('ok')} ok", "bold")]


def _to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    from gpu_launcher.cli.survey_json import installed_version
    from gpu_launcher.text import one_line

    levels = [finding.level.value for finding in findings]
    return {
        "schema": SCHEMA,
        "version": installed_version("gpu-launcher"),
        "problems": levels.count("problem"),
        "warnings": levels.count("warning"),
        "findings": [
            {
                "check": finding.check,
                "level": finding.level.value,
                "text": one_line(finding.text),
                "remedy": finding.remedy and one_line(finding.remedy),
            }
            for finding in findings
        ],
    }
