"""Counters, schedules and hyperparameters as the numbers that a program takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep._core import maths
from purestep._core.primitives import Primitive, evaluated, single, users
from purestep._core.torch_api import DisableFuncTorch, dispatch_mode_count
from purestep._core.values import Schedule
from purestep._executors.chains import FusedChain
from purestep._executors.leaf_function import advanced, lifted, stored
from purestep._executors.task import Env


class Numbers:
    """The numbers of one call: each counter is read once, and each schedule called once for a counter."""

    __slots__ = ("env", "keeps", "made", "read", "scheduled")

    def __init__(self, env: Env) -> None:
        self.env = env
        self.read: dict[int, Any] = {}  # counters as numbers, by identity
        self.scheduled: dict[Any, tuple[Any, Any]] = {}  # a counter and what a schedule gives there, by identity
        self.made: dict[Any, Tensor] = {}  # numbers as counters
        self.keeps = False  # whether schedules have been called before the chain runs

    def number(self, x: Tensor) -> Any:
        """A counter as a number: a float if it is on the CPU, else a tensor in the precision numbers are computed in."""
        if self.env.mode == "traced" or torch.compiler.is_compiling():
            return lifted(x)
        found = self.read.get(id(x))
        if found is None:
            found = self.read[id(x)] = self._read(x)
        return found

    def _read(self, x: Tensor) -> Any:
        if not x.is_cpu:
            return lifted(x)
        if self.env.mode == "program":
            return x.item()
        if dispatch_mode_count() > 0 or maths.followed(x):
            value = None if self.env.level is None else self.env.level.read(x)
            return value if isinstance(value, float) else lifted(x)
        with DisableFuncTorch():  # nothing that is running has anything to do with this tensor
            return maths.bottom(x)[0].item()

    def equal(self, counters: list[Any]) -> bool:
        """Whether these are the same number for each member of a batch."""
        level = self.env.level
        if level is None or counters[0] is None:
            return False
        first, *others = [level.read(x) for x in counters]
        if not isinstance(first, Tensor):
            return first is not None and all([not isinstance(x, Tensor) and x == first for x in others])
        with DisableFuncTorch():
            return all([isinstance(x, Tensor) and torch.equal(x, first) for x in others])

    def counted(self, old: Tensor, x: Any) -> Tensor:
        """The new value of a field; equal numbers are one tensor."""
        if isinstance(x, Tensor):
            return advanced(old, x)
        key = (x, old.dtype, old.device)
        found = self.made.get(key)
        if found is None:
            found = self.made[key] = stored(old, x)
        return found

    def of_chain(self, chain: FusedChain, fields: Any) -> list[Any]:
        """The hyperparameters of a chain in order, as the arguments of a program."""
        if chain.numbers is not None:
            return chain.numbers
        found: list[Any] = []
        for (_, value, info), own in zip(chain.items, fields):
            count = own[info.step][0] if info.step >= 0 else None
            for name in value.declaration.hypers:
                x = value.arguments[name]
                if type(x) is float:
                    found.append(x)
                    continue
                x = self.lower(x, count)
                found += x if isinstance(x, tuple) else () if x is None else (x,)
        return found

    def lower(self, x: Any, count: Tensor | None) -> Any:
        """A hyperparameter as a program takes it; `count` is the counter that schedules are called with."""
        if isinstance(x, tuple):
            return tuple([y if type(y) is float else self.lower(y, count) for y in x])
        if isinstance(x, Schedule):
            return self.lower(self._at(x, count), count)
        if isinstance(x, Tensor):
            single(x)
            if x.requires_grad and self.env.watched:
                self.env.record()
            return x.item() if self.env.mode == "program" and x.is_cpu else x.reshape(()) if x.dim() else x
        return x

    def _at(self, x: Schedule, count: Tensor | None) -> Any:
        """What a schedule gives at this counter."""
        key = None if torch.compiler.is_compiling() else (id(x), id(count))
        found = self.scheduled.get(key)
        if found is None:
            step = 0 if count is None else self.number(count)
            found = count, x(int(step) if isinstance(step, float) else step)
            if key is not None and (self.keeps or self.env.watched):
                self.scheduled[key] = found
        return found[1]

    def evaluate(self, value: Primitive, counters: Sequence[Any]) -> None:
        """Call the schedules among a transform's hyperparameters, before anything is overwritten."""
        if not torch.compiler.is_compiling():
            counters = list({id(x): x for x in counters}.values())
        for count in counters:
            for name in value.declaration.intervals:
                self.lower(value.arguments[name], count)

    def rehearse(self, value: Primitive, counters: Sequence[Any]) -> None:
        """Call the schedules of a user's among a transform's hyperparameters, before anything is overwritten."""
        self.keeps = True
        for count in {id(x): x for x in counters if x is not None}.values():
            for name in value.declaration.intervals:
                x = value.arguments[name]
                if users(x):
                    self.lower(x, count) if self.env.mode == "program" else evaluated(x, lifted(count))
