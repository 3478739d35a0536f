"""One leaf function on one tensor, and what goes in and out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep._core import maths
from purestep._core.plain import plain
from purestep._core.primitives import Fields, Primitive, evaluated
from purestep._core.torch_api import DisableFuncTorch, dispatch_mode_count
from purestep._trace.program import call


def leaf_update(value: Primitive, info: Fields, g: Tensor, columns: list[Any], p: Tensor) -> tuple[Tensor, list[Any]]:
    """One leafwise transform on one parameter: its function on bare tensors. State is stored in the dtype it came in."""
    d = value.declaration
    count = lifted(columns[info.step]) if info.step >= 0 else None
    hypers = {n: evaluated(x, count) if n in d.intervals else x for n, x in value.arguments.items()}
    if d.state is None:
        u, _ = call(d, g, None, p, hypers)
        return shaped_like(g, u), [] if count is None else [advanced(columns[0], count + 1)]
    state = d.state(*[lifted(c) if scalar and c is not None else c for c, scalar in zip(columns, info.scalars)])
    u, new = call(d, g, state, p, hypers)
    pairs = zip(columns, [shaped_like(c, x) if c is not None else x for c, x in zip(columns, new)], info.scalars)
    return shaped_like(g, u), [x if c is None else advanced(c, x) if scalar else stored(c, x) for c, x, scalar in pairs]


def apart(results: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """What a leaf function returns, each tensor in memory that it shares with no other, nor with its inputs."""
    found: list[Any] = []
    if torch.compiler.is_compiling():  # no tensor has a place in memory then
        for k, x in enumerate(results):
            same = isinstance(x, Tensor) and any([x is y for y in (*given, *results[:k])])
            found.append(x.clone() if same else x)
        return found
    held = {maths.memory(x) for x in given if isinstance(x, Tensor)}
    for x in results:
        if isinstance(x, Tensor):
            if not plain([maths.bottom(x)[0]]):
                x = x.clone()  # nobody knows where it is
            elif maths.memory(x) in held or 0 in x.stride():
                x = x.clone(memory_format=torch.contiguous_format)
            held.add(maths.memory(x))
        found.append(x)
    return found


def lifted(x: Tensor) -> Tensor:
    """A counter in the precision that numbers are computed in."""
    return x.to(maths.precise(x.device))


def stored(old: Tensor, x: Any) -> Tensor:
    """The new value of a state field, in the dtype and on the device of the old; see `outgrows` for counters."""
    if isinstance(x, Tensor):
        return x if x.dtype == old.dtype else x.to(old.dtype)
    return torch.full((), x, dtype=torch.float64 if x > STOP and outgrows(old, x) else old.dtype, device=old.device)


STOP = 2.0**24
"""A float32 has every integer up to this one, and no odd one after it: 1 added to it is lost."""


def outgrows(old: Tensor, x: Any) -> bool:
    """Whether a number is a count that the counter `old` cannot hold: the counter is a float64 from then on."""
    return bool(x > STOP and old.dtype is torch.float32 and x % 1 == 0 and x != torch.tensor(x, dtype=torch.float32).item())


def advanced(old: Tensor, x: Any) -> Any:
    """`stored`, of a number in a tensor: where it can be read, a count that `old` cannot hold stays the float64 that it is."""
    if isinstance(x, Tensor) and x.dtype is torch.float64 and old.dtype is torch.float32 and outgrows(old, read(x)):
        return x
    return stored(old, x)


def read(x: Tensor) -> float:
    """A counter, or the largest of a batch of them; NaN if it may not be read: on a device, recorded, or traced."""
    if torch.compiler.is_compiling() or dispatch_mode_count() > 0 or not x.is_cpu or maths.followed(x, batches=False):
        return math.nan
    with DisableFuncTorch():
        column = maths.bottom(x)[0]
        return float((column.max() if column.dim() else column).item())


def shaped_like(like: Tensor, x: Any) -> Any:
    """What a leaf function returns in the place of a tensor, in its shape."""
    if isinstance(x, Tensor):
        return x.expand(like.shape) if x.dim() < like.dim() else x
    return torch.full_like(like, x) if like.dim() else x


def requires_grad(x: Any) -> bool:
    """Whether autograd follows any of the tensors in what a function has returned."""
    if isinstance(x, Tensor):
        return x.requires_grad
    if isinstance(x, (list, tuple)):
        return any([y.requires_grad if isinstance(y, Tensor) else requires_grad(y) for y in x if y is not None])
    return isinstance(x, dict) and any(map(requires_grad, x.values()))
