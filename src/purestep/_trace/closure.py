"""The numbers that leaf functions read from variables outside of themselves.

A program contains their values as constants, so it must be made anew when one of them changes. Tensors are another matter:
`purestep._core.recorder` makes an input of the graph of each tensor that a leaf function closes over.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple


class Guard(NamedTuple):
    """A variable outside of a leaf function, and its value when the function was traced: a number, a string or None."""

    read: Callable[[], Any]
    value: Any

    def holds(self) -> bool:
        """Whether the variable still has this value."""
        try:
            found = self.read()
        except (KeyError, ValueError):
            return False
        return found is self.value or (type(found) is type(self.value) and repr(found) == repr(self.value))


def guards_of(function: Callable[..., Any]) -> list[Guard]:
    """The guards of one leaf function: of its closure, and of the globals that its code names."""
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    known = function.__globals__
    reads = [functools.partial(operator.attrgetter("cell_contents"), cell) for cell in function.__closure__ or ()]
    reads += [functools.partial(known.__getitem__, name) for name in code.co_names if name in known]
    found = []
    for read in reads:
        try:
            value = read()
        except ValueError:  # the variable of this cell has no value yet
            continue
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            found.append(Guard(read, value))
    return found
