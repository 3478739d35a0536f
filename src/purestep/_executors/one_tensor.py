"""The program of one tensor, in operations that can be differentiated and batched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep._core.lists import flattened, parted
from purestep._executors.chains import joinable
from purestep._executors.leaf_function import stored
from purestep._executors.task import Base, Mode, Result, Task
from purestep._trace.program import runner


class Joined(Base):
    """Small tensors as one vector, in operations that can be differentiated and batched."""

    modes: tuple[Mode, ...] = ("leaf",)
    name = "joined"
    when = "inside `torch.func` or where autograd records, elementwise transforms on small tensors"
    how = "the program of one tensor, once, on all parameters as one vector; nothing is overwritten"

    def declines(self, task: Task) -> str | None:
        if torch.compiler.is_compiling():
            return "the compiler joins them by itself"
        if not task.counters_equal:
            return "the parameters have made different numbers of updates"
        if not joinable(task.params, task.program(task.applies, False, False, "single")):
            return "the tensors are large, the chain is short, or it is not elementwise"
        return None

    def run(self, task: Task) -> Result:
        params, chain = task.params, task.chain
        flats = [
            [c[0] if s or c[0] is None else flattened(c) for c, s in zip(own, info.scalars)]
            for (_, _, info), own in zip(chain.items, task.fields)
        ]
        update, news = one(task, flattened(task.grads), flattened(params), flats)
        many = [
            [[x] * len(params) if s or x is None else parted(x, params) for x, s in zip(new, info.scalars)]
            for (_, _, info), new in zip(chain.items, news)
        ]
        return Result(parted(update, params), many)


class SingleTensor(Base):
    """The program of one tensor, parameter by parameter."""

    modes: tuple[Mode, ...] = ("leaf",)
    name = "single"
    when = "inside `torch.func` or where autograd records, everything else"
    how = "the program of one tensor, parameter by parameter; nothing is overwritten"

    def declines(self, task: Task) -> str | None:
        return None

    def run(self, task: Task) -> Result:
        fields = task.fields
        rows = [[[c[k] for c in own] for own in fields] for k in range(len(task.params))]
        found = [one(task, g, p, row) for g, p, row in zip(task.grads, task.params, rows)]
        result = [[[new[j][f] for _, new in found] for f in range(len(own))] for j, own in enumerate(fields)]
        if task.counters_equal:
            for columns, (_, _, info) in zip(result, task.chain.items):
                for f, scalar in enumerate(info.scalars):
                    columns[f] = columns[f][:1] * len(task.params) if scalar else columns[f]
        return Result([u for u, _ in found], result)


def one(task: Task, g: Tensor, p: Tensor, fields: list[list[Any]], applies: bool | None = None) -> tuple[Tensor, Any]:
    """The program on one tensor, with one value of each field: the update, or the parameter, and the new values."""
    chain, numbers = task.chain, task.numbers
    applies = task.applies if applies is None else applies
    run = runner(task.recipe, applies, False, False, *chain.declarations, form="single")
    given: list[Any] = []
    places: list[tuple[int, int]] = []
    news: list[list[Any]] = [[None] * len(own) for own in fields]
    for j, ((_, value, info), own) in enumerate(zip(chain.items, fields)):
        for f, (x, scalar) in enumerate(zip(own, info.scalars)):
            if x is None:
                continue
            if scalar and value.declaration.state is None:
                news[j][f] = numbers.counted(x, numbers.number(x) + 1)
                continue
            given.append(numbers.number(x) if scalar else x)
            places.append((j, f))
    update, *results = run(g, p, *given, *numbers.of_chain(chain, [[[x] for x in own] for own in fields]))
    for (j, f), x in zip(places, results):
        news[j][f] = numbers.counted(fields[j][f], x)
    return stored(p, update), news
