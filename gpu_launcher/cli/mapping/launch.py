"""Runs `gpu-launcher map`, from its arguments to the exit code."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.cli.mapping.grid import Grid, read_grid
from gpu_launcher.cli.mapping.inputs import STDIN, Input, RunSequence
from gpu_launcher.cli.mapping.map_directory import COMMAND, PRINTED, MapDirectory, new_directory, quoted
from gpu_launcher.cli.mapping.map_runs import MapRuns
from gpu_launcher.cli.mapping.record_reader import Bad
from gpu_launcher.cli.mapping.results_file import ResultsFile, write_table
from gpu_launcher.cli.mapping.resume import EarlierRuns, unwritable
from gpu_launcher.cli.mapping.run_process import CommandProgram, search_path, why_not_runnable
from gpu_launcher.cli.mapping.template import GPU, Template
from gpu_launcher.cli.options import as_flag
from gpu_launcher.cli.steer import check_directory
from gpu_launcher.cli.streams import print_if_possible, printable, tell
from gpu_launcher.debug_log import log_into
from gpu_launcher.durations import read_duration
from gpu_launcher.errors import GpuLauncherError, MapError, OptionError, UsageError
from gpu_launcher.jobs.dry_run import examine_needs
from gpu_launcher.jobs.ending import recorded_end
from gpu_launcher.jobs.failures import FailurePolicy
from gpu_launcher.jobs.head import SweepResult, run_jobs
from gpu_launcher.jobs.job import Cause
from gpu_launcher.jobs.leaving import OUTPUT, detached_text, over_ssh
from gpu_launcher.jobs.notifications import ON_END, ON_JOB_FAILURE, Hooks, Notifier, read_hook
from gpu_launcher.jobs.progress import open_progress
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.model import BUSY_MEMORY
from gpu_launcher.nodes.engines import NodeSpec, fetches, read_nodes
from gpu_launcher.nodes.start import start_nodes
from gpu_launcher.processes.detaching import Detachment, continue_detached
from gpu_launcher.processes.inherited_files import OpenFiles
from gpu_launcher.requests import read_request
from gpu_launcher.text import one_line, short_path
from gpu_launcher.wording import count

if TYPE_CHECKING:
    from gpu_launcher.jobs.node_client import LocalNode
    from gpu_launcher.nodes.node_group import NodeGroup

DEFAULT = "map"
"""Name of the directory that holds maps started without --dir."""
HOOKS = (ON_END, ON_JOB_FAILURE)
OF_ONE_LAUNCH = (*HOOKS, "detach")
"""Options that are not stored: they belong to one launch, and the command of a stored hook may be another user's."""
DRY = 20
"""Maximum number of command lines that a dry run prints."""


@dataclass(frozen=True, slots=True)
class MapArguments:
    """The arguments of a command line, or the saved arguments of a map to resume."""

    command: list[str] = field(default_factory=list)
    param: list[str] = field(default_factory=list)
    source: str | None = None
    shell: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options that the user gave, by name."""
    grid: Grid = Grid()  # noqa: RUF009  (frozen)
    directory: Path = field(default_factory=Path.cwd)
    """Working directory of the commands."""

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> MapArguments:
        """Read the arguments that an earlier launch saved. Raises TypeError or ValueError if they are invalid."""
        if not all(isinstance(word, str) for word in (*settings["command"], *settings["param"])):
            raise TypeError("a word is not text")
        return cls(
            command=settings["command"],
            param=settings["param"],
            source=settings["from"],
            shell=settings["shell"],
            options={name: value for name, value in dict(settings["options"]).items() if name not in OF_ONE_LAUNCH},
            grid=Grid(tuple((name, tuple(values)) for name, values in settings["grid"])),
            directory=Path(settings["directory"]),
        )

    def settings(self) -> dict[str, Any]:
        """These arguments as JSON data, to save for a later launch."""
        named = self.source is not None and self.source != STDIN
        options = {name: value for name, value in self.options.items() if name not in OF_ONE_LAUNCH}
        if options.get("pool_dir"):
            options["pool_dir"] = str(Path(options["pool_dir"]).expanduser().absolute())
        return {
            "command": self.command,
            "param": self.param,
            "from": str(Path(self.source or "").absolute()) if named else self.source,
            "shell": self.shell,
            "options": options,
            "grid": [[name, list(values)] for name, values in self.grid.axes],
            "directory": str(self.directory),
        }

    def resumed_by(self, later: MapArguments) -> MapArguments:
        """These arguments, changed by a `later` command line. Raises OptionError if that is for a different map."""
        for name, before, now in (
            ("command", self.command, later.command),
            ("param", self.param, later.param),
            ("shell", self.shell, later.shell),
        ):
            if now and now != before:
                problem = f"{name} is not that of the map to be resumed: leave it out, or start a map of its own"
                raise OptionError("resume", problem)
        return replace(self, source=later.source or self.source, options={**self.options, **later.options})


def run_map(asked: MapArguments, new: str | None, resume: str | None, *, dry_run: bool) -> int:
    """Run a map and return the exit code.

    Raises OptionError if nothing was run, and other kinds of GpuLauncherError otherwise.
    """
    directory: MapDirectory | None = None
    for option, name in (("dir", new), ("resume", resume)):
        check_directory(option, name)
    if resume is not None:
        if new is not None:
            raise OptionError("dir", "--resume names the directory, too: leave out one of them")
        directory = MapDirectory(Path(resume).absolute())
        asked = _resumed(directory, asked)
    elif not asked.param and asked.source is None:
        raise UsageError("there are no parameters: give --param name=1,2,3, or --from a file")
    else:
        asked = replace(asked, grid=read_grid(asked.param))
    template = Template.parse(asked.command, shell=asked.shell)
    if problem := why_not_runnable(template, asked.directory, search_path()):
        raise UsageError(problem)
    _check_grid(template, asked)
    options = _options(asked.options)
    nodes = read_nodes(asked.options.get("nodes"), options.grace)
    fetching = fetches(asked.options.get("outputs", "shared"))
    hooks = Hooks(*(read_hook(name, asked.options.get(name)) for name in HOOKS))
    sequence = RunSequence(template, asked.grid, None if asked.source is None else Input(asked.source))
    if dry_run:
        earlier = EarlierRuns() if directory is None else EarlierRuns.of(directory)
        return _dry_run(sequence, template, earlier, asked, options, here=not nodes)
    launch = _Launch(asked, template, options, nodes, sequence, fetching, hooks)
    return launch.begin(new) if directory is None else launch.resume(directory)


def _resumed(directory: MapDirectory, later: MapArguments) -> MapArguments:
    settings = directory.read_settings()
    try:
        before = MapArguments.of_settings(settings)
    except (TypeError, ValueError) as error:
        raise directory.damaged() from error
    nodes = [] if "nodes" in later.options else before.options.get("nodes", [])
    if (nodes or later.command != before.command) and (why := directory.whose()) is not None:
        _ask_before_running(directory, before, nodes, why)
    if before.source == STDIN and later.source is None and os.isatty(0):
        raise OptionError(
            "resume",
            "its parameters came from stdin, which is a terminal now: send the same ones again, as in "
            f"{_how_to_resume(directory, STDIN)}",
        )
    return before.resumed_by(later)


def _ask_before_running(directory: MapDirectory, before: MapArguments, nodes: object, why: str) -> None:
    """Ask the user to confirm a command and `nodes` that another user may have written, because nodes are commands.

    Raises OptionError if the user refuses.
    """
    command = one_line(shlex.join(before.command))
    where = one_line(str(before.directory))
    tell(f"{short_path(directory.settings)} {why}. The map would run this command as you, in {where}:")
    tell(f"    {command}")
    if nodes:
        tell(f"    on the nodes {one_line(str(nodes))}")
    if os.isatty(0):
        print("Run it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise OptionError(
        "resume",
        f"{short_path(directory.path)} may be another user's map, and its command was not confirmed: answer y on a "
        f"terminal, or give {'--nodes and ' if nodes else ''}the command itself after --",
    )


def _how_to_resume(directory: MapDirectory, source: str | None) -> str:
    """The command line that resumes a map."""
    command = f"{COMMAND} --resume {quoted(directory.path)}"
    return f"<the same stream> | {command}" if source == STDIN else command


def _check_grid(template: Template, asked: MapArguments) -> None:
    """Raise UsageError if a value of the grid does not fit the command."""
    if asked.source is not None:
        return  # each record is checked together with the grid
    first = asked.grid[0]
    for name, values in asked.grid.axes:
        for value in values:
            if problem := template.misfit({**first, name: value}):
                raise UsageError(problem)


def _options(given: Mapping[str, Any]) -> Options:
    for name in ("max_parallel", "retries"):
        if given.get(name) is not None and given[name] < (name == "max_parallel"):
            raise OptionError(name, f"{given[name]} is too few")
    grace = read_duration(given.get("grace", 10.0), "grace")
    return Options(
        devices=given.get("devices", "auto"),
        request=read_request(given, learns=True),
        max_parallel=given.get("max_parallel"),
        cap="--max-parallel",
        grace=grace,
        pool_dir=given.get("pool_dir"),
        busy_memory=BUSY_MEMORY,
        device_environment=DeviceEnvironment(),
        # With --retries, every failure of a command is retried, because its cause is unknown.
        failures=FailurePolicy(given.get("retries", 0), frozenset(Cause), 1 if given.get("stop_on_failure") else None),
        spell=as_flag,
    )


def _dry_run(
    sequence: RunSequence,
    template: Template,
    earlier: EarlierRuns,
    asked: MapArguments,
    options: Options,
    *,
    here: bool,
) -> int:
    """Print the first command lines, the number of runs and what they need. Returns 1 if a run could not start."""
    runs = bad = 0
    while not sequence.over:
        found = sequence.next()
        if found is None:
            sequence.wait()
        elif isinstance(found, Bad):
            bad += 1
            if not asked.options.get("keep_going"):
                raise _refused([found.problem], 1)
            tell(f"{found.problem}; it is left out")
        elif found.index not in earlier:
            runs += 1
            if runs <= DRY:
                print(printable(template.line(found.params, found.index, GPU), sys.stdout), flush=True)
            elif sequence.total is not None:
                runs = sequence.total - earlier.completed
                break
    more = f"... and {runs - DRY} more: " if runs > DRY else ""
    print(f"{more}{count(runs, 'run')}" + (f", {count(bad, 'line')} left out" if bad else ""), file=sys.stderr)
    if not runs:
        return 1 if bad else 0
    assert options.request is not None
    needs = examine_needs({options.request: runs}, runs, options, "run", here=here)
    for line in needs.lines:
        tell(line)
    return 1 if bad or not needs.possible else 0


def _refused(problems: Sequence[str], lines: int) -> OptionError:
    more = f"; and {count(lines - len(problems), 'line')} more" if lines > len(problems) else ""
    return OptionError(
        "from",
        f"{'; '.join(problems)}{more}. Nothing was run: fix {'it' if lines == 1 else 'them'}, or run the other lines "
        "with --keep-going",
    )


@dataclass(frozen=True, slots=True)
class _Launch:
    asked: MapArguments
    template: Template
    options: Options
    nodes: tuple[NodeSpec, ...]
    sequence: RunSequence
    fetches: bool
    """Whether files of runs are fetched from nodes that do not share the map's directory."""
    hooks: Hooks

    def begin(self, name: str | None) -> int:
        """Run a new map."""
        total = self._survey(EarlierRuns())
        above = MapDirectory(Path(name or DEFAULT).absolute()).above()
        directory = MapDirectory(new_directory() if name is None else Path(name).absolute())
        directory.create(self.asked.settings(), above)
        try:
            detachment = self._detach(directory)
            with directory.locked("dir", tell), recorded_end(directory.path) as end:
                self._leave_terminal(directory, detachment)
                end.value = self._run(directory, total, None, detachment)
            return end.value
        except GpuLauncherError:
            directory.withdraw(above)  # so that the corrected command can use the same directory
            raise

    def resume(self, directory: MapDirectory) -> int:
        """Run the runs that earlier launches of a map did not complete."""
        detachment = self._detach(directory)
        with (
            directory.locked("resume", tell),
            recorded_end(directory.path) as end,
            directory.without_kept_results(),
        ):
            earlier = EarlierRuns.to_resume(directory)
            total = self._survey(earlier)
            of, rest = ("", "the rest") if total is None else (f" of {total}", total - earlier.completed)
            tell(f"{earlier.completed}{of} runs completed before, {rest} to run")
            self._leave_terminal(directory, detachment)
            end.value = self._run(directory, total, earlier, detachment)
        return end.value

    def _detach(self, directory: MapDirectory) -> Detachment | None:
        """Continue in a process without a terminal, if asked to. Raises OptionError if that is not possible."""
        if not self.asked.options.get("detach"):
            return None
        if self.asked.source == STDIN and os.isatty(0):
            raise OptionError(
                "detach", "the parameters are typed on the terminal: give them in a file or through a pipe"
            )
        return continue_detached(directory.path / OUTPUT, partial(detached_text, "gpu-launcher", directory.path))

    def _leave_terminal(self, directory: MapDirectory, detachment: Detachment | None) -> None:
        if detachment is not None:
            try:
                detachment.redirect(directory.path / OUTPUT, keeps_stdin=self.asked.source == STDIN)
            except OSError as error:
                raise unwritable(directory, error) from error

    def _survey(self, earlier: EarlierRuns) -> int | None:
        """Check the whole input before anything is run, if it can be read twice.

        Returns the number of runs; None if it is unknown. Raises OptionError.
        """
        if self.sequence.source is None or not self.sequence.source.seekable:
            return self.sequence.total
        survey = self.sequence.survey(earlier)
        if survey.lines and not self.asked.options.get("keep_going"):
            raise _refused(survey.problems, survey.lines)
        if not survey.runs and not survey.lines:
            raise OptionError("from", f"{self.sequence.source.name} is empty")
        if survey.runs + survey.lines * len(self.asked.grid) < earlier.runs:
            raise OptionError(
                "from",
                f"{self.sequence.source.name} has {count(survey.runs, 'run')}, and this map had {earlier.runs} before: "
                "put back what is missing, or run it as a map of its own, with another --dir",
            )
        return survey.runs

    def _run(
        self, directory: MapDirectory, total: int | None, earlier: EarlierRuns | None, detachment: Detachment | None
    ) -> int:
        try:
            results = ResultsFile(directory.results)
        except OSError as error:
            raise unwritable(directory, error) from error
        log_into(directory.path)
        keep_going = bool(self.asked.options.get("keep_going"))
        source = MapRuns(self.sequence, directory, results, earlier, total=total, keep_going=keep_going)
        assert self.options.request is not None
        program = CommandProgram(self.template, directory, self.options.request, self.asked.directory, search_path())
        left = None if total is None else total - (earlier.completed if earlier else 0)
        # Forking is safe: no other threads run and CUDA is not initialised. All open files are ours, and the commands
        # inherit none of them.
        start = partial(
            start_nodes,
            self.nodes,
            program,
            directory.path,
            arguments=sys.argv,
            method="fork",
            open_files=OpenFiles(),
            imports_script=False,
            check=program.check,
            at_once=lambda: min((one for one in (left, self.options.max_parallel) if one is not None), default=None),
            fetches=self.fetches,
            logs=PRINTED,
        )
        command_line = shlex.join(["gpu-launcher", *sys.argv[1:]])
        notifying = Notifier(self.hooks, directory.path, command_line, spell=as_flag, tell=tell)
        with notifying if self.hooks else nullcontext() as notifier:
            sweep = self._run_jobs(directory, source, start, left, notifier, detachment)
            code = self._conclude(directory, source, sweep)
        return code if notifier is None or notifier.interrupted is None else 128 + notifier.interrupted

    def _run_jobs(
        self,
        directory: MapDirectory,
        source: MapRuns,
        start: Callable[[], LocalNode | NodeGroup],
        left: int | None,
        notifier: Notifier | None,
        detachment: Detachment | None,
    ) -> SweepResult:
        try:
            with closing(source), closing(start()) as node:
                node.wait_until_ready()
                reads = self.asked.source == STDIN and os.isatty(0)
                display = open_progress(name="gpu-launcher", reads=reads)
                return run_jobs(
                    [],
                    node,
                    self.options,
                    directory.path,
                    COMMAND,
                    source=source,
                    total=left,
                    display=display,
                    how_to_resume=self._how(directory),
                    closing=lambda failed, incomplete: [f"table: gpu-launcher results {quoted(directory.path)}"],
                    notices=over_ssh(sys.stderr, os.environ, "--detach", reads=reads),
                    notifier=notifier,
                    begun=(lambda: None) if detachment is None else detachment.begun,
                    anew=source.is_new,
                )
        except GpuLauncherError as error:
            if source.ran or isinstance(error, OptionError):
                raise
            raise UsageError(str(error)) from error

    def _conclude(self, directory: MapDirectory, source: MapRuns, sweep: SweepResult) -> int:
        try:
            source.results.flush()
            source.results.close()
            if self.asked.options.get("csv"):
                write_table(directory)
        except OSError as error:
            raise MapError(
                f"results cannot be written to {short_path(directory.path)}: {error.strerror}. Each completed "
                "run is recorded in its own directory: make room, and run the rest with "
                f"{self._how(directory)}"
            ) from error
        incomplete = bool(source.failed or source.bad or source.problem or sweep.given_up)
        if source.missing and not (sweep.stopped or source.problem):
            incomplete = True
            tell(
                f"{count(len(source.missing), 'run')} that did not complete before, such as {min(source.missing)}, did "
                "not come in again: the input is not what it was"
            )
        if incomplete or sweep.stopped:
            tell(f"to run the rest: {self._how(directory)}")
        print_if_possible(short_path(directory.results))
        if sweep.stopped_by is not None:
            return 128 + sweep.stopped_by
        return 1 if incomplete or sweep.stopped else 0

    def _how(self, directory: MapDirectory) -> str:
        return _how_to_resume(directory, self.asked.source)
