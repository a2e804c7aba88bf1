"""The job loop's record of each job, with the attempt that runs and the stage of its process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.allocation.request_queue import PendingRequest
from gpu_launcher.devices import Condition, memory_of
from gpu_launcher.jobs.failures import RetryState
from gpu_launcher.jobs.job import Job
from gpu_launcher.leases import HeldLease
from gpu_launcher.model import Device, Request, Share
from gpu_launcher.processes import messages
from gpu_launcher.processes.fork_server_client import SUPERVISOR_DIED, JobProcess, Lost


class Stage(Enum):
    """The state of a job's process. The machine's `Phase` says what the job does in it."""

    IDLE = auto()
    """No process: the job is queued, or has its result."""
    POSTPONED = auto()
    """No process yet, because the node has too many open files until another job ends."""
    STRANDED = auto()
    """No process, because the fork server died. The job is started by the next server."""
    LIVE = auto()
    """A process, whose end a supervisor or the fork server will report."""
    GONE = auto()
    """The process tree has ended, and the result is not known yet."""


@dataclass(slots=True)
class JobRun:
    """One attempt of a job, from the start of its process."""

    process: JobProcess
    server: int
    """The fork server that started it: the number of servers that were lost before."""
    oom_kills: int = 0
    """How many processes the kernel had killed for lack of memory when this attempt was started."""
    pid: int | None = None
    """Process id of its main process, once it is prepared."""
    log: str | None = None
    device_environment: DeviceEnvironment | None = None
    """How it is told its devices. None: as the sweep's jobs are."""

    request: Request | None = None
    """Its request, once it may enter the queue."""
    pending: PendingRequest | None = None
    """Its place in the queue, while it waits there."""
    lease: HeldLease | None = None
    devices: tuple[Device, ...] = ()
    shares: Mapping[str, Share] = field(default_factory=dict)
    """The share that it had of each of its devices, by UUID."""
    started: float | None = None
    """When its devices were granted. None before."""

    ended: float | None = None
    """When its process tree was known to be gone."""
    status: int | None = None
    """Exit status of its main process, as from `os.waitpid`. None if it is not known."""
    printed: str = ""
    """The end of its output before it had a log."""
    left_behind: tuple[str, ...] = ()
    """Processes that outlived it and had to be ended."""
    peak_memory: int | None = None
    """See `Figures`."""
    peak_device_memory: int | None = None
    """See `Figures`."""
    measurements: int = 0
    """How many measurements have shown it on a device."""
    unsupervised: bool = False
    """Whether its supervisor is gone. The fork server reports its end, unless that is dead, too."""
    problem: str | None = None
    """A problem outside the job's own code, as a sentence without a subject."""
    report_digest: bytes | None = None
    """SHA-256 of its report's file, once the job has announced it."""
    final: bool = False
    """Whether another attempt would be useless, or would repeat work that is done."""

    @property
    def duration(self) -> float | None:
        """Seconds from grant to end. None if it never ran."""
        if self.started is None or self.ended is None:
            return None
        return self.ended - self.started

    def note_exit(self, message: messages.JobExited) -> None:
        """Take note that its supervisor reported its end."""
        self.status = message.status
        self.printed = message.printed.decode(errors="replace").strip()
        self.unsupervised = message.abandoned
        self.left_behind = message.left_behind
        self.peak_memory = message.peak_memory or None

    def note_conditions(self, conditions: Iterable[Condition]) -> None:
        """Take note of a measurement of devices."""
        ours = {device.uuid for device in self.devices}
        if self.pid is None:
            return
        seen = [memory_of(self.pid, condition) for condition in conditions if condition.uuid in ours]
        used = [memory for memory in seen if memory is not None]
        if used:
            self.peak_device_memory = max(*used, self.peak_device_memory or 0)
            self.measurements += 1

    def note_supervisor_death(self) -> None:
        """Take note that its supervisor was killed. The fork server ends the rest of the job and reports that."""
        self.problem = SUPERVISOR_DIED
        self.unsupervised = True

    def note_loss(self, lost: Lost) -> None:
        """Take note that the fork server reported its end."""
        self.problem = lost.problem
        self.final = not lost.started
        self.unsupervised = lost.started

    def note_result(self, message: messages.ResultWritten | messages.ResultLost) -> None:
        """Take note that it wrote its report, or could not."""
        if isinstance(message, messages.ResultWritten):
            self.report_digest = message.digest
        else:
            self.problem = f"could not write its result: {message.problem}"
            self.final = True


@dataclass(slots=True)
class JobRecord:
    """A job in the loop."""

    job: Job
    retries: RetryState
    stage: Stage = Stage.IDLE
    run: JobRun | None = None
    """The attempt that is LIVE or GONE."""
    delay: str = ""
    """For a POSTPONED job: why it could not be started."""
    pruned: bool = False
    """Whether it was cancelled because other trials are better."""

    @property
    def live(self) -> JobRun | None:
        """The attempt, while it has a process."""
        return self.run if self.stage is Stage.LIVE else None

    @property
    def attempt(self) -> JobRun:
        """The attempt, which must exist."""
        assert self.run is not None, f"job {self.job.number} is {self.stage.name}"
        return self.run

    def begin(self, run: JobRun) -> None:
        """Take note that its process was started."""
        self.stage, self.run = Stage.LIVE, run

    def reset(self, stage: Stage = Stage.IDLE) -> None:
        """Take note that it has no process: not yet, or not any more."""
        self.stage, self.run = stage, None
