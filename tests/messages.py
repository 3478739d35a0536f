"""Every error and warning of purestep as a real text: `tests/messages.txt`. `python -m tests.messages` writes the file anew.

A *site* is a statement in `src/purestep` that makes a message: a `raise` with a call in it, or a call of `warnings.warn`. No
sites are

- `raise` alone, and `raise NAME`, which hand an exception on, or raise one without a text, for the library itself to catch;
- `raise AssertionError(...)`, which is for its authors: no call of a user's gets there.

A *case* is a function that makes one wrong call. It belongs to the site at which the innermost frame of purestep was, when its
exception (or the one that this was raised `from`) was raised.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import purestep as ps
from tests import error_cases, error_cases_meta, error_cases_optimizer, error_cases_sharded

ROOT = Path(ps.__file__).parent
FILE = Path(__file__).with_suffix(".txt")
HEAD = """\
Every message that purestep raises or warns with, as a wrong call has produced it: the function, the type, the case, the text.
`python -m tests.messages` writes this file anew, from the cases in tests/error_cases*.py. tests/test_error_messages.py holds it.
"""
CASES: dict[str, Callable[[], Any]] = {
    **error_cases.CASES,
    **error_cases_optimizer.CASES,
    **error_cases_meta.CASES,
    **error_cases_sharded.CASES,
}


class Site(NamedTuple):
    """Where a message is made."""

    file: str
    function: str
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.file}:{self.first} ({self.function})"


class Message(NamedTuple):
    """What a case was told."""

    file: str
    function: str
    kind: str
    text: str


def is_site(node: ast.AST) -> bool:
    """Whether a statement or an expression makes a message, by the rule above."""
    if isinstance(node, ast.Raise):
        return isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func) != "AssertionError"
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"


def sites_of(file: str, tree: ast.AST, function: str = "") -> Iterator[Site]:
    """The sites in the source of a file, with the names of the functions that they are in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Raise, ast.Call)) and is_site(node):
            yield Site(file, function, node.lineno, node.end_lineno or node.lineno)
        named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        inside = f"{function}.{node.name}".removeprefix(".") if named else function  # type: ignore[attr-defined]
        yield from sites_of(file, node, inside)


SITES = [
    site
    for path in sorted(ROOT.rglob("*.py"))
    for site in sites_of(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text()))
]


def normalised(text: str) -> str:
    """A text without what differs from run to run, or from torch to torch: addresses, meshes, and what torch itself has said."""
    mesh = r"(?<=DeviceMesh)\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"  # brackets in brackets in brackets
    return re.sub(rf"(?<=0x)[0-9a-f]+|{mesh}|(?<=torch says: ).*", "...", text, flags=re.DOTALL)


def place(trace: TracebackType | None) -> tuple[str, int]:
    """The file and the line of the innermost frame that is purestep's."""
    found = ("", 0)
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_relative_to(ROOT):
            found = (path.relative_to(ROOT).as_posix(), trace.tb_lineno)
        trace = trace.tb_next
    return found


def site_at(file: str, line: int) -> Site | None:
    return next((s for s in SITES if s.file == file and s.first <= line <= s.last), None)


def observed(case: Callable[[], Any]) -> tuple[Message, list[Site]]:
    """What a case is told, and the sites at which that was made.

    Raises:
        AssertionError: nothing was raised, or not by a site.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", UserWarning)
        try:
            case()
        except Exception as error:
            chain: list[BaseException] = [error]
    assert "chain" in locals(), "nothing was raised"
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    found = [site_at(*place(e.__traceback__)) for e in chain]
    if found[0] is None:
        raise AssertionError(f"raised at {place(chain[0].__traceback__)}, which is no site") from chain[0]
    text = str(chain[0].args[0]) if isinstance(chain[0], KeyError) else str(chain[0])
    message = Message(found[0].file, found[0].function, type(chain[0]).__name__, normalised(text))
    return message, [site for site in found if site is not None]


def written() -> dict[str, Message]:
    """The messages in the file, by the names of their cases."""
    found: dict[str, Message] = {}
    file = name = ""
    for line in FILE.read_text().splitlines():
        if line.startswith("== "):
            file = line.removeprefix("== ")
        elif file and (head := re.fullmatch(r"(\S+), (\w+): (.+)", line)):
            name = head[3]
            assert name not in found, f"{name!r} is there twice"
            found[name] = Message(file, head[1], head[2], "")
        elif line.startswith("  "):
            old = found[name]
            found[name] = old._replace(text="\n".join([*old.text.splitlines(), line.removeprefix("  ")]))
    return found


def made() -> str:
    """The file, from what all cases are told now, by file and line."""
    told: list[tuple[Site, str, Message]] = []
    for name, case in CASES.items():
        try:
            message, sites = observed(case)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        told.append((sites[0], name, message))
    lines, file = [HEAD], ""
    for site, name, message in sorted(told, key=lambda x: (x[0].file, x[0].first)):
        if site.file != file:
            file = site.file
            lines.append(f"\n== {file}\n")
        lines.append(f"{message.function}, {message.kind}: {name}")
        lines += [f"  {line}" for line in message.text.splitlines()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(made())
