"""Pass 2: each list of a graph as one line: a foreach operation, or a loop where torch has no such operation."""

from __future__ import annotations

from typing import Any

from torch import fx

from purestep._trace.foreach import UNARY
from purestep._trace.ir import BINARY, COMMUTATIVE, COMPARISONS, LOOPS, Op, Values, nodes_in, op_name


def lower(graph: fx.Graph, values: Values) -> dict[fx.Node, Op]:
    """A line for each list of a graph, in order; `values` learns which lists are like the parameters.

    Assumes that `values` has the kinds of all nodes. Changes no graph.
    """
    ops: dict[fx.Node, Op] = {}
    for node in graph.nodes:
        if node.op not in ("output", "placeholder") and values.kinds[node] == "list":
            op = ops[node] = lowered(node, values)
            note_likeness(op, values)
            promised = getattr(node.target, "block", 0) > 0 or getattr(node.target, "like", False)
            op.fresh |= promised or node in values.scalars
    return ops


def lowered(node: fx.Node, values: Values) -> Op:
    """One operation as a line."""
    args = list(node.args)
    loop = Op(node, "loop", args, fresh=False, elementwise=False)
    if node.kwargs or (node.op == "call_method" and not args):
        return loop
    if not all([values.is_list(x) or values.is_number(x) or isinstance(x, complex) for x in args]):
        return loop  # a captured tensor may be of any shape
    if values.takes_scalars(node):
        return with_scalars(node, values) or loop
    found = kernel(node, args, [values.is_list(x) for x in args])
    if found is None:
        return loop
    if found.targets and not all([values.is_like(x) if values.is_list(x) else not isinstance(x, complex) for x in args]):
        return Op(node, "loop", args)  # torch decides on the dtype of the result
    return found


def with_scalars(node: fx.Node, values: Values) -> Op | None:
    """A line that combines a list like the parameters with one number per parameter; None if the operation is another."""
    name, args = op_name(node), list(node.args)
    if name in COMMUTATIVE and args[0] in values.scalars:
        args.reverse()
    if name in BINARY and len(args) == 2 and values.is_like(args[0]) and args[0] not in values.scalars:
        return Op(node, name, args, (0,))
    return None


def kernel(node: fx.Node, args: list[Any], lists: list[bool]) -> Op | None:
    """An elementwise operation as a line; None if the operation is not known to be elementwise.

    `lists` tells which arguments are lists; the others are numbers.
    """
    name = op_name(node)
    if name in BINARY and len(args) == 2:
        return binary(node, name, args, lists)
    if name in (*UNARY, "square") and len(args) == 1:
        return Op(node, name, args, (0,))
    if name == "pow" and lists == [True, False]:
        two = isinstance(args[1], (int, float)) and args[1] == 2
        return Op(node, "square" if two else "pow", args[:1] if two else args, (0,))
    if name == "lerp" and lists == [True, True, False]:
        return Op(node, name, args, (0,))
    if node.target in COMPARISONS:
        return Op(node, "compare", args)
    if name == "where" and len(args) == 3 and node.op == "call_function":
        return Op(node, "where", args, fresh=lists[0])
    return None


def binary(node: fx.Node, name: str, args: list[Any], lists: list[bool]) -> Op:
    """An operation of two arguments, at least one of them a list, as a line whose first argument is a list."""
    if all(lists):
        return Op(node, name, args, (0, 1) if name in COMMUTATIVE or name == "div" else (0,))
    if lists[0]:
        return Op(node, name, args, (0,))
    name = name if name in COMMUTATIVE else {"sub": "rsub", "div": "rdiv"}[name]
    return Op(node, name, args[::-1], (0,))


def note_likeness(op: Op, values: Values) -> None:
    """Note whether the result of a line has the parameters' shapes, and whether it has their dtypes."""
    if getattr(op.out.target, "like", False):
        values.shaped[op.out] = values.like[op.out] = True
        return
    lists = [x for x in nodes_in((op.args, op.out.kwargs)) if values.is_list(x) and x not in values.scalars]
    elementwise = bool(op.targets) or (op.name in LOOPS and op.elementwise)
    values.shaped[op.out] = elementwise and bool(lists) and all([values.shaped[x] for x in lists])
    operands = [x for x in op.args[1:] if x in lists] if op.name == "where" else lists
    keeps_dtype = bool(op.targets) or (op.name == "where" and not any([isinstance(x, complex) for x in op.args]))
    values.like[op.out] = values.shaped[op.out] and keeps_dtype and bool(operands) and all(map(values.is_like, operands))
