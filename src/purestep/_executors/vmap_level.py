"""The innermost level of `torch.func`, if it is a vmap that can be stepped out of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from purestep._core.plain import plain
from purestep._core.torch_api import (
    DisableFuncTorch,
    TransformType,
    VmapInterpreter,
    add_batch_dim,
    batch_dim_of,
    dispatch_mode_count,
    function_mode_count,
    get_unwrapped,
    interpreter_stack,
    is_batched,
)


class VmapLevel(NamedTuple):
    """The innermost level of `torch.func`, a vmap around nothing but eager operations."""

    number: int
    size: int

    @classmethod
    def now(cls) -> VmapLevel | None:
        """None if there is no such level, or if something else looks on."""
        if torch.compiler.is_compiling():
            return None
        stack = interpreter_stack()
        if (
            stack is None
            or len(stack) != 1
            or stack[0].key() != TransformType.Vmap
            or forward_ad._current_level >= 0
            or dispatch_mode_count() > 0
            or function_mode_count() > 0
        ):
            return None
        return cls(stack[0].level(), VmapInterpreter(stack[0]).batchSize())

    def stacked(self, xs: list[Tensor]) -> list[Tensor] | None:
        """Tensors with the batch in their first dimension; None if one is not batched, not plain, or autograd follows it."""
        if not all(map(is_batched, xs)):
            return None
        inside: list[Tensor] = list(map(get_unwrapped, xs))
        if not plain(inside) or (torch.is_grad_enabled() and any([x.requires_grad for x in inside])):
            return None
        dims: list[int] = list(map(batch_dim_of, xs))
        if any(dims):
            inside = [x.movedim(dim, 0) for x, dim in zip(inside, dims)]
        return list(map(Tensor.contiguous, inside))

    def read(self, x: Any) -> Any:
        """A number: as it is, or a tensor of one for each member if they differ; None if they cannot be known."""
        if not isinstance(x, Tensor):
            return x
        column = get_unwrapped(x) if is_batched(x) else x
        if not column.is_cpu or (torch.is_grad_enabled() and column.requires_grad) or x.dim():
            return None
        with DisableFuncTorch():
            values = column.tolist()
        if not isinstance(values, list):
            return values
        return values[0] if values.count(values[0]) == len(values) else column

    def batched(self, x: Any) -> Any:
        """Stacked tensors as those of this level; anything else as it is."""
        if isinstance(x, Tensor):
            return add_batch_dim(x, 0, self.number)
        return [add_batch_dim(y, 0, self.number) for y in x] if isinstance(x, (list, tuple)) else x
