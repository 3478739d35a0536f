"""The program of all parameters at once, on lists of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from purestep._core.lists import cast
from purestep._core.torch_api import BelowAutograd
from purestep._executors.chains import MERGED_DTYPES
from purestep._executors.task import Base, Mode, Result, Task
from purestep._executors.tiles import Variant, calculate
from purestep._trace.program import program, runner


class Traced(Base):
    """The program on lists, in operations that whoever traces may record."""

    modes: tuple[Mode, ...] = ("traced",)
    name = "traced"
    when = "while `torch.compile`, `make_fx` or `torch.export` traces"
    how = "the program on lists of tensors, which is traced into the graph; numbers stay tensors"

    def declines(self, task: Task) -> str | None:
        return None

    def run(self, task: Task) -> Result:
        own = task.env.own.given

        def calculated(columns: list[Any], numbers: list[Any]) -> Any:
            run = runner(task.recipe, task.applies, task.owns_grads, own, *task.chain.declarations)
            return run(task.grads, task.params, *columns, *numbers)

        found = collected(task, calculated)
        assert found is not None
        return found


class Foreach(Base):
    """The program on lists of tensors, one foreach call for each of its lines; large tensors in tiles that fit the cache."""

    modes: tuple[Mode, ...] = ("program",)
    name = "foreach"
    when = "everything else"
    how = "the program on all parameters at once, one foreach call for each line; large tensors in tiles that fit the cache"

    def declines(self, task: Task) -> str | None:
        return None

    def run(self, task: Task) -> Result:
        if task.env.wanted == "compiled":
            return run_foreach(task)
        with BelowAutograd():  # nothing requires grad; to ask each tensor costs a tenth of a step
            return run_foreach(task)


def run_foreach(task: Task) -> Result:
    """The program of a chain on lists, with torch's kernels in the place of several lines where they compute the same."""

    def calculated(columns: list[Any], numbers: list[Any]) -> Any:
        given = (task.grads, task.params, columns)
        own, given_away = task.owns_grads, task.env.own.given
        variant = Variant(task.recipe, task.chain.declarations, task.applies, own, given_away, merges(task))
        return calculate(variant, given, numbers)

    found = collected(task, calculated)
    assert found is not None
    return found


def collected(task: Task, calculated: Callable[[list[Any], list[Any]], Any]) -> Result | None:
    """What a program returns for a task, in the task's form; None if `calculated` returns None."""
    columns, places, news = task.arranged()
    numbers = task.all_numbers()
    found = calculated(columns, numbers)
    if found is None:
        return None
    updates, *results = found
    if tensors_among(columns, numbers):  # a 0-d parameter is promoted by a 0-d number
        dtype = task.params[0].dtype
        own = [True, *[place not in task.chain.encoded for place in places]]
        updates, *results = [
            cast(x, dtype) if yes and isinstance(x, (list, tuple)) else x for yes, x in zip(own, (updates, *results))
        ]
    for (j, f), x in zip(places, results):
        news[j][f] = list(x) if isinstance(x, tuple) else x
    return Result(list(updates) if isinstance(updates, tuple) else updates, news)


def tensors_among(*lists: list[Any]) -> bool:
    """Whether anything in these lists is a tensor."""
    for xs in lists:
        for x in xs:
            if isinstance(x, Tensor):
                return True
    return False


def merges(task: Task) -> bool:
    """Whether a kernel of torch's computes several lines of this program, and is right for these tensors."""
    p = task.params[0]
    if task.env.wanted is not None or not p.is_cpu or p.dtype not in MERGED_DTYPES:
        return False
    if not program(task.recipe, task.applies, task.owns_grads, True, *task.chain.declarations, form="kernels").merged:
        return False
    return bool(task.fact("ordinary"))
