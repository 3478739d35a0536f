"""What a program's lines say about which elements of its result depend on which elements of its inputs."""

from __future__ import annotations

import math
from typing import NamedTuple

from purestep._trace.ir import LOOPS, Op, Values, nodes_in
from purestep._trace.trace import Trace


class Locality(NamedTuple):
    """How a program may be run on parts of its tensors."""

    block: int  # this many consecutive elements of the result depend only on those in the same places; 0: on all
    broadcasts: bool  # the program takes tensors that can be broadcast in the places of numbers


def locality(ops: list[Op], traced: Trace, values: Values, sharded: bool = False) -> Locality:
    """The locality of a program with these lines; of a `sharded` one, which has its own way with matrices."""
    sizes = [1 if sharded and values.spreads(op.out) else block_of(op, values) for op in ops]
    local = all(values.shaped[i.node] or i.kind == "encoded" for i in traced.inputs if not i.number) and all(sizes)
    local = local and not any(map(values.is_tensor, traced.outputs))
    block = math.lcm(*sizes) if local else 0
    loops = [op.out for op in ops if op.name in LOOPS]  # in a loop, a tensor in the place of a number could change the dtype
    broadcasts = block == 1 and all(values.is_list(x) for node in loops for x in nodes_in((node.args, node.kwargs)))
    return Locality(block, broadcasts)


def block_of(op: Op, values: Values) -> int:
    """How many consecutive elements one line treats independently of all others; 0 if it must have whole tensors."""
    if op.name == "loop" and not op.elementwise:
        return getattr(op.out.target, "block", 0)
    return int(values.shaped[op.out])
