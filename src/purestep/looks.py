"""Whether tensors are what they were when they were last looked at.

To ask 800 tensors for their types, dtypes, shapes and strides takes as long as to update them. `torch.compile` asks the same of
its arguments at every call, in C++, and these are its guards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

MISSES = 4
"""To learn what tensors look like costs as much as to look at them; what has changed so many times is not learnt again."""


class Looks:
    """What some tensors look like: their types, dtypes, devices, layouts, shapes and strides, and what follows them.

    None of them is kept alive.
    """

    __slots__ = ("count", "grad", "guards", "misses", "plain")

    def __init__(self) -> None:
        self.guards: Any = None
        self.misses = 0
        self.plain = False  # for whoever looks to say what was found

    def fit(self, tensors: Sequence[object]) -> bool:
        """Whether these are as many and look the same, one by one, in the same surroundings; not if one is there twice."""
        if self.guards is None or len(tensors) != self.count or torch.is_grad_enabled() is not self.grad:
            return False
        if not self.guards.check(*tensors):
            return False
        self.misses = 0
        return True

    def learn(self, tensors: Sequence[Tensor], plain: bool = False) -> None:
        """Keep in mind what these look like."""
        if self.misses < MISSES:
            self.misses += 1
            self.count, self.grad, self.plain = len(tensors), torch.is_grad_enabled(), plain
            self.guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
