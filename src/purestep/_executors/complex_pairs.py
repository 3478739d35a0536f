"""Complex tensors as pairs of real numbers."""

from __future__ import annotations

from typing import Any

from purestep._core.lists import imaginary, real
from purestep._executors.chains import FusedChain
from purestep._executors.task import Base, Result, Task, execute


class ComplexPairs(Base):
    """Complex tensors as pairs of real numbers, in the same memory."""

    name = "complex"
    when = "complex parameters"
    how = "the parameters as pairs of real numbers in the same memory, with one of the executors below"

    def declines(self, task: Task) -> str | None:
        return None if task.params[0].is_complex() else "the parameters are real"

    def run(self, task: Task) -> Result:
        inner = task.on(*in_reals(task))
        inner.nested = task.nested
        updates, news = execute(inner)
        return Result(imaginary(updates), out_of_reals(task.chain, news))


def in_reals(task: Task) -> tuple[list[Any], list[Any], list[Any]]:
    """Gradients, parameters and fields as pairs of reals, in the same memory."""
    fields = [
        [c if scalar else real(c) for c, scalar in zip(own, info.scalars)]
        for (_, _, info), own in zip(task.chain.items, task.fields)
    ]
    return real(task.grads), real(task.params), fields


def out_of_reals(chain: FusedChain, news: list[list[Any]]) -> list[list[Any]]:
    """`in_reals` undone, of new fields."""
    return [
        [x if scalar or x is None else imaginary(x) for x, scalar in zip(new, info.scalars)]
        for (_, _, info), new in zip(chain.items, news)
    ]
