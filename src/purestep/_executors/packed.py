"""Many small tensors as one long one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep._core.lists import overwrite
from purestep._core.torch_api import BelowAutograd, foreach_add, foreach_add_, foreach_copy_
from purestep._executors.chains import encodes
from purestep._executors.flat_buffer import COUNT, SIZE, FlatBuffer, borrow, give_back, split
from purestep._executors.task import Base, Mode, Result, Task, execute
from purestep._executors.tiles import pieces


class Packed(Base):
    """Many small tensors as one: a program costs what its calls cost, and there is one call a line for all of them."""

    modes: tuple[Mode, ...] = ("program",)
    name = "packed"
    when = f"on a CPU, elementwise transforms on {COUNT} tensors or more, of at most {SIZE} elements on average"
    how = "the program on one long vector, into which gradients are copied; the state becomes pieces of one vector"

    def declines(self, task: Task) -> str | None:
        env = task.env
        if task.nested:
            return "another executor hands these tensors on"
        if env.wanted in ("foreach", "fused"):
            return f"{env.wanted} was asked for"
        if task.applies and task.chain.kernel is not None and env.wanted != "compiled":
            return "torch has a kernel for this chain, which costs less than to gather the tensors"
        if not task.fact("packable"):
            return "the tensors are few or large, or their dtypes, shapes or memory layouts differ"
        if encodes(task.chain, task.fields):
            return "the state is kept in few bits"
        program = task.program(False, True, env.own.given)
        return None if program.elementwise and program.parts else "the chain is not elementwise"

    def workspace(self, task: Task) -> int:
        return 2 * sum([p.numel() * p.element_size() for p in task.params])

    def run(self, task: Task) -> Result:
        buffer = borrow(task.params, [p.shape for p in task.params])
        try:
            if task.env.wanted == "compiled":
                return in_buffer(task, buffer)
            with BelowAutograd():
                return in_buffer(task, buffer)
        finally:
            give_back(buffer)


def in_buffer(task: Task, buffer: FlatBuffer) -> Result:
    """Run a task on one vector for each of its lists, in memory that was made for it."""
    grads, params, given = task.grads, task.params, task.env.own.given
    places = [(j, f) for j, (_, _, info) in enumerate(task.chain.items) for f in info.tensors]
    places = [(j, f) for j, f in places if task.fields[j][f][0] is not None]
    counts = len(cut(task, buffer.grad))
    flats: list[list[Any]] = [[c[:1] * counts for c in own] for own in task.fields]
    old = [list(own) for own in task.fields]
    for j, f in places:
        flat = buffer.joined(old[j][f])
        if flat is None:
            old[j][f], flat = buffer.join(old[j][f])
        flats[j][f] = cut(task, flat)
    foreach_copy_(buffer.grads, grads)
    reads = task.program(False, True, given).reads_params
    adds = task.applies and not reads  # the updates are added to the parameters where these are
    if reads:
        foreach_copy_(buffer.params, params)
    inner = task.on(cut(task, buffer.grad), cut(task, buffer.param), flats, applies=task.applies and not adds)
    inner.owns_grads = True
    out, news = execute(inner)
    for j, f in places:
        if news[j][f][0] is flats[j][f][0]:
            news[j][f] = old[j][f]
        else:
            news[j][f] = split(torch.cat(news[j][f]), params)
    if adds:
        overwrite(cut(task, buffer.grad), out)
        if given:
            foreach_add_(params, buffer.grads)
            return Result(params, news)
        return Result(list(foreach_add(params, buffer.grads)), news)
    if task.applies and given:
        foreach_copy_(params, buffer.params)
        return Result(params, news)
    return Result(split(torch.cat(out), params), news)


def cut(task: Task, flat: Tensor) -> list[Tensor]:
    """One long tensor as a program takes it: in tiles that fit the cache; a compiled kernel sees it once anyway."""
    return [flat] if task.env.wanted == "compiled" else pieces(flat)
