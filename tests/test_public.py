"""What is public is documented, tested and where it belongs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import purestep as ps
from benchmarks import importing
from tests.cases import CASES

SOURCE = Path(ps.__file__).parent
ROOT = SOURCE.parent.parent
TYPES_AND_TOOLS = {  # public names that are no transforms, and the test file that is theirs
    "select", "nested", "finite", "stack", "unstack", "take", "ravel", "detach", "out_dims", "meta", "convert", "Inner", "Betas", "EmptyState", "Explanation", "Extra", "ExtraTree", "Fraction", "Hyper", "NonNegative", "Positive", "Scalar", "ScheduleState", "Transform", "UnitInterval", "Weights", "apply_updates",
    "counter", "eval_params", "filled", "find", "find_all", "get_hyperparams", "global_norm", "hutchinson", "in_dims", "leafwise", "lerp", "load_state_dict", "map_params", "maximum", "minimum", "multiply", "operation", "optim",
    "root", "rounded", "schedules", "state_dict", "step_count", "tensors", "where", "whole",
}  # fmt: skip


OWN_FILE = {"lbfgs", "LBFGSState"}  # it needs a function at every update, which no other test gives: tests/test_lbfgs.py


def test_every_transform_has_a_case() -> None:
    covered = {case.name for case in CASES} | {name for case in CASES for name in case.covers}
    assert set(ps.__all__) - covered - OWN_FILE == TYPES_AND_TOOLS


@pytest.mark.parametrize("name", ps.__all__)
def test_every_name_has_a_docstring(name: str) -> None:
    """Functions and classes have one of their own; a factory's has an example that runs and, for an algorithm, its paper."""
    x = getattr(ps, name)
    if not callable(x) or isinstance(x, type(ps.Hyper)):
        return
    doc = inspect.getdoc(x) or ""
    assert len(doc.splitlines()[0]) > 20
    if inspect.isfunction(x):
        assert ">>>" in doc or name in NO_EXAMPLE, f"{name} has no example"
        assert re.match(r"[A-Z`]", doc)
    if name in ("adam", "adamw", "sgd", "scale_by_adam", "scale_by_amsgrad", "trace"):
        assert "Reference:" in doc
        assert r".. math::" in doc


def test_every_name_has_a_place_in_the_reference() -> None:
    """The docs build says so too, and with more authority (docs/conf.py), but last."""
    pages = "\n".join(p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    documented = {name.rpartition(".")[2] for name in re.findall(r"^\.\. (?:auto|py:)\w+:: ([\w.]+)", pages, re.MULTILINE)}
    assert not set(ps.__all__) - documented


NO_EXAMPLE = {
    "rounded",
    "counter",
    "filled",
    "global_norm",
    "lerp",
    "maximum",
    "minimum",
    "multiply",
    "root",
    "where",
    "whole",
    "scale_by_amsgrad",
}


@pytest.mark.parametrize("name", [n for n in ps.__all__ if callable(getattr(ps, n)) and inspect.isfunction(getattr(ps, n))])
def test_factories_show_their_own_arguments(name: str) -> None:
    """What `inspect.signature` (and so an editor) shows has no gradient, state or parameter in it."""
    factory = getattr(ps, name)
    if hasattr(factory, "declaration"):
        assert not {"g", "s", "p", "u", "us"} & set(inspect.signature(factory).parameters)
        assert factory.declaration.name == name


def test_optim_mirrors_torch() -> None:
    for name in ("SGD", "Adam", "AdamW", "Optimizer"):
        assert issubclass(getattr(ps.optim, name), torch.optim.Optimizer)
    assert ps.optim.lr_scheduler is torch.optim.lr_scheduler
    assert ps.optim.swa_utils is torch.optim.swa_utils


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_signatures_are_torchs(name: str) -> None:
    """Same names, same order, same kinds, same defaults; and one flag more, at the end and by name only."""
    ours = [(p.name, p.kind, p.default) for p in inspect.signature(getattr(ps.optim, name)).parameters.values()]
    theirs = [(p.name, p.kind, p.default) for p in inspect.signature(getattr(torch.optim, name)).parameters.values()]
    assert ours == [*theirs, ("compile", inspect.Parameter.KEYWORD_ONLY, False)]


@pytest.mark.parametrize(("name", "factory"), [("SGD", ps.sgd), ("Adam", ps.adam), ("AdamW", ps.adamw)])
def test_classes_and_factories_agree(name: str, factory: Any) -> None:
    """A class's arguments are its factory's, with the same defaults."""
    ours = inspect.signature(getattr(ps.optim, name)).parameters
    for p in inspect.signature(factory).parameters.values():
        assert ours[p.name].default == p.default


DEFAULTS = Path(__file__).with_name("defaults.txt")


def defaults() -> str:
    """A line for each default of a public function and of a class of `optim`; `python -m tests.test_public` writes the file."""
    places = [
        ("", ps, ps.__all__),
        *[(f"{x.__name__.rpartition('.')[2]}.", x, sorted(vars(x))) for x in (ps.optim, ps.schedules)],
    ]
    found = []
    for place, module, names in places:
        for name in names:
            x = getattr(module, name)
            if inspect.isfunction(x) or (inspect.isclass(x) and module is ps.optim and issubclass(x, torch.optim.Optimizer)):
                if name.startswith("_") or not x.__module__.startswith("purestep"):
                    continue
                given = [p for p in inspect.signature(x).parameters.values() if p.default is not p.empty]
                found += [f"{place}{name} {p.name} = {p.default!r}" for p in given]
    return "\n".join(sorted(set(found))) + "\n"


NEWER = {"optim.LBFGS maximize = False": "torch has it from 2.14 on"}
"""Defaults that are not in the file, because the pinned torch has no such argument."""


def test_defaults_are_a_promise() -> None:
    """A default that changes, changes what users train: no other test calls every function without arguments."""
    found = [line for line in defaults().splitlines() if line not in NEWER]
    assert found == DEFAULTS.read_text().splitlines()


def test_an_algorithm_is_short_and_speaks_no_engine() -> None:
    """The mathematics of scale_by_adam fits ten lines, and no algorithm or transform names a part of the engine."""
    words = re.compile(r"foreach|vmap|fused|donat|proxy|trace[rd]\b|functorch|in-place", re.IGNORECASE)
    for path in (SOURCE / "algorithms").glob("*.py"):
        if path.stem == "kernels":  # which says to the engine what torch's kernels compute
            continue
        code = re.sub(r"fused: bool|foreach: bool", "", path.read_text())
        assert not words.search(re.sub(r'r?""".*?"""', "", code, flags=re.DOTALL)), path.name
    body = inspect.getsource(ps.scale_by_adam.declaration.function)  # type: ignore[attr-defined]
    body = re.sub(r'r""".*?"""', "", body, flags=re.DOTALL)
    assert len([line for line in body.splitlines() if line.strip()]) <= 10


def test_runtime_dependencies() -> None:
    """Nothing but torch, typing-extensions and the standard library is imported at run time."""
    tomllib = importlib.import_module("tomllib") if importlib.util.find_spec("tomllib") else None
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                root = node.module.split(".")[0]
                assert root in {"torch", "typing_extensions", "purestep"} or root in sys_names(), f"{path.name}: {root}"
    if tomllib:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert [re.split(r"[<>=]", d)[0] for d in project["dependencies"]] == ["torch", "typing-extensions"]


def test_importing_is_cheap() -> None:
    """torch._dynamo alone takes a second to load; purestep leaves it to the first torch.compile."""
    code = "import sys, torch; before = 'torch._dynamo' in sys.modules; import purestep; print(before, 'torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_importing_leaves_the_garbage_collector_as_it_was(collects: bool, fails: bool) -> None:
    before = "sys.modules['purestep._trace'] = None" if fails else ""
    lines = ["import gc, sys, torch", "gc.enable()" if collects else "gc.disable()", before, "try: import purestep"]
    lines += ["except ImportError: print('failed', end=' ')", "print(gc.isenabled())"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout == f"{'failed ' * fails}{collects}\n"


def test_how_long_importing_takes(record_property: Any) -> None:
    """Reported, not asserted; `python -m benchmarks.importing` says where it goes."""
    modules = importing.best(1, "import torch; import purestep")
    record_property("milliseconds beyond torch", modules[-1].all)
    assert modules[-1].name == "purestep"
    assert {"purestep.transform", "purestep.optim"} <= {module.name for module in modules}
    assert not any(module.name.startswith(("torch._dynamo", "torch._inductor")) for module in modules)


def sys_names() -> frozenset[str]:
    return sys.stdlib_module_names


if __name__ == "__main__":
    DEFAULTS.write_text(defaults())
