"""Pass 4: which line overwrites which of its arguments.

A line may overwrite a list that no later line reads, if the list's memory is the program's (a temporary) or was given away
(an input, under `Recipe.donate` or `Recipe.own_grads`). Nothing else is ever overwritten.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from purestep._trace.ir import Op, Values, nodes_in
from purestep._trace.recipe import Recipe
from purestep._trace.trace import Trace


def reuse(ops: list[Op], traced: Trace, values: Values, recipe: Recipe) -> list[Op]:
    """The lines with what each of them overwrites.

    Assumes that the lines are in their final order, and that none overwrites anything yet.
    """
    found = Reuse(ops, traced.outputs, values)
    if recipe.donate:
        for given in traced.inputs:
            if given.output is not None and not given.number:
                found.update_in_place(given.node, traced.outputs[given.output])
    found.overwrite({op.out for op in ops if op.fresh} - set(found.chosen), {traced.grad} if recipe.own_grads else set())
    return [dataclasses.replace(op, inplace=found.chosen.get(op.out)) for op in ops]


class Reuse:
    """The search for what lines may overwrite, and what was chosen so far."""

    def __init__(self, ops: list[Op], outputs: list[object], values: Values) -> None:
        self.ops, self.values = ops, values
        self.producers = {op.out: i for i, op in enumerate(ops)}
        self.chosen: dict[fx.Node, int] = {}  # for the result of a line, the position of the argument that it overwrites
        self.last: dict[fx.Node, int] = {}  # for a list, the last line that needs its memory
        for i, op in enumerate(ops):
            for x in nodes_in(op.args):
                if values.is_list(x):
                    # The result of a line that is not fresh may share this memory, however late that result is read.
                    self.last[x] = max(self.last.get(x, 0), i if op.fresh else len(ops))
        self.last.update({x: len(ops) for x in outputs if isinstance(x, fx.Node)})

    def candidates(self, i: int) -> list[int]:
        """The positions of the arguments that a line may overwrite, if their memory is the program's."""
        op, values = self.ops[i], self.values
        if not values.like.get(op.out, False):
            return []
        return [
            t
            for t in op.targets
            if values.is_list(x := op.args[t]) and self.last[x] == i and op.args.count(x) == 1 and x not in values.scalars
        ]

    def inplace_chain(self, node: fx.Node, home: fx.Node) -> list[tuple[fx.Node, int]] | None:
        """The results that turn `home` into `node` within its own memory, each with what it overwrites; None if none do."""
        if node is home:
            return []
        if node not in self.producers or node in self.chosen:
            return None
        i = self.producers[node]
        for t in self.candidates(i):
            before = self.inplace_chain(self.ops[i].args[t], home)
            if before is not None:
                return [*before, (node, t)]
        return None

    def update_in_place(self, home: fx.Node, new: fx.Node) -> None:
        """Compute the new value of an input that was given away in the input's own memory, if that can be."""
        self.chosen.update(self.inplace_chain(new, home) or [])

    def overwrite(self, temporaries: set[fx.Node], given: set[fx.Node]) -> None:
        """Let each line that overwrites nothing yet overwrite a list in these that no later line reads."""
        ours = temporaries | given
        for i, op in enumerate(self.ops):
            if op.out not in self.chosen:
                target = next((t for t in self.candidates(i) if op.args[t] in ours), None)
                if target is not None:
                    self.chosen[op.out] = target
