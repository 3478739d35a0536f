"""The snippets of the README and of the documentation run as they are written."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
APART = {ROOT / "docs/frameworks.md"}  # need frameworks: tests/frameworks/test_recipes.py
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").rglob("*.md")} - APART)]
BLOCK = re.compile(r"^```(python|pycon|\{code-block\} (?:python|pycon))\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if "_build" not in p.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_snippets(page: Path) -> None:
    """The python blocks of a page run from top to bottom in one namespace; pycon blocks print what they say."""
    space: dict[str, object] = {"__name__": "snippets"}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for kind, text in BLOCK.findall(page.read_text()):
        if "pycon" in kind:
            test = doctest.DocTestParser().get_doctest(text, space, page.name, str(page), 0)
            out = io.StringIO()
            runner = doctest.DocTestRunner(optionflags=flags)
            runner.run(test, out=out.write, clear_globs=False)
            space.update(test.globs)
            assert runner.failures == 0, out.getvalue()
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, page.name, "exec", dont_inherit=True), space)


def test_the_readme_has_snippets_and_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(BLOCK.findall(text)) >= 4
    assert "pip install -c constraints.txt -e '.[examples]' && python examples/quickstart.py" in text
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in text


def test_the_algorithm_shown_is_the_algorithm() -> None:
    source = (ROOT / "src/purestep/algorithms/adam.py").read_text()
    (shown,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert all(line in source for line in shown.splitlines())


def test_lion_is_written_in_less_than_25_lines() -> None:
    """The first block of the page is all of it, and computes what its paper says."""
    page = (ROOT / "docs/write-your-own.md").read_text()
    kind, text = BLOCK.findall(page)[0]
    assert kind == "python"
    assert len(text.splitlines()) < 25
    space: dict[str, Any] = {"__name__": "snippets"}
    exec(compile(text, "write-your-own.md", "exec", dont_inherit=True), space)
    opt = space["lion"](lr=0.1, betas=(0.7, 0.9), weight_decay=0.5)
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(5, generator=generator, dtype=torch.float64)
    q, m, state = p, torch.zeros_like(p), opt.init_state(p)
    for _ in range(20):
        g = torch.randn(5, generator=generator, dtype=torch.float64)
        p, state = opt.step(g, state, p)
        q = q - 0.1 * (torch.sign(0.7 * m + 0.3 * g) + 0.5 * q)
        m = 0.9 * m + 0.1 * g
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
