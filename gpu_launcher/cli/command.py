"""The implementation of `gpu-launcher run`: waits for devices, runs the command and exits as it did."""

from __future__ import annotations

import contextlib
import math
import os
import select
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from gpu_launcher.allocation.device_watch import links_among
from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.allocation.feasibility import refuse
from gpu_launcher.allocation.request_queue import RequestQueue
from gpu_launcher.cli.streams import tell
from gpu_launcher.devices import select_devices
from gpu_launcher.devices.specification import read_specification
from gpu_launcher.errors import CommandError, GpuLauncherError, LeaseTimeout, OptionError
from gpu_launcher.leases import FileLedger, HeldLease, resolve_pool_directory
from gpu_launcher.model import ENDING, Device, Request
from gpu_launcher.processes.command_front import CommandResult, InterruptedBySignal, check_command, run_command
from gpu_launcher.processes.signals import HARMLESS, STOPS, CommandSignals
from gpu_launcher.text import one_line
from gpu_launcher.users import this_process
from gpu_launcher.wording import device_names

TIMED_OUT = 124
"""Exit code if the command reaches its time limit, as for timeout(1)."""
FAILED = 125
"""Exit code if gpu-launcher itself fails, as for env(1), nice(1) and timeout(1)."""
NO_DEVICES = 75
"""Exit code if no devices are granted in time: EX_TEMPFAIL of sysexits.h, which means that a retry may succeed."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a command. The caller validates the values."""

    request: Request
    devices: object
    """The devices to use, in the form that `gpu_launcher.devices.select_devices` takes."""
    wait: float | None
    """Longest time to wait for devices, in seconds; None for no limit."""
    grace: float
    """Seconds between SIGTERM and SIGKILL when the time limit is reached."""
    pool_dir: str | None
    busy_memory: int | None


def run_on_pool(command: Sequence[str], options: RunOptions) -> NoReturn:
    """Run `command` and exit as it does. Raises OptionError."""
    try:
        check_command(command[0], os.environ.get("PATH", os.defpath))
        if options.request.gpus == 0:
            _run_without_devices(command, options)
        _run(command, options)
    except CommandError as error:
        _tell(str(error))
        sys.exit(error.code)
    except LeaseTimeout as error:
        _tell(str(error))
        sys.exit(NO_DEVICES)
    except OptionError:
        raise
    except GpuLauncherError as error:
        _tell(str(error))
        sys.exit(FAILED)


def _run_without_devices(command: Sequence[str], options: RunOptions) -> NoReturn:
    read_specification(options.devices, "--devices")
    environment = {**os.environ, **DeviceEnvironment().variables((), {}, os.environ)}
    signals = CommandSignals()
    with _dying_of_signals(signals):
        ended = run_command(
            command,
            environment,
            signals,
            lease=None,
            timeout=options.request.timeout,
            grace=options.grace,
            tell=_tell,
        )
    _end_as(ended, signals)


def _run(command: Sequence[str], options: RunOptions) -> NoReturn:
    selection = select_devices(options.devices, os.environ, option="--devices")
    refuse(options.request, selection.devices)
    links = links_among(selection.devices, options.request)
    for notice in selection.notices:
        _tell(notice)
    directory = resolve_pool_directory(options.pool_dir)
    # Signals are blocked only from here on, so that a signal can end the program if the driver hangs above.
    signals = CommandSignals()
    with _dying_of_signals(signals), contextlib.ExitStack() as stack:
        ledger = stack.enter_context(FileLedger(directory, warn=_tell))
        announcements = _Announcements()
        queue = RequestQueue(
            selection.devices,
            ledger,
            busy_memory=options.busy_memory,
            tell=announcements.tell,
            clock=time.monotonic,
            links=links,
        )
        stack.callback(queue.close)
        lease = _wait_for_devices(command, options, queue, signals)
        queue.watch.close()  # no more requests will enter
        devices = {device.uuid: device for device in selection.devices}
        granted = [devices[uuid] for uuid in lease.uuids]
        announcements.granted(granted)
        telling = DeviceEnvironment(by_uuid=selection.by_uuid).variables(granted, lease.shares, os.environ)
        descriptor = os.dup(lease.fileno())
        stack.callback(os.close, descriptor)
        ended = run_command(
            command,
            {**os.environ, **telling},
            signals,
            lease=descriptor,
            timeout=options.request.timeout,
            grace=options.grace,
            tell=_tell,
            in_children=queue.close_in_child,
        )
    _end_as(ended, signals)


@contextlib.contextmanager
def _dying_of_signals(signals: CommandSignals) -> Iterator[None]:
    """If a signal arrives before the command runs, release everything in the block, then die of that signal."""
    try:
        yield
    except InterruptedBySignal as error:
        signals.die(error.signum)
        sys.exit(128 + error.signum)


def _end_as(ended: CommandResult, signals: CommandSignals) -> NoReturn:
    if ended.timed_out:
        sys.exit(TIMED_OUT)
    if ended.status is None:
        _tell("the process that supervised the command was killed, and so the command was, too")
        sys.exit(128 + signal.SIGKILL)
    if os.WIFSIGNALED(ended.status):
        signals.die(os.WTERMSIG(ended.status))
        sys.exit(128 + os.WTERMSIG(ended.status))
    sys.exit(os.WEXITSTATUS(ended.status))


def _tell(text: str) -> None:
    tell(one_line(text))


class _Announcements:
    """Messages while the command waits for devices. A grant is announced only if there were other messages before."""

    def __init__(self) -> None:
        self._told = False

    def tell(self, text: str) -> None:
        self._told = True
        _tell(text)

    def granted(self, devices: Sequence[Device]) -> None:
        if self._told:
            _tell(f"got {device_names(devices)}")


def _wait_for_devices(
    command: Sequence[str], options: RunOptions, queue: RequestQueue, signals: CommandSignals
) -> HeldLease:
    """Wait for the lease.

    Raises LeaseTimeout, InterruptedBySignal, and PoolDirectoryError if the directory stays unusable.
    """
    request = options.request
    if request.timeout is not None:  # the request declares when the devices are free at the latest
        request = replace(request, timeout=request.timeout + options.grace + ENDING)
    limit = math.inf if options.wait is None else options.wait
    pending = queue.enter(request, this_process(shlex.join(command)), limit=limit)
    poll = select.poll()
    for descriptor in (signals.fileno(), *queue.descriptors):
        poll.register(descriptor, select.POLLIN)
    while True:
        queue.attend()
        if pending.settled:
            return pending.result()
        left = queue.seconds_left(pending)
        for descriptor, _ in poll.poll(min(queue.patience, left if left > 0 else math.inf) * 1000 + 1):
            if descriptor == signals.fileno():
                _heed(signals)


def _heed(signals: CommandSignals) -> None:
    """Handle signals that arrive before the command runs. Raises InterruptedBySignal for a signal that ends the run."""
    for arrived in signals.read():
        if arrived.signum in STOPS:
            signals.suspend(arrived.signum)
        elif arrived.signum not in HARMLESS:
            raise InterruptedBySignal(arrived.signum)
