"""What a node of Ray reserves: the options behind `ray:COUNT`, and whether a cluster can ever provide it.

The head reads the options to check them, and the bridge (`ray_bridge.py`) reads the same words again. Nothing here
imports Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gpu_launcher.wording import count

NEW_CLUSTER = "local"
"""The address that makes Ray start a cluster on this machine."""
ADDRESS_VARIABLE = "RAY_ADDRESS"
"""The variable with the address of the cluster, if no option names one."""
AGENT_END_SECONDS = 20.0
"""Maximum seconds for the agent to end after its input has. It needs 15 s if it cannot hear that."""
BRIDGE_END_SECONDS = AGENT_END_SECONDS + 5.0
"""Maximum seconds for the bridge to end after its input has."""
RUNNING_CLUSTER = "auto"
"""The address of the cluster that runs on this machine."""
EXAMPLE = "'ray:4 --gpus=8 --cpus=16'"

NOT_INSTALLED = "Ray is not installed here"
NO_CLUSTER = "cannot connect to a Ray cluster"
OTHER_VERSION = "the Ray cluster has other versions"
NEVER = "has no machine with"
BUSY = "waits until the Ray cluster has"
_CONNECT = (
    "run this on a machine of the cluster, and set RAY_ADDRESS or --address if it is not found; --address=local "
    "starts a cluster on this machine"
)
REMEDIES = {
    NOT_INSTALLED: "pip install 'gpu-launcher[ray]'",
    NO_CLUSTER: _CONNECT,
    "Failed to connect to GCS": _CONNECT,  # Ray prints this for more than a minute
    OTHER_VERSION: "install the same versions here as in the cluster",
    NEVER: "reserve less, or give --wait if the cluster adds machines when they are needed",
    BUSY: "`ray status` says what is in use; a sweep starts without it",
}
"""What to do about each problem that the bridge or Ray prints."""


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What is reserved for one node, and where."""

    gpus: int | None = None
    """GPUs to reserve. None: as many as the machine of the cluster that has most."""
    cpus: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)
    """Other resources of Ray, such as `memory` in bytes or `accelerator_type:H100`."""
    address: str | None = None
    """Address of the cluster. None: RAY_ADDRESS, or the cluster that runs on this machine."""
    wait: bool = False
    """Whether to wait for a machine that the cluster does not have."""
    command: tuple[str, ...] = ()
    """The words behind the options."""


def read_ray_options(words: Sequence[str]) -> RayOptions:
    """Read the words behind the number of nodes. Raises ValueError with what is wrong."""
    found: dict[str, object] = {}
    resources: dict[str, float] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        name, equals, value = rest.pop(0).partition("=")
        if name == "--wait" and not equals:
            found["wait"] = True
            continue
        if name not in ("--gpus", "--cpus", "--resource", "--address"):
            raise ValueError(
                f"{name!r} is not an option of ray: give --gpus=N, --cpus=N, --resource=NAME=AMOUNT, --address=ADDRESS "
                "or --wait"
            )
        if not equals:
            if not rest:
                raise ValueError(f"{name} needs a value")
            value = rest.pop(0)
        if name == "--gpus":
            found["gpus"] = _whole(name, value, 0)
        elif name == "--cpus":
            found["cpus"] = _whole(name, value, 1)
        elif name == "--resource":
            resource, amount = _resource(value)
            resources[resource] = amount
        else:
            found["address"] = _address(value)
    return RayOptions(**found, resources=resources, command=tuple(rest))  # type: ignore[arg-type]


def _whole(name: str, value: str, least: int) -> int:
    if not value.isdecimal() or len(value) > 9 or int(value) < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def _resource(value: str) -> tuple[str, float]:
    name, _, text = value.rpartition("=")
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if not name or not 0 < amount < math.inf:
        raise ValueError(f"--resource must be NAME=AMOUNT, such as accelerator_type:H100=1, got {value!r}")
    if name in ("CPU", "GPU"):
        raise ValueError(f"--resource does not set {name}: use --{name.lower()}s")
    return name, amount


def _address(value: str) -> str:
    if value.startswith("ray://"):
        raise ValueError(
            f"{value!r} is the address of a Ray client. Start the sweep on a machine of the cluster, as `ray job "
            "submit` does, and give --address=HOST:PORT, or no address there"
        )
    if not value:
        raise ValueError("--address needs a value: HOST:PORT, auto or local")
    return value


def bundle_of(options: RayOptions, machines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what to reserve, as a bundle of a placement group. `machines` are the resources of each machine."""
    gpus = options.gpus
    if gpus is None:
        gpus = max((int(machine.get("GPU", 0)) for machine in machines), default=0)
    bundle: dict[str, float] = {"GPU": gpus} if gpus else {}
    return {**bundle, "CPU": options.cpus, **options.resources}


def can_provide(machines: Sequence[Mapping[str, float]], bundle: Mapping[str, float]) -> bool:
    """Whether one of the machines has everything, if nothing else used it."""
    return any(all(machine.get(name, 0) >= amount for name, amount in bundle.items()) for machine in machines)


def in_words(bundle: Mapping[str, float]) -> str:
    """Return such as `8 GPUs, 16 CPUs and memory=64000000000`."""
    words = [
        count(int(amount), name) if name in ("GPU", "CPU") else f"{name}={amount:.12g}"
        for name, amount in bundle.items()
    ]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def most_of_each(machines: Sequence[Mapping[str, float]], bundle: Mapping[str, float]) -> str:
    """Say how much of each part of the bundle one of the machines has at most."""
    most = {name: max((machine.get(name, 0) for machine in machines), default=0) for name in bundle}
    return f"its machines have at most {in_words(most)}"
