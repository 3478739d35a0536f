"""Sharded tensors: on the part that this process has, or in full where a chain must see whole tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purestep._core import maths, sharded
from purestep._core.dealt import can_deal, cost, dealt_rows
from purestep._core.lists import overwrite
from purestep._core.plain import PLAIN, plain
from purestep._executors.foreach import collected
from purestep._executors.one_by_one import OneByOne, written
from purestep._executors.task import LEAF_BY_LEAF, Base, Result, Task, run_plain

_one_by_one = OneByOne()


class ByParts(Base):
    """Sharded tensors (`torch.distributed.tensor.DTensor`)."""

    name = "by parts"
    when = "sharded parameters (`DTensor`)"
    how = (
        "elementwise transforms: the part that each process holds, with one of the executors below; functions of whole "
        "matrices that take stacks of them (Muon's): each matrix by one process, its owner; other transforms: each parameter "
        "with its gradient and state by its owner; derivatives: the gathered tensors, in every process"
    )

    def declines(self, task: Task) -> str | None:
        return None if task.odd and sharded.is_sharded(task.params[0]) else "no parameter is sharded"

    def run(self, task: Task) -> Result:
        env = task.env
        wanted = env.wanted
        if wanted == "compiled":  # a part that is empty here, and not elsewhere, would be compiled for alone
            env.wanted = None
        try:
            traceable = not task.chain.arrays
            elementwise = traceable and task.program(False, False, False, "single").elementwise
            # a derivative with respect to a number is a sum over all parts
            followed = env.mode != "program" and (wanted not in LEAF_BY_LEAF or torch.is_grad_enabled() or maths.transforming())
            like = [own[f] for (_, _, info), own in zip(task.chain.items, task.fields) for f in info.tensors]
            task.grads = sharded.alike(task.grads, task.params, like, "number {}".format)  # a whole transform may change it
            if elementwise and not followed:
                return in_part(task, any_of)
            if traceable and not followed and in_matrices(task):
                return in_part(task, lambda inner: run_sharded(inner, task.params))
            if env.mode == "program" and not followed and in_rows(task):
                return by_owners(task)
            return in_full(task)
        finally:
            env.wanted = wanted


def in_matrices(task: Task) -> bool:
    """Whether a chain is elementwise but for functions of whole matrices, which their owners can compute."""
    params = task.params
    if task.env.mode != "program" or params[0].is_complex() or not task.program(False, False, False, "sharded").elementwise:
        return False
    return all([p.dim() >= 2 and can_deal(p) for p in params]) and not task.fact("mixed")


def run_sharded(task: Task, homes: list[Any]) -> Result:
    """A chain on the parts that are here, with the matrices of `homes` in the hands of their owners."""
    program = task.program(task.applies, False, task.env.own.given, "sharded")
    found = collected(task, lambda columns, numbers: program.run(task.grads, task.params, *columns, *numbers, homes))
    assert found is not None
    return found


def in_part(task: Task, run: Callable[[Task], Result]) -> Result:
    """What is elementwise, on the parts that are here."""
    env, fields = task.env, task.fields
    with torch.no_grad():  # a part is the very tensor, then, and not a view of it
        inside = [[[sharded.local(x) for x in c] for c in own] for own in fields]
        params = [sharded.local(p) for p in task.params]
        found, inner = run(task.on([sharded.local(g) for g in task.grads], params, inside))
        writes = env.overwrites and env.mode != "traced"
        olds = [params, *[y for own in inside for y in own]]
        found = settled(found, params, olds) if writes and task.applies else found
        updates = [wrapped(x, y, p) for x, y, p in zip(found, params, task.params)]
        news = [
            [
                x
                if x is None or (scalar and env.mode != "leaf")
                else [wrapped(*row) for row in zip(settled(x, y, olds) if writes and not scalar else x, y, old)]
                for x, y, old, scalar in zip(*columns, info.scalars)
            ]
            for columns, (_, _, info) in zip(zip(inner, inside, fields), task.chain.items)
        ]
    if env.overwrites and env.mode != "traced":
        written_to = [*(task.params if task.applies else ()), *[x for c in task.columns for x in c if sharded.is_sharded(x)]]
        torch.autograd.graph.increment_version(written_to)
    return Result(updates, news)


def in_rows(task: Task) -> bool:
    """Whether each parameter can be brought together with its gradient and its state, and all of it spread again."""
    for p, *row in zip(task.params, task.grads, *task.columns):
        if not can_deal(p) or p.device_mesh.size() == 1:
            return False
        for x in row:
            if sharded.is_sharded(x):
                if x.device_mesh != p.device_mesh or not can_deal(x):
                    return False
            elif x is not None and (type(x) not in PLAIN or x.device != p.device):
                return False
    return True


def by_owners(task: Task) -> Result:
    """What must see whole tensors, on each parameter in the process that owns it."""
    env, items = task.env, task.chain.items
    places = [(j, f) for j, (_, _, info) in enumerate(items) for f in info.columns if task.fields[j][f][0] is not None]
    scalars = [(j, f) for j, (_, _, info) in enumerate(items) for f, s in enumerate(info.scalars) if s]
    scalars = [(j, f) for j, f in scalars if task.fields[j][f][0] is not None]
    columns = [task.fields[j][f] for j, f in places]
    homes = [list(row) for row in zip(task.params, *columns, task.grads)]
    rows = [[sharded.local(x) for x in row] for row in homes]

    def updated(whole: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[Any]]:
        params, *inside, grads = map(list, zip(*whole))
        fields = [[c[:1] * len(whole) for c in own] for own in task.fields]
        for (j, f), column in zip(places, inside):
            fields[j][f] = column
        updates, news = any_of(task.on(grads, params, fields))
        made = [[u, *[news[j][f][k] for j, f in places]] for k, u in enumerate(updates)]
        return made, [news[j][f] for j, f in scalars]

    with torch.no_grad():
        costs = [sum([cost(x.shape) for x in row]) for row in homes]
        made, numbers = dealt_rows(updated, homes, rows, costs, len(scalars), given=1)
        writes = env.overwrites
        updates = placed([x[0] for x in made], [x[0] for x in homes], writes and task.applies)
        news: list[list[Any]] = [[None] * len(own) for own in task.fields]
        for n, (j, f) in enumerate(places, 1):
            news[j][f] = placed([x[n] for x in made], [x[n] for x in homes], writes)
    for (j, f), x in zip(scalars, numbers):
        news[j][f] = x
    return Result(updates, news)


def placed(parts: list[Tensor], homes: list[Any], writes: bool) -> list[Any]:
    """New parts as those of tensors like `homes`: in the memory of these, if that was given away."""
    if not writes:
        return list(map(sharded.wrapped, parts, homes))
    for x, home in zip(parts, homes):
        sharded.local(home).copy_(x)
    torch.autograd.graph.increment_version([home for home in homes if sharded.is_sharded(home)])
    return homes


def settled(new: list[Any], old: list[Any], olds: list[list[Any]]) -> list[Any]:
    """New parts, in the memory of the old ones, which was given away, if they are in none of it: to wrap a part is dear."""
    if all(map(operator.is_, new, old)) or not all(map(fits, new, old)):
        return new
    place = storage if plain(new, *olds, optional=True) else maths.memory
    held = {place(x) for column in olds for x in column if x is not None}
    return new if any([place(x) in held for x in new]) else overwrite(old, new)


def storage(x: Tensor) -> int:
    """What is the same for plain tensors in the same memory."""
    return x.untyped_storage()._cdata


def fits(x: Any, like: Any) -> bool:
    """Whether a part can be written into another."""
    return x is not None and x.shape == like.shape and x.dtype == like.dtype


def in_full(task: Task) -> Result:
    """What must see whole tensors, on each of them in turn, by every process."""
    overwrites, fields = task.env.overwrites, task.fields
    updates: list[Any] = []
    news: list[list[Any]] = [[None] * len(own) for own in fields]
    with task.env.reading():  # a tensor that is here in full may be the memory of one that is not to be written yet
        for k, (g, p) in enumerate(zip(task.grads, task.params)):
            row = [[[sharded.whole(c[k])] for c in own] for own in fields]
            g_whole = sharded.whole(g)
            (update,), found = any_of(task.on([g_whole], [sharded.whole(p)], row))
            updates.append(written(spread(update, g_whole, g, p), p, overwrites and task.applies))
            for columns, own, given, new, (_, _, info) in zip(news, fields, row, found, task.chain.items):
                for f, (x, scalar) in enumerate(zip(new, info.scalars)):
                    if x is None:
                        continue
                    if scalar and task.env.mode != "leaf":
                        columns[f] = x  # the same for all parameters of a task
                        continue
                    columns[f] = columns[f] or []
                    old = own[f][k]
                    columns[f].append(x[0] if scalar else written(spread(x[0], given[f][0], old, old), old, overwrites))
    return Result(updates, news)


def spread(x: Any, given: Any, old: Any, like: Any) -> Any:
    """A whole tensor, spread as `like` is; `old` if it is the whole tensor that was `given` for it."""
    return old if x is given else sharded.spread(x, like)


def any_of(task: Task) -> Result:
    """Run a task on tensors of one process, which may still not be plain."""
    task.nested = False
    if plain(task.grads, task.params, *task.columns, optional=True):
        return run_plain(task)
    return _one_by_one.run(task)


def wrapped(x: Tensor, old: Tensor, like: Tensor) -> Tensor:
    """A part of a sharded tensor as such a tensor: as the same, if it is the same part."""
    return like if x is old else sharded.wrapped(x, like)
