"""Runs of many steps: counters at 2^24, where a float32 stops, formulas at ten million steps and at a billion, caches, leaks.

`benchmarks/long_runs.py` makes the million steps themselves.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from purestep.saving import visit
from tests import processes
from tests.cases import CASES, CLASSES, Case, Options, each, each_options
from tests.problems import difference

STOP = 2.0**24
"""float32 has every integer up to this one, and 1 added to it is lost."""

SMALL = {"w": torch.tensor([[0.5, -1.0], [0.2, 0.3], [1.5, -0.4]], dtype=torch.float64), "b": torch.tensor([0.7, -0.2], dtype=torch.float64)}  # fmt: skip


def small(case: Case) -> dict[str, Tensor]:
    """A matrix and a vector, if the case treats both."""
    if "hidden.weight" in case.problem()[0]:
        return {f"hidden.{k}": p for k, p in (("weight", SMALL["w"]), ("bias", SMALL["b"])) if case.treats(p)}
    return {k: p for k, p in SMALL.items() if case.treats(p)}


def gradients(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.sin(3 * p.detach()) for k, p in params.items()}


def with_counters(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The state with another tensor in the place of each counter of updates that has begun; one that is shared stays so."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def leaf(name: str, x: Any, counts: bool = False) -> Any:
        if not isinstance(x, Tensor) or not counts or "mini_step" in name or not bool((x > 0).all()):
            return x
        if id(x) not in made:
            made[id(x)] = x, change(x)
        return made[id(x)][1]

    return visit(state, "", leaf, lambda name, history, around: history)


def counters(state: Any) -> dict[str, Any]:
    """All counters of a state as numbers, by their paths."""
    found: dict[str, Any] = {}

    def leaf(name: str, x: Any, counts: bool = False) -> Any:
        if isinstance(x, Tensor) and (counts or "n_averaged" in name):
            found[name] = x.detach().double().tolist()
        return x

    visit(state, "", leaf, lambda name, history, around: history)
    return found


def at(count: float, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.full_like(x, count, dtype=dtype or x.dtype)


# ------------------------------------------------------------------------------------------------------ counters: pure steps

MODES: tuple[Options, ...] = ({}, {"donate": True}, {"executor": "leaf"}, {"executor": "leaf", "donate": True}, {"executor": "foreach"}, {"executor": "foreach", "donate": True})  # fmt: skip


def run(t: ps.Transform, params: Any, dtype: torch.dtype | None = None, steps: int = 4, start: float = STOP - 1, **how: Any) -> Any:
    """Two steps, then some more from a count of `start` on, with counters in this dtype."""
    params, state = {k: p.clone() for k, p in params.items()}, t.init_state(params)
    for k in range(2 + steps):
        if k == 2:
            state = with_counters(state, at(start, dtype))
        params, state = t.step(gradients(params), state, params, **how)
    return params, state


def check_modes(case: Case, options: Options, modes: tuple[Options, ...]) -> None:
    t, params = case.transform(options), small(case)
    expected, state = run(t, params, torch.float64)
    for how in modes:
        found, after = run(t, params, **how)
        assert counters(after) == counters(state), how
        assert difference(found, expected) <= 1e-13, how


@each()
def test_a_count_goes_on(case: Case) -> None:
    """A float32 counter is a float64 where it cannot count on; the numbers are those of a float64 counter."""
    check_modes(case, case.options[0], MODES)


@pytest.mark.long
@each_options()
def test_a_count_goes_on_under_all_options(case: Case, options: Options) -> None:
    check_modes(case, options, MODES)
