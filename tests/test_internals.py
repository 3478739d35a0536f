"""What the documentation says of the engine is so."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import purestep as ps
from tests.test_house import FLOORS

SOURCE = Path(ps.__file__).parent
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_executors_is_the_registry() -> None:
    executors = script("executors")
    assert executors.shown((DOCS / "concepts.md").read_text()) == executors.table(), "run `python docs/executors.py`"


PAGE = (DOCS / "internals.md").read_text()


def test_every_file_that_is_named_exists() -> None:
    found = set(re.findall(r"`((?:_\w+/)+\w+\.py)`", PAGE))
    assert len(found) > 15
    assert [name for name in found if not (SOURCE / name).exists()] == []


def test_every_class_of_the_glossary_exists() -> None:
    named = {name.split(".")[0] for name in re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", PAGE.partition("## Glossary")[2])}
    text = "\n".join([path.read_text() for path in SOURCE.rglob("*.py")])
    assert len(named) > 15
    assert [name for name in named if not re.search(rf"^class {name}\b", text, re.MULTILINE)] == []


def test_the_rooms_are_the_floors() -> None:
    section = PAGE.partition("## Rooms")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    rooms = [re.findall(r"`(\w+)(?:\.py|/)`", cell) for cell in cells]
    assert rooms == FLOORS[::-1]


@pytest.mark.parametrize("box", script("drawings").BOXES.values(), ids=lambda box: box.title)
def test_every_stage_of_the_drawing_exists(box: Any) -> None:
    parts = box.name.split(".")
    at = next(
        k
        for k, name in enumerate(parts)
        if not (SOURCE.joinpath(*parts[: k + 1]).is_dir() or SOURCE.joinpath(*parts[:k], f"{name}.py").exists())
    )
    module = importlib.import_module(".".join(["purestep", *parts[:at]]))
    functools.reduce(getattr, parts[at:], module)


# -------------------------------------------------------------------------------------------------------------- an operation

USE = """
import torch, purestep as ps
from purestep._core.maths import softsign

@ps.leafwise()
def soften(g, p, k: ps.NonNegative = 1.0):
    return softsign(k * g)

print(soften().program(), end="")
opt = ps.chain(soften(2.0), ps.scale_by_learning_rate(0.1))
p = {"a": torch.randn(3), "b": torch.randn(2, 2)}
expected, _ = opt.step(p, opt.init_state(p), p, executor="leaf")
for how in ({}, {"donate": True}):
    q = {name: x.clone() for name, x in p.items()}
    torch.testing.assert_close(opt.step(p, opt.init_state(p), q, **how)[0], expected)
torch.testing.assert_close(torch.func.vmap(lambda q: opt.step(q, opt.init_state(q), q)[0])(p["b"]), expected["b"])
"""


def apply(diff: str, source: Path) -> None:
    """Change the files that a diff names; each of its parts is found once."""
    for name, lines in re.findall(r"^--- (.*)\n((?:[ +-](?!-- ).*\n)*)", diff, re.MULTILINE):
        old, new = ["".join([x[1:] + "\n" for x in lines.splitlines() if x[0] in marks]) for marks in (" -", " +")]
        text = (source / name).read_text()
        assert text.count(old) == 1, (
            f"The diff in docs/internals.md changes these lines of {name}, which are not there once: write it anew.\n{old}"
        )
        (source / name).write_text(text.replace(old, new))


def test_an_operation_is_added_as_the_page_says(tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "purestep", ignore=shutil.ignore_patterns("__pycache__"))
    (diff,) = re.findall(r"^```diff\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (shown,) = re.findall(r"^```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    apply(diff, tmp_path / "purestep")
    done = subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown
