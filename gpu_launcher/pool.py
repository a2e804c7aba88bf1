"""`Pool`: the machine's pool for Python programs, with leases for threads, asyncio tasks and subprocesses."""

from __future__ import annotations

import logging
import math
import os
import select
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

from gpu_launcher.allocation.device_watch import links_among
from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.allocation.lease import Lease
from gpu_launcher.allocation.lease_broker import LeaseBroker
from gpu_launcher.allocation.readings import put_together
from gpu_launcher.allocation.request_queue import RequestQueue
from gpu_launcher.allocation.survey import Found, PoolSeen, PoolSnapshot, snapshot_of
from gpu_launcher.devices import Links, select_devices
from gpu_launcher.devices.specification import read_specification
from gpu_launcher.durations import read_duration
from gpu_launcher.errors import OptionError
from gpu_launcher.jobs import notice_log
from gpu_launcher.jobs.where import Where, this_program
from gpu_launcher.leases import FileLedger, HeldLease, choose_pool_directory, resolve_pool_directory
from gpu_launcher.model import Device, Request
from gpu_launcher.requests import read_request
from gpu_launcher.sizes import read_memory
from gpu_launcher.users import this_process

LOG = logging.getLogger("gpu_launcher")
ANSWER = 3.0
"""Maximum seconds that a snapshot waits for the conditions of the devices."""


@dataclass(frozen=True, slots=True)
class _Machine:
    devices: tuple[Device, ...]
    links: Links | None
    device_environment: DeviceEnvironment


class _Entrance:
    """Finds the devices and opens the request queue for them.

    It is separate from `Pool` so that the lease broker, which calls it, does not keep the pool alive.
    """

    def __init__(self, spec: object, directory: Path, busy_memory: int | None) -> None:
        self.spec = spec
        self.directory = directory
        self.busy_memory = busy_memory
        self.environ = dict(os.environ)
        """A copy of the environment with the mask of visible GPUs, because `Lease.apply` later changes the mask."""
        self._machine: _Machine | None = None

    def machine(self) -> _Machine:
        """Find the devices. The first call may take seconds. Raises OptionError, DeviceError."""
        if self._machine is None:
            selection = select_devices(self.spec, self.environ, option="devices")
            device_environment = DeviceEnvironment(by_uuid=selection.by_uuid)
            self._machine = _Machine(selection.devices, links_among(selection.devices), device_environment)
            for notice in selection.notices:
                notice_log.log(notice)
        return self._machine

    def open(self, tell: Callable[[str], None]) -> RequestQueue:
        """Open a request queue. Raises OptionError, DeviceError, PoolDirectoryError."""
        machine = self.machine()
        return RequestQueue(
            machine.devices,
            FileLedger(resolve_pool_directory(str(self.directory)), warn=tell),
            busy_memory=self.busy_memory,
            tell=tell,
            clock=time.monotonic,
            links=machine.links,
        )


class Pool:
    """The GPUs of this machine, shared with every program and user that uses gpu-launcher on it.

    Threads and event loops may share a pool. A forked child can use it, too; parent and child then both hold the leases
    that were held at the fork. Nothing is opened before the first lease. `close`, or the end of a `with` block, closes
    the pool.

    If a lease is not granted at once, a warning from the logger `gpu_launcher` says what it waits for.
    """

    def __init__(
        self,
        devices: object = "auto",
        pool_dir: str | os.PathLike[str] | None = None,
        busy_memory: object = "512MiB",
    ) -> None:
        """Use `devices`: `auto` (all GPUs, or CPU slots if there are none), indices or UUIDs, `cpu:4`, `simulated:8`.

        `pool_dir` is a pool directory to use instead of the machine's. GPUs on which programs outside the pool use more
        memory than `busy_memory` are not granted; with None, such use is ignored. All three mean the same as for the
        launcher. CUDA_VISIBLE_DEVICES, as it is when the pool is created, restricts the devices.

        Raises OptionError, PoolDirectoryError.
        """
        read_specification(devices, "devices")
        most = None if busy_memory in (None, "null") else read_memory(busy_memory, "busy_memory")
        self.directory: Path = choose_pool_directory(None if pool_dir is None else os.fspath(pool_dir))[0]
        self._made_of = (devices, None if pool_dir is None else os.fspath(pool_dir), busy_memory)
        self._entrance = _Entrance(devices, self.directory, most)
        self._broker = LeaseBroker(self._entrance.open, LOG.warning)

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices that it may lease. The first access may take seconds, because it reads the GPUs.

        Raises OptionError for devices that do not exist, DeviceError if the driver does not answer.
        """
        return self._prepare().devices

    def lease(
        self,
        gpus: float | None = None,
        memory: object = None,
        priority: int = 0,
        timeout: object = None,
    ) -> Lease:
        """Wait for a lease of `gpus` devices, or of a fraction of one, with `memory` (`20GiB`) on each; 1 by default.

        With `memory` alone, the lease is for a fraction of one device with that much memory. 0 devices are granted at
        once. Requests with a higher `priority` go first. `timeout` is the longest wait, in seconds or as `10m`. 0 means
        to try once; by default, there is no limit.

        Raises LeaseTimeout; RequestError if these devices can never satisfy the request; OptionError if the request is
        invalid; PoolDirectoryError; DeviceError; ValueError if the pool is closed.
        """
        request, limit = _read(gpus, memory, priority, timeout)
        if request.gpus == 0:
            return self._nothing()
        make = self._maker(request)
        return self._broker.wait(request, this_process(this_program()), limit, make)

    def alease(
        self,
        gpus: float | None = None,
        memory: object = None,
        priority: int = 0,
        timeout: object = None,
    ) -> Asking:
        """Like `lease`, for asyncio: `async with pool.alease(gpus=1) as lease:`, or `lease = await pool.alease()`.

        It uses no thread. If it is cancelled, it leaves the queue at once. Other tasks run while it waits, except for
        the milliseconds in which the pool is read.
        """
        return Asking(self, *_read(gpus, memory, priority, timeout))

    def snapshot(self) -> PoolSnapshot:
        """The pool's devices, who holds them and who waits for them. Takes seconds if the GPUs were not read before.

        Raises OptionError, DeviceError, PoolDirectoryError; ValueError if the pool is closed.
        """
        machine = self._prepare()
        deadline = time.monotonic() + ANSWER
        while True:
            with self._broker.guard():
                queue = self._broker.queue()
                waiting = queue.look()
                if waiting is None or time.monotonic() >= deadline:
                    view, conditions = queue.snapshot(), queue.watch.conditions
                    break
            poll = select.poll()
            poll.register(waiting, select.POLLIN)
            poll.poll(50)
        known = {device.uuid: device for device in machine.devices}
        found, pool = Found(machine.devices, known=known, only=True), PoolSeen(self.directory, view)
        return snapshot_of(put_together(found, conditions, pool, self._entrance.busy_memory), known)

    def close(self) -> None:
        """Release all leases that this process holds from this pool. Waiting calls raise an error. Idempotent."""
        self._broker.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._broker.closed

    async def _wait_in_loop(self, request: Request, limit: float) -> Lease:
        if request.gpus == 0:
            return self._nothing()
        make = self._maker(request)
        return await self._broker.wait_in_loop(request, this_process(this_program()), limit, make)

    def _nothing(self) -> Lease:
        if self.closed:
            raise ValueError("this pool is closed")
        return Lease((), None, self._give_back)

    def _maker(self, request: Request) -> Callable[[HeldLease], Lease]:
        machine = self._prepare()
        known = {device.uuid: device for device in machine.devices}

        def make(held: HeldLease) -> Lease:
            return Lease(tuple(known[uuid] for uuid in held.uuids), held, self._give_back, machine.device_environment)

        return make

    def _give_back(self, held: HeldLease) -> None:
        self._broker.give_back(held)

    def _prepare(self) -> _Machine:
        if self.closed:
            raise ValueError("this pool is closed")
        with self._broker.preparing:
            return self._entrance.machine()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Pool(devices={self._entrance.spec!r}, pool_dir={str(self.directory)!r})"

    def __reduce__(self) -> tuple[type[Pool], tuple[object, str | None, object]]:
        """Pickle the arguments. An unpickled pool is a separate one with the same arguments."""
        return type(self), self._made_of

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        broker: LeaseBroker | None = getattr(self, "_broker", None)
        if broker is not None and broker.in_use and not broker.closed:
            warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            broker.close()


def read_pool(pool: object) -> Where:
    """Read the option `pool`; None means all of the machine's devices. Raises OptionError if it is not an open pool."""
    if pool is None:
        return Where()
    if isinstance(pool, Where):
        return pool
    if not isinstance(pool, Pool):
        raise OptionError("pool", f"{pool!r} is not a pool: give a gpu_launcher.Pool, such as Pool({_example(pool)!r})")
    if pool.closed:
        raise OptionError("pool", f"{pool!r} is closed: make another one, or call this before its block ends")
    return Where(*pool._made_of, environ=pool._entrance.environ)


def _example(pool: object) -> object:
    return pool if isinstance(pool, (str, list)) else "auto"


class Asking:
    """A lease that is requested when it is awaited or when its `async with` block is entered."""

    def __init__(self, pool: Pool, request: Request, limit: float) -> None:
        """Only `Pool.alease` creates it."""
        self._pool = pool
        self._request = request
        self._limit = limit
        self._lease: Lease | None = None

    def __await__(self) -> Generator[object, None, Lease]:
        return self._pool._wait_in_loop(self._request, self._limit).__await__()

    async def __aenter__(self) -> Lease:
        if self._lease is not None:
            raise RuntimeError("this lease was asked for already: call alease() for each block")
        self._lease = await self
        return self._lease

    async def __aexit__(self, *error: object) -> None:
        if self._lease is not None:
            self._lease.release()


def _read(gpus: object, memory: object, priority: object, timeout: object) -> tuple[Request, float]:
    request = read_request({"gpus": gpus, "memory": memory, "priority": priority})
    return request, math.inf if timeout is None else read_duration(timeout, "timeout")
