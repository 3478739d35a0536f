"""Pass 6: which outputs are copied, so that each one is returned in memory of its own.

The new value of an input that was given away is returned in that input's memory. Any other output is returned in memory that
belongs to no input, to no captured tensor and to no other output.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from torch import fx

from purestep._trace.ir import Op, Values, is_opaque, leaves_of
from purestep._trace.recipe import Recipe
from purestep._trace.trace import Trace

CAPTURED = "captured tensors"
"""Stands for the memory of all captured tensors."""

Memory: TypeAlias = dict[fx.Node, set[Any]]
"""For each list, the values whose memory it may share: inputs, results of lines, and `CAPTURED`."""


class Output(NamedTuple):
    """What an output of a program is to the caller."""

    value: Any  # a node or a constant
    like: fx.Node  # the input whose dtype and shape the output has
    home: fx.Node | None  # the input that the output is the new value of
    number: bool
    donated: bool  # the memory of `home` was given away


class Copies(NamedTuple):
    """Which outputs are copied, by their positions."""

    clones: list[int]  # to new memory
    moves: list[int]  # to the memory of the input that was given away, after the clones
    tangled: bool  # a clone was in the memory of the parameters or of their state


def outputs_of(traced: Trace, recipe: Recipe) -> list[Output]:
    """The outputs of a program, in order."""
    first, *rest = traced.outputs
    found = [Output(first, traced.param, traced.param if recipe.apply else None, False, recipe.donate and recipe.apply)]
    updated = [i for i in traced.inputs[2:] if i.output is not None]
    return found + [Output(x, i.node, i.node, i.number, recipe.donate and not i.number) for x, i in zip(rest, updated)]


def memory_of(ops: list[Op], traced: Trace, values: Values) -> Memory:
    """Alias analysis: the memory that each list may share.

    Assumes that it is settled what each line overwrites.
    """
    found: Memory = {i.node: {i.node} for i in traced.inputs if not i.number}
    for op in ops:
        for node, target in op.further.items():
            found[node] = found[op.args[target]]
        if op.inplace is not None:
            found[op.out] = found[op.args[op.inplace]]
        elif op.fresh:
            found[op.out] = {op.out}
        else:
            args = leaves_of((op.out.args, op.out.kwargs))
            found[op.out] = {op.out}.union(*[found[x] for x in args if values.is_list(x)])
            if is_opaque(op.out) or any(map(values.is_tensor, args)):
                found[op.out].add(CAPTURED)
    return found


def copies_of(outputs: list[Output], in_place: list[bool], memory: Memory, traced: Trace, recipe: Recipe) -> Copies:
    """Which outputs must be copied, of which some are `in_place`: already in the memory of the input that was given away."""
    moves = [k for k, x in enumerate(outputs) if x.donated and not in_place[k]]
    written = {outputs[k].home for k in moves}
    inputs = {i.node for i in traced.inputs}
    taken: set[Any] = {CAPTURED, *inputs} - ({traced.grad} if recipe.own_grads else set())
    clones: list[int] = []
    tangled = False
    for k in [*range(1, len(outputs)), 0]:  # if the updates share memory with the state, the updates are copied
        output = outputs[k]
        is_list = isinstance(output.value, fx.Node) and output.value in memory
        if output.number or not is_list or (output.donated and k not in moves):
            continue
        shared = memory[output.value]
        if shared & (written if output.donated else taken):
            clones.append(k)
            tangled |= bool(shared & inputs - {traced.grad})
        elif not output.donated:
            taken |= shared
    return Copies(clones, moves, tangled)
