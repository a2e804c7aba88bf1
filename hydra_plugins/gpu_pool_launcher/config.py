"""The options of `hydra/launcher=gpu_pool`. Imported at the start of every Hydra program: keep it light."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from .resolvers import register_resolver

HELP = {
    "devices": "Devices to run on: auto (all GPUs, or CPU slots if there is no GPU), a list of GPUs such as [0,2] or "
    "UUIDs, cpu:4, or simulated:8. CUDA_VISIBLE_DEVICES restricts auto and lists.",
    "nodes": "Machines to run on, such as [local,ssh:gpu2]: local, ssh:HOST, slurm:COUNT, sbatch:COUNT, ray:COUNT, "
    "'command:COMMAND ...', or a list of these. See `gpu-launcher guide nodes`. null: this machine.",
    "outputs": "Where jobs on other machines leave their outputs: shared (a file system that all machines share), or "
    "fetch (each job's directory is brought here when it ends).",
    "gpus": "GPUs per job: a whole number, or a fraction such as 0.5. Can be an interpolation on the job's own "
    "config, if the sweep's config has that key too; a list, such as Lightning's devices, then counts by its length. "
    "null: one, or with memory the share that it needs.",
    "memory": "Memory that a job declares on each of its devices, such as 20GiB. Jobs share a device as long as its "
    "memory suffices. auto: the first jobs get whole devices, later ones the most memory that earlier ones used, with "
    "head-room.",
    "priority": "Rank among waiting jobs on this machine: higher goes first, below 0 goes after others. Above 0 is "
    "for root, and for the owner of a pool directory that root made for them.",
    "timeout": "Time limit for a job, such as 90, 30m or 2h. At the limit, it gets SIGTERM, and after grace it is "
    "killed. A short job that declares a timeout may start while a large one waits.",
    "retries": "How many times to run a failed job again, in the same directory. The log of each attempt is kept. "
    "GPU_LAUNCHER_ATTEMPT tells a job the number of its attempt.",
    "retry_on": "Failures to retry after: crash, oom (then alone on a whole GPU, or on a larger one), timeout, "
    "device_lost, exception.",
    "on_failure": "What a failure does: continue (the other jobs keep running) or stop (the first failure ends the "
    "sweep).",
    "max_failures": "Number of failed jobs that ends the sweep. null: no limit.",
    "resume": "Run only the jobs that did not complete in an earlier launch with the same hydra.sweep.dir and "
    "overrides.",
    "dry_run": "Run nothing: show the first commands, the jobs whose configs do not compose, and what all jobs need of "
    "the pool. The exit code is 1 if a job cannot run. Needs --multirun, as every sweep does.",
    "detach": "Continue without the terminal when the first job can start: the prompt returns, and the output goes to "
    "sweep.log in the sweep's directory. gpu-launcher attach shows the sweep. See `gpu-launcher guide leave`.",
    "direction": "minimize or maximize: which value that the jobs return is best. The sweep then names its best job at "
    "its end. null: not known. optuna_async uses hydra.sweeper.direction instead.",
    "on_end": "Command that runs when the sweep is over, with a JSON document on its standard input: a list of words, "
    "or text that is split as a shell does. See `gpu-launcher guide notifications`. null: none.",
    "on_job_failure": "Command that runs for each job that fails and is not retried, like on_end.",
    "stagger": "Time between the starts of two jobs on one device, such as 5 or 1m.",
    "busy_memory": "Memory in use on a device, beyond what is leased, above which jobs do not start on it. null: "
    "ignore programs outside the pool.",
    "enforce_memory": "Make PyTorch and JAX keep to the job's share of the memory.",
    "visible": "How CUDA_VISIBLE_DEVICES names a job's devices: index or uuid.",
    "cpu_affinity": "auto: pin each job to the CPUs near its devices. null: do not pin.",
    "max_parallel": "Maximum number of jobs at the same time. null: as many as the devices allow; with gpus=0, as many "
    "as there are CPUs.",
    "start_method": "How jobs start: fork (from the imported program), spawn (each in a fresh interpreter), or auto "
    "(fork where it is safe, else spawn, and say why).",
    "grace": "Seconds that jobs get to end by themselves after Ctrl-C, SIGTERM or SIGHUP, before they are killed.",
    "pool_dir": "Directory of the pool. Sweeps share devices only within one pool. null: $GPU_LAUNCHER_POOL_DIR, "
    "else the machine's own.",
}
"""What each option means; `--cfg hydra` and shell completion show it under `hydra.launcher.help`."""


@dataclass
class GpuPoolLauncherConf:
    """The options, with their defaults; HELP has their documentation."""

    _target_: str = "hydra_plugins.gpu_pool_launcher.launcher.GpuPoolLauncher"
    unresolved: Any = "${gpu_pool.unresolved:}"
    devices: Any = "auto"
    nodes: Any = None
    outputs: str = "shared"
    gpus: Any = None
    memory: Any = None
    priority: Any = 0
    timeout: Any = None
    retries: int = 0
    retry_on: Any = field(default_factory=lambda: ["crash", "oom", "timeout", "device_lost"])
    on_failure: str = "continue"
    max_failures: int | None = None
    resume: bool = False
    dry_run: bool = False
    detach: bool = False
    direction: str | None = None
    on_end: Any = None
    on_job_failure: Any = None
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
    """Find the options that cannot be resolved, and replace them by their defaults.

    Hydra resolves all options before it creates the launcher. If one cannot be resolved, it shows a long traceback.
    The option `unresolved` comes first and calls this function. So the launcher is created, and can say what is wrong.
    """
    from ._interpolations import unresolvable  # too slow for every start of a Hydra program

    names = unresolvable(_parent_, besides=("unresolved", "help"))
    if names and not OmegaConf.is_readonly(_parent_):  # read-only if the config is only shown
        defaults = OmegaConf.structured(GpuPoolLauncherConf)
        for name in names:
            _parent_[name] = defaults.get(name)
    return names


register_resolver("gpu_pool.unresolved", find_unresolved)
ConfigStore.instance().store(group="hydra/launcher", name="gpu_pool", node=GpuPoolLauncherConf, provider="gpu_launcher")
