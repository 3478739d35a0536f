"""Pass 5: several lines of a program as one of torch's fused kernels.

Each separate line reads its lists from the cache and writes them to it. Where several lines together compute what a kernel
of `purestep._trace.fused` computes, whichever algorithm the lines come from, the kernel makes one pass instead.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection
from typing import Any, NamedTuple

from torch import fx

from purestep._core import maths
from purestep._trace.ir import Op, Scale, Values, nodes_in


def fuse(ops: list[Op], graph: fx.Graph, values: Values) -> list[Op]:
    """The lines of a program, with fused lines in the place of those that a kernel computes.

    Assumes that it is settled what each line overwrites. Adds the numbers of the kernels to the graph and to `values`.
    """
    return FusionPass(ops, graph, values).run()


class Fusion(NamedTuple):
    """A fused line, and the lines that it replaces besides the last of them."""

    line: Op
    gone: list[Op]


class Root(NamedTuple):
    """The lines of outer * sqrt(inner * v) + added, of which only the root must be there."""

    v: fx.Node
    inner: Op | None
    outer: Op | None
    added: Op | None
    lines: list[Op]


class MeanSquare(NamedTuple):
    """The lines of b2*v + (1 - b2)*g*g, which overwrite v."""

    v: fx.Node
    g: fx.Node
    b2: Any
    lines: list[Op]


class Direction(NamedTuple):
    """What is divided by the root: the running mean b1*m + (1 - b1)*g; m itself if b1 is 1; g if m is None."""

    m: fx.Node | None
    b1: Any
    lines: list[Op]  # of the mean, which overwrite m


class Lines:
    """The lines of a program while some of them are fused, and the memory that their results are in."""

    def __init__(self, ops: list[Op], values: Values) -> None:
        self.ops = [dataclasses.replace(op) for op in ops]
        self.values = values
        self.original = {op.out: op for op in self.ops}  # the line of each list before fusion, which tells the list's memory
        self.made = dict(self.original)  # the line that makes each list now

    def replace(self, last: Op, fusion: Fusion) -> None:
        """Put a fused line in the place of the last of the lines that it replaces."""
        self.ops = [fusion.line if op is last else op for op in self.ops if op not in fusion.gone]
        for op in fusion.gone:
            del self.made[op.out]
        self.made.update(dict.fromkeys([last.out, *fusion.line.further], fusion.line))

    def with_number(self, node: fx.Node, *names: str) -> Op | None:
        """The line that makes this list from another one and a number, if it has one of these names and is read once."""
        op = self.made.get(node)
        if op is None or op.name not in names or len(op.args) != 2 or self.values.uses[node] != 1:
            return None
        return None if self.values.is_list(op.args[1]) else op

    def home(self, node: fx.Node) -> fx.Node:
        """The list whose memory this one is in."""
        op = self.original.get(node)
        return node if op is None or op.inplace is None else self.home(op.args[op.inplace])

    def is_temporary(self, node: fx.Node) -> bool:
        """Whether this list is in memory that the program allocates."""
        home = self.original.get(self.home(node))
        return home is not None and home.fresh

    def read_before(self, last: Op, nodes: Collection[fx.Node], gone: list[Op]) -> bool:
        """Whether a remaining line before `last` reads one of these lists."""
        before = self.ops[: self.ops.index(last)]
        return any([x in nodes for op in before if op not in gone for x in nodes_in(op.args)])

    def preserve(self, node: fx.Node, last: Op, gone: list[Op]) -> None:
        """Let no remaining line before `last` overwrite this list."""
        made = self.made.get(node)
        start = 0 if made is None else self.ops.index(made) + 1
        home = self.home(node)
        for op in self.ops[start : self.ops.index(last)]:
            if op.inplace is not None and op not in gone and self.home(op.args[op.inplace]) is home:
                op.inplace = None


class FusionPass:
    """The search for lines that one kernel computes.

    The kernel takes the place of the last of them. So no remaining line may read what the kernel writes before the kernel has
    written it, and none may overwrite what the kernel reads before the kernel has read it.
    """

    def __init__(self, ops: list[Op], graph: fx.Graph, values: Values) -> None:
        self.lines, self.graph, self.values = Lines(ops, values), graph, values

    def run(self) -> list[Op]:
        """The lines after fusion."""
        for last in list(self.lines.ops):
            found = self.adam(last) or self.sgd(last)
            if found is not None:
                self.lines.preserve(found.line.args[1], last, found.gone)
                self.lines.replace(last, found)
        return self.lines.ops

    def adam(self, last: Op) -> Fusion | None:
        """The fused line `adam_` for the lines that end in this one: p + k*x/(c*sqrt(v) + e), those of v, and those of x."""
        if last.name != "addcdiv" or last.inplace != 0:
            return None
        p, x, divisor, k = last.args
        root = self.root(divisor)
        square = None if root is None else self.mean_square(root.v)
        direction = None if square is None else self.direction(x, square.g)
        if root is None or square is None or direction is None:
            return None
        further = {root.v: 3} | ({x: 2} if direction.lines else {})
        gone = [*root.lines, *square.lines, *direction.lines]
        if self.lines.read_before(last, further, gone):
            return None
        numbers = [direction.b1, square.b2, self.factor(last, root), root.added.args[1] if root.added else 0.0, k]
        line = Op(last.out, "adam", [p, square.g, direction.m, square.v, *numbers], inplace=0, further=further)
        return Fusion(line, gone)

    def root(self, node: fx.Node) -> Root | None:
        """The lines that make a list from the root of another; None if the list is made in another way."""
        added = self.lines.with_number(node, "add")
        node = added.args[0] if added else node
        outer = self.lines.with_number(node, "mul", "div")
        node = outer.args[0] if outer else node
        root = self.lines.made.get(node)
        if root is None or root.name != "sqrt" or self.values.uses[node] != 1:
            return None
        inner = self.lines.with_number(root.args[0], "mul", "div")
        v = inner.args[0] if inner else root.args[0]
        return Root(v, inner, outer, added, [op for op in (added, outer, root, inner) if op is not None])

    def mean_square(self, node: fx.Node) -> MeanSquare | None:
        """The lines that make a list as a running mean of squares in place; None if the list is made in another way."""
        square = self.lines.made.get(node)
        if square is None or square.name != "addcmul" or square.inplace != 0 or square.args[1] is not square.args[2]:
            return None
        old, g, _, weight = square.args
        decayed = self.lines.with_number(old, "mul")
        if decayed is None or decayed.inplace != 0 or complement(weight) is not decayed.args[1]:
            return None
        v, b2 = decayed.args
        return MeanSquare(v, g, b2, [square, decayed])

    def direction(self, x: fx.Node, g: fx.Node) -> Direction | None:
        """A list as a direction that the kernel can take; None if the kernel cannot."""
        if x is g:
            return Direction(None, 0.0, [])
        mean = self.lines.made.get(x)
        if mean is None:
            return None
        if self.values.uses[x] == 1 and (self.lines.is_temporary(x) or self.lines.home(x) is self.lines.home(g)):
            return Direction(x, 1.0, [])  # the kernel may overwrite x
        if mean.name != "lerp" or mean.inplace != 0 or mean.args[1] is not g:
            return None
        b1 = complement(mean.args[2])
        return None if b1 is None else Direction(mean.args[0], b1, [mean])

    def sgd(self, last: Op) -> Fusion | None:
        """The fused line `sgd_` for the lines that end in this one: p + k*(g + decay*p)."""
        if last.name != "axpy" or last.inplace != 0:
            return None
        p, x, k = last.args
        decayed = self.lines.made.get(x)
        if decayed is None or decayed.name != "axpy" or decayed.args[1] is not p or self.values.uses[x] != 1:
            return None
        return Fusion(Op(last.out, "sgd", [p, decayed.args[0], decayed.args[2], k], inplace=0), [decayed])

    def factor(self, last: Op, root: Root) -> Any:
        """The number c of `adam_`: outer * sqrt(inner), as a number of the program."""
        product: Any = 1.0
        with self.graph.inserting_before(last.out):
            for op in (root.inner, root.outer):
                if op is None:
                    continue
                number = op.args[1] if op.name == "mul" else self.number(operator.truediv, 1.0, op.args[1])
                number = self.number(maths.root, number) if op is root.inner else number
                product = number if isinstance(product, float) else self.number(operator.mul, product, number)
        return product

    def number(self, function: Any, *args: Any) -> fx.Node:
        """A new number of the graph."""
        node = self.graph.call_function(function, args)
        self.values.kinds[node], self.values.uses[node] = "number", 1
        return node


def complement(x: Any) -> Any:
    """b if the number is 1 - b; None for any other number."""
    if isinstance(x, Scale):
        x = x.numbers[0] if len(x.numbers) == 1 and not x.negative else None
    if isinstance(x, fx.Node) and x.target is operator.sub and x.args[0] == 1:
        return x.args[1]
    return None
