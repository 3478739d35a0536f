"""From a recipe to a graph: the leaf functions are run on proxies, and what they do is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor, fx
from torch.fx.proxy import TraceError

from purestep._core.recorder import Recorder, RefusedError, Tracer
from purestep._trace.ir import INFIX, NAMES
from purestep._trace.recipe import NUMBER, OFF, LeafDeclaration, Part, Recipe, StateFields

InputKind: TypeAlias = Literal["number", "like", "encoded", "other"]
"""What an input is.

* ``number``: a hyperparameter, or a counter.
* ``like``: a tensor with the parameter's shape and dtype.
* ``encoded``: a tensor of another shape and dtype; a part of it belongs to a part of the parameter.
* ``other``: any other tensor.
"""


class Input(NamedTuple):
    """One argument of a program."""

    node: fx.Node
    kind: InputKind
    output: int | None = None  # the position of the output that is this input's new value

    @property
    def number(self) -> bool:
        return self.kind == "number"


class Trace(NamedTuple):
    """What a recipe does with one parameter."""

    graph: fx.Graph
    inputs: list[Input]  # the gradient, the parameter, the state's fields, and then the hyperparameters
    outputs: list[Any]  # the updates or parameters, and then the state's fields; nodes and constants
    captured: tuple[Tensor, ...]  # the tensors that the leaf functions close over

    @property
    def grad(self) -> fx.Node:
        return self.inputs[0].node

    @property
    def param(self) -> fx.Node:
        return self.inputs[1].node


def trace(recipe: Recipe) -> Trace:
    """Run the leaf functions of a recipe on proxies, one after the other.

    This changes nothing global, so several threads may trace at once.

    Raises:
        TypeError: a leaf function does what a program cannot do.
    """
    recording = Recording(recipe.apply)
    states = [recording.state(part) for part in recipe.parts]
    update: Any = recording.g
    outputs: list[Any] = []
    for part, fields in zip(recipe.parts, states):
        update, new = recording.run(part, update, fields)
        outputs += [x for x, absent in zip(new, part.spec.absent) if not absent]
    outputs.insert(0, recording.p + update if recipe.apply else update)
    return recording.trace(outputs)


class Recording:
    """A graph while it is recorded, and its inputs so far."""

    def __init__(self, apply: bool) -> None:
        self.graph = fx.Graph()
        self.tracer = Tracer(self.graph)
        self.inputs: list[Input] = []
        self.fields = 0  # how many fields of states there are so far
        self.g = self.input("g", "like")
        self.p = self.input("p", "like", 0 if apply else None)

    def input(self, name: str, kind: InputKind, output: int | None = None) -> fx.Proxy:
        """One more input."""
        node = self.graph.placeholder(name)
        self.inputs.append(Input(node, kind, output))
        return self.tracer.proxy(node)

    def state(self, part: Part) -> list[Any]:
        """The state of one leaf function: an input for each field that is not absent."""
        found: list[Any] = []
        info = part.declaration.fields
        for name, kind, absent in zip(info.names, kinds_of(info), part.spec.absent):
            self.fields += not absent
            found.append(None if absent else self.input(name, kind, self.fields))
        return found

    def hypers(self, part: Part) -> dict[str, Any]:
        """The hyperparameters of one leaf function by name: an input for each number."""
        found: dict[str, Any] = {}
        for name, length in zip(part.declaration.hypers, part.spec.hypers):
            if length == OFF:
                found[name] = None
            elif length == NUMBER:
                found[name] = self.input(name, "number")
            else:
                found[name] = tuple([self.input(f"{name}_{i}", "number") for i in range(length)])
        return found

    def run(self, part: Part, update: Any, fields: list[Any]) -> tuple[Any, Sequence[Any]]:
        """Record one leaf function: its update and its new state."""
        d = part.declaration
        arguments = self.hypers(part) | dict(zip(d.switches, part.spec.switches))
        try:
            with Recorder(self.tracer, d.name):
                result = call(d, update, d.state(*fields) if d.state else None, self.p, arguments)
        except RefusedError as error:
            raise TypeError(str(error)) from error
        except TraceError as error:
            raise TypeError(
                f"{d.name} asks for the value of a tensor or a hyperparameter ('if', 'while', bool(), float(), len()), "
                "but it is traced once for all values. Use purestep.where for a choice, a switch (a bool, str or int "
                "argument) for structure, or wrap the part that must see real tensors in @purestep.operation."
            ) from error
        for node in self.graph.nodes:  # dead code, too: where the leaf function is run by itself, it would write
            refuse_writing(d.name, node)
            refuse_text(d.name, node)
        return result

    def trace(self, outputs: list[Any]) -> Trace:
        """The finished graph, without dead code and without repeated computations."""
        nodes = [self.tracer.create_arg(x) for x in outputs]
        replaced = share_repeated(self.graph)
        nodes = [replaced.get(x, x) if isinstance(x, fx.Node) else x for x in nodes]
        self.graph.output(tuple(nodes))
        self.graph.eliminate_dead_code()
        return Trace(self.graph, self.inputs, nodes, tuple(self.tracer.captured.values()))


def kinds_of(info: StateFields) -> list[InputKind]:
    """What the fields of a state are as inputs."""
    return [
        "number" if scalar else "like" if like else "encoded" if encoded else "other"
        for scalar, like, encoded in zip(info.scalars, info.like, info.encoded)
    ]


def call(d: LeafDeclaration, g: Any, s: Any, p: Any, arguments: dict[str, Any]) -> tuple[Any, Sequence[Any]]:
    """Run a leaf function: its update and its new state, which is empty for a function without a state."""
    if s is None:
        return d.function(g, p, **arguments), ()
    update, new = d.function(g, s, p, **arguments)
    if type(new) is not type(s):
        raise TypeError(f"{d.name} must return (update, {type(s).__name__}), but its second value is a {type(new).__name__}.")
    return update, new


def refuse_writing(name: str, node: fx.Node) -> None:
    """Refuse an operation that changes a tensor in place.

    Raises:
        TypeError: the operation is in-place, or it has an `out` or a true `inplace` argument.
    """
    target = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if (node.op == "call_method" or (node.op == "call_function" and node.target not in INFIX)) and (
        (target.endswith("_") and not target.endswith("__")) or node.kwargs.get("inplace") or "out" in node.kwargs
    ):
        other = f"use {target[:-1]}()" if target.endswith("_") else "leave out inplace and out"
        raise TypeError(f"A leaf function changes nothing in place, but {name} calls {target}(); {other}.")


def refuse_text(name: str, node: fx.Node) -> None:
    """Refuse names of methods and of arguments that are no names: they are written into the source of the program.

    Raises:
        TypeError: there is one.
    """
    for text in (*[node.target] * (node.op == "call_method"), *node.kwargs):
        if not (isinstance(text, str) and text.isascii() and text.isidentifier()):
            raise TypeError(
                f"{name} calls a method, or gives an argument, by the name {text!r}, which is no identifier in ASCII."
            )


def share_repeated(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Common subexpression elimination: replace each node that repeats an earlier one, and return the earlier node of each."""
    first: dict[Any, fx.Node] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (node.target in NAMES or node.target in INFIX) and not node.kwargs:
            found = first.setdefault((node.target, *map(identity, node.args)), node)
            if found is not node:
                node.replace_all_uses_with(found)
                replaced[node] = found
    return replaced


def signature(graph: fx.Graph) -> Any:
    """What a graph computes: two graphs with equal signatures do the same with the same inputs."""
    return [(n.op, n.target, n.name, identity((n.args, n.kwargs))) for n in graph.nodes]


def identity(x: Any) -> Any:
    """What identifies an argument: numbers of equal value may differ, as 1 and True or 0.0 and -0.0 do."""
    if isinstance(x, (tuple, list)):
        return type(x), tuple(map(identity, x))
    if isinstance(x, dict):
        return tuple([(k, identity(y)) for k, y in x.items()])
    if isinstance(x, slice):
        return slice, identity((x.start, x.stop, x.step))
    if isinstance(x, fx.Node):
        return fx.Node, x.name
    return (type(x), repr(x)) if x is None or isinstance(x, (bool, int, float, complex, str)) else (type(x), id(x))
