"""From the lines of a program to its source: straight-line Python, one call for each line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import fx

from purestep._core import maths
from purestep._trace.expressions import ITEM, Coefficients, Expressions, Namespace
from purestep._trace.foreach import KERNELS
from purestep._trace.fused import FUSED
from purestep._trace.ir import LOOPS, Op, Values, nodes_in
from purestep._trace.passes.outputs import Output, copies_of, memory_of, outputs_of
from purestep._trace.recipe import HOMES, Recipe
from purestep._trace.single import SINGLE
from purestep._trace.trace import Trace

COEFFICIENTS = "k"
"""The argument of a split program that has all of its coefficients in one tensor."""


class Code(NamedTuple):
    """A program's source, the objects that its names refer to, and what it does with its outputs."""

    source: str
    objects: dict[str, Any]
    copies: bool  # the program copies some of its outputs, which would share memory otherwise
    tangled: bool  # the program copies an output that would be in the memory of the parameters or of their state


def generate(ops: list[Op], traced: Trace, values: Values, recipe: Recipe) -> Code:
    """The source of a program with these lines.

    Assumes that the lines are in the order of the graph, and that all of their arguments are inputs, results of earlier lines,
    or nodes of the graph that are no lists.
    """
    return Writer(traced, values, recipe).write(ops)


class Writer:
    """The source of a program while it is written.

    In a split program, `numbers` has the lines of the function that computes the coefficients, and `lines` has those of the
    program. In any other, both are the same list.
    """

    def __init__(self, traced: Trace, values: Values, recipe: Recipe) -> None:
        self.traced, self.values, self.recipe = traced, values, recipe
        self.split, self.sharded = recipe.form == "split", recipe.form == "sharded"
        reserved = (*[COEFFICIENTS] * self.split, *[HOMES] * self.sharded)
        self.names = Namespace(KERNELS | FUSED if recipe.lists else SINGLE, reserved)
        self.outside = Expressions(values, self.names)  # of numbers, and of what is computed once for all parameters
        self.inside = Coefficients(self.outside) if self.split else self.outside  # of what is computed for each parameter
        self.texts = self.outside.texts
        self.numbers: list[str] = []
        self.lines: list[str] = [] if self.split else self.numbers

    def write(self, ops: list[Op]) -> Code:
        """The finished source."""
        for given in self.traced.inputs:
            self.texts[given.node] = self.names.argument(given.node.name)
        lines = {op.out: op for op in ops}
        for node in self.traced.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if self.values.kinds[node] == "number":
                self.number(node)
            elif self.values.kinds[node] == "tensor":
                self.tensor(node)
            elif node in lines:
                self.statement(lines[node])
        outputs = outputs_of(self.traced, self.recipe)
        texts = [self.result(x) for x in outputs]
        in_place = [text == self.texts[x.like] for text, x in zip(texts, outputs)]
        copies = copies_of(outputs, in_place, memory_of(ops, self.traced, self.values), self.traced, self.recipe)
        for k in copies.clones:
            texts[k] = self.assign("t", f"clone({texts[k]})")
        for k in copies.moves:
            home = self.texts[outputs[k].like]
            self.lines.append(f"copy_({home}, {texts[k]})")
            texts[k] = home
        return Code(self.source(outputs, texts), self.names.objects, bool(copies.clones), copies.tangled)

    def assign(self, prefix: str, text: str) -> str:
        """One line that binds an expression to a new name."""
        name = self.names.variable(prefix)
        self.lines.append(f"{name} = {text}")
        return name

    def number(self, node: fx.Node) -> None:
        """A number: its expression, which is bound to a name only if it is used more than once."""
        text = self.outside.number(node)
        if self.values.uses[node] > 1:
            name = self.names.variable("n")
            self.numbers.append(f"{name} = {text[1:-1] if text.startswith('(') else text}")
            text = name
        self.texts[node] = text

    def tensor(self, node: fx.Node) -> None:
        """A line that computes one tensor for all parameters."""
        name = self.names.variable("c")
        self.numbers.append(f"{name} = {self.outside.operation(node)}")
        self.texts[node] = name

    def statement(self, op: Op) -> None:
        """A line that computes a list."""
        if op.name in LOOPS:
            name = self.names.variable("t")
            self.lines.append(f"{name} = {self.loop(op.out)}")
            self.texts[op.out] = name
        elif op.inplace is None:
            name = "root" if not self.recipe.lists and op.out.target is maths.root else op.name
            out = self.names.variable("t")
            self.lines.append(f"{out} = {name}({self.inside.arguments(op.args, {})})")
            self.texts[op.out] = out
        else:
            args = list(op.args)
            args.insert(0, args.pop(op.inplace))
            name = "rdiv" if op.name == "div" and op.inplace else op.name  # any other operation with two targets commutes
            self.texts[op.out] = self.texts[args[0]]
            self.texts.update({node: self.texts[op.args[i]] for node, i in op.further.items()})
            self.lines.append(f"{name}_({self.inside.arguments(args, {})})")

    def loop(self, node: fx.Node) -> str:
        """An operation that torch has no foreach operation for: a list comprehension over the parameters."""
        if not self.recipe.lists:
            return self.inside.operation(node)
        lists = list(dict.fromkeys(x for x in nodes_in((node.args, node.kwargs)) if self.values.is_list(x)))
        if self.values.stacks(node):
            function = self.names.constant(maths.untraced(node.target))
            arguments = self.inside.arguments(node.args, node.kwargs)
            return f"dealt({function}, {HOMES}, {arguments})" if self.sharded else f"stacked({function}, {arguments})"
        items = {x: f"{ITEM}{i}" if len(lists) > 1 else ITEM for i, x in enumerate(lists)}
        names = [self.texts[x] for x in lists]
        if self.sharded and getattr(node.target, "shapes", False):
            names = [HOMES] * len(names)
        texts = [self.texts[x] for x in lists]
        self.texts.update(items)
        text = self.inside.operation(node)
        self.texts.update(zip(lists, texts))
        if self.sharded and self.values.measures(node):
            return f"[{text} for {', '.join(items.values())}, in measured({HOMES}, {', '.join(names)})]"
        over = names[0] if len(lists) == 1 else f"zip({', '.join(names)})"
        return f"[{text} for {', '.join(items.values())} in {over}]"

    def result(self, output: Output) -> str:
        """An output. It is cast to its input's dtype unless it is known to have that dtype."""
        x, like = output.value, self.texts[output.like]
        if output.number:
            return self.inside.text(x, True)
        if not self.values.is_list(x):
            return f"filled({self.inside.text(x, True)}, {like})"
        if self.values.is_like(x) or x is output.home:
            return self.texts[x]
        return f"cast({self.texts[x]}, {like})"

    def source(self, outputs: list[Output], texts: list[str]) -> str:
        """The source of the program, after that of its coefficients if it is split."""
        inputs = self.traced.inputs
        if not isinstance(self.inside, Coefficients):
            arguments = [*[self.texts[i.node] for i in inputs], *[HOMES] * self.sharded]
            return function("program", arguments, self.lines, texts)
        found = self.inside.found
        scalars = [self.outside.text(x.value) for x in outputs if x.number]
        results = [f"({', '.join(found)}{',' * bool(found)})", f"({''.join(f'{x}, ' for x in scalars)})"]
        first = function("coefficients", [self.texts[i.node] for i in inputs if i.number], self.numbers, results)
        unpacked = [f"{', '.join(found.values())}, = {COEFFICIENTS}.unbind()"] if found else []
        arguments = [*[self.texts[i.node] for i in inputs if not i.number], COEFFICIENTS]
        second = function("program", arguments, unpacked + self.lines, [t for t, x in zip(texts, outputs) if not x.number])
        return f"{first}\n\n{second}"


def function(name: str, arguments: Sequence[str], lines: Sequence[str], results: Iterable[str]) -> str:
    """The source of a function that returns a tuple."""
    body = "".join(f"    {line}\n" for line in [*lines, f"return {', '.join(results)},"])
    return f"def {name}({', '.join(arguments)}):\n{body}"
