"""Small parameters as one vector.

Every operation on a small tensor costs the same, so in a training run that is differentiated, which cannot write in place, they
are put together once and taken apart at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep._core import tree
from purestep._core.lists import flattened, parted
from purestep._core.plain import plain
from purestep._engine.boundary import columns_of, trees_of
from purestep._executors.task import same_number
from purestep.transform import Transform


def joins(opt: Transform, state: Any, leaves: list[Any], spec: tree.Spec) -> bool:
    """Whether a transform may as well be run on all parameters as one vector."""
    stages = opt.plan.stages
    if len(stages) != 1 or stages[0].whole or stages[0].masked or not plain(leaves):
        return False
    if torch.compiler.is_compiling():  # the compiler finds out for itself
        return False
    states = columns_of(opt.plan, opt._split(state), spec)
    fields = opt.plan.fields
    counters = [c for s, info in zip(states, fields) for c, scalar in zip(s, info.scalars) if scalar]
    return (
        len({(p.dtype, p.device) for p in leaves}) == 1
        and all([x is not None for s in states for c in s for x in c])
        and all([same_number(c) for c in counters])
        and all([x.dtype == p.dtype for s, f in zip(states, fields) for k in f.tensors for x, p in zip(s[k], leaves)])
        and opt.plan.fused_chain(stages[0].positions).joins(leaves)
    )


def join_state(opt: Transform, state: Any, spec: tree.Spec) -> Any:
    """The state of one vector that holds all parameters: a counter of each kind, and the other fields as vectors."""
    made = []
    for s, info in zip(columns_of(opt.plan, opt._split(state), spec), opt.plan.fields):
        made.append([[c[0]] if scalar else [flattened(c)] for c, scalar in zip(s, info.scalars)])
    return opt._join(trees_of(opt.plan, made, tree.BARE))


def part_state(opt: Transform, state: Any, leaves: list[Tensor], spec: tree.Spec) -> Any:
    """`join_state` undone."""
    made = []
    for s, info in zip(opt._split(state), opt.plan.fields):
        made.append([[c] * len(leaves) if scalar else parted(c, leaves) for c, scalar in zip(s, info.scalars)])
    return opt._join(trees_of(opt.plan, made, spec))
