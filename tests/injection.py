"""Faults at chosen places: an exception at the n-th line of the library, where an interrupt may arrive, or at an allocation.

Each context manager counts the places that it passes, and raises at the place `at` (from 0 on); without one it only counts. So a
test runs a step once to learn how many places there are, and then once for each of them.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import purestep
from purestep._core import torch_api
from purestep._trace.program import _programs

OURS = str(Path(purestep.__file__).parent)


class Interrupt(KeyboardInterrupt):
    """What `Ctrl-C` raises, told apart from a real one."""


class OutOfMemory(RuntimeError):
    """An allocation that fails."""


@functools.cache
def is_ours(file: str) -> bool:
    return file.startswith((OURS, "<purestep program"))


@functools.cache
def cleaning(file: str) -> tuple[frozenset[int], frozenset[int]]:
    """The lines of a file that are in a ``finally``, and those on which a ``with`` begins, to which its end comes back."""
    if not file.startswith(OURS):
        return frozenset(), frozenset()
    tree = ast.parse(Path(file).read_text())
    final = [x for node in ast.walk(tree) if isinstance(node, ast.Try) for x in node.finalbody]
    lines = {k for x in final for k in range(x.lineno, (x.end_lineno or x.lineno) + 1)}
    withs = {item.context_expr.lineno for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items}
    return frozenset(lines), frozenset(withs | {n.lineno for n in ast.walk(tree) if isinstance(n, ast.With)})


@functools.cache
def after_calls(code: CodeType) -> frozenset[int]:
    """The instructions before which CPython (3.11 and newer) may run a signal's handler, apart from the first: those after a call.

    Not those where another ``try`` or ``with`` begins or ends: an exception after the call would be seen by the old one.
    """
    table = dis._parse_exception_table(code)  # type: ignore[attr-defined]

    def handler(offset: int) -> Any:
        return next(((x.target, x.depth) for x in table if x.start <= offset < x.end), None)

    found = []
    instructions = [i for i in dis.get_instructions(code) if i.opname != "CACHE"]
    for one, two in itertools.pairwise(instructions):
        if (
            one.opname.startswith("CALL")
            and not one.opname.startswith("CALL_INTRINSIC")
            and handler(one.offset) == handler(two.offset)
        ):
            found.append(two.offset)
    return frozenset(found)


class Places:
    """How many places there were, and where it was raised."""

    def __init__(self, at: int | None, error: Callable[[], BaseException]) -> None:
        self.at, self.error, self.count, self.raised = at, error, 0, ""

    def pass_by(self, place: Callable[[], str]) -> None:
        self.count += 1
        if self.count - 1 == self.at:
            self.raised = place()
            raise self.error()


@contextlib.contextmanager
def traced(trace: Callable[..., Any]) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def where(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.removeprefix(OURS)}:{frame.f_lineno} in {frame.f_code.co_name}"


@contextlib.contextmanager
def at_line(at: int | None = None, error: Callable[[], BaseException] = Interrupt) -> Iterator[Places]:
    """Raise before the `at`-th line of the library that is run, those that only clean up left out."""
    places = Places(at, error)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if event != "call" or not is_ours(file) or frame.f_code.co_flags & inspect.CO_GENERATOR:
            return None
        final, withs = cleaning(file)
        begun: set[int] = set()

        def local(frame: FrameType, event: str, arg: Any) -> Any:
            line = frame.f_lineno
            if event != "line" or line in final or line in begun or sys.exc_info()[1] is not None:
                return local
            if line in withs:
                begun.add(line)
            places.pass_by(lambda: where(frame))
            return local

        return local

    with traced(trace):
        yield places


@contextlib.contextmanager
def at_interrupt(at: int | None = None, error: Callable[[], BaseException] = Interrupt) -> Iterator[Places]:
    """Raise at the `at`-th place where CPython looks for signals: where a function of the library begins, and after its calls."""
    places = Places(at, error)

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode" and frame.f_lasti in after_calls(frame.f_code) and sys.exc_info()[1] is None:
            places.pass_by(lambda: where(frame))
        return local

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if event != "call" or not is_ours(frame.f_code.co_filename) or frame.f_code.co_flags & inspect.CO_GENERATOR:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if sys.exc_info()[1] is None:
            places.pass_by(lambda: where(frame))
        return local

    with traced(trace):
        yield places


class AtOperation(TorchDispatchMode):
    """Raises at the `at`-th operation that returns new memory. A step under a dispatch mode is one that something traces."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.places = Places(at, OutOfMemory)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not name.endswith("_") and func._schema.returns:
            self.places.pass_by(lambda: name)
        return func(*args, **(kwargs or {}))


CALLED = {
    id(f): f
    for f in (
        *torch_api.FOREACH.values(), torch_api.fused_adam_, torch_api.fused_adamw_, torch_api.fused_sgd_, torch_api.fused_adagrad_,
        torch_api.flatten_dense,
    )
}  # fmt: skip
"""The functions through which executors write and allocate; those of torch that allocate are exchanged in torch itself."""
ALLOCATES = ("empty_like", "full", "stack", "cat", "zeros_like", "where", "lerp")


@contextlib.contextmanager
def at_call(at: int | None = None) -> Iterator[Places]:
    """Raise before the `at`-th call of a function that writes to tensors or allocates one, in the path that is taken anyway."""
    places = Places(at, OutOfMemory)

    def failing(f: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            places.pass_by(lambda: str(getattr(f, "__name__", f)))
            return f(*args, **kwargs)

        return call

    spaces = [vars(m) for name, m in sys.modules.items() if name.startswith("purestep.") and m is not torch_api]
    spaces += [made.run.__globals__ for made in _programs.entries.values()]
    changed = [(space, name, f) for space in spaces for name, f in list(space.items()) if id(f) in CALLED]
    changed += [(vars(torch), name, getattr(torch, name)) for name in ALLOCATES]
    wrapped: dict[int, Any] = {}
    try:
        for space, name, f in changed:
            space[name] = wrapped.setdefault(id(f), failing(f))
        yield places
    finally:
        for space, name, f in changed:
            space[name] = f
