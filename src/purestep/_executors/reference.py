"""The leaf functions themselves, one parameter after the other."""

from __future__ import annotations

from typing import Any

import torch

from purestep._core.lists import overwrite, widest
from purestep._executors.chains import encodes
from purestep._executors.leaf_function import apart, leaf_update, requires_grad
from purestep._executors.task import Base, Mode, Result, Task


class Reference(Base):
    """The leaf functions themselves: what all other executors have to agree with."""

    modes: tuple[Mode, ...] = ("leaf",)
    name = "leaf"
    when = (
        '`executor="leaf"`; inside `torch.func` or where autograd records, parameters and state of different dtypes, or '
        "arguments annotated `Weights`"
    )
    how = "the leaf functions themselves, one parameter at a time: an error appears on the line that its author wrote"

    def declines(self, task: Task) -> str | None:
        if task.env.wanted == "leaf" or task.chain.arrays or mixed_history(task):
            return None
        return "nobody asked for it, the dtypes of parameters and state are the same, and there are no `Weights`"

    def run(self, task: Task) -> Result:
        return leaf_by_leaf(task)


class Promoted(Base):
    """The leaf functions where parameters and state have different dtypes: promoted by torch's rules, and stored as before."""

    modes: tuple[Mode, ...] = ("program", "traced")
    name = "promoted"
    when = "parameters and state of different dtypes"
    how = "the leaf functions, one parameter at a time, in the wider of the dtypes"

    def declines(self, task: Task) -> str | None:
        return None if task.fact("mixed") else "parameters and state have one dtype"

    def run(self, task: Task) -> Result:
        return stored_once(task, leaf_by_leaf(task))


def stored_once(task: Task, result: Result) -> Result:
    """What leaf functions return, outside the mode ``leaf``: one number for a counter, in the memory that was given away."""
    given, (updates, news) = task.env.own.given, result
    for (_, _, info), old, new in zip(task.chain.items, task.fields, news):
        for f, scalar in enumerate(info.scalars):
            if scalar:
                new[f] = new[f][0]
            elif given and old[f][0] is not None:
                new[f] = overwrite(old[f], new[f])
    return Result(overwrite(task.params, updates) if task.applies and given else updates, news)


class Learned(Promoted):
    """The leaf functions of transforms that take pytrees of tensors, which are real tensors in every mode."""

    name = "learned"
    when = "arguments annotated `Weights`"
    how = "the leaf functions, one parameter at a time"

    def declines(self, task: Task) -> str | None:
        return None if task.chain.arrays else "no transform has an argument annotated `Weights`"

    def run(self, task: Task) -> Result:
        env = task.env
        with env.reading():
            result = leaf_by_leaf(task)
        if env.watched and requires_grad([*result.updates, *result.fields]):  # of what the functions close over
            env.record()
            return result
        return stored_once(task, result)


def mixed_history(task: Task) -> bool:
    """Whether a field that is like the parameters has another dtype, or is kept in fewer bits than it is computed with."""
    dtype = task.params[0].dtype
    if dtype.itemsize < 4 and encodes(task.chain, task.fields):
        return True
    like = [own[f] for (_, _, info), own in zip(task.chain.items, task.fields) for f in info.tensors]
    return not all([x is None or x.dtype == dtype for column in like for x in column])


def leaf_by_leaf(task: Task) -> Result:
    """Run the leaf functions of a chain on one parameter after the other, in place where the memory was given away."""
    chain, fields, factor = task.chain, task.fields, task.factor
    widens = encodes(chain, fields)
    later = task.env.writes and any([not v.declaration.ours for v in chain.values])  # a leaf function of a user's may raise
    writes = task.env.writes and not later
    out: list[Any] = []
    news: list[list[Any]] = [[[] for _ in columns] for columns in fields]
    for k, (g, p) in enumerate(zip(task.grads, task.params)):
        u, dtype = g, p.dtype
        wide = widest(dtype, [own[f][k] for (_, _, info), own in zip(chain.items, fields) for f in info.tensors])
        if widens:  # numbers that are kept in few bits are computed with in many
            wide = torch.promote_types(wide, torch.float32)
        if wide != dtype:  # a state of higher precision than its parameter: the mathematics is done in the state's
            u, p = g.to(wide), p.to(wide)
        if chain.scaled and factor is not None:
            u = (u * factor).to(u.dtype)
        for (_, value, info), columns, new in zip(chain.items, fields, news):
            old = [c[k] for c in columns]
            given = [x.to(wide) if like and x is not None else x for x, like in zip(old, info.like)]
            was = [u, p, *given]
            u, state = leaf_update(value, info, u, given, p)
            *state, u = apart([*state, u], was)  # the state's memory may be given away later, and the rest is someone else's
            in_place = writes and not (torch.is_grad_enabled() and requires_grad((u, *state)))
            for column, x, y, like in zip(new, state, old, info.like):
                column.append(x if x is None or not like else y.copy_(x) if in_place else x.to(y.dtype))
        if task.applies:
            u = p + u
            if writes and not (torch.is_grad_enabled() and u.requires_grad):
                u = task.params[k].copy_(u)
        out.append(u if u.dtype == dtype else u.to(dtype))
    if later:
        write_like(task, out, news)
    return Result(out, news)


def write_like(task: Task, out: list[Any], news: list[list[Any]]) -> None:
    """Write new parameters and fields of their shapes into the memory that was given away, unless autograd records them."""
    if torch.is_grad_enabled() and requires_grad((out, news)):
        return
    if task.applies:
        out[:] = [p.copy_(u) for p, u in zip(task.params, out)]
    for (_, _, info), olds, new in zip(task.chain.items, task.fields, news):
        for f, like in enumerate(info.like):
            if like:
                new[f] = [x if x is None else y.copy_(x) for x, y in zip(new[f], olds[f])]
