"""Many small tensors as one.

On a CPU a small tensor costs what a call costs, about a microsecond for every operation, and not what its numbers cost. So a
program of elementwise operations is run on one long tensor instead. Gradients and parameters are copied into it and back;
the tensors of a state are made consecutive pieces of one piece of memory, once, and recognised as such afterwards.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from purestep._core.torch_api import UNFLATTENS_EMPTY, flatten_dense, foreach_add, foreach_copy_, unflatten_dense

COUNT = 16
"""From this many tensors on."""

SIZE = 4096
"""Up to this many elements in the average tensor; beyond that the copies cost more than the calls they save."""


POOL = 4
"""The buffers of so many different models are kept for the next step."""

_free: OrderedDict[Any, FlatBuffer] = OrderedDict()


def borrow(like: Sequence[Tensor], shapes: list[torch.Size]) -> FlatBuffer:
    """Buffers for tensors of these shapes and this dtype; to be given back with `give_back`."""
    found = _free.pop((like[0].dtype, len(shapes), shapes[0], shapes[-1]), None)
    return found if found is not None and found.shapes == shapes else FlatBuffer(like)


def give_back(buffer: FlatBuffer) -> None:
    """Keep these buffers for the next step, and let go of those that were not used for the longest time."""
    _free[buffer.dtype, len(buffer.shapes), buffer.shapes[0], buffer.shapes[-1]] = buffer
    with contextlib.suppress(KeyError):  # another thread may have taken the last one
        for _ in range(len(_free) - POOL):
            _free.popitem(last=False)


class FlatBuffer:
    """One long tensor, and its pieces in the shapes of some tensors."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.shapes = [x.shape for x in like]
        self.dtype = like[0].dtype
        sizes = [x.numel() for x in like]
        self.size = sum(sizes)
        self.starts = [0, *accumulate(sizes[:-1])]
        self.grads, self.grad = self.make(like)
        self.params, self.param = self.make(like)

    def make(self, like: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        flat = like[0].new_empty(self.size)
        return split(flat, like), flat

    def joined(self, xs: Sequence[Tensor]) -> Tensor | None:
        """The one tensor that these are the consecutive pieces of, if there is one."""
        first = xs[0]
        width, start = first.element_size(), first.data_ptr()
        if list(map(Tensor.data_ptr, xs)) != [start + width * k for k in self.starts]:
            return None
        memory = first.untyped_storage()
        if start + width * self.size > memory.data_ptr() + memory.nbytes():
            return None
        return first.as_strided((self.size,), (1,))

    def join(self, xs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The same numbers as pieces of one new tensor."""
        pieces, flat = self.make(xs)
        foreach_copy_(pieces, list(xs))
        return pieces, flat


def joined(xs: Sequence[Tensor]) -> Tensor:
    """All of them as one new vector."""
    flat: Tensor = flatten_dense(xs)  # type: ignore[no-untyped-call]
    return flat


def split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive pieces of one long tensor, in the shapes of these."""
    pieces: Sequence[Tensor] = unflatten_dense(flat, like)  # type: ignore[no-untyped-call]
    return list(pieces) if UNFLATTENS_EMPTY else [x if x.numel() else x.view(y.shape) for x, y in zip(pieces, like)]


def apart(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Consecutive pieces of one long tensor, in these shapes, as tensors that are no views: each has a version of its own."""
    storage, start, pieces = flat.untyped_storage(), 0, []
    for shape in shapes:
        pieces.append(flat.new_empty(0).set_(storage, start, shape))  # type: ignore[call-overload]
        start += shape.numel()
    return pieces


def offset(xs: Sequence[Tensor], flat: Tensor, k: float) -> list[Tensor]:
    """`xs` plus `k` times the consecutive pieces of one long tensor."""
    return list(foreach_add(list(xs), split(flat, xs), alpha=k))


def small(xs: Sequence[Tensor]) -> bool:
    """Whether these are many small tensors, each in one piece."""
    return (
        len(xs) >= COUNT
        and xs[0].is_cpu
        and sum(map(Tensor.numel, xs)) <= SIZE * len(xs)
        and all(map(Tensor.is_contiguous, xs))
    )
