"""The class `Lease` that users' programs get, and its effect on the program's own environment."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import NoReturn, SupportsIndex

from gpu_launcher.allocation.environment import DeviceEnvironment
from gpu_launcher.errors import ApplyError
from gpu_launcher.leases import HeldLease
from gpu_launcher.model import Device
from gpu_launcher.processes.linux import cuda_in_use
from gpu_launcher.wording import device_names


class Lease:
    """The right to use `devices`, from the grant until `release` or the end of its `with` block.

    A lease also stays alive while another process has a copy of its descriptor. Forked children have one; other
    subprocesses get one by `pass_fds`. The devices are free once `release` was called and those processes have ended.
    """

    def __init__(
        self,
        devices: tuple[Device, ...],
        held: HeldLease | None,
        give_back: Callable[[HeldLease], None],
        device_environment: DeviceEnvironment = DeviceEnvironment(),  # noqa: B008  (frozen)
    ) -> None:
        """Only `Pool` creates it. If `held` is None, it is a lease of no devices, without a locked file."""
        self.devices = devices
        """The devices, in the order in which CUDA counts them for a process with `environment`."""
        self._held = held
        self._give_back = give_back
        self._device_environment = device_environment
        self._released = False
        # __del__ is not used: it would swallow an exception from a signal handler, even at the end of any `with` block.
        self._finalizer = weakref.finalize(self, _forgotten, held, give_back, device_names(devices))
        self._finalizer.atexit = False

    @property
    def released(self) -> bool:
        """Whether this process has released the lease."""
        return self._released or (self._held is not None and not self._held.held)

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment for a subprocess that uses exactly these devices. `base` defaults to `os.environ`.

        It sets CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER and GPU_LAUNCHER_MEMORY_FRACTION, the lease's fraction of each
        device's memory. Raises ValueError after `release`.
        """
        base = os.environ if base is None else base
        return {**base, **self._variables(base)}

    def apply(self) -> None:
        """Make this process use exactly these devices: set `environment` in `os.environ` until `release`.

        Raises ApplyError if CUDA is already initialised, or if an applied lease of other devices is still held. Raises
        ValueError after `release`.
        """
        _application.apply(self, self._variables(os.environ))

    def fileno(self) -> int:
        """Return the descriptor that keeps the lease alive (close-on-exec). Never unlock it; only close copies of it.

        Raises ValueError after `release`, and for a lease of no devices, which has no descriptor.
        """
        self._check()
        if self._held is None:
            raise ValueError("a lease of no devices has no descriptor")
        return self._held.fileno()

    @property
    def pass_fds(self) -> tuple[int, ...]:
        """Descriptors for `subprocess.Popen`. The child then holds the lease until it ends, even if this process ends.

        Raises ValueError after `release`.
        """
        self._check()
        return () if self._held is None else (self._held.fileno(),)

    def release(self) -> None:
        """Release the devices. Idempotent."""
        if not self._released:
            _application.undo(self)
            if self._held is not None:
                self._give_back(self._held)
            self._released = True
            self._finalizer.detach()  # last, so that the finalizer completes an interrupted release

    def _variables(self, inherited: Mapping[str, str]) -> dict[str, str]:
        self._check()
        shares = {} if self._held is None else self._held.shares
        return self._device_environment.variables(self.devices, shares, inherited)

    def _check(self) -> None:
        if self.released:
            raise ValueError(f"{self!r} has been released")

    def __enter__(self) -> Lease:
        self._check()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raise TypeError: a copy would hold nothing, and its release could close an unrelated file."""
        raise TypeError(
            f"{self!r} can be neither copied nor pickled: it is held by a descriptor of this process. Remedy: give "
            "another process env=lease.environment() and pass_fds=lease.pass_fds, or have it ask for a lease of its own"
        )

    def __repr__(self) -> str:
        return f"<Lease of {device_names(self.devices) or 'no devices'}{', released' if self.released else ''}>"


def _forgotten(held: HeldLease | None, give_back: Callable[[HeldLease], None], names: str) -> None:
    """Release a lease whose last reference is gone."""
    if held is not None and held.held:
        _application.undo(None)
        give_back(held)
        warnings.warn(f"unreleased lease of {names}", ResourceWarning, stacklevel=2)


class _Application:
    """The environment variables that the applied lease has set. There is one instance per process."""

    def __init__(self) -> None:
        # Reentrant, because the garbage collector may finalize a lease at any point.
        self._lock = threading.RLock()
        self._lease: weakref.ref[Lease] | None = None
        self._set: dict[str, str] = {}
        self._before: dict[str, str | None] = {}

    def apply(self, lease: Lease, variables: Mapping[str, str]) -> None:
        with self._lock:
            applied = self._lease() if self._lease is not None else None
            if applied is None or applied.released:
                self._undo()
                applied = None
            same = applied is not None and applied.devices == lease.devices
            if applied is not None and not same:
                raise ApplyError(
                    f"this program uses {_named(applied)}, whose lease was applied: release that first, or run the "
                    f"work on {_named(lease)} in a subprocess with env=lease.environment()"
                )
            if not same and (problem := cuda_in_use()):
                raise ApplyError(
                    f"{problem}, and what it may use does not change after that: call apply() before anything uses "
                    f"CUDA, or run the work on {_named(lease)} in a subprocess with env=lease.environment()"
                )
            self._before = {name: os.environ.get(name) for name in variables} | (self._before if same else {})
            self._set = dict(variables)
            self._lease = weakref.ref(lease)
            os.environ.update(variables)

    def undo(self, lease: Lease | None) -> None:
        """Restore the variables if `lease`, or a lease that no longer exists, has set them."""
        with self._lock:
            if self._lease is not None and self._lease() in (lease, None):
                self._undo()

    def _undo(self) -> None:
        for name, before in self._before.items():
            if os.environ.get(name) != self._set.get(name):
                continue  # the program has changed the variable since
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
        self._lease, self._set, self._before = None, {}, {}


def _named(lease: Lease) -> str:
    return device_names(lease.devices) or "no devices"


_application = _Application()


def _in_child() -> None:
    _application._lock = threading.RLock()


os.register_at_fork(after_in_child=_in_child)
