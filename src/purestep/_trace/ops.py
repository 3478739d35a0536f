"""What the lines of a program are made of, while it is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx
from torch.fx.node import map_arg


@dataclass
class Op:
    """One line of the program: `out = name(lists..., numbers...)`."""

    out: fx.Node
    name: str
    args: list[Any]  # list-valued nodes, and number expressions or constants
    targets: tuple[int, ...] = ()  # which arguments could be overwritten with the result
    fresh: bool = True  # the result's memory is its own; False where it may be an argument's
    elementwise: bool = True  # of a loop: whether every number of the result depends on those in its own place only
    inplace: int | None = None
    further: dict[fx.Node, int] = field(default_factory=dict)  # other results, each in the memory of this argument

    def lists(self, kinds: dict[fx.Node, str]) -> list[fx.Node]:
        return [a for a in nodes_in(self.args) if kinds[a] == "list"]


def nodes_in(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(args, found.append)
    return found


class Name(str):
    """The name of a variable of the program."""


class Minus:
    """The factor of a product that was negated; a -1 of the user's is a number."""


MINUS = Minus()


class Scale(NamedTuple):
    """The number in front of a contracted product."""

    negative: bool
    numbers: list[Any]


class Product(NamedTuple):
    """Numbers times one list, or times the product or quotient of two."""

    numbers: list[Any]
    lists: list[Any]
    name: str
    absorbed: set[fx.Node]
