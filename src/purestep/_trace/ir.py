"""The intermediate representation of a program.

Tracing gives a graph (`torch.fx.Graph`), whose nodes are values. The passes note in a `Values` what they find out about these
values, and turn the graph into lines (`Op`), each of which computes one value of the graph from others.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from purestep._core import maths
from purestep._trace.foreach import UNARY

# -------------------------------------------------------------------------------------------------------------- operations

INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.pow: "**", operator.floordiv: "//",
    operator.mod: "%", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">",
    operator.ge: ">=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip
NAMES = {
    maths.cos: "cos",
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div", operator.pow: "pow",
    operator.neg: "neg", operator.abs: "abs", maths.root: "sqrt", maths.lerp: "lerp", maths.minimum: "minimum",
    maths.maximum: "maximum", maths.where: "where",
}  # fmt: skip
METHODS = {"divide": "div", "multiply": "mul", "true_divide": "div", "subtract": "sub"}
COMPARISONS = frozenset({operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge})
BOOLEAN = COMPARISONS | {operator.and_, operator.or_}
BINARY = frozenset({"add", "sub", "mul", "div", "maximum", "minimum"})
COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum"})
TORCH = frozenset(filter(callable, (getattr(torch, n, None) for n in (*UNARY, *BINARY, "pow", "square", "lerp", "where"))))


def op_name(node: fx.Node) -> str:
    """The canonical name of a node's operation; `""` if it has none."""
    if node.op == "call_method":
        target = str(node.target)
        return METHODS.get(target, target)
    if node.op == "call_function":
        if node.target in NAMES:
            return NAMES[node.target]
        if node.target in TORCH:
            return str(getattr(node.target, "__name__", ""))
    return ""


def is_opaque(node: fx.Node) -> bool:
    """Whether a node calls an `operation` of the user's, which may return any tensor."""
    return hasattr(node.target, "single") and getattr(node.target, "__module__", None) != maths.__name__


def nodes_in(args: Any) -> list[fx.Node]:
    """The nodes in the arguments of an operation, in order."""
    found: list[fx.Node] = []
    map_arg(args, found.append)
    return found


def leaves_of(args: Any) -> list[Any]:
    """Everything in the arguments of an operation, in order: nodes and constants."""
    if isinstance(args, (tuple, list)):
        return [y for x in args for y in leaves_of(x)]
    if isinstance(args, dict):
        return [y for x in args.values() for y in leaves_of(x)]
    return [args]


# ------------------------------------------------------------------------------------------------------------------ values

Kind: TypeAlias = Literal["list", "number", "tensor"]
"""What a value is when the program runs.

* ``list``: one tensor per parameter. It depends on the gradient, the parameter or the state.
* ``number``: a Python number, or a tensor that was given in the place of one. It depends on hyperparameters and counters.
* ``tensor``: one tensor for all parameters. It depends on captured and constant tensors.
"""


@dataclass
class Values:
    """What is known of the values of a graph; `classify` and then `lower` fill it in."""

    kinds: dict[fx.Node, Kind] = field(default_factory=dict)
    uses: Counter[fx.Node] = field(default_factory=Counter)  # how often a value is an argument or an output
    scalars: set[fx.Node] = field(default_factory=set)  # lists of one number per parameter
    shaped: dict[fx.Node, bool] = field(default_factory=dict)  # each tensor of the list has its parameter's shape
    like: dict[fx.Node, bool] = field(default_factory=dict)  # each tensor of the list has its parameter's shape and dtype

    def is_list(self, x: Any) -> bool:
        return isinstance(x, fx.Node) and self.kinds[x] == "list"

    def stacks(self, node: fx.Node) -> bool:
        """Whether a node calls an operation that takes stacks, and nothing but its first argument is a list."""
        lists = list(dict.fromkeys([x for x in nodes_in((node.args, node.kwargs)) if self.is_list(x)]))
        return getattr(node.target, "stacks", False) and lists == [node.args[0]]

    def measures(self, node: fx.Node) -> bool:
        """Whether a node calls an operation that looks at nothing but the norms of tensors of the parameters' shapes."""
        lists = [x for x in nodes_in((node.args, node.kwargs)) if self.is_list(x)]
        return getattr(node.target, "norms", False) and all([self.shaped[x] for x in lists])

    def spreads(self, node: fx.Node) -> bool:
        """Whether a sharded program computes a node from shapes or norms alone, or by the owners of its matrices."""
        return getattr(node.target, "shapes", False) or self.measures(node) or self.stacks(node)

    def is_like(self, x: Any) -> bool:
        """Whether an argument is a list of tensors that have the parameters' shapes and dtypes."""
        return self.like.get(x, False) if isinstance(x, fx.Node) else False

    def is_number(self, x: Any) -> bool:
        """Whether an argument is a real number: a constant, or one that the program computes."""
        return self.kinds[x] == "number" if isinstance(x, fx.Node) else isinstance(x, (bool, int, float))

    def is_tensor(self, x: Any) -> bool:
        """Whether an argument is one tensor for all parameters: a captured one, or one that depends on such alone."""
        return isinstance(x, Tensor) or (isinstance(x, fx.Node) and self.kinds[x] == "tensor")

    def takes_scalars(self, node: fx.Node) -> bool:
        """Whether an operation has a list of one number per parameter among its arguments."""
        return not self.scalars.isdisjoint(node.all_input_nodes)


# ------------------------------------------------------------------------------------------------------------------- lines

LOOPS = frozenset({"loop", "where", "compare"})
"""The names of lines that are loops over the parameters, because torch has no foreach operation for them."""


@dataclass(eq=False)
class Op:
    """One line of the program: `out = name(lists..., numbers...)`."""

    out: fx.Node
    name: str
    args: list[Any]  # list-valued nodes, and number expressions or constants
    targets: tuple[int, ...] = ()  # the positions of the arguments that the result could overwrite
    fresh: bool = True  # the line makes its result in new memory; False where the result may share an argument's memory
    elementwise: bool = True  # of a loop: each element of the result depends only on the elements in the same place
    inplace: int | None = None  # the position of the argument that the result overwrites
    further: dict[fx.Node, int] = field(default_factory=dict)  # other results, each with the argument that it overwrites


class Minus:
    """The factor of a product that was negated; a -1 of the user's is a number."""


MINUS = Minus()


class Scale(NamedTuple):
    """The number in front of a contracted product."""

    negative: bool
    numbers: list[Any]


class Product(NamedTuple):
    """Numbers times one list, or numbers times the product or quotient of two lists."""

    numbers: list[Any]
    lists: list[Any]
    name: str  # of two lists: mul or div
    absorbed: set[fx.Node]  # the values that need no line of their own if the product is contracted
