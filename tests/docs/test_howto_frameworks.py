"""The pages on PyTorch, Lightning, trackers and notebooks do what they show. `make matrix` has their packages."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.test_walkthroughs import DOCS, blocks, follow, write_programs

HOWTO = DOCS / "howto"


def sections(name: str) -> dict[str, str]:
    """The text of each section of a page by its title, and what is above the first."""
    return dict(part.split("\n", 1) for part in re.split("^## ", f"\n{(HOWTO / f'{name}.md').read_text()}", flags=re.M))


NEEDS = {
    ("trackers", ""): [],
    ("trackers", "Weights & Biases"): ["wandb"],
    ("trackers", "MLflow"): ["mlflow"],
    ("trackers", "TensorBoard"): ["torch", "tensorboard"],
    ("pytorch", ""): ["torch"],
    ("distributed", "Lightning DDP"): ["torch", "lightning"],
    ("distributed", "torchrun"): ["torch"],
}
"""What must be installed to follow a section of a page, or what is above the first."""


@pytest.mark.timeout(900)  # importing torch takes half a minute in each process of a busy machine
@pytest.mark.parametrize(("name", "section"), NEEDS)
def test_the_commands_of_the_section_print_what_it_says(name: str, section: str, tmp_path: Path) -> None:
    for package in NEEDS[name, section]:
        if importlib.util.find_spec(package) is None:  # not imported: that changes the environment
            pytest.skip(f"needs {package}")
    write_programs((HOWTO / f"{name}.md").read_text(), tmp_path)
    assert follow(sections(name)[section], tmp_path, timeout=850) >= 1


@pytest.mark.filterwarnings("ignore")  # from the packages of Jupyter
def test_the_cells_of_a_notebook_print_in_jupyter_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ipykernel")
    nbclient, nbformat = map(pytest.importorskip, ("nbclient", "nbformat"))
    monkeypatch.setenv("GPU_LAUNCHER_POOL_DIR", str(tmp_path / "pool"))
    text = (HOWTO / "notebooks.md").read_text()
    cells = [nbformat.v4.new_code_cell(block) for block in blocks(text, "python")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources=where).execute()
    streams = [output for cell in cells for output in cell.outputs if output.output_type == "stream"]
    said = {name: "".join(output.text for output in streams if output.name == name) for name in ("stdout", "stderr")}
    assert said["stdout"] == "".join(block for block in blocks(text, "text") if "..." not in block)
    assert "jobs start in fresh interpreters (spawn)" in said["stderr"]


def test_all_sections_with_commands_are_followed() -> None:
    for name in {name for name, _ in NEEDS}:
        assert {(name, title) for title, text in sections(name).items() if blocks(text, "console")} <= set(NEEDS)
