"""Pass 1: what kind of value each node of a graph is, and how often it is used."""

from __future__ import annotations

from torch import Tensor, fx

from purestep._trace.ir import Kind, Values, leaves_of, nodes_in
from purestep._trace.trace import Trace


def classify(traced: Trace) -> Values:
    """The kinds and the uses of all values of a graph, and which inputs are like the parameters.

    Assumes that the graph has no dead code, so that each use is one in the program.
    """
    values = Values()
    inputs = {i.node: i for i in traced.inputs}
    for node in traced.graph.nodes:
        if node.op == "output":
            continue
        given = inputs.get(node)
        if given is not None:
            values.kinds[node] = "number" if given.number else "list"
            values.like[node] = values.shaped[node] = given.kind == "like"
            continue
        values.kinds[node] = kind_of(node, values)
        if values.kinds[node] == "list" and getattr(node.target, "single", False):
            values.scalars.add(node)
        values.uses.update(nodes_in((node.args, node.kwargs)))
    values.uses.update([x for x in traced.outputs if isinstance(x, fx.Node)])
    return values


def kind_of(node: fx.Node, values: Values) -> Kind:
    """The kind of an operation's result, by the kinds of its arguments."""
    args = nodes_in((node.args, node.kwargs))
    kinds = {values.kinds[x] for x in args}
    if "list" in kinds:
        return "list"
    makes_tensor = not args or any(isinstance(x, Tensor) for x in leaves_of((node.args, node.kwargs)))
    return "tensor" if makes_tensor or "tensor" in kinds else "number"
