"""torch's fused kernels, for the tails of chains that they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purestep._core.lists import clones
from purestep._core.torch_api import BelowAutograd
from purestep._executors.foreach import run_foreach
from purestep._executors.leaf_function import stored
from purestep._executors.task import Base, Mode, Result, Task, all_ordinary
from purestep._executors.tiles import through, tile_slices


class TorchFused(Base):
    """One of torch's fused kernels, after a program of what comes before it in the chain."""

    modes: tuple[Mode, ...] = ("program",)
    name = "fused"
    when = "`step` of a chain whose end one of torch's fused kernels computes, on tensors that the kernel takes"
    how = "the program of the transforms before that end, then the kernel"

    def declines(self, task: Task) -> str | None:
        env, chain = task.env, task.chain
        if not task.applies:
            return "a kernel writes parameters, and updates are asked for"
        if chain.kernel is None:
            return "torch has no kernel for this chain"
        if env.wanted == "foreach":
            return "foreach was asked for"
        if env.wanted == "compiled" and (not env.own.given or chain.first):
            return "compiled was asked for, and the kernel is not all of the chain or may not write in place"
        if not (env.own.given or chain.kernel.copies or env.wanted):
            return "the kernel writes in place, and copies would cost more than it saves"
        if not chain.kernel.computes(task.params[0]):
            return "the kernel is not known to be right for this dtype and device"
        if not task.params[0].is_cpu and (reason := waits(task)):
            return reason
        return None if task.fact("in order") else "types, dtypes, shapes or memory layouts differ"

    def run(self, task: Task) -> Result:
        with BelowAutograd():  # nothing requires grad; to ask each tensor costs a tenth of a step
            return run_fused(task)


def waits(task: Task) -> str | None:
    """Why a kernel would wait for the device before it ran: it takes a learning rate from there, and no other number."""
    chain, numbers = task.chain, task.numbers
    tail = chain.tail
    later = chain.kernel.later if chain.kernel is not None else ()
    for (_, value, info), own in zip(tail.items, task.fields[len(chain.items) - len(tail.items) :]):
        count = own[info.step][0] if info.step >= 0 else None
        for name in value.declaration.hypers:
            x = numbers.lower(value.arguments[name], count)
            for y in x if isinstance(x, tuple) else (x,):
                if isinstance(y, Tensor):
                    if name != "lr":
                        return f"the kernel takes {name} as a number, and it is on the device"
                    if task.params[0].dtype == torch.float64 and y.dtype != torch.float32:
                        return "the kernel takes a learning rate on the device as float32, which is too coarse for float64"
                elif name in later and y:
                    return f"whether {name} is due is on the device"
    return None


def run_fused(task: Task) -> Result:
    """The program of what comes first, and a kernel for the tail: in place, on copies of what was not given away."""
    head, tail = task.chain.head, task.chain.tail
    n = len(task.chain.items) - len(tail.items)
    kernel, states, news = bound_kernel(task, n)
    out, given = task.params, task.env.own.given
    first = task.on(task.grads, task.params, task.fields[:n], applies=False)
    first.chain = head
    heads = in_tiles(first, kernel, states) if given and task.chain.first else None
    if heads is None:
        heads, grads = [], task.grads
        if task.chain.first:
            grads, heads = run_foreach(first)
        if not given:
            out, states = clones(task.params), {name: clones(x) for name, x in states.items()}
        kernel(out, grads, states)
    for (_, _, info), new in zip(tail.items, news):
        for f in info.tensors:
            new[f] = states[info.names[f]]
    return Result(out, heads + news)


def for_kernel(old: Tensor, count: Any) -> Tensor:
    """The counter as a kernel reads it: on a device always as float32."""
    new = stored(old, count)
    return new if new.is_cpu else new.to(torch.float32)


Bound = Callable[[list[Tensor], list[Tensor], dict[str, list[Tensor]]], None]


def bound_kernel(task: Task, n: int) -> tuple[Bound, dict[str, list[Tensor]], list[list[Any]]]:
    """The kernel with its numbers, the state that it takes by name, and the new fields, of which tensors are to be filled in.

    The tail of the chain begins at its `n`-th transform.
    """
    tail, numbers = task.chain.tail, task.numbers
    items = list(zip(tail.items, task.fields[n:]))
    states: dict[str, list[Tensor]] = {}
    news: list[list[Any]] = []
    before: Any = 0
    hypers, step = tail.hypers, {}
    for (_, value, info), own in items:
        new = list(own)
        for f in info.tensors:
            states[info.names[f]] = own[f]
        if info.step >= 0:
            count = own[info.step][0]
            number = numbers.number(count)
            new[info.step] = after = number + 1
            if value.declaration.state is not None:
                before, step["step"] = number, functools.cache(functools.partial(for_kernel, count, after))
        news.append(new)
    if tail.numbers is None:
        hypers = dict(hypers)
        for (_, value, info), own in items:
            count = own[info.step][0] if info.step >= 0 else None
            for name in value.declaration.hypers:
                hypers[name] = numbers.lower(value.arguments[name], count)
        lr = hypers.get("lr")
        if isinstance(lr, Tensor):  # CUDA's kernels read it as float32
            hypers["lr"] = lr.to(torch.float32)
    run = task.chain.kernel.run  # type: ignore[union-attr]

    def kernel(params: list[Tensor], grads: list[Tensor], states: dict[str, list[Tensor]]) -> None:
        run(params, grads, {**states, **step}, hypers, before)

    return kernel, states, news


def in_tiles(first: Task, kernel: Bound, states: dict[str, list[Tensor]]) -> list[list[Any]] | None:
    """What comes before a kernel, and the kernel, on large tensors tile by tile, if it is elementwise; its new fields."""
    params = first.params
    if tile_slices(params) is None:
        return None
    columns, places, news = first.arranged()
    lists = [first.grads, params, *states.values(), *[c for c in columns if isinstance(c, list)]]
    if not all_ordinary(lists, params[0].dtype):
        return None
    head = first.program(False, False, True)
    if not head.elementwise or head.fails:
        return None
    results = through(head, kernel, (first.grads, params, columns, states), first.all_numbers())
    for (j, f), x in zip(places, results):
        news[j][f] = x
    return news
