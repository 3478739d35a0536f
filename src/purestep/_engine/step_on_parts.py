"""The step cache of sharded parameters, for steps that overwrite them: on the parts that this process has.

What it assumes is written in `purestep._engine.step_cache`. A step is made without checks only after one like it was made with
all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain as flat
from typing import Any, TypeAlias

import torch
from torch import Tensor

from purestep._core.plain import plain
from purestep._engine.counters import stopped
from purestep._engine.guards import GuardCache
from purestep._engine.run import choose, one
from purestep._engine.step_cache import RepeatedStep
from purestep._executors.task import LEAF_BY_LEAF, ExecutorName

Lists: TypeAlias = "tuple[list[Any], list[Any]]"
"""Gradients and parameters."""


def on_parts(step: RepeatedStep, lists: Lists, states: list[Any], guards: GuardCache, executor: ExecutorName | None) -> bool:
    """The update of sharded parameters and states that were given away, all in place: like the last one.

    Nothing has changed if it is False.
    """
    parts = parts_of(step, lists, states, guards)
    if parts is None or executor in LEAF_BY_LEAF or choose(None) != "program":
        return False
    guard = guards.check([*flat.from_iterable(parts)])
    counters = columns_of(step, states, [(j, f) for _, j, f in step.counters])
    if guard is None or not all([one(c, "program") and type(c[0]) is Tensor and c[0].is_cpu for c in counters]):
        return False
    params, grads, *columns = parts
    executor = None if executor == "compiled" else executor  # a part that is empty here may not be so elsewhere
    counts = [c[0].item() for c in counters]
    if stopped(counters, counts):
        return False
    step.make((params, grads, columns), counters, [c[0] for c in counters], counts, (guard.facts, executor))
    homes = flat.from_iterable([lists[1], *columns_of(step, states, step.places)])
    torch.autograd.graph.increment_version([*homes, *flat.from_iterable(columns)])
    return True


def remember(step: RepeatedStep, lists: Lists, states: list[Any], guards: GuardCache) -> None:
    """Make `on_parts` take the next step, if it can: this one has been made, with all that is looked at."""
    parts = parts_of(step, lists, states, guards)
    if parts is not None and plain(*parts) and step.takes(parts[0], parts[1], parts[2:]):
        guards.install([*flat.from_iterable(parts)])


def parts_of(step: RepeatedStep, lists: Lists, states: list[Any], guards: GuardCache) -> list[list[Any]] | None:
    """The parts of sharded parameters, gradients and fields that are here; None if the step cannot be made on these."""
    grads, params = lists
    homes = columns_of(step, states, step.places)
    if torch.is_grad_enabled() and any([x.requires_grad for xs in (params, grads, *homes) for x in xs if x is not None]):
        return None
    return guards.parts([params, grads, *homes]) if step.elementwise() else None


def columns_of(step: RepeatedStep, states: list[Any], places: Sequence[tuple[int, int]]) -> list[list[Any]]:
    """Fields of the states of a plan's links: lists over the parameters."""
    return [states[step.chain.items[j][0]][f] for j, f in places]
