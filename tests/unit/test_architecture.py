"""Who may import what, held by reading the imports. The tables are the architecture; docs/architecture.md says why."""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]

if not (TREE / "gpu_launcher").is_dir():
    pytest.skip("needs the source tree; only the tests are here", allow_module_level=True)

# Arrows run one way: a layer may import itself and the layers before its own. Those on one line are siblings and
# do not import each other.
LAYERS = (
    {
        "gpu_launcher.boot",
        "gpu_launcher.debug_log",
        "gpu_launcher.descriptors",
        "gpu_launcher.errors",
        "gpu_launcher.json_data",
        "gpu_launcher.model",
        "gpu_launcher.sizes",
        "gpu_launcher.text",
        "gpu_launcher.durations",
        "gpu_launcher.redaction",
        "gpu_launcher.requests",
        "gpu_launcher.requirements",
        "gpu_launcher.version",
        "gpu_launcher.safe_files",
        "gpu_launcher.users",
        "gpu_launcher.validation",
        "gpu_launcher.wording",
    },
    {"gpu_launcher.devices", "gpu_launcher.leases", "gpu_launcher.processes"},
    {"gpu_launcher.allocation"},
    {"gpu_launcher.jobs"},
    {"gpu_launcher.nodes"},
    {"gpu_launcher.pool"},
    {"gpu_launcher.studies", "gpu_launcher.executors"},
    {"gpu_launcher.web"},
    {"gpu_launcher.cli", "gpu_launcher.lightning", "hydra_plugins"},
)
# The first layer is the vocabulary: the only one in which siblings may meet.
VOCABULARY = LAYERS[0]

# Where a library may be imported. A pattern is matched against the file's path in the tree, from its start.
ONLY_IN = {
    "hydra": ("hydra_plugins/*/*.py", "gpu_launcher/cli/mapping/grid.py", "gpu_launcher/cli/demo_program.py"),
    "omegaconf": ("hydra_plugins/*/*.py",),
    "optuna": ("gpu_launcher/studies/**/*.py", "hydra_plugins/*_sweeper/_*.py"),
    "pynvml": ("gpu_launcher/devices/nvml.py",),
    "ray": ("gpu_launcher/nodes/ray_bridge.py",),
    "lightning": ("gpu_launcher/lightning.py",),
    "pytorch_lightning": ("gpu_launcher/lightning.py",),
    "sqlalchemy": ("gpu_launcher/studies/storage.py",),
    "rich": (
        "gpu_launcher/jobs/progress/**/*.py",
        "gpu_launcher/executors/progress.py",
        "gpu_launcher/cli/**/*.py",
    ),
    "click": ("gpu_launcher/cli/**/*.py",),
    "optuna_dashboard": ("gpu_launcher/web/dashboard_process.py",),
    "starlette": ("gpu_launcher/web/*.py",),
    "uvicorn": ("gpu_launcher/web/listener.py",),
    "jinja2": ("gpu_launcher/web/templating.py",),
    "gpu_launcher.web": ("gpu_launcher/web/*.py", "gpu_launcher/cli/web.py", "gpu_launcher/cli/result_page.py"),
}
# Of these libraries, one file at most may know, wherever it lies.
IN_ONE_FILE = ("pynvml", "ray", "sqlalchemy")

# What only tests may import. Doubles of other libraries lie in tests/*_double.
TEST_ONLY = ("pytest", "hypothesis", "unittest", "tests", "conftest", "hydra.test_utils")

# Everything public: the names in `gpu_launcher.__all__` and these modules. All other modules are private.
PUBLIC_MODULES = {"lightning"}
ARCHITECTURE = "docs/architecture.md"
ERRORS = "gpu_launcher/errors.py"
PUBLIC_TEXTS = ("README.md", "docs/*.md", "examples/**/*.py", "examples/**/*.yaml", "examples/**/*.md")


@dataclass(frozen=True)
class Import:
    """One import statement: `module` is imported by `file`, and so is `name` from it, if there is one."""

    file: str
    line: int
    module: str
    name: str | None
    at_start: bool
    """Whether it runs when the file is imported: neither in a function nor for type checkers only."""

    @property
    def target(self) -> str:
        """The longest name that may be a module: `from gpu_launcher import errors` is `gpu_launcher.errors`."""
        return f"{self.module}.{self.name}" if self.name else self.module

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def imports_in(tree: Path) -> list[Import]:
    """All imports of the packages in `tree`, the relative ones made absolute."""
    return [
        found
        for package in ("gpu_launcher", "hydra_plugins")
        for path in sorted((tree / package).rglob("*.py"))
        for found in imports_of(path, tree)
    ]


def imports_of(path: Path, tree: Path) -> tuple[Import, ...]:
    return imports_in_text(path.relative_to(tree).as_posix(), path.read_text())


@cache
def imports_in_text(file: str, text: str) -> tuple[Import, ...]:
    package = Path(file).parent.parts

    def visit(node: ast.AST, at_start: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(file, node.lineno, name.name, None, at_start)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            for name in node.names:
                yield Import(file, node.lineno, module, name.name, at_start)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for statement in node.body:
                yield from visit(statement, False)
            for statement in node.orelse:
                yield from visit(statement, at_start)
        else:
            in_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_start and not in_function)

    return tuple(visit(ast.parse(text, file), True))


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def part_of(name: str) -> str | None:
    """The part of the house that a dotted name belongs to; None for `gpu_launcher` itself and for foreign modules."""
    return next((part for layer in LAYERS for part in layer if within(name, part)), None)


def layer_of(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def dotted(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def against_the_arrows(tree: Path) -> list[str]:
    wrong = []
    for found in imports_in(tree):
        importer, imported = part_of(dotted(found.file)), part_of(found.target)
        if importer is None or imported is None or importer == imported:
            continue
        if layer_of(imported) > layer_of(importer):
            wrong.append(f"{found}: against the arrows")
        elif layer_of(imported) == layer_of(importer) and imported not in VOCABULARY:
            wrong.append(f"{found}: siblings do not import each other")
    return wrong


def outside_the_house(tree: Path) -> list[str]:
    """Modules that no layer contains. gpu_launcher/__init__.py is the house's door and belongs to none."""
    files = [p.relative_to(tree).as_posix() for p in (tree / "gpu_launcher").rglob("*.py")]
    return [file for file in files if file != "gpu_launcher/__init__.py" and part_of(dotted(file)) is None]


def through_the_door(tree: Path) -> list[str]:
    """Imports of the public names from inside, which run in a circle."""
    return [
        str(found)
        for found in imports_in(tree)
        if within(found.module, "gpu_launcher")
        and part_of(found.target) is None
        and found.file.startswith("gpu_launcher/")
        and found.file not in ("gpu_launcher/__init__.py", "gpu_launcher/cli/demo_program.py")  # a user's program
    ]


def misplaced_libraries(tree: Path) -> list[str]:
    return [
        f"{found}: only {' or '.join(patterns)} may"
        for library, patterns in ONLY_IN.items()
        for found in imports_in(tree)
        if within(found.module, library) and not any(matches(found.file, pattern) for pattern in patterns)
    ]


def matches(file: str, pattern: str) -> bool:
    """Path.match from the start, with `**/` for any number of folders."""
    head, found, rest = pattern.partition("**/")
    if not found:
        return len(Path(file).parts) == len(Path(pattern).parts) and Path(file).match(pattern)
    return file.startswith(head) and Path(file).match(rest)


def scattered_libraries(tree: Path) -> list[str]:
    wrong = []
    for library in IN_ONE_FILE:
        files = sorted({found.file for found in imports_in(tree) if within(found.module, library)})
        if len(files) > 1:
            wrong.append(f"{library} is imported in {len(files)} files: {', '.join(files)}")
    return wrong


def slow_starts(tree: Path) -> list[str]:
    """Hydra imports these modules at the start of every program, so they may import only what Hydra has imported."""
    return [
        f"{found}: at every start of every Hydra program"
        for found in imports_in(tree)
        if found.at_start
        and found.file.startswith("hydra_plugins/")
        and not hidden_from_hydra(found.file)
        and (
            within(found.module, "gpu_launcher")
            or (
                not within(found.module, "hydra")
                and any(part.startswith("_") and part != "__future__" for part in found.target.split("."))
            )
        )
    ]


def hidden_from_hydra(file: str) -> bool:
    return any(part.startswith("_") and part != "__init__.py" for part in file.split("/"))


def imports_for_tests(tree: Path) -> list[str]:
    return [f"{found}: belongs to tests" for found in imports_in(tree) if for_tests(found)]


def for_tests(found: Import) -> bool:
    return any(within(found.target, name) for name in TEST_ONLY) or "_double" in found.target


def errors_elsewhere(tree: Path) -> list[str]:
    """Errors for users that are not in errors.py, though they need no other library's class."""
    ours = {node.name for node in ast.walk(parsed(tree / ERRORS)) if isinstance(node, ast.ClassDef)}
    wrong = []
    for path in product_files(tree):
        for node in ast.walk(parsed(path)) if path != tree / ERRORS else ():
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base) for base in node.bases}
                if bases & ours and all(base in ours or hasattr(builtins, base) for base in bases):
                    wrong.append(f"{path.relative_to(tree)}:{node.lineno}: {node.name} belongs into {ERRORS}")
    return wrong


def undrawn_errors(tree: Path) -> list[str]:
    """Errors that the drawing at the top of errors.py lacks, or puts below another one."""
    module = parsed(tree / ERRORS)
    drawn = {}
    for line in (ast.get_docstring(module, clean=False) or "").splitlines():
        if found := re.match(r"( *(?:[│├└─ ]*))(\w+)", line):
            drawn[found[2]] = len(found[1])
    depths = {"Exception": 0}
    wrong = []
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            depths[node.name] = depths[ast.unparse(node.bases[0])] + 4
            if drawn.get(node.name) != depths[node.name]:
                wrong.append(f"{ERRORS}:{node.lineno}: {node.name} is not drawn in its place")
    return wrong


def shared_class_names(tree: Path) -> list[str]:
    """Classes with one name in several places. A reader, a search and a pickle tell them apart only by module."""
    places = defaultdict(list)
    for path in product_files(tree):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(tree)}:{node.lineno}")
    return shared(places)


def shared_file_names(tree: Path) -> list[str]:
    """Modules with one name in several packages. Files of the plugins have one name if they do the same for each."""
    places = defaultdict(list)
    for path in product_files(tree):
        if path.name != "__init__.py" and path.is_relative_to(tree / "gpu_launcher"):
            places[path.name].append(str(path.relative_to(tree)))
    return shared(places)


def shared(places: dict[str, list[str]]) -> list[str]:
    return [f"{name}: {', '.join(at)}" for name, at in sorted(places.items()) if len(at) > 1]


def parsed(path: Path) -> ast.Module:
    return parsed_text(path.read_text()) if path.exists() else ast.Module([], [])


@cache
def parsed_text(text: str) -> ast.Module:
    return ast.parse(text)


def product_files(tree: Path) -> list[Path]:
    return sorted(path for package in ("gpu_launcher", "hydra_plugins") for path in (tree / package).rglob("*.py"))


def private_names_in_public_texts(tree: Path) -> list[str]:
    """What the documentation or an example uses of `gpu_launcher` is public."""
    public = {*public_names(tree), *PUBLIC_MODULES, "__version__"}
    wrong = []
    for path in sorted({path for pattern in PUBLIC_TEXTS for path in tree.glob(pattern)} - {tree / ARCHITECTURE}):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            names = re.findall(r"\bgpu_launcher\.(\w+)", line)
            for imported in re.findall(r"\bfrom gpu_launcher import ([\w, ]+)", line):
                names += re.findall(r"\w+", imported)
            wrong += [f"{path.relative_to(tree)}:{number}: gpu_launcher.{name}" for name in names if name not in public]
    return wrong


def public_names(tree: Path) -> list[str]:
    for node in ast.parse((tree / "gpu_launcher" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


def test_arrows_run_one_way_and_siblings_do_not_import_each_other() -> None:
    assert against_the_arrows(TREE) == []


def test_every_module_belongs_to_a_layer() -> None:
    assert outside_the_house(TREE) == []


def test_nothing_inside_imports_the_public_names() -> None:
    assert through_the_door(TREE) == []


def test_libraries_are_imported_only_where_they_belong() -> None:
    assert misplaced_libraries(TREE) == []


def test_pynvml_and_sqlalchemy_are_each_known_to_one_file() -> None:
    assert scattered_libraries(TREE) == []


def test_what_hydra_imports_at_every_start_does_not_import_gpu_launcher() -> None:
    assert slow_starts(TREE) == []


def test_packages_import_no_test_double() -> None:
    assert imports_for_tests(TREE) == []


def test_no_two_classes_share_a_name() -> None:
    assert shared_class_names(TREE) == []


def test_no_two_modules_share_a_name() -> None:
    assert shared_file_names(TREE) == []


def test_errors_for_users_are_in_one_module() -> None:
    assert errors_elsewhere(TREE) == []


def test_drawing_of_the_errors_is_complete() -> None:
    assert undrawn_errors(TREE) == []


def test_documentation_and_examples_use_only_public_names() -> None:
    assert private_names_in_public_texts(TREE) == []


def test_hydra_plugins_is_a_namespace_that_other_plugins_can_share() -> None:
    assert not (TREE / "hydra_plugins" / "__init__.py").exists()


def test_each_plugin_is_a_package_that_hydra_1_3_finds() -> None:
    plugins = [p for p in (TREE / "hydra_plugins").iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert plugins
    assert [p.name for p in plugins if not (p / "__init__.py").is_file()] == []


Check = Callable[[Path], list[str]]


@pytest.mark.parametrize(
    ("check", "file", "code"),
    [
        (against_the_arrows, "gpu_launcher/model.py", "from gpu_launcher.leases import ledger"),
        (against_the_arrows, "gpu_launcher/errors.py", "import gpu_launcher.cli"),
        (against_the_arrows, "gpu_launcher/jobs/loop.py", "def later():\n    from ..cli import main"),
        (against_the_arrows, "gpu_launcher/jobs/loop.py", "from gpu_launcher import studies"),
        (against_the_arrows, "gpu_launcher/leases/ledger.py", "from ..devices.nvml import Probe"),
        (against_the_arrows, "gpu_launcher/devices/__init__.py", "from .. import processes"),
        (against_the_arrows, "gpu_launcher/cli/main.py", "import hydra_plugins.gpu_pool_launcher._launch"),
        (outside_the_house, "gpu_launcher/helpers.py", ""),
        (through_the_door, "gpu_launcher/jobs/loop.py", "from gpu_launcher import current_trial"),
        (misplaced_libraries, "gpu_launcher/jobs/loop.py", "from hydra.core.utils import JobReturn"),
        (misplaced_libraries, "gpu_launcher/cli/mapping/launch.py", "from hydra.core.override_parser import types"),
        (misplaced_libraries, "gpu_launcher/studies/storage.py", "def f():\n    import omegaconf"),
        (misplaced_libraries, "hydra_plugins/optuna_async_sweeper/config.py", "import optuna"),
        (misplaced_libraries, "hydra_plugins/gpu_pool_launcher/_launch.py", "from optuna import Trial"),
        (misplaced_libraries, "gpu_launcher/devices/simulated.py", "import pynvml"),
        (misplaced_libraries, "gpu_launcher/nodes/engines.py", "def f():\n    import ray"),
        (misplaced_libraries, "gpu_launcher/studies/b.py", "def f():\n    from sqlalchemy import event"),
        (misplaced_libraries, "gpu_launcher/jobs/loop.py", "import optuna"),
        (misplaced_libraries, "gpu_launcher/jobs/loop.py", "from rich.live import Live"),
        (scattered_libraries, "gpu_launcher/studies/b.py", "import sqlalchemy.event"),
        (slow_starts, "hydra_plugins/gpu_pool_launcher/launcher.py", "from gpu_launcher.model import Device"),
        (slow_starts, "hydra_plugins/gpu_pool_launcher/__init__.py", "if True:\n    import gpu_launcher"),
        (slow_starts, "hydra_plugins/gpu_pool_launcher/config.py", "from ._launch import launch"),
        (slow_starts, "hydra_plugins/gpu_pool_launcher/config.py", "from . import _launch"),
        (imports_for_tests, "gpu_launcher/devices/nvml.py", "from tests.nvml_double import pynvml"),
        (imports_for_tests, "gpu_launcher/leases/ledger.py", "from unittest import mock"),
        (imports_for_tests, "gpu_launcher/jobs/machine.py", "from tests.memory_ledger import MemoryLedger"),
        (shared_class_names, "gpu_launcher/jobs/loop.py", "def f():\n    class Once: ..."),
        (errors_elsewhere, "gpu_launcher/jobs/loop.py", "class LoopError(OptionError, ValueError): ..."),
        (undrawn_errors, "gpu_launcher/errors.py", '"""\n    OurError"""\nclass NewError(Exception): ...'),
        (shared_file_names, "gpu_launcher/jobs/storage.py", ""),
        (private_names_in_public_texts, "docs/leases.md", "```python\nfrom gpu_launcher import pool\n```"),
        (private_names_in_public_texts, "examples/a/train.py", "import gpu_launcher.pool"),
    ],
)
def test_the_checks_see_a_violation(tmp_path: Path, check: Check, file: str, code: str) -> None:
    plant(tmp_path, "gpu_launcher/__init__.py", '__all__ = ["Pool"]')
    plant(tmp_path, "gpu_launcher/studies/storage.py", "import sqlalchemy\nclass Once: ...")
    plant(tmp_path, "gpu_launcher/errors.py", '"""\n    OptionError\n"""\nclass OptionError(Exception): ...')
    assert check(tmp_path) == []
    plant(tmp_path, file, code)
    (message,) = check(tmp_path)
    assert file in message


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("gpu_launcher/errors.py", "from gpu_launcher.model import Device"),
        ("gpu_launcher/jobs/loop.py", "class BrokenError(GpuLauncherError, BrokenExecutor): ..."),
        ("gpu_launcher/__init__.py", "from gpu_launcher.jobs.loop import run"),
        ("gpu_launcher/jobs/progress/live.py", "from rich.live import Live\nfrom ..events import Event"),
        ("gpu_launcher/cli/main.py", "import click, rich.table\nfrom gpu_launcher.executors.local import Local"),
        ("gpu_launcher/studies/deep/er.py", "import optuna.storages"),
        ("gpu_launcher/cli/mapping/grid.py", "def f():\n    from hydra.core.override_parser import types"),
        ("gpu_launcher/devices/nvml.py", "def probe():\n    import pynvml"),
        ("hydra_plugins/optuna_async_sweeper/_sweep.py", "import optuna, gpu_launcher.jobs.loop"),
        ("hydra_plugins/grid_async_sweeper/storage.py", "class Twice: ..."),
        ("examples/a/train.py", "import gpu_launcher.lightning\nfrom gpu_launcher import Pool\ngpu_launcher.Pool()"),
        (
            "hydra_plugins/gpu_pool_launcher/launcher.py",
            "from __future__ import annotations\n"
            "from typing import TYPE_CHECKING\n"
            "from hydra.plugins.launcher import Launcher\n"
            "if TYPE_CHECKING:\n    import gpu_launcher\n"
            "def launch():\n    from ._launch import launch",
        ),
        ("hydra_plugins/gpu_pool_launcher/_launch.py", "from gpu_launcher.jobs import loop"),
        ("hydra_plugins/grid_async_sweeper/sweeper.py", "from hydra._internal.core_plugins import basic_sweeper"),
    ],
)
def test_the_checks_let_pass_what_is_right(tmp_path: Path, file: str, code: str) -> None:
    plant(tmp_path, "gpu_launcher/__init__.py", '__all__ = ["Pool"]')
    plant(tmp_path, "gpu_launcher/studies/storage.py", "class Once: ...")
    plant(tmp_path, file, code)
    checks: tuple[Check, ...] = (
        against_the_arrows,
        outside_the_house,
        through_the_door,
        misplaced_libraries,
        scattered_libraries,
        slow_starts,
        imports_for_tests,
        errors_elsewhere,
        undrawn_errors,
        shared_class_names,
        shared_file_names,
        private_names_in_public_texts,
    )
    assert [message for check in checks for message in check(tmp_path)] == []


def plant(tree: Path, file: str, code: str) -> None:
    (tree / file).parent.mkdir(parents=True, exist_ok=True)
    (tree / file).write_text(code + "\n")
