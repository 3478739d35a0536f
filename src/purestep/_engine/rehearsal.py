"""Before a step overwrites what it was given: functions of a user's are called, which may raise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from purestep._core.primitives import Primitive, fresh_state
from purestep._engine.numbers import Numbers
from purestep._engine.plan import ParamSlice, Plan
from purestep._executors.chains import detail
from purestep._executors.task import Mode
from purestep._trace.program import program


def rehearse(groups: Sequence[ParamSlice], inputs: Any, states: list[Any], numbers: Numbers) -> None:
    """Call schedules at every step, leaf functions that run after something else once, and ask masks.

    Where a leaf function may still raise when it sees tensors, its stage becomes the `last_call` of the plan: until it has
    returned, nothing is overwritten.
    """
    first, env = groups[0].plan, numbers.env
    if first.structure.masked and not env.own.private:  # an optimizer has asked them when it got its parameters
        for link in first.links:
            inputs.selected(link)
    if inputs.rehearsed or torch.compiler.is_compiling():
        return
    for plan, rows in groups:
        for i in plan.scheduled:
            numbers.rehearse(plan.links[i].transform, counters(plan, i, inputs.selected(plan.links[i]), states[i], rows))
        for i in () if plan.rehearsed else plan.structure.late:
            if may_raise(plan.links[i].transform, env.mode):
                stage = next(n for n, stage in enumerate(plan.stages) if stage.start <= i < stage.stop)
                first.last_call = max(first.last_call, stage)
        plan.rehearsed = True


def counters(plan: Plan, i: int, on: list[bool] | None, own: list[Any], rows: range) -> list[Any]:
    """The counters of the `i`-th link, of these parameters that it acts on."""
    info = plan.fields[i]
    if info.step < 0:
        return []
    column = own[info.step]
    return [column[k] for k in rows if on is None or on[k]] if info.leaves[info.step] else [column]


def may_raise(value: Primitive, mode: Mode) -> bool:
    """Whether a leaf function may raise when it sees tensors; it is traced, and raises what it raises without.

    In the mode ``leaf`` it need not be one that can be traced.
    """
    d = value.declaration
    try:
        absent = tuple([x is None for x in fresh_state(value, torch.empty(64, 64, device="meta"))])
    except Exception:  # the first state may look at values
        return True
    try:
        found = program((detail(value, absent),), False, False, False, d, form="single")
    except TypeError:
        if mode == "program":
            raise
        return True
    return mode == "leaf" or found.fails
