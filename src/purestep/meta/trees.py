"""Pytrees of what a function returns, at each of many calls: taken apart, copied, and put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from purestep._core import tree
from purestep._core.torch_api import TreeSpec, tree_map, tree_unflatten

PyTree = Any
T = TypeVar("T")

GAP = object()
"""The place of a tensor in a list of leaves."""


def refilled(others: list[Any], tensors: Sequence[Tensor], spec: TreeSpec) -> PyTree:
    """A pytree of these tensors, and of what else there was in the places between them."""
    rest = iter(tensors)
    return tree_unflatten([next(rest) if x is GAP else x for x in others], spec)


def copies(buffers: T) -> T:
    """The same pytree with tensors of its own memory. What is one tensor in several places stays one."""
    made: list[tuple[Tensor, Tensor]] = []  # not by id, which torch 2.9 cannot compile

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        for old, new in made:
            if old is x:
                return new
        made.append((x, x.clone()))
        return made[-1][1]

    return tree_map(copy, buffers)


def together(trees: Sequence[PyTree], join: Callable[[list[Tensor]], Tensor], name: str) -> PyTree:
    """Pytrees of consecutive calls, or of consecutive segments of them, as one: tensors are joined, and numbers are tensors.

    Raises:
        ValueError: structures or shapes differ.
        TypeError: there is something else in them.
    """
    first, spec = tree.flatten(trees[0])
    columns = [[x] for x in first]
    for other in trees[1:]:
        leaves = tree.flatten_like(other, spec, name, "those of the first time")
        for column, x in zip(columns, leaves):
            column.append(x)
    start = 1 if join is torch.cat else 0
    made: list[Any] = []
    for column, path in zip(columns, spec.paths()):
        like = next((x for x in column if isinstance(x, Tensor)), None)
        if all([x is None for x in column]):
            made.append(None)
            continue
        for x in column:
            if not isinstance(x, (Tensor, bool, int, float, complex)):
                raise TypeError(f"{name} must be tensors or numbers, but {tree.quote(path)} is {x!r}.")
        if like is None:
            made.append(torch.tensor(column))
            continue
        tensors = [x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in column]
        shapes = list(dict.fromkeys([tuple(x.shape[start:]) for x in tensors]))
        if len(shapes) > 1:
            raise ValueError(
                f"{name} must have the same shape every time, but {tree.quote(path)} has {shapes[0]} and {shapes[1]}. "
                "Return its mean or sum."
            )
        made.append(join(tensors))
    return tree.unflatten(made, spec)


def differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())
