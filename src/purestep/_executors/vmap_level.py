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

    def stacked(self, x: Tensor) -> Tensor | None:
        """A tensor with the batch in its first dimension; None if it is not batched, not plain, or autograd follows it."""
        if not is_batched(x):
            return None
        inside, dim = get_unwrapped(x), batch_dim_of(x)
        if not plain([inside]):
            return None
        if torch.is_grad_enabled() and inside.requires_grad:
            return None
        return (inside.movedim(dim, 0) if dim else inside).contiguous()

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

    def batched(self, x: Tensor) -> Tensor:
        """A stacked tensor as one of this level."""
        made: Tensor = add_batch_dim(x, 0, self.number)
        return made
