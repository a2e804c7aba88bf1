"""Settings of Sphinx, which makes the documentation site: `make docs`.

The source directory is the repository, so that a link between two files works on the site and in the repository.
"""

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
