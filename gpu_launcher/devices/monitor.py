"""Measures the conditions of devices repeatedly, in a separate process.

It is a separate process for three reasons. Initialising NVML can take seconds, because without persistence mode the
driver initialises each idle GPU again. NVML must not be initialised in a program that forks. A driver that hangs must
not hang the program. The process initialises NVML once and answers when asked. It ends with the program that started
it, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gpu_launcher.debug_log import environment, get_logger, set_role
from gpu_launcher.devices.condition import Condition
from gpu_launcher.devices.nvml import NoGpuError, open_nvml
from gpu_launcher.errors import DeviceError
from gpu_launcher.model import Device, DeviceKind

_log = get_logger("devices.monitor")

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_STARTS = 3
"""Most starts of the process that watches GPUs. If it died this often, it is not started again."""

_LENGTH = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of one measurement."""

    asked: float
    """The time given to `ask`. The reading includes everything that happened before."""
    conditions: tuple[Condition, ...] = ()
    """The conditions of the devices, in their order; empty if there is a problem."""
    problem: str | None = None
    """Why nothing is known of the devices, such as an updated driver. The devices may still be used."""


class ConditionMonitor:
    """Asks for the conditions of devices and never waits for the answer.

    Only GPUs and MIG instances are measured; without any, no process is started. Not promised: an answer within any
    time. Until it comes, `latest` keeps the last reading, whose `asked` tells its age.
    """

    def __init__(self, devices: Sequence[Device], root: Path = Path("/")) -> None:
        """Prepare to watch `devices`. `root` contains /proc and /sys."""
        self._devices = tuple(devices)
        self._root = root
        self._real = any(device.kind in (DeviceKind.GPU, DeviceKind.MIG) for device in devices)
        # Both ends stay open here, so that the descriptor stays valid if the watching process dies.
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self.asking: float | None = None
        """When the question that is not answered yet was asked; None if there is none."""
        self._received = b""
        self.latest: Reading | None = None
        """The last reading; None before the first."""

    def fileno(self) -> int:
        """Readable when there is something to `receive`."""
        return self._ours.fileno()

    def ask(self, now: float) -> None:
        """Request a reading, unless one is pending. `receive` returns it later."""
        if not self._real:
            self.latest = Reading(now, tuple(Condition(device.uuid) for device in self._devices))
            return
        if self._process is not None and self._process.poll() is not None:
            self._forget()
        if self.asking is not None:
            return
        if self._process is None:
            if self._starts == MAX_STARTS:
                self.latest = Reading(now, problem="the process that watches the GPUs ended again and again")
                return
            self._start()
        self.asking = now
        self._ours.send(b"?")

    def receive(self) -> Reading | None:
        """Return the reading if it has arrived completely, else None. Never waits."""
        with contextlib.suppress(BlockingIOError):
            while chunk := self._ours.recv(1 << 16):
                self._received += chunk
        if self.asking is None or len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if len(self._received) < _LENGTH.size + length:
            return None
        conditions, problem = pickle.loads(self._received[_LENGTH.size :])
        self.latest = Reading(self.asking, conditions, problem)
        self._received = b""
        self.asking = None
        return self.latest

    def close(self) -> None:
        """End the watching process."""
        self._ours.close()
        self._theirs.close()
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it is stuck in a driver that hangs
                self._process.wait(1)

    def close_in_child(self) -> None:
        """Drop everything that belongs to the parent. Called in a forked child."""
        self._ours.close()
        self._theirs.close()
        if self._process is not None:
            self._process.returncode = 0  # not a child of this process: prevents a ResourceWarning

    def _start(self) -> None:
        self._starts += 1
        descriptor = self._theirs.fileno()
        # The path is set before any import, because -m would find modules in the current directory first.
        code = f"import sys; sys.path[:] = {list(map(str, sys.path))!r}; "
        code += f"from gpu_launcher.devices.monitor import serve; serve({descriptor})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C does not reach it
            env={**os.environ, **environment()},
        )
        task = pickle.dumps((self._devices, self._root))
        self._ours.send(_LENGTH.pack(len(task)) + task)

    def _forget(self) -> None:
        """Forget a watching process that died, and all data that was sent in either direction."""
        self._process = None
        self.asking = None
        self._received = b""
        self._theirs.setblocking(False)
        for end in (self._ours, self._theirs):
            with contextlib.suppress(BlockingIOError):
                while end.recv(1 << 16):
                    pass
        self._theirs.setblocking(True)


def serve(descriptor: int) -> None:
    """The main function of the watching process."""
    set_role("monitor")
    with socket.socket(fileno=descriptor) as channel, contextlib.suppress(ConnectionError):
        (length,) = _LENGTH.unpack(channel.recv(_LENGTH.size, socket.MSG_WAITALL))
        devices, root = pickle.loads(channel.recv(length, socket.MSG_WAITALL))
        _log.debug("measures %d devices", len(devices))
        while channel.recv(1):
            try:
                with open_nvml(root) as nvml:
                    while True:
                        conditions = nvml.conditions(devices)
                        _answer(channel, conditions, None)
                        if any(condition.fault for condition in conditions):
                            _log.warning("faults: %s", [one for one in conditions if one.fault])
                            break  # NVML's state of a lost GPU changes only when it is initialised again
                        if not channel.recv(1):
                            return
            except (NoGpuError, DeviceError) as error:
                _log.warning("the devices cannot be measured: %s", error)
                _answer(channel, (), str(error))


def _answer(channel: socket.socket, conditions: tuple[Condition, ...], problem: str | None) -> None:
    answer = pickle.dumps((conditions, problem))
    channel.sendall(_LENGTH.pack(len(answer)) + answer)
