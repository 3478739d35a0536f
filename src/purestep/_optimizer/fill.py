"""The first state of parameters: what is missing in `optimizer.state` is made, and what is there stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from purestep._core import sharded
from purestep._core.lists import alike
from purestep._core.plain import plain
from purestep._core.primitives import Link, fields_of, fresh_state, fresh_whole_state, is_off
from purestep._engine.counters import together
from purestep._engine.plan import packed_links
from purestep._executors.flat_buffer import apart, joined, small
from purestep._optimizer.selection import Contents
from purestep.transform import Transform

Column = list[tuple[dict[str, Any], Tensor]]
"""Values of one field, each after the state of its parameter."""


def fill(contents: Contents, params: list[Tensor], transform: Transform) -> None:
    """Give these parameters whatever of their state is missing."""
    plan = transform.plan
    for name in contents.restarts & {name for names, off in zip(plan.keys, plan.off) if not off for name in names}:
        for p in params:
            if name not in contents.state[p]:
                contents.state[p].pop("step", None)
    counters: dict[Any, Column] = {}
    columns: dict[Any, Column] = {}
    for k, link in enumerate(transform.links):
        value, names = link.transform, plan.keys[k]
        if is_off(value) or not names:
            continue
        if value.declaration.whole:
            fill_whole(contents, link, names, bool(plan.extras))
            continue
        info = fields_of(value)
        for p, yes in zip(params, contents.selected(link.masks, params)):
            state = contents.state[p]
            if not yes or all([name in state for name in names]):
                continue
            fields = fresh_state(value, p)
            resumed = len(names) > 1 and "step" not in state and any([name in state for name in names])
            made = {name: x for name, x in zip(names, fields) if name not in state and x is not None}
            if resumed and "step" in made:
                made["step"] += 1  # a checkpoint of torch's that does not count steps, but has made some
            state.update(made)  # at once: after an interrupt half of it would look like such a checkpoint
            for name, scalar, like, x in zip(names, info.scalars, info.like, fields):
                if name not in made:
                    continue
                if scalar and not x.requires_grad:
                    counters.setdefault((name, x.dtype, x.device), []).append((state, x))
                elif like:
                    columns.setdefault((k, name), []).append((state, x))
    if torch.compiler.is_compiling():
        return
    for (name, *_), column in counters.items():
        if len(column) > 1:
            put(column, name, together([x for _, x in column]))
    parts = list(map(sharded.local, params))
    packs = packed_links(plan) if plain(parts) and small(parts) else ()
    for (k, name), column in columns.items():
        xs = [sharded.local(x) for _, x in column]
        if k in packs and packable(xs):
            pieces = apart(joined(xs), [x.shape for x in xs])
            if plain(params):
                put(column, name, pieces)
            else:  # torch cannot copy a sharded tensor that is made of a piece: its part is moved there instead
                for x, piece in zip(xs, pieces):
                    x.set_(piece)


def put(column: Column, name: str, xs: Any) -> None:
    """Replace the values of a field."""
    for (state, _), x in zip(column, xs):
        state[name] = x


def fill_whole(contents: Contents, link: Link, names: tuple[str, ...], frozen: bool) -> None:
    """The same for a whole transform, which begins with all parameters: its own fields are kept under one key."""
    value, params = link.transform, members(contents, link, frozen)
    for name, leaf, x in zip(names, fields_of(value).leaves, fresh_whole_state(value, params)):
        if not leaf:
            contents.shared.setdefault(name, x)
            continue
        missing = [(p, y) for p, y in zip(params, x) if name not in contents.state[p]]
        ys = [y for _, y in missing]
        if len(ys) > 1 and fields_of(value).scalars[names.index(name)]:
            ys = together(ys)
        for (p, _), y in zip(missing, ys):
            contents.state[p][name] = y


def members(contents: Contents, link: Link, frozen: bool) -> list[Tensor]:
    """The parameters that a whole transform begins with; a function of all parameters is one of the `frozen` ones, too."""
    params = [p for p in contents.params if not is_lazy(p)]
    if not frozen:
        params = [p for p in params if p.requires_grad or p.grad is not None]
    return [p for p, yes in zip(params, contents.selected(link.masks, params)) if yes]


def packable(xs: list[Tensor]) -> bool:
    """Whether these can be consecutive pieces of one tensor."""
    first = xs[0]
    kinds = [(type(x), x.dtype, x.device) for x in xs]
    return type(first) is Tensor and alike(kinds) and all(map(Tensor.is_contiguous, xs)) and not first.requires_grad
