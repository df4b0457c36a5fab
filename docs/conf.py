"""Sphinx configuration: ``make docs`` builds the site, with warnings as errors."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from sb3_trpo_ext import __version__  # noqa: E402

project = "sb3_trpo_ext"
author = "the sb3_trpo_ext authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "inherited_arguments",  # docs/_ext
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["myst.header"]  # in the report that benchmarks/learning.py writes

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures show them; descriptions stay readable
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
autodoc_inherit_docstrings = False  # Gymnasium's are not written for this reader

# links into other projects' documentation need the network
if os.environ.get("DOCS_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "stable_baselines3": ("https://stable-baselines3.readthedocs.io/en/master/", None),
        "sb3_contrib": ("https://sb3-contrib.readthedocs.io/en/master/", None),
        "gymnasium": ("https://gymnasium.farama.org/", None),
        "torch": ("https://pytorch.org/docs/stable/", None),
    }

html_theme = "furo"
html_title = f"sb3_trpo_ext {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

# pages that are written beside the results that they speak of, and where the site shows them
ELSEWHERE = {
    "../benchmarks/results/learning/report.md": "/appendix/learning_report.md",
    "../benchmarks/results/tuning/README.md": "/appendix/tuning.md",
}


def resolve(app, docname, source):
    """Links to pages that the site shows elsewhere; entries of a toctree marked with "?" where there is such a page."""
    for path, page in ELSEWHERE.items():
        source[0] = source[0].replace(f"({path}", f"({page}")
    lines = source[0].splitlines(keepends=True)
    source[0] = "".join(line.removeprefix("? ") for line in lines if not line.startswith("? ") or _exists(line[2:].strip()))


def _exists(name):
    return (ROOT / "docs" / f"{name}.md").exists()


def setup(app):
    app.connect("source-read", resolve)
