"""Tensors of any type, one after the other."""

from __future__ import annotations

from typing import Any

from purestep._core.lists import imaginary
from purestep._executors.chains import encodes
from purestep._executors.complex_pairs import in_reals, out_of_reals
from purestep._executors.one_tensor import one
from purestep._executors.reference import leaf_by_leaf
from purestep._executors.task import LEAF_BY_LEAF, Base, Result, Task


class OneByOne(Base):
    """Tensors of types that nobody has proved the fast ways right for, one after the other, out of place.

    Updates are added to the parameters at last, in place where these were given away: that is what every type of parameters
    must know.
    """

    name = "one by one"
    when = "any other subclass of `torch.Tensor`"
    how = "the program of one tensor, parameter by parameter, out of place and in public operations of torch"

    def declines(self, task: Task) -> str | None:
        return None if task.odd else "all tensors are plain"

    def run(self, task: Task) -> Result:
        complex_ = task.params[0].is_complex()
        real = task.on(*in_reals(task), applies=False) if complex_ else task.on(task.grads, task.params, task.fields, False)
        updates, news = calculated(real)
        if complex_:
            updates, news = imaginary(updates), out_of_reals(task.chain, news)
        scalar_mode = task.env.mode != "leaf"
        for j, (_, _, info) in enumerate(task.chain.items):
            for f, (column, scalar) in enumerate(zip(news[j], info.scalars)):
                if not column or column[0] is None:
                    news[j][f] = None
                elif scalar and scalar_mode:
                    news[j][f] = column[0]
        return Result(settled_updates(task, updates, news), settled_fields(task, news))


def calculated(task: Task) -> Result:
    """The updates and new fields, as lists, of real tensors; nothing is written."""
    fields = task.fields
    like = [own[f] for (_, _, info), own in zip(task.chain.items, fields) for f in info.tensors]
    dtype = task.params[0].dtype
    mixed = not all([x is None or x.dtype == dtype for c in like for x in c]) or encodes(task.chain, fields)
    if mixed or task.chain.arrays or task.env.wanted in LEAF_BY_LEAF:
        with task.env.reading():
            return leaf_by_leaf(task)
    rows = [[[c[k] for c in own] for own in fields] for k in range(len(task.params))]
    made = [one(task, g, p, row, applies=False) for g, p, row in zip(task.grads, task.params, rows)]
    news = [[[new[j][f] for _, new in made] for f in range(len(own))] for j, own in enumerate(fields)]
    return Result([u for u, _ in made], news)


def settled_updates(task: Task, updates: list[Any], news: list[list[Any]]) -> list[Any]:
    """The updates, in memory of their own, or the parameters with the updates added."""
    if task.applies:
        params = task.params if task.env.overwrites else [p.clone() for p in task.params]
        for p, u in zip(params, updates):
            p.add_(u)  # what it returns may be the same by another name
        return list(params)
    places = [(j, f) for j, (_, _, info) in enumerate(task.chain.items) for f in info.columns]
    columns = [x[j][f] or () for x in (task.fields, news) for j, f in places]
    taken = {id(x) for c in (task.grads, *columns) for x in c}  # given away at the next step, or never ours
    return [u.clone() if id(u) in taken else u for u in updates]


def settled_fields(task: Task, news: list[list[Any]]) -> list[list[Any]]:
    """The new fields, in the memory of the old ones if that was given away, and never in that of a gradient."""
    grads = set(map(id, task.grads))
    for j, (_, _, info) in enumerate(task.chain.items):
        for f in info.columns:
            if news[j][f] is not None:
                column = [x.clone() if id(x) in grads else x for x in news[j][f]]
                news[j][f] = [written(x, old, task.env.overwrites) for x, old in zip(column, task.fields[j][f])]
    return news


def written(x: Any, old: Any, overwrites: bool) -> Any:
    """A new value, in the place of the old one if that is to be overwritten."""
    if not overwrites or x is old or x.shape != old.shape:
        return x
    old.copy_(x)
    return old
