"""The documentation: `sphinx-build -W --keep-going -b html docs docs/_build/html`.

The API reference is the docstrings. A public name without a docstring, or without a place on an API page, is a warning,
and warnings are errors; `check` sees to it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging

project = "purestep"
author = "the purestep authors"
copyright = "the purestep authors"
release = importlib.metadata.version(project)

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

# -- docstrings

default_role = "py:obj"  # `x` is code, and a link where x is documented
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: f"purestep.{name}" for name in ("Hyper", "NonNegative", "Fraction", "Betas", "Scalar")} | {
    name: name for name in ("PyTree", "Params")
}
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# -- looks

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["custom.css"]
pygments_dark_style = "github-dark"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5f8b", "color-brand-content": "#1f5f8b"},
    "dark_css_variables": {"color-brand-primary": "#7cb8e0", "color-brand-content": "#7cb8e0"},
}


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", complete)
    app.connect("object-description-transform", shorten)
    app.connect("build-finished", check)
    declare = ModuleAnalyzer.for_module("purestep.declare")
    declare.analyze()
    declare.overloads.pop("leafwise", None)  # for type checkers: autodoc would show these lines instead of its signature


# -- what autodoc does not find by itself


def complete(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Give a type alias the text that stands below it in its module, and a state the comments beside its fields."""
    if what == "data":
        lines[:] = text_below(name)
    elif is_state(thing):
        lines += [f":param {field}: {comment}" for field, comment in comments_beside(thing)]


def shorten(app: Sphinx, domain: str, objtype: str, content: nodes.Element) -> None:
    """Leave out what a type alias stands for: it is for the engine to read."""
    if objtype == "data":
        content[:] = [x for x in content if not x.astext().startswith("alias of")]


def is_state(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, tuple) and hasattr(thing, "_fields")


def comments_beside(state: type) -> Iterator[tuple[str, str]]:
    """The fields of a NamedTuple, each with the comment on its line."""
    source = inspect.getsource(state)
    (definition,) = ast.parse(source).body
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            yield node.target.id, source.splitlines()[node.end_lineno - 1].partition("# ")[2]


def text_below(name: str) -> list[str]:
    """The string below an assignment, in the module that a public name is imported from."""
    module, _, attribute = name.rpartition(".")
    home = dict(public(module)).get(attribute, module)
    return list(ModuleAnalyzer.for_module(home).find_attr_docs().get(("", attribute), []))


# -- every public name has a docstring and a place


def public(module: str) -> Iterator[tuple[str, str]]:
    """The public names of a module, each with the module it comes from.

    They are those in `__all__`; without one, those it defines, and those of this package that it imports as themselves
    (`from .x import f as f`).
    """
    imported = importlib.import_module(module)
    listed = getattr(imported, "__all__", None)
    for node in ast.parse(inspect.getsource(imported)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, module
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == project:
            yield from (
                (a.name, str(node.module)) for a in node.names if (a.asname == a.name if listed is None else a.name in listed)
            )


def docstring(module: str, name: str) -> str:
    """A name's own docstring: not an inherited one, nor the one that Python writes for a NamedTuple."""
    thing = getattr(importlib.import_module(module), name)
    if not (inspect.isroutine(thing) or inspect.isclass(thing) or inspect.ismodule(thing)):
        return "\n".join(text_below(f"{module}.{name}"))
    text = thing.__doc__ or ""
    return "" if is_state(thing) and text.startswith(f"{name}(") else text


def check(app: Sphinx, error: Exception | None) -> None:
    """Warn of every public name that has no docstring, or that no page documents."""
    if error is not None:
        return
    domain = app.env.get_domain("py")
    for module in (project, f"{project}.schedules", f"{project}.optim", f"{project}.meta"):
        for name, _ in public(module):
            full = f"{module}.{name}"
            if not docstring(module, name).strip():
                logging.getLogger(__name__).warning("%s is public, but has no docstring", full)
            if full not in domain.objects and full not in domain.modules:
                logging.getLogger(__name__).warning("%s is public, but no page of docs/api documents it", full)
