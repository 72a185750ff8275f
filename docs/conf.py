"""The documentation site: ``python -m sphinx -W --keep-going -n docs docs/_build``."""

import re
import tomllib
from pathlib import Path

from sphinx.util.typing import stringify_annotation

from dsee_jax import typing
from merge import arguments

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "dsee_jax"
author = copyright = "the dsee_jax authors"
version = release = PROJECT["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
templates_path = ["_templates"]
exclude_patterns = ["jupyter_execute", "_build", "_templates"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
# CI runs the notebooks by themselves.
nb_execution_mode = "off"

html_theme = "sphinx_book_theme"
html_title = "dsee_jax"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "navbar_persistent": []}

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
default_role = "code"

# Types of other projects, and types that public signatures name without being public.
nitpick_ignore_regex = [
    ("py:.*", r"(argparse|collections|flax|jax|jaxlib|numpy|optax|os|pathlib|transformers|typing)\..*"),
    ("py:(class|obj)", r"(dsee_jax|merge)\..*\.(M|P|T|Value|Model|Layout|ModelOptions|Update|StorePath|Task|Writer)"),
    ("py:exc", "Diverged|Preempted"),
]

UNIONS = {
    stringify_annotation(union, "smart"): f"~{name}"
    for name, union in {
        "merge.arguments.Each": arguments.Each,
        "merge.arguments.PerModel": arguments.PerModel,
        "dsee_jax.typing.Array": typing.Array,
    }.items()
}
"""Long types in signatures, and their names; the longest first."""


def _signature(app, what, name, obj, options, signature, returns):
    """Name long types; the fields of a config follow one by one."""
    if what == "class" and name.endswith("Config"):
        return "", returns
    for union, alias in UNIONS.items():
        signature = signature and signature.replace(union, alias)
        returns = returns and returns.replace(union, alias)
    return signature, returns


def _original(app, what, name, obj, options, lines):
    app.env.temp_data["docstring"] = list(lines)


def _attribute(app, what, name, obj, options, lines):
    """Undo napoleon, which takes the text before a colon for a type; no text of an attribute is a substitution."""
    if what in ("attribute", "data", "property"):
        lines[:] = app.env.temp_data["docstring"]
    lines[:] = [re.sub(r"(?<!`)\|", r"\\|", line) if "``" not in line else line for line in lines]


def setup(app):
    """Surround napoleon's hook, of the default priority 500."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _original, priority=400)
    app.connect("autodoc-process-docstring", _attribute, priority=600)
