# SPDX-License-Identifier: BSD-3-Clause
"""Sphinx configuration of the documentation; ``make docs`` builds it, without the network and without a warning."""

import zlib
from pathlib import Path

import ffn_ops

HERE = Path(__file__).parent
SITES = {"torch": "https://docs.pytorch.org/docs/stable/", "python": "https://docs.python.org/3/"}

project = "ffn_ops"
author = "the ffn_ops authors"
version = release = ffn_ops.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
html_theme = "pydata_sphinx_theme"
html_title = f"ffn_ops {release}"
html_theme_options = {"show_prev_next": True, "navigation_with_keys": False, "navbar_align": "left"}
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "notes_style"), ("Shapes", "notes_style")]
nitpicky = True  # a name that leads nowhere is a warning, and a warning ends the build
nitpick_ignore_regex = [("py:class", r"ffn_ops\._replace\.Model|Group")]  # names for typing only


def inventory(site: str) -> str:
    """Writes the names of a site as the inventory that intersphinx reads, and returns its place."""
    lines = [line.split() for line in (HERE / "torch_names.txt").read_text().splitlines() if line[0] != "#"]
    entries = "".join(f"{name} {role} 1 {page} -\n" for of, name, role, page in lines if of == site)
    head = f"# Sphinx inventory version 2\n# Project: {site}\n# Version: \n# The rest is compressed using zlib.\n"
    out = HERE / "_build" / f"{site}.inv"
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(head.encode() + zlib.compress(entries.encode()))
    return str(out)


intersphinx_mapping = {site: (url, inventory(site)) for site, url in SITES.items()}
