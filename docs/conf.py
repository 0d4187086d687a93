"""Configuration of the documentation site, built by `make docs`; warnings are errors."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

project = "Deformable Attention Transformers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = []
html_theme = "pydata_sphinx_theme"
html_title = "DAT, DAT+ and DAT++"
html_theme_options = {"navbar_center": [], "show_toc_level": 2}
templates_path = ["templates"]
html_sidebars = {"**": ["pages.html"]}  # the theme's own sidebar lists the pages below a page, and there are none
html_show_sourcelink = False
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"


def _name_files_of_the_repository(app: Sphinx, name: str, source: list[str]) -> None:  # noqa: ARG001
    """Replace links to files outside docs/, which are not on the site, by their paths."""
    source[0] = re.sub(r"(?<!!)\[([^\]]*)\]\(\.\./([^)]*)\)", r"\1 (`\2`)", source[0])


def _name_files_next_to(app: Sphinx, included: Path, parent: str, source: list[str]) -> None:  # noqa: ARG001
    """Likewise in an included page for links to files in its folder; those to docs/ lead to pages of the site."""
    text = re.sub(
        r"(?<!!)\[([^\]]*)\]\((?!https?:|#|\.\./docs/)([^)]*)\)", rf"\1 (`{included.parent.name}/\2`)", source[0]
    )
    source[0] = text.replace("](../docs/", "](")


def setup(app: Sphinx) -> None:
    """Connect the page preprocessing."""
    app.connect("source-read", _name_files_of_the_repository)
    app.connect("include-read", _name_files_next_to)
