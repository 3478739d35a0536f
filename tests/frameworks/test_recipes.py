"""The recipes of the documentation run as they are written, each where its framework is installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.frameworks

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
SECTION = re.compile(r"^## (.*?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RECIPES = [
    pytest.param(block, id=f"{title} {k}" if k else title)
    for title, text in SECTION.findall(PAGE.read_text())
    for k, block in enumerate(BLOCK.findall(text))
]


@pytest.mark.parametrize("block", RECIPES)
def test_a_recipe_runs_and_leaves_no_file(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line of a block imports its framework."""
    first = re.match(r"(?:import|from) (\w+)", block)
    assert first, "the first line of a recipe imports its framework"
    if importlib.util.find_spec(first[1]) is None:
        pytest.skip(f"{first[1]} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, PAGE.name, "exec", dont_inherit=True), {"__name__": "recipe"})
    assert not list(tmp_path.iterdir())


def test_every_section_has_a_recipe() -> None:
    sections = SECTION.findall(PAGE.read_text())
    assert sections
    assert all(BLOCK.search(text) for _, text in sections)
