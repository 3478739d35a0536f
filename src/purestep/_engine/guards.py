"""Guards: whether tensors are what they were in an earlier call.

To ask 800 tensors for their types, dtypes, shapes and strides takes a good part of the time of their update. `torch.compile`
asks the same of its arguments at every call, in C++, and these are its guards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.sharded import partial, spread_alike
from purestep._core.torch_api import TensorGuards
from purestep._engine.counters import ordinary, spans

MISSES = 4
"""To install a guard costs as much as to check the tensors, so after this many misses in a row none is installed any more."""


def alike(x: Any, p: Any) -> bool:
    """Whether a sharded tensor is of the shape of a parameter, and spread as it is."""
    return x.shape == p.shape and spread_alike(x, p)


class Guard(NamedTuple):
    """The types, dtypes, devices, layouts, shapes and strides of some tensors, and what follows from them.

    It keeps no tensor alive.
    """

    guards: TensorGuards
    number: int
    grad: bool  # whether grad mode was on
    facts: dict[Any, Any]  # what is known of tensors that look so: see `purestep._executors.task.Task.facts`

    def matches(self, tensors: Sequence[object]) -> bool:
        """Whether these tensors have, one by one, the same types, dtypes, devices, shapes and strides; in the same grad mode.

        A tensor that is there twice never matches.
        """
        same = len(tensors) == self.number and torch.is_grad_enabled() is self.grad
        return same and bool(self.guards.check(*tensors))


class GuardCache:
    """The guard of the tensors of the last call."""

    __slots__ = ("last", "misses", "spans", "specs")

    def __init__(self) -> None:
        self.last: Guard | None = None
        self.misses = 0
        self.spans: dict[int, tuple[list[int], Tensor]] = {}
        self.specs: list[list[Any]] = []  # how sharded tensors were spread: torch's descriptions, which hold no tensor

    def parts(self, lists: Sequence[list[Any]]) -> list[list[Any]] | None:
        """The parts of sharded tensors that this process has; None if some are not spread as the parameters are.

        Args:
            lists: the parameters, and lists of what is spread as they are.
        """
        params, specs, parts = lists[0], [], []
        try:
            for xs in lists:
                specs.append([x._spec for x in xs])  # twice as fast as `map` with an `attrgetter`
                parts.append([x._local_tensor for x in xs])
        except AttributeError:  # some are not sharded
            return None
        if specs != self.specs:  # objects are compared only where they are not the same
            if any(map(partial, params)) or not all([all(map(alike, xs, params)) for xs in lists]):
                return None
            self.specs = specs
        return parts

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

    def check(self, tensors: Sequence[object]) -> Guard | None:
        """The guard that was installed last, if it matches these tensors."""
        found = self.last  # which another thread may exchange
        if found is None or len(tensors) != found.number or torch.is_grad_enabled() is not found.grad:
            return None
        if not found.guards.check(*tensors):
            return None
        self.misses = 0
        return found

    def install(self, tensors: Sequence[Tensor]) -> Guard | None:
        """Install a guard for these tensors, on the second miss, so that one-off calls do not pay for it.

        Returns:
            the guard, or None.
        """
        self.misses += 1
        if 1 < self.misses <= MISSES:
            guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            self.last = Guard(guards, len(tensors), torch.is_grad_enabled(), {})
            return self.last
        return None
