"""Pass 3: products and sums as one line, for fewer passes over memory.

`x + k*y` becomes `axpy`, `a*x + b*y` `axpby`, `x + k*(y*z)` `addcmul`, and `x + k*(y/z)` `addcdiv`; minus signs go into the
numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx
from typing_extensions import TypeIs

from purestep._trace.ir import MINUS, Op, Product, Scale, Values, op_name


def contract(graph: fx.Graph, values: Values, lowered: dict[fx.Node, Op]) -> list[Op]:
    """The lines of a program, in order.

    Assumes that `lowered` has a line for each list of the graph, and that `values` tells which lists are like the parameters. A
    product is contracted if only one sum uses it, and if all of its lists are like the parameters.
    """
    ops: list[Op] = []
    absorbed: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):  # a sum comes before the products in it
        if node not in lowered or node in absorbed:
            continue
        found = contracted(node, values) or Contracted(lowered[node], set())
        ops.append(found.line)
        absorbed |= found.absorbed
    ops.reverse()
    return ops


class Contracted(NamedTuple):
    """A line, and the values besides its result that it computes: they need no lines of their own."""

    line: Op
    absorbed: set[fx.Node]


def contracted(node: fx.Node, values: Values) -> Contracted | None:
    """`x ± k*y`, `x ± k*(y*z)` or `x ± k*(y/z)` as one line; None for anything else."""
    name, args = op_name(node), node.args
    if name not in ("add", "sub") or node.kwargs or len(args) != 2 or not values.is_like(node) or values.takes_scalars(node):
        return None
    for x, y in [args, args[::-1]] if name == "add" else [args]:
        if not (values.is_list(x) and values.is_list(y)):
            continue
        product = product_of(y, values)
        if product is None or not (product.numbers or product.name == "div" or len(product.lists) == 2):
            continue
        scale = Scale(name == "sub", product.numbers)
        if len(product.lists) == 2:
            kernel = "addcdiv" if product.name == "div" else "addcmul"
            return Contracted(Op(node, kernel, [x, *product.lists, scale], (0,)), product.absorbed)
        other = product_of(x, values)
        if is_scaled(other) and other.lists[0] not in product.lists:
            operands = [*other.lists, *product.lists, Scale(False, other.numbers), scale]
            return Contracted(Op(node, "axpby", operands, (0,)), product.absorbed | other.absorbed)
        return Contracted(Op(node, "axpy", [x, *product.lists, scale], (0,)), product.absorbed)
    return None


def is_scaled(product: Product | None) -> TypeIs[Product]:
    """Whether this is a product of numbers and one list."""
    return product is not None and bool(product.numbers) and len(product.lists) == 1


def product_of(node: Any, values: Values) -> Product | None:
    """A value as numbers times one list, or numbers times the product or quotient of two; None for anything else."""
    if values.uses[node] > 1 or node.kwargs or node.op == "placeholder" or not values.is_like(node):
        return None
    if values.takes_scalars(node) or not all(
        [values.is_like(x) if values.is_list(x) else values.is_number(x) for x in node.args]
    ):
        return None
    name, args = op_name(node), node.args
    if name == "neg":
        return scaled(node, args[0], MINUS, values)
    if name == "div" and all(map(values.is_list, args)):
        return quotient(node, values)
    if name == "mul" and len(args) == 2:
        if all(map(values.is_list, args)):
            return product_of_lists(node, values)
        x, k = args if values.is_list(args[0]) else args[::-1]
        return scaled(node, x, k, values)
    return None  # (y * z) / k, too, stays a division: multiplying by 1/k would round differently


def scaled(node: fx.Node, x: Any, k: Any, values: Values) -> Product:
    """k times the list x, which may be a product itself."""
    inner = product_of(x, values) or Product([], [x], "mul", set())
    return Product([*inner.numbers, k], inner.lists, inner.name, inner.absorbed | {node})


def quotient(node: fx.Node, values: Values) -> Product:
    """The quotient of two lists; numbers in the dividend become numbers of the product."""
    x, y = node.args
    top = product_of(x, values)
    if is_scaled(top) and top.lists[0] is not y:
        return Product(top.numbers, [*top.lists, y], "div", top.absorbed | {node})
    return Product([], [x, y], "div", {node})


def product_of_lists(node: fx.Node, values: Values) -> Product:
    """The product of two lists; numbers in the first one that has any become numbers of the product."""
    for a, b in (node.args, node.args[::-1]):
        inner = product_of(a, values) if a is not b else None
        if is_scaled(inner):
            return Product(inner.numbers, [*inner.lists, b], "mul", inner.absorbed | {node})
    return Product([], list(node.args), "mul", {node})
