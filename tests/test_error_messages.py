"""Every error and warning of purestep is one of `tests/messages.txt`, word for word, and every one of them can be had.

`tests/messages.py` says what counts, and writes the file anew: `python -m tests.messages`.
"""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests import messages
from tests.messages import CASES, ROOT, SITES, Message, Site

NO_MESSAGES = {
    "Callable[P, Schedule]": "a type",
    "number {}": "the path of a parameter without a name, where a closure is evaluated anew",
    "The state of a quantized transform, which without that would be `": "a docstring",
    "`purestep.optim.Optimizer` of ": "a docstring",
    "all together": "a label in a plot",
    "upper center": "a place in a plot",
}
"""Texts in functions with sites, or in those that they call, that are no parts of messages."""


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
    assert not [str(site) for site in SITES if site not in seen]


def test_every_form_of_a_message_is_in_the_file() -> None:
    """Each text of several words in a function that has a site, or in one that such a function calls by its name."""
    trees = [ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))]
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    telling = [f for f in functions if any(map(messages.is_site, ast.walk(f)))]
    names = {called(node.func) for f in telling for node in ast.walk(f) if isinstance(node, ast.Call)}
    told = "\n".join([message.text for message in messages.written().values()])
    words = {text for f in functions if f in telling or f.name in names for text in texts_in(f)}
    assert {text for text in words if text.strip() not in told} == NO_MESSAGES.keys()


def called(function: ast.expr) -> str:
    """The last name of what is called."""
    return getattr(function, "attr", getattr(function, "id", ""))


def texts_in(function: ast.FunctionDef) -> set[str]:
    """Its texts of several words, without docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(function)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and isinstance(node.body[0], ast.Expr)
    }
    constants = [node for node in ast.walk(function) if isinstance(node, ast.Constant) and id(node) not in docs]
    return {x.value for x in constants if isinstance(x.value, str) and len(x.value.split()) > 1}


def test_the_page_has_these_numbers() -> None:
    page = " ".join((messages.FILE.parent.parent / "docs/reliability.md").read_text().split())
    functions = {(site.file, site.function) for site in SITES}
    told = f"{len(SITES)} places that make a message, in {len(functions)} functions; {len(CASES)} wrong calls"
    assert told in page
    assert f"{len(CASES)} wrong calls, for {len(SITES)} places that make a message" in page


# ------------------------------------------------------------------------------------------------------------------ its prose

WEEDED = ("whole number", "so many", "put around", "stands", "asked", "told", "seen", "face", "what it is given", "Whether")
"""Words that no message has, because there are plainer ones."""

ENDS_OTHERWISE = {
    "fused and differentiable": "torch's own text",
    "two groups of lbfgs": "torch's own text",
    "a flat state of another transform": "ends in a list",
    "a flat state that is wrong in all ways": "ends in a list",
    "schedules drawn without matplotlib": "ends in a command",
    "a plot without matplotlib": "ends in a command",
}
"""The cases whose messages do not end as a sentence does, and why."""


def test_messages_are_sentences_in_plain_words() -> None:
    told = {name: message.text for name, message in messages.written().items()}
    assert {name for name, text in told.items() if not text.endswith((".", "?"))} == ENDS_OTHERWISE.keys()
    weeded = re.compile(rf"\b({'|'.join(WEEDED)})\b")
    assert not [text for text in told.values() if weeded.search(text)]


def test_messages_are_short() -> None:
    """What was found is described, or cut off: no tensor's elements, and no page of text."""
    told = {name: message.text for name, message in messages.written().items()}
    assert not [name for name, text in told.items() if re.search(r"\btensor\(", text) or len(text) > 600]


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
    said = (
        f"{test_what_is_a_site} on DeviceMesh((2, 1), 'cpu', stride=(1, ())), and DeviceMesh('cpu', [0]). torch says: no\nnever"
    )
    expected = "<function test_what_is_a_site at 0x...> on DeviceMesh..., and DeviceMesh.... torch says: ..."
    assert messages.normalised(said) == expected
