"""The options of `hydra/launcher=gpu_pool`. Imported at the start of every Hydra program: keep it light."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from .resolvers import register_resolver

HELP = {
    "devices": "What to run on: auto (all GPUs, or CPU slots where there is none), a list of GPUs as [0,2] or by UUID, "
    "cpu:4, simulated:8. An inherited CUDA_VISIBLE_DEVICES restricts auto and lists.",
    "gpus": "Devices for each job: 0, 1, 2, ..., or a part of one such as 0.5, also as an interpolation on the job's "
    "own config, of a key that the sweep's config has, too; a list then counts by its length, as Lightning's devices. "
    "null: one, or with memory as much of one as that says.",
    "memory": "Memory on each device that a job declares, such as 20GiB. Jobs share a device as long as it has enough.",
    "priority": "Higher goes first among those that wait, machine-wide; below 0 after others. "
    "Above 0 is for root and the owner of the pool directory.",
    "timeout": "Longest time for a job, such as 90, 30m or 2h. Then it gets SIGTERM, and after grace it is killed. "
    "Short jobs that declare it may start while a large one waits.",
    "retries": "How many times a failed job is run again, in the same directory. The log of each attempt is kept; "
    "GPU_LAUNCHER_ATTEMPT tells a job which it is.",
    "retry_on": "After what: crash, oom (then alone on a whole GPU, or a larger one), timeout, device_lost, exception.",
    "on_failure": "continue: the other jobs go on. stop: the first failure ends the sweep.",
    "max_failures": "How many failed jobs end the sweep; null: none do.",
    "resume": "Run only what did not complete in an earlier launch with the same hydra.sweep.dir and overrides.",
    "stagger": "Time between the starts of two jobs on one device, such as 5 or 1m.",
    "busy_memory": "A device on which more than this is in use beyond what is leased is left alone. null: do not look "
    "at what others do.",
    "enforce_memory": "Make PyTorch and JAX keep to the job's part of the memory.",
    "visible": "How jobs see their devices in CUDA_VISIBLE_DEVICES: index or uuid.",
    "cpu_affinity": "auto: pin each job to the CPUs near its devices. null: do not.",
    "max_parallel": "Most jobs at the same time. null: as many as get devices; with gpus=0 as many as there are CPUs.",
    "start_method": "How jobs start: fork (from the imported program), spawn (a fresh interpreter each), "
    "auto (fork where it is safe, else spawn, with the reason on the screen).",
    "grace": "Seconds that jobs get to end by themselves after Ctrl-C, SIGTERM or SIGHUP. Then they are killed.",
    "pool_dir": "Directory of the pool. null: $GPU_LAUNCHER_POOL_DIR, else the machine's own. "
    "Sweeps share devices only within one pool.",
}
"""What each option means; `--cfg hydra` and shell completion show it under `hydra.launcher.help`."""


@dataclass
class GpuPoolLauncherConf:
    """The options, with their defaults; HELP has their documentation."""

    _target_: str = "hydra_plugins.gpu_pool_launcher.launcher.GpuPoolLauncher"
    unresolved: Any = "${gpu_pool.unresolved:}"
    devices: Any = "auto"
    gpus: Any = None
    memory: Any = None
    priority: Any = 0
    timeout: Any = None
    retries: int = 0
    retry_on: Any = field(default_factory=lambda: ["crash", "oom", "timeout", "device_lost"])
    on_failure: str = "continue"
    max_failures: int | None = None
    resume: bool = False
    stagger: Any = 0
    busy_memory: Any = "512MiB"
    enforce_memory: bool = False
    visible: str = "index"
    cpu_affinity: str | None = None
    max_parallel: int | None = None
    start_method: str = "auto"
    grace: float = 10.0
    pool_dir: str | None = None
    help: dict[str, str] = field(default_factory=lambda: dict(HELP))


def find_unresolved(*, _parent_: DictConfig) -> list[str]:
    """The options that cannot be resolved, which get their defaults in their place.

    Hydra resolves all options before it makes the launcher, and shows 80 lines of traceback if one of them cannot be.
    This one comes first, and so lets the launcher be made, which then says what is wrong.
    """
    from ._interpolations import unresolvable  # which is not for every start of a Hydra program

    names = unresolvable(_parent_, besides=("unresolved", "help"))
    if names and not OmegaConf.is_readonly(_parent_):  # such as a config that is only shown
        defaults = OmegaConf.structured(GpuPoolLauncherConf)
        for name in names:
            _parent_[name] = defaults.get(name)
    return names


register_resolver("gpu_pool.unresolved", find_unresolved)
ConfigStore.instance().store(group="hydra/launcher", name="gpu_pool", node=GpuPoolLauncherConf, provider="gpu_launcher")
