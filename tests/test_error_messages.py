"""Every error and warning of purestep is one of `tests/messages.txt`, word for word, and every one of them can be had.

`tests/messages.py` says what counts, and writes the file anew: `python -m tests.messages`.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests import messages
from tests.messages import CASES, ROOT, SITES, Message, Site

TESTS = Path(__file__).parent

ELSEWHERE = {
    "Exchange._note": (
        "another process must fail while this one does not",
        "tests/test_dealt.py::test_a_failure_of_one_owner_ends_all",
    ),
    "check_agreement": (
        "processes must answer each other with different parameters",
        "tests/test_dealt.py::test_processes_that_do_not_agree",
    ),
}
"""The functions with a site that one process cannot get to, why it cannot, and the test that does in several."""


@cache
def observed(name: str) -> tuple[Message, list[Site]]:
    """What a case is told; each is run once."""
    return messages.observed(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_call_is_told_what_the_file_says(name: str) -> None:
    found, _ = observed(name)
    assert found == messages.written().get(name), "run `python -m tests.messages`, and read what has changed"


def test_the_file_has_no_other_messages() -> None:
    assert messages.written().keys() == CASES.keys()


def test_every_site_has_a_case() -> None:
    """Each was really seen where an exception began, so that no case can stay behind when its site goes."""
    seen = {site for name in CASES for site in observed(name)[1]}
    lost = [site for site in SITES if site not in seen]
    assert sorted({site.function for site in lost}) == sorted(ELSEWHERE), "\n".join(["without a case:", *map(str, lost)])
    assert len(lost) == len(ELSEWHERE)


@pytest.mark.parametrize("function", ELSEWHERE)
def test_what_one_process_cannot_get_to_has_a_test(function: str) -> None:
    _, name = ELSEWHERE[function]
    file, _, test = name.partition("::")
    tree = ast.parse((TESTS.parent / file).read_text())
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# ----------------------------------------------------------------------------------------------------------- what is a site


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("raise ValueError('x')", 1),
        ("raise ValueError(found) from None", 1),
        ("warnings.warn('x', stacklevel=2)", 1),
        ("raise", 0),
        ("raise error", 0),
        ("raise KeyError", 0),
        ("raise AssertionError('x')", 0),
    ],
)
def test_what_is_a_site(text: str, count: int) -> None:
    assert len(list(messages.sites_of("file.py", ast.parse(text)))) == count


def test_errors_are_raised_where_they_are_made() -> None:
    """Nothing makes an exception to be raised elsewhere: its site would be no site by the rule."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted(ROOT.rglob("*.py"))
        for tree in [ast.parse(path.read_text())]
        for raised in [{id(x.exc) for x in ast.walk(tree) if isinstance(x, ast.Raise)}]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and id(node) not in raised
        and isinstance(node.func, ast.Name) and re.fullmatch(r"[A-Z]\w*(Error|Exception|Warning)", node.func.id)
    ]  # fmt: skip
    assert not found


def test_what_differs_from_run_to_run_is_left_out() -> None:
    said = f"{test_what_is_a_site} on DeviceMesh((2, 1), 'cpu', stride=(1, ())), and DeviceMesh('cpu', [0]). torch says: no\nnever"
    expected = "<function test_what_is_a_site at 0x...> on DeviceMesh..., and DeviceMesh.... torch says: ..."
    assert messages.normalised(said) == expected
