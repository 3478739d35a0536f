"""Lists of tensors: put together, taken apart, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep._core.matrices import MatrixForm
from purestep._core.plain import plain
from purestep._core.torch_api import foreach_clone, foreach_copy_, is_non_overlapping_and_dense


def flattened(xs: list[Tensor]) -> Tensor:
    """Tensors one after the other, as one vector."""
    return torch.cat([x.reshape(-1) for x in xs])


def parted(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    """One vector as tensors in the shapes of these: `flattened` undone."""
    return [x.view(p.shape) for x, p in zip(torch.split(flat, [p.numel() for p in like]), like)]


def widest(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> torch.dtype:
    """The dtype that all of these promote to."""
    for x in tensors:
        if x is not None and x.dtype != dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def alike(values: list[Any]) -> bool:
    """Whether all are equal."""
    return values.count(values[0]) == len(values)


def clones(xs: list[Tensor]) -> list[Tensor]:
    return list(foreach_clone(xs)) if plain(xs) else [x.clone() for x in xs]


def first_places(values: Sequence[Any]) -> list[int]:
    """For each value, where the same object stands first."""
    return [next(j for j, y in enumerate(values) if y is x) for x in values]


def pick(values: list[Any], rows: Sequence[int] | None) -> list[Any]:
    return values if rows is None else [values[k] for k in rows]


def put(values: list[Any], rows: Sequence[int], new: Iterable[Any]) -> list[Any]:
    result = list(values)
    for k, x in zip(rows, new):
        result[k] = x
    return result


def cast(xs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x if x.dtype == dtype else x.to(dtype) for x in xs]


def overwrite(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    if plain(old, new):
        foreach_copy_(old, new)
    else:
        for x, y in zip(old, new):
            x.copy_(y)
    return old


def real(xs: list[Any]) -> list[Any]:
    """Complex tensors as their real and imaginary parts, in a last dimension of 2 and the same memory."""
    return [torch.view_as_real(x) if x is not None and x.is_complex() else x for x in xs]


def imaginary(xs: list[Any]) -> list[Any]:
    return [x if x is None else torch.view_as_complex(x) for x in xs]


def same_layout(tensors: Sequence[Tensor]) -> bool:
    """Whether the same element stands at the same place in the memory of all of them, with no gaps."""
    strides = tensors[0].stride()
    return all([t.stride() == strides for t in tensors]) and is_non_overlapping_and_dense(tensors[0].shape, strides)


STACK = 2**22
"""At most this many elements are stacked."""


def in_stacks(function: Callable[..., Tensor], x: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """Apply a function that takes stacks of matrices to every tensor of a list: to all matrices of one shape at once.

    Where the function sees each tensor as several matrices (`MatrixForm`), these are put into one stack with the others.
    """
    form: MatrixForm | None = getattr(function, "form", None)
    inside = function if form is None else function.plain  # type: ignore[attr-defined]  # see `viewed` in maths
    views = [t if form is None else form.apart(t) for t in x]
    groups: dict[Any, list[int]] = {}
    for k, t in enumerate(views):
        groups.setdefault((t.shape if form is None else t.shape[-2:], t.dtype, t.device), []).append(k)
    found: dict[int, Tensor] = {}
    for ks in groups.values():
        for part in parts([views[k].numel() for k in ks], STACK):
            rows = [ks[i] for i in part]
            if len(rows) == 1:
                made = [inside(views[rows[0]], *rest)]
            elif form is None:
                made = list(inside(torch.stack([views[k] for k in rows]), *rest).unbind())
            else:
                made = list(inside(torch.cat([views[k] for k in rows]), *rest).split([len(views[k]) for k in rows]))
            found.update(zip(rows, made))
    return [found[k] if form is None else form.together(found[k], t.shape) for k, t in enumerate(x)]


def parts(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive numbers of things, in parts that are no larger than `most` together, but have one at least."""
    found: list[list[int]] = []
    filled = most
    for k, size in enumerate(sizes):
        if not found or filled + size > most:
            found.append([])
            filled = 0
        found[-1].append(k)
        filled += size
    return found
