"""Whether tensors are what they were when they were last looked at.

To ask 800 tensors for their types, dtypes, shapes and strides takes a good part of the time that their update takes.
`torch.compile` asks the same of its arguments at every call, in C++, and these are its guards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.torch_api import TensorGuards
from purestep._engine.counters import ordinary, spans

MISSES = 4
"""To learn what tensors look like costs as much as to look at them; what has changed so many times is not learnt again."""


class Look(NamedTuple):
    """What some tensors look like: their types, dtypes, devices, layouts, shapes and strides, and what follows them.

    None of them is kept alive.
    """

    guards: TensorGuards
    number: int
    grad: bool  # whether grad mode was on
    plain: bool  # for whoever looks to say what was found
    facts: dict[Any, Any] | None  # what is known of tensors that look so: see `purestep._executors.task.Task.facts`

    @classmethod
    def unknown(cls) -> Look:
        """Of nothing, with no facts."""
        return cls(TensorGuards(dynamic_dims_sizes=None, dynamic_dims_strides=None), 0, False, False, None)

    def fits(self, tensors: Sequence[object]) -> bool:
        """Whether these are as many and look the same, one by one, in the same surroundings; not if one is there twice."""
        same = len(tensors) == self.number and torch.is_grad_enabled() is self.grad
        return same and bool(self.guards.check(*tensors))


class Looks:
    """What the tensors of one call after the other look like."""

    __slots__ = ("last", "misses", "spans")

    def __init__(self) -> None:
        self.last: Look | None = None
        self.misses = 0
        self.spans: dict[int, tuple[list[int], Tensor]] = {}

    def span(self, k: int, counters: Sequence[Any]) -> Tensor | None:
        """The `k`-th list of counters as one vector, if they follow each other in memory; remembered by their addresses."""
        try:
            addresses = list(map(Tensor.data_ptr, counters))
        except TypeError:  # there is something else among them
            return None
        known = self.spans.get(k)
        if known is not None and known[0] == addresses and counters[0].dtype is known[1].dtype:
            return known[1]
        vectors = spans(counters) if ordinary(counters) and not counters[0].requires_grad else []
        if len(vectors) != 1:
            return None
        self.spans[k] = addresses, vectors[0]
        return vectors[0]

    def fit(self, tensors: Sequence[object]) -> Look | None:
        """What was learnt last, if these look like that."""
        found = self.last  # which another thread may exchange
        if found is None or not found.fits(tensors):
            return None
        self.misses = 0
        return found

    def learn(self, tensors: Sequence[Tensor], plain: bool = False) -> Look | None:
        """Keep in mind what these look like, if it is not the first time that nothing was known: there may be no second."""
        self.misses += 1
        if 1 < self.misses <= MISSES:
            guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            self.last = Look(guards, len(tensors), torch.is_grad_enabled(), plain, {})
            return self.last
        return None
