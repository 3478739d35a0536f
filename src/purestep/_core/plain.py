"""Which tensors the fast ways are right for: the one rule, which all of them ask.

A tensor is *plain* if its type is exactly `torch.Tensor` or `torch.nn.Parameter`. What is fast here takes more for granted
than a tensor promises, and only of plain tensors are all of these true and tested:

* lists (`purestep._trace.foreach`): an operation on a list is that operation on each of its tensors, and nobody asks to see
  them one by one; a list that is written to is written, whatever else is in it.
* `purestep._executors.packed`: ``data_ptr`` is where the numbers are, storages and strides say how they lie there, and
  consecutive pieces of one tensor can be parameters of their own.
* `purestep._executors.tiles`, `purestep._executors.compiled`: ``view(-1)`` and `torch.split` of a contiguous tensor share its
  memory, and a pointer can be handed to a kernel.
* torch's fused kernels: the same, and a dtype that the kernel is known to be right for
  (`purestep._executors.chains.Kernel.computes`).
* below autograd (`purestep._executors`, `purestep._engine.step_cache`): nothing above the backend has to see an operation.
* remembered steps (`purestep._engine.step_cache`, `purestep._engine.guards`): what is the same object is the same memory.
  `torch.compile`'s guards ask for exact types, so what they know to be plain is.

None of it is true of a `DTensor`, of a tensor whose numbers are kept in few bits, or of a subclass that watches what is
done to it, as a user's own may. The engine runs such tensors by themselves, in operations of torch's that anyone could call:
`Task.odd` in `purestep._executors.task`. What is sharded is the concern of `purestep._core.sharded`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep._core.torch_api import DisableTorchFunctionSubclass, FakeTensor, FunctionalTensor, dispatch_mode_count

PLAIN = frozenset({Tensor, torch.nn.Parameter})

TRACED = PLAIN | {FakeTensor, FunctionalTensor}
"""While an operation is traced these stand for plain tensors."""

dispatch = operator.attrgetter("__torch_dispatch__")


def bare(x: Any) -> Any:
    """A number that was found in a tensor as a plain tensor, if it is one but for how Python sees it."""
    if isinstance(x, Tensor) and type(x) not in TRACED and dispatch(type(x)) is dispatch(Tensor):
        with DisableTorchFunctionSubclass():
            return x.as_subclass(Tensor)
    return x


def plain(*lists: Sequence[Any], optional: bool = False) -> bool:
    """Whether all that is in these lists are plain tensors; with `optional`, or None."""
    if torch.compiler.is_compiling():  # which cannot make a set of types
        return all([(x is None and optional) or type(x) in TRACED for xs in lists for x in xs])
    types = set().union(*[map(type, xs) for xs in lists])
    if types <= PLAIN:
        return True
    if optional:
        types.discard(type(None))
    return types <= (TRACED if dispatch_mode_count() else PLAIN)
