"""Settings of Sphinx, which makes the documentation site: `make docs`.

The source directory is the repository, so that a link between two files works on the site and in the repository.
"""

import ast
from pathlib import Path
from typing import Any

import gpu_launcher
from gpu_launcher.version import find_version

project = "gpu-launcher"
author = "The gpu-launcher developers"
release = version = find_version()
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]

root_doc = "docs/index"
include_patterns = ["docs/*.md", "docs/howto/*.md", "*.md", "benchmarks/README.md"]
include_patterns += ["examples/README.md", "examples/*/README.md"]
exclude_patterns = ["docs/site"]
default_role = "code"  # docstrings write code as Markdown does
html_theme = "furo"
html_title = "gpu-launcher"
html_extra_path = ["site"]  # index.html, which leads to docs/index.html
html_copy_source = False

myst_heading_anchors = 3  # links such as options.md#in-a-config-group, as on GitHub
autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning", "pytorch_lightning"]
autodoc_typehints = "none"  # signatures without them are readable, and docstrings say what arguments are
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True


def error_messages() -> list[str]:
    """Return the messages of the errors that the code raises, with `...` for what varies."""
    found = set()
    root = Path(gpu_launcher.__file__).parents[1]
    for file in [*root.glob("gpu_launcher/**/*.py"), *root.glob("hydra_plugins/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                found |= {as_shown(argument) for argument in node.exc.args}
    return sorted(found - {""}, key=lambda message: message.lstrip(". :'\"").lower())


def as_shown(message: ast.expr) -> str:
    """Return a message on one line, or nothing if the expression is not one."""
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in parts)
    text = " ".join(text.split())
    return text if " " in text and len(text.replace("...", "")) > 12 else ""


def add_error_messages(app: Any, page: str, source: list[str]) -> None:
    """Put the messages of errors on the page of messages, where the search of the site finds them."""
    if page == "docs/faq":
        source[0] = source[0].replace("<!-- error messages -->", "\n".join(["```text", *error_messages(), "```"]))


def setup(app: Any) -> None:
    app.connect("source-read", add_error_messages)
