"""Fixtures for all tests: machines on which separate processes run the shipped code with a double of NVML."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.workers import pytest_addoption, pytest_runtestloop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["pytest_addoption", "pytest_runtestloop"]  # pytest finds its hooks here

hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "tests" / "nvml_double" / "nvml_double.c"
GIB = 2**30
THOROUGH = (
    "tests/cli",
    "tests/contract/test_storage_optuna.py",
    "tests/crash",
    "tests/docs",
    "tests/executors/test_cpython_suite.py",
    "tests/executors/test_example_folds.py",
    "tests/executors/test_functions_on_nodes.py",
    "tests/executors/test_open_files.py",
    "tests/executors/test_parallel_map_misuse.py",
    "tests/executors/test_random_numbers.py",
    "tests/hydra",
    "tests/nvml_double/test_gpu_check.py",
    "tests/studies/test_example_optuna_study.py",
    "tests/studies/test_optimize_again.py",
    "tests/studies/test_optimize_errors.py",
    "tests/unit/test_joining.py",
    "tests/web",
)
"""Paths with slow tests. `make test` runs only those marked `smoke`; `make test-rest` runs the others."""


CALLERS = (
    "CUDA_",
    "HYDRA_",
    "SLURM_",
    "SSH_",
    "CI",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
    "TMUX",
    "STY",
    "COLORTERM",
    "TTY_",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONUNBUFFERED",
)
"""Prefixes of variables that change what the programs under test do, show or cost, and that tests set themselves."""


def pytest_configure() -> None:
    """Let programs under test behave alike, whatever the environment says and whichever signals are ignored here.

    A script or nohup may ignore signals. With CI or TERM=dumb, which a CI service may set, there is no live view.
    """
    for name in [name for name in os.environ if name.startswith(CALLERS)]:
        del os.environ[name]
    os.environ["TERM"] = "xterm-256color"
    as_usual = {
        signal.SIGQUIT: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGINT: signal.default_int_handler,
    }
    for signum, handler in as_usual.items():
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, handler)
    with contextlib.suppress(
        ImportError
    ):  # a progress bar's thread would outlive its test and keep later tests from forking
        importlib.import_module("tqdm").tqdm.monitor_interval = 0


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    paths = [REPOSITORY / name for name in THOROUGH]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise pytest.UsageError(f"THOROUGH in {__file__} names what does not exist: {', '.join(missing)}")
    for item in items:
        if any(item.path.is_relative_to(path) for path in paths):
            item.add_marker(pytest.mark.thorough)


@pytest.fixture(autouse=True)
def environment_left_as_found() -> Iterator[None]:
    """Fail a test that changes the environment: processes of all later tests would inherit the change."""
    before = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    yield
    after = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    if after != before:
        os.environ.clear()
        os.environ.update(before)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        pytest.fail(f"the test left the environment changed: {', '.join(sorted(changed))}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Fail if the tests of a file leave this process changed, because other files run in it later, in any order.

    This is a hook, not a fixture, because pytest keeps the values of a test's fixtures until all of them have ended.
    """
    stash = item.session.stash
    if stash.get(FOUND, (None,))[0] != item.path:
        stash[FOUND] = item.path, process_state()
    result = yield
    if nextitem is None or nextitem.path != item.path:
        before, after = stash[FOUND][1], process_state()
        if after != before:
            gc.collect()  # closes connections of a study that is no longer referenced
            after = process_state()
        changed = [name for name in sorted(after.keys() | before) if after.get(name) != before.get(name)]
        if changed:
            left = "; ".join(f"{name}: {before.get(name)} became {after.get(name)}" for name in changed)
            report = pytest.TestReport(
                item.nodeid, item.location, {}, "failed", f"{item.path} left this process changed: {left}", "teardown"
            )
            item.ihook.pytest_runtest_logreport(report=report)
    return result


FOUND = pytest.StashKey[tuple[Path, dict[str, Any]]]()
"""The file whose tests are running, and the state of this process before them."""


def process_state() -> dict[str, Any]:
    """The working directory, the signal handlers, and the files with a name that are open for writing."""
    state: dict[str, Any] = {signum.name: signal.getsignal(signum) for signum in signal.Signals}
    state["working directory"] = Path.cwd()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            number, status = int(entry.name), entry.stat()
            writes = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
            if number > 2 and writes and stat.S_ISREG(status.st_mode) and status.st_nlink:
                state[f"descriptor {number}"] = entry.readlink()
    return state


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which notices were logged. A program logs each only once, and all tests run in one program."""
    from gpu_launcher.jobs import notice_log  # imported late, because some tests check what imports it

    monkeypatch.setattr(notice_log, "_said", set())
    monkeypatch.setattr(notice_log, "_told", deque(maxlen=64))
    monkeypatch.setattr(notice_log, "_last", -math.inf)


@pytest.fixture(autouse=True)
def hydra_left_as_found() -> Iterator[None]:
    """Restore Hydra's version_base and config, which a test that runs Hydra in this process changes."""
    before = hydra_state()
    yield
    for kind, (instance, _) in hydra_state().items():
        if kind in before:
            vars(instance).clear()
            vars(instance).update(before[kind][1])
        else:
            del type(kind)._instances[kind]


def hydra_state() -> dict[type, tuple[Any, dict[str, Any]]]:
    """Hydra's singletons with their attributes; empty if Hydra is not imported."""
    if "hydra" not in sys.modules:
        return {}
    from hydra.core.singleton import Singleton

    names = ("VersionBase", "GlobalHydra", "HydraConfig")
    instances = Singleton._instances
    return {kind: (instances[kind], dict(vars(instances[kind]))) for kind in instances if kind.__name__ in names}


@pytest.fixture(scope="session")
def frame_of() -> Callable[[str | Path, str, str], str]:
    """Format a frame of a traceback: `frame_of(file, "main", "raise ValueError")`. Exactly one line must begin so."""

    def frame_of(file: str | Path, function: str, statement: str) -> str:
        lines = Path(file).read_text().splitlines()
        ((number, line),) = ((n, line) for n, line in enumerate(lines, 1) if line.strip().startswith(statement))
        return f'File "{file}", line {number}, in {function}\n    {line.strip()}\n'

    return frame_of


@dataclass
class Machine:
    """A machine whose libnvidia-ml.so.1 is the double in `libraries`. If that is None, it has no driver."""

    state: Path
    libraries: Path | None
    lines: list[str] = field(default_factory=list)

    def has(self, *lines: str) -> None:
        """Replace the state. The next NVML call sees it, even in a process that already runs. See nvml_double.c."""
        self.lines = list(lines)
        new = self.state.with_suffix(".new")
        new.write_text("".join(line + "\n" for line in lines))
        new.replace(self.state)

    def now(self, *lines: str) -> None:
        """Add lines to the state. A new line replaces an old one with the same key."""
        keys = {line.split(" ")[0] for line in lines}
        self.has(*[line for line in self.lines if line.split(" ")[0] not in keys], *lines)

    @staticmethod
    def gpu(index: int, uuid: str, *more: str, name: str = "NVIDIA Double", memory: int = 24 * GIB) -> list[str]:
        """The lines of an ordinary GPU. `more` has lines that differ: `compute_mode 3`, `memory.error 15`."""
        lines = [f"uuid {uuid}", f"name {name}", f"memory {memory}", "compute_mode 0", "mig 0"]
        replaced = {line.split()[0].removesuffix(".error") for line in more}
        kept = [line for line in lines if line.split()[0] not in replaced]
        return [f"{index}.{line}" for line in [*more, *kept]]

    @staticmethod
    def instance(index: int, number: int, uuid: str, *more: str, memory: int = 10 * GIB) -> list[str]:
        """The lines of a MIG instance of GPU `index`, which needs the line `mig 1`."""
        lines = [f"uuid {uuid}", "name NVIDIA Double MIG 1g.10gb", f"memory {memory}", *more]
        return [f"{index}.mig.{number}.{line}" for line in lines]

    def environment(self, **environ: str) -> dict[str, str]:
        """The environment of a process on this machine, without the real machine's mask."""
        removed = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH")
        clean = {name: value for name, value in os.environ.items() if name not in removed}
        clean |= {"NVML_DOUBLE_STATE": str(self.state), "PYTHONPATH": str(REPOSITORY), **environ}
        if self.libraries is not None:
            clean["LD_LIBRARY_PATH"] = str(self.libraries)
        return clean

    def run(self, code: str, **environ: str) -> str:
        """Run Python `code` and return what it prints. If it fails, the test fails with its traceback."""
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.environment(**environ),
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.strip()


def compiled(directory: Path, *flags: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the NVML double with")
    library = directory / "libnvidia-ml.so.1"
    name = f"-Wl,-soname,{library.name}"
    strict = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, "-shared", "-fPIC", *strict, *flags, name, "-o", library, SOURCE], check=True)
    return directory


@pytest.fixture(scope="session")
def nvml_double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the double, for LD_LIBRARY_PATH."""
    return compiled(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(nvml_double: Path, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "nvml-state", nvml_double)


@pytest.fixture
def old_machine(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Machine:
    """A machine whose driver is older than MIG."""
    return Machine(tmp_path / "nvml-state", compiled(tmp_path_factory.mktemp("old-nvml"), "-DDRIVER=440"))


@pytest.fixture
def older_machine(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Machine:
    """A machine whose driver knows MIG, but not the third version of process lists."""
    return Machine(tmp_path / "nvml-state", compiled(tmp_path_factory.mktemp("older-nvml"), "-DDRIVER=470"))


@pytest.fixture
def machine_without_driver(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "nvml-state", None)


@pytest.fixture
def first_namespace(tmp_path: Path) -> Path:
    """A root whose /proc shows this process and its ancestors, in the initial PID namespace."""
    root = tmp_path / "root"
    (root / "proc/self/ns").mkdir(parents=True)
    (root / "proc/self/ns/pid").symlink_to("pid:[4026531836]")
    pid = os.getpid()
    while pid > 0:
        (root / f"proc/{pid}").symlink_to(f"/proc/{pid}")
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return root
