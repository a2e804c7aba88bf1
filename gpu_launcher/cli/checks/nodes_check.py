"""Tries the nodes of `--nodes`: starts an agent on each, opens its pool, and ends it."""

from __future__ import annotations

import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.cli.checks.finding import Finding, ok, problem, warning
from gpu_launcher.cli.checks.gpus import kinds
from gpu_launcher.jobs.directory import as_proposed
from gpu_launcher.jobs.events import Notice
from gpu_launcher.jobs.node_messages import BeginRun, Closed, Opened
from gpu_launcher.jobs.report_files import ReportFiles
from gpu_launcher.jobs.source import Exhausted
from gpu_launcher.jobs.sweep import Options
from gpu_launcher.model import BUSY_MEMORY, Device, DeviceKind
from gpu_launcher.nodes.agent_messages import Echo, HostedProgram, Setup, Timing
from gpu_launcher.nodes.engines import NodeSpec
from gpu_launcher.nodes.remote_node import Life, RemoteNode, end_all
from gpu_launcher.processes import spawn
from gpu_launcher.processes.random_generators import Generators
from gpu_launcher.processes.signals import StopSignals
from gpu_launcher.processes.worker import JobContext
from gpu_launcher.wording import device_counts, duration

CHECK = "nodes"
AGENT_SECONDS = 60.0
"""Maximum seconds to wait for an agent. A sweep waits for as long as it runs."""
STEP_SECONDS = 60.0
"""Maximum seconds for everything that follows."""
ECHOES = 5
"""Number of messages of which the median time there and back is shown."""


def examine_nodes(specs: Sequence[NodeSpec]) -> Iterator[Finding]:
    """Try all nodes at the same time. Everything that is started has ended when this returns or raises."""
    directory = Path(tempfile.mkdtemp(prefix=".gpu-launcher-doctor-", dir=Path.cwd()))
    trials: list[_Trial] = []
    try:
        setup = _setup(directory)
        with StopSignals() as signals:
            try:
                for spec in specs:
                    trials.append(_Trial(spec, setup, directory))
                _run(trials, signals)
            finally:
                nodes = [trial.node for trial in trials if trial.node is not None]
                end_all(nodes)
                for node in nodes:
                    node.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    for trial in trials:
        yield from trial.findings


def _setup(directory: Path) -> Setup:
    """Return what an agent needs to open a pool without a program."""
    probe, content = directory / "probe", uuid.uuid4().hex.encode()
    probe.write_bytes(content)
    program = HostedProgram(_no_program, as_proposed)
    return Setup(
        timing=Timing(),
        directory=str(Path.cwd()),
        arguments=(),
        interpreter=spawn.describe_interpreter(
            spawn.pickled_program(program, "nodes", "nodes are tried", "do not name any"),
            Generators().pickled_globals(),
        ),
        script=None,
        probe=(str(probe), content),
        method="auto",
        option="start_method",
    )


def _no_program(number: int, spec: Any, context: JobContext) -> NoReturn:
    raise AssertionError("no job is run")


def _run(trials: Sequence[_Trial], signals: StopSignals) -> None:
    """Wait until all trials are over. Raises KeyboardInterrupt or SystemExit if a signal asks to stop."""
    beat = Timing().beat
    next_beat = time.monotonic()
    while running := [trial for trial in trials if not trial.over]:
        if time.monotonic() >= next_beat:
            next_beat = time.monotonic() + beat
            for trial in running:
                trial.beat()
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        for trial in running:
            trial.listen_with(poll)
        poll.poll(100)
        if signals.take():
            if signals.last is signal.SIGINT:
                raise KeyboardInterrupt
            assert signals.last is not None
            sys.exit(128 + signals.last)
        for trial in running:
            trial.advance()


class _Trial:
    """The trial of one node."""

    def __init__(self, spec: NodeSpec, setup: Setup, directory: Path) -> None:
        self._spec = spec
        self._directory = directory
        self.findings: list[Finding] = []
        self.over = False
        self.node: RemoteNode | None = None
        self._began = self._asked = time.monotonic()
        self._answered: float | None = None
        """When the agent was there."""
        self._loaded = False
        self._round_trips: list[float] = []
        if spec.command is None:
            self._find(ok, "is this machine: see the other findings")
            self.over = True
            return
        try:
            self.node = RemoteNode(spec, setup)
        except OSError as error:
            self._fail(spec.why_not_executed(error))

    def beat(self) -> None:
        if self.node is not None:
            self.node.beat()

    def listen_with(self, poll: select.poll) -> None:
        if self.node is not None and self.node.life in (Life.STARTING, Life.LIVES):
            poll.register(self.node, select.POLLIN)

    def advance(self) -> None:
        """Record what the node says, and proceed to the next step."""
        assert self.node is not None
        messages = self.node.receive_ready()
        now = time.monotonic()
        self.node.tick()
        if self.node.hello and self._answered is None:
            self._answered = now
            self._find(ok, f"its agent answered after {duration(now - self._began)}, on {self.node.hello['host']}")
        if self.node.life is Life.LIVES and not self._loaded:
            self._loaded = True
            versions = ", ".join(f"{name} {version}" for name, version in self.node.hello["versions"].items())
            self._find(ok, f"the same versions as here: {versions}")
            self._find(ok, f"sees the files in this directory, {self._directory.parent}")
            self._ask(now)
        for message in messages:
            self._take(message, now)
        if self.over:
            return
        if self.node.life is Life.GONE or (self.node.life is Life.SILENT and self._loaded):
            self._fail(self.node.problem or "lost its connection")
        elif self._answered is None and now - self._began > AGENT_SECONDS:
            said = self.node.said
            printed = f", and has printed: {said}" if said else ""
            self._fail(
                f"has no agent after {duration(AGENT_SECONDS)}{printed}. Remedy: {self._spec.remedy(None, said)}"
            )
        elif self._answered is not None and now - self._answered > STEP_SECONDS:
            missing = "open its pool" if self._loaded else "start Python and import gpu-launcher"
            self._fail(
                f"could not {missing} in {duration(STEP_SECONDS)}: a file system or the machine may be overloaded"
            )

    def _ask(self, now: float) -> None:
        assert self.node is not None
        self._asked = now
        self.node.say(Echo())

    def _take(self, message: object, now: float) -> None:
        match message:
            case Echo():
                self._round_trips.append(now - self._asked)
                if len(self._round_trips) < ECHOES:
                    self._ask(now)
                else:
                    milliseconds = 1000 * statistics.median(self._round_trips)
                    self._find(ok, f"a message takes {milliseconds:.1f} ms there and back")
                    self._open()
            case Opened(devices):
                self._show(devices)
            case Notice(text=text):
                self._find(warning, text)
            case Closed(error):
                self.over = True
                if error is not None:
                    self._fail(f"cannot run jobs: {error}")

    def _open(self) -> None:
        """Open the node's pool for a run without jobs."""
        assert self.node is not None
        options = Options(
            devices="auto",
            request=None,
            max_parallel=None,
            grace=1.0,
            pool_dir=None,
            busy_memory=BUSY_MEMORY,
            device_environment=DeviceEnvironment(),
            spell="hydra.launcher.{}".format,
        )
        self.node.say(BeginRun(options, ReportFiles(self._directory), "gpu-launcher doctor", shown=True, last=True))
        self.node.say(Exhausted())

    def _show(self, devices: Sequence[Device]) -> None:
        if all(device.kind is DeviceKind.CPU for device in devices):
            # A notice follows that says why.
            self._find(
                warning,
                f"no GPU is found there: jobs run on {device_counts(devices)}. Remedy: none if that is wanted; else "
                "leave this node out, or see `gpu-launcher doctor` there",
            )
            return
        for text in kinds(devices):
            self._find(ok, text)

    def _find(self, level: Callable[..., Finding], text: str) -> None:
        text, _, remedy = text.partition(". Remedy: ")
        self.findings.append(level(CHECK, f"{self._spec.name}: {text}", *([remedy] if remedy else [])))

    def _fail(self, text: str) -> None:
        self.over = True
        self._find(problem, text)
