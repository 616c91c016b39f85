"""Sphinx configuration.  The pages are plain Markdown and readable as they are."""

project = "softcvm"
author = "the softcvm developers"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "softcvm"
exclude_patterns = ["build"]
myst_heading_anchors = 2
suppress_warnings = ["myst.xref_missing"]
