"""Run the tests against the installed package in several environments. `make matrix` calls this.

The dependencies are the newest, the lowest that pyproject.toml allows, or in between; what was installed is printed.
The tests run in a shuffled order; `--seed` repeats one.

`make test-all` has run every test but the slow ones on this machine's Python with the newest dependencies. Here, the
oldest Python with the lowest dependencies and the newest Python with the next Hydra run the quick tests of what depends
on these versions, and some of the thorough ones. The two Pythons between run what depends on packaging and what needs
torch. The slow tests are for `make slow`. On two idle CPUs, all of CI takes about 70 minutes.

Each environment lives in `.matrix/<name>/` and is kept: a second run reinstalls only gpu-launcher itself,
unless what it depends on has changed. The tests run in a copy of the tree that lacks the packages, so that what
is tested is what was installed. A Python that this machine lacks is reported and skipped; in CI that is a failure.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TREE = Path(__file__).resolve().parents[1]
MATRIX = TREE / ".matrix"
DIST = MATRIX / "dist"


@dataclass(frozen=True)
class Environment:
    python: str
    dependencies: Literal["newest", "lowest"]
    """Which release of each dependency in pyproject.toml the installer chooses, unless it is pinned below."""
    artifact: Literal["tree", "sdist", "wheel"]
    """What is installed: the tree itself (not editable), or what `python -m build` made of it."""
    tests: tuple[str, ...]
    """Files and directories whose tests are run, but for the slow ones."""
    quick: tuple[str, ...] = ()
    """Those whose quick tests are run, as in `make test`. Then only the thorough ones of `tests` are run."""
    hydra: str | None = None
    optuna: str | None = None
    beside: tuple[str, ...] = ()
    """What is installed beside, if it can be: the tests that need it are skipped without."""
    ddp: bool = False
    """Whether our extra `ddp` is, too."""
    histories: int | None = None
    """How many random histories of a pool are tried; None for as few as in `make test`, if any."""

    @property
    def name(self) -> str:
        return "-".join([f"py{self.python}", self.dependencies, *("".join(pin) for pin in self.pins), self.artifact])

    @property
    def pins(self) -> list[tuple[str, str]]:
        return [(name, version) for name, version in (("hydra", self.hydra), ("optuna", self.optuna)) if version]


QUICK = ("tests/cli/test_main.py", "tests/hydra", "tests/studies", "tests/unit", "tests/web")
"""What depends on the versions of Python, Hydra or Optuna. Crashes, leases and users depend on the kernel."""
QUICK_NEXT = ("tests/cli/test_main.py", "tests/hydra", "tests/studies", "tests/unit")
"""Quick tests of what the next Hydra or the newest Python may change."""
LOWEST = (
    "tests/hydra/test_contract.py",
    "tests/hydra/test_job_options.py",
    "tests/hydra/test_optuna_async_config.py",
    "tests/hydra/test_several_launches.py",
)
NEXT_HYDRA = (
    "tests/executors/test_cpython_suite.py",
    "tests/hydra/test_contract.py",
    "tests/hydra/test_existing_programs.py",
    "tests/hydra/test_hydra_suites.py",
    "tests/hydra/test_other_sweepers.py",
    "tests/hydra/test_preparation.py",
)
"""Thorough tests of what depends on them most. All would take too long for CI; `--only py3.10 -- PATH` runs more."""
PACKAGED = (
    "tests/hydra/test_contract.py",
    "tests/hydra/test_example_digits.py",
    "tests/unit/test_packaging.py",
    "tests/unit/test_public_names.py",
    "tests/crash/test_stress.py",
    "tests/web/test_pages.py",
)
"""What depends on what was packaged, and a sweep on each start method."""
DISTRIBUTED = (
    "tests/unit/test_packaging.py",
    "tests/unit/test_public_names.py",
    "tests/docs/test_howto_frameworks.py",
    "tests/docs/test_readme_in_order.py",
    "tests/hydra/test_existing_programs.py",
    "tests/hydra/test_lightning.py",
    "tests/hydra/test_lightning_pruning.py",
    "tests/hydra/test_pruning_ranks.py",
    "tests/unit/test_cpu_unpickler.py",
    "tests/unit/test_random_generators.py",
    "tests/unit/test_result_table.py",
    "tests/unit/test_samplers.py",
)
"""The wheel itself, and what needs torch, Lightning or one of FRAMEWORKS."""
FRAMEWORKS = ("tensorboard", "wandb", "mlflow-skinny", "pandas", "matplotlib", "nbclient", "ipykernel")
HISTORIES = (*PACKAGED, "tests/simulation/test_policy_state_machine.py")
SWEEPERS = ("hydra-optuna-sweeper==1.4.0rc3", "hydra-nevergrad-sweeper==1.4.0rc3")
"""Other people's that run on this Hydra."""

# The oldest and the newest of everything we support, each at least once; the longest first, so that two CPUs end
# together. `make test` has the newest release of each dependency, too. The release candidate of Hydra has to be named.
ENVIRONMENTS = (
    Environment(
        "3.13",
        dependencies="newest",
        hydra="1.4.0rc3",
        artifact="tree",
        tests=NEXT_HYDRA,
        quick=QUICK_NEXT,
        beside=SWEEPERS,
    ),
    Environment("3.10", dependencies="lowest", artifact="tree", tests=LOWEST, quick=QUICK),
    Environment(
        "3.11",
        dependencies="newest",
        artifact="wheel",
        tests=DISTRIBUTED,
        ddp=True,
        beside=("torch==2.13.0", *FRAMEWORKS),
    ),
    Environment(
        "3.12",
        dependencies="newest",
        hydra="1.4.0rc3",
        optuna="4.9.0",
        artifact="sdist",
        tests=HISTORIES,
        histories=20_000,
    ),
)

# What the tests read, apart from the packages.
COPIED = (
    "tests",
    "examples",
    "benchmarks",
    "docs",
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "pyproject.toml",
)
NOT_COPIED = shutil.ignore_patterns("__pycache__", "outputs", "multirun")

RUNNING: set[subprocess.Popen[bytes]] = set()
"""Commands of all environments, each in a session of its own."""
WORKERS = 2
"""Processes that run the tests of one environment: they wait as much as they work."""
LIMIT = 60 * 60  # seconds for each step; more than it needs on a busy machine

CHECK_INSTALLED = """
import importlib.metadata as metadata, pathlib, sys
import gpu_launcher, hydra_plugins.gpu_pool_launcher as plugin
prefix, *pins = sys.argv[1:]
for module in (gpu_launcher, plugin):
    assert pathlib.Path(module.__file__).is_relative_to(prefix), f"{module.__file__} is not in {prefix}"
for pin in pins:
    name, version = pin.split("==")
    assert metadata.version(name) == version, f"{name} is {metadata.version(name)}, not {version}"
print("installed:", *sorted(f"{one.name}=={one.version}" for one in metadata.distributions()))
"""


class StepFailed(Exception):
    """A step of an environment failed; its output is in the environment's log."""


@dataclass
class Report:
    environment: Environment
    outcome: Literal["passed", "FAILED", "skipped"]
    detail: str
    setup: float = 0.0
    tests: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests against installed packages.")
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="only environments whose name begins so, such as py3.13 (may be repeated)",
    )
    parser.add_argument("--fresh", action="store_true", help="make the environments anew")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="environments at a time (default: one per CPU)"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(100_000), help="for the order of the tests")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()

    chosen = [e for e in ENVIRONMENTS if not options.only or any(e.name.startswith(o) for o in options.only)]
    if not chosen:
        parser.error(f"no environment is called so; there are {', '.join(e.name for e in ENVIRONMENTS)}")
    for path in {path for environment in chosen for path in environment.tests + environment.quick}:
        if not (TREE / path).exists():
            parser.error(f"{path}, which an environment in {__file__} runs, does not exist")
    MATRIX.mkdir(exist_ok=True)
    build()
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            print(f"the tests run in the order of --seed {options.seed}", flush=True)
            reports = list(pool.map(lambda one: run(one, options), chosen))
        except KeyboardInterrupt:  # which the others do not see
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                end(process)
            raise
    summarize(reports)
    return 0 if all(r.outcome != "FAILED" for r in reports) and any(r.outcome == "passed" for r in reports) else 1


def build() -> None:
    """Make the sdist, and the wheel from the sdist, and have twine check that PyPI would take them."""
    shutil.rmtree(DIST, ignore_errors=True)
    log = MATRIX / "build.log"
    print("building sdist and wheel", flush=True)
    with log.open("w") as output:
        for module, *arguments in (
            ("build", "--outdir", str(DIST), str(TREE)),
            ("twine", "check", "--strict", str(DIST / "*")),
        ):
            command = [sys.executable, "-m", module, *arguments]
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode != 0:
                output.flush()
                sys.exit(f"{tail(log)}\n{module} failed; see {log}")


def run(environment: Environment, options: argparse.Namespace) -> Report:
    python = find_python(environment.python)
    if python is None:
        outcome: Literal["FAILED", "skipped"] = "FAILED" if os.environ.get("CI") else "skipped"
        return Report(environment, outcome, f"no Python {environment.python} on this machine")
    print(f"{environment.name}: begins", flush=True)

    home = MATRIX / environment.name
    log = MATRIX / f"{environment.name}.log"
    report = Report(environment, "FAILED", "")
    start = time.monotonic()
    with log.open("w") as output:
        try:
            install(environment, home, python, options.fresh, output)
            report.setup = time.monotonic() - start
            test(environment, home, options.seed, options.pytest, output)
            report.outcome = "passed"
            report.detail = last_line(log)
        except StepFailed as failure:
            print(f"\n{tail(log)}", flush=True)
            report.detail = f"{failure}; see {log.relative_to(TREE)}"
    if report.setup:
        report.tests = time.monotonic() - start - report.setup
    print(f"{environment.name}: {report.outcome}: {report.detail}", flush=True)
    return report


def find_python(version: str) -> str | None:
    """A Python of this version (such as 3.12) that can make virtual environments, or None."""
    probe = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for candidate in python_candidates(version):
        # What is found need not work: pyenv's shims exist for versions that are not selected.
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run([candidate, "-c", probe], capture_output=True, text=True, timeout=60, check=False)
            if done.returncode == 0 and done.stdout.strip() == version:
                return candidate
    return None


def python_candidates(version: str) -> Iterator[str]:
    yield sys.executable
    if found := shutil.which(f"python{version}"):
        yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True))
    if uv := shutil.which("uv"):
        done = subprocess.run([uv, "python", "find", version], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            yield done.stdout.strip()


def install(environment: Environment, home: Path, python: str, fresh: bool, output: IO[str]) -> None:
    pins = pinned(environment)
    artifact = {
        "tree": lambda: TREE,
        "sdist": lambda: only(DIST, "*.tar.gz"),
        "wheel": lambda: only(DIST, "*.whl"),
    }[environment.artifact]()
    stamp = home / ".dependencies"
    chosen = f"{environment.dependencies} {pins} {environment.beside} {environment.ddp}"
    wanted = f"{python}\n{home}\n{chosen}\n{(TREE / 'pyproject.toml').read_text()}"
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]

    if not fresh and stamp.is_file() and stamp.read_text() == wanted:
        step("install", [*pip, "--no-deps", "--force-reinstall", str(artifact)], output)
    else:
        step("venv", [python, "-m", "venv", "--clear", str(home)], output)
        installer = pip
        if environment.dependencies == "lowest":  # of which pip has no notion
            uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(home / "bin" / "python")]
            installer = [*uv, "--resolution", "lowest-direct"]
        step("install", [*installer, f"{artifact}[test]", *pins], output)
        beside = [*([f"{artifact}[ddp]"] if environment.ddp else []), *environment.beside]
        if beside:
            try:
                step("install", [*pip, *beside, *pins], output)
            except StepFailed as failure:
                print(f"{environment.name}: without {' '.join(beside)}: {failure}; see {output.name}", flush=True)
                return  # and no stamp: the next run tries again
        stamp.write_text(wanted)


def pinned(environment: Environment) -> list[str]:
    return [f"{'hydra-core' if name == 'hydra' else name}=={version}" for name, version in environment.pins]


def test(environment: Environment, home: Path, seed: int, pytest_arguments: Sequence[str], output: IO[str]) -> None:
    copy = home / "tree"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for name in COPIED:
        if (TREE / name).is_dir():
            shutil.copytree(TREE / name, copy / name, ignore=NOT_COPIED)
        elif (TREE / name).is_file():
            shutil.copy(TREE / name, copy / name)

    binaries = home / "bin"
    check = [str(binaries / "python"), "-c", CHECK_INSTALLED, str(home), *pinned(environment)]
    step("installed", check, output, cwd=copy)
    print(f"{environment.name}: {last_line(Path(output.name))}", flush=True)
    order = ["--random-order", f"--random-order-seed={seed}"]
    pytest = [str(binaries / "python"), "-m", "pytest", "--workers", str(WORKERS), *order, "-m"]
    histories = {} if environment.histories is None else {"GPU_LAUNCHER_HISTORIES": str(environment.histories)}
    rest = "not slow"
    if environment.quick and not pytest_arguments:
        quick = [*pytest, "smoke or not (thorough or slow)", *environment.quick]
        step("quick tests", quick, output, cwd=copy, **histories)
        rest = "thorough and not (smoke or slow)"
    step("tests", [*pytest, rest, *(pytest_arguments or environment.tests)], output, cwd=copy, **histories)


def step(name: str, command: Sequence[str], output: IO[str], cwd: Path = TREE, **variables: str) -> None:
    """Run one command with its output in the log; raise StepFailed if it fails or takes LIMIT seconds."""
    output.write(f"$ {' '.join(command)}\n")
    output.flush()
    environment = {**os.environ, **variables, "GPU_LAUNCHER_DIST": str(DIST)}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    RUNNING.add(process)
    try:
        if process.wait(LIMIT) != 0:
            raise StepFailed(f"{name} exited with {process.returncode}")
    except subprocess.TimeoutExpired:
        raise StepFailed(f"{name} took longer than {LIMIT} s") from None
    finally:
        RUNNING.discard(process)
        if process.poll() is None:
            end(process)
            process.wait()


def end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def only(directory: Path, pattern: str) -> Path:
    (path,) = directory.glob(pattern)
    return path


def tail(log: Path, lines: int = 60) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def last_line(log: Path) -> str:
    return tail(log, 1).strip("= ")


def summarize(reports: Sequence[Report]) -> None:
    width = max(len(r.environment.name) for r in reports)
    print(f"\n{'environment':{width}}  outcome  set-up  tests")
    for r in reports:
        print(
            f"{r.environment.name:{width}}  {r.outcome:7}  {r.setup:4.0f} s  {r.tests:3.0f} s  {r.detail}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
