"""Several lines of a program as one of torch's fused kernels.

Lines that are run one by one read and write the cache once each. Where some of them together are what a kernel for the CPU
computes, whatever algorithm they come from, the kernel makes one pass:

* `adam_`: a running mean of squares, and a step along some direction divided by its root. `torch._fused_adam_` with all bias
  corrections 1; those of the program are in its numbers.
* `sgd_`: a step along a gradient with decay. `torch._fused_sgd_` without momentum.

It rounds as the compiler of the kernel saw fit, so the results agree with those of the lines but for the last digits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from purestep._core import maths
from purestep._core.threads import divided
from purestep._core.torch_api import fused_adam_, fused_sgd_
from purestep._trace import foreach
from purestep._trace.ops import Op, Scale, nodes_in

# ----------------------------------------------------------------------------------------------------- what the lines call

MANY = torch.tensor(2.0**60)
"""After so many steps there is no bias to be corrected."""

NEARLY = 1 - 2.0**-53
"""A mean with this weight stays what it is, but for its last bit in float64, and yet has no bias after `MANY` steps."""


def adam_(p: Any, g: Any, m: Any, v: Any, b1: Any, b2: Any, c: Any, e: Any, k: Any) -> None:
    """v becomes b2*v + (1 - b2)*g*g, m becomes b1*m + (1 - b1)*g, and p becomes p + k*m/(c*sqrt(v) + e).

    With `b1` 1, m is any direction, in memory that may be written to; without m it is the gradient.
    """
    numbers = (b1, b2, c, e, k)
    if any([isinstance(x, Tensor) for x in numbers]) or not (0 <= b1 <= 1 and 0 <= b2 < 1 and 0 < c < math.inf and e >= 0):
        foreach.mul_(v, b2)
        foreach.addcmul_(v, g, g, 1 - b2)
        if m is not None and not (isinstance(b1, float) and b1 == 1):
            foreach.lerp_(m, g, 1 - b1)
        root = foreach.mul(foreach.KERNELS["sqrt"](v), c)
        foreach.add_(root, e)
        foreach.addcdiv_(p, g if m is None else m, root, k)
        return
    m = [torch.zeros_like(x) for x in g] if m is None else m
    _adam(list(p), list(g), list(m), list(v), min(b1, NEARLY), b2, e / c, -k / c)


@divided
def _adam(
    p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], b1: float, b2: float, eps: float, lr: float
) -> None:
    fused_adam_(
        p, g, m, v, [], [MANY] * len(p),
        lr=lr, beta1=b1, beta2=b2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip


def sgd_(p: Any, g: Any, decay: Any, k: Any) -> None:
    """p becomes p + k*(g + decay*p)."""
    if isinstance(decay, Tensor) or isinstance(k, Tensor) or decay == 0:  # the kernel would leave out 0 times infinity
        foreach.axpy_(p, foreach.axpy(g, p, decay), k)
    else:
        _sgd(list(p), list(g), decay, -k)


@divided
def _sgd(p: Any, g: Any, decay: float, lr: float) -> None:
    fused_sgd_(
        p, g, [], lr=lr, weight_decay=decay,
        momentum=0.0, dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
    )  # fmt: skip


MERGED: dict[str, Any] = {"adam_": adam_, "sgd_": sgd_}

# ------------------------------------------------------------------------------------------------------ where they are used


class Merger:
    """Finds the lines that one kernel computes, after it has been settled which lines overwrite what.

    The kernel takes the place of the last of them. So no line that stays may read what they write before it has, or overwrite
    what it reads.
    """

    def __init__(self, ops: Sequence[Op], graph: fx.Graph, kinds: dict[fx.Node, str], uses: dict[fx.Node, int]) -> None:
        self.ops, self.graph, self.kinds, self.uses = list(ops), graph, kinds, uses
        self.by = {op.out: op for op in ops}

    def merged(self) -> list[Op]:
        """The lines, the merged ones in one."""
        for last in list(self.ops):
            found = self.adam(last) or self.sgd(last)
            if found is not None:
                line, gone = found
                self.keep(line.args[1], last, gone)
                self.ops = [line if op is last else op for op in self.ops if all([op is not x for x in gone])]
        return self.ops

    def adam(self, last: Op) -> tuple[Op, list[Op]] | None:
        """The lines of `adam_` that end in this one: p + k*x/(c*sqrt(v) + e), and those that make v and, perhaps, x."""
        if last.name != "addcdiv" or last.inplace != 0:
            return None
        p, x, node, k = last.args
        gone: list[Op] = []

        def peeled(*names: str) -> Op | None:
            """The line that this list was made by, if it is one of these with a number; go on with what it was made from."""
            nonlocal node
            op = self.with_number(node, *names)
            if op is not None:
                gone.append(op)
                node = op.args[0]
            return op

        added, outer = peeled("add"), peeled("mul", "div")
        root = self.by.get(node)
        if root is None or root.name != "sqrt" or self.uses[node] != 1:
            return None
        gone.append(root)
        node = root.args[0]
        inner = peeled("mul", "div")
        square = self.by.get(node)
        if square is None or square.name != "addcmul" or square.inplace != 0 or square.args[1] is not square.args[2]:
            return None
        old, g, _, weight = square.args
        faded = self.with_number(old, "mul")
        if faded is None or faded.inplace != 0 or complement(weight) is not faded.args[1]:
            return None
        gone += [square, faded]
        v, b2 = faded.args
        further = {node: 3}
        m, b1 = None, 0.0
        if x is not g:
            mean = self.by.get(x)
            if mean is None:
                return None
            if self.uses[x] == 1 and (self.temporary(x) or self.home(x) is self.home(g)):
                m, b1 = x, 1.0
            elif mean.name == "lerp" and mean.inplace == 0 and mean.args[1] is g and complement(mean.args[2]) is not None:
                m, b1 = mean.args[0], complement(mean.args[2])
                gone.append(mean)
                further[x] = 2
            else:
                return None
        if self.read_before(last, further, gone):
            return None
        factor = self.factor(last, inner, outer)
        line = Op(
            last.out, "adam", [p, g, m, v, b1, b2, factor, added.args[1] if added else 0.0, k], inplace=0, further=further
        )
        return line, gone

    def sgd(self, last: Op) -> tuple[Op, list[Op]] | None:
        """The lines of `sgd_` that end in this one."""
        if last.name != "axpy" or last.inplace != 0:
            return None
        p, x, k = last.args
        decayed = self.by.get(x)
        if decayed is None or decayed.name != "axpy" or decayed.args[1] is not p or self.uses[x] != 1:
            return None
        return Op(last.out, "sgd", [p, decayed.args[0], decayed.args[2], k], inplace=0), [decayed]

    def with_number(self, node: fx.Node, *names: str) -> Op | None:
        """The line that makes this list from another one and a number, if nobody else asks for it."""
        op = self.by.get(node)
        if op is None or op.name not in names or len(op.args) != 2 or self.uses[node] != 1:
            return None
        return op if self.kinds.get(op.args[1]) != "list" else None

    def home(self, node: fx.Node) -> fx.Node:
        """The list in whose memory this one is."""
        op = self.by.get(node)
        return node if op is None or op.inplace is None else self.home(op.args[op.inplace])

    def temporary(self, node: fx.Node) -> bool:
        """Whether this list is in memory that the program has made."""
        home = self.by.get(self.home(node))
        return home is not None and home.fresh

    def read_before(self, last: Op, nodes: Collection[fx.Node], gone: Sequence[Op]) -> bool:
        """Whether a line that stays asks for one of these lists before the kernel has made it."""
        before = self.ops[: self.ops.index(last)]
        return any([x in nodes for op in before if op not in gone for x in nodes_in(op.args)])

    def keep(self, node: fx.Node, last: Op, gone: Sequence[Op]) -> None:
        """Let no other line overwrite this list before the kernel has read it."""
        made = self.by.get(node)
        start = 0 if made is None else self.ops.index(made) + 1
        home = self.home(node)
        for op in self.ops[start : self.ops.index(last)]:
            if op.inplace is not None and op not in gone and self.home(op.args[op.inplace]) is home:
                op.inplace = None

    def factor(self, last: Op, inner: Op | None, outer: Op | None) -> Any:
        """What a root is multiplied by, as a number of the program: what stands under it goes through a root itself."""
        product: Any = 1.0
        with self.graph.inserting_before(last.out):
            for op in (inner, outer):
                if op is None:
                    continue
                number = op.args[1] if op.name == "mul" else self.number(operator.truediv, 1.0, op.args[1])
                number = self.number(maths.root, number) if op is inner else number
                product = number if isinstance(product, float) else self.number(operator.mul, product, number)
        return product

    def number(self, function: Any, *args: Any) -> fx.Node:
        """One more number."""
        node = self.graph.call_function(function, args)
        self.kinds[node], self.uses[node] = "number", 1
        return node


def complement(x: Any) -> Any:
    """b of the number 1 - b; None of any other."""
    if isinstance(x, Scale):
        x = x.numbers[0] if len(x.numbers) == 1 and not x.negative else None
    if isinstance(x, fx.Node) and x.target is operator.sub and x.args[0] == 1:
        return x.args[1]
    return None
