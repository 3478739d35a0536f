"""What is given away is what was given away: results of a pure step share no memory with what went into it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps


def nan_if(bad: bool) -> dict[str, Tensor]:
    return {"a": torch.full((3,), torch.nan if bad else 1.0), "b": torch.ones(2)}


OPTS: dict[str, ps.Transform] = {
    "skip": ps.skip_if_nonfinite(ps.adam(0.1)),
    "accumulate": ps.accumulate(ps.sgd(0.1, momentum=0.9), 3),
    "conditionally": ps.conditionally(lambda step: step % 2 == 0, ps.adam(0.1), otherwise="zero"),
    "lookahead": ps.lookahead(ps.sgd(0.1), k=2),
    "frozen": ps.chain(ps.adam(0.1), ps.freeze(lambda path, p: path == "a")),
    "masked": ps.masked(ps.adamw(0.1), False),
    "averages": ps.chain(ps.sgd(0.1), ps.ema_params(0.9)),
    "madgrad": ps.madgrad(0.1),
    "prodigy": ps.prodigy(),
    "nothing": ps.chain(),
    "kernel": ps.adamw(0.1),
}


def memory(tree: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)}


@pytest.mark.parametrize("executor", [None, "leaf", "foreach", "compiled"])
@pytest.mark.parametrize("grads", ["good", "not finite", "missing"])
@pytest.mark.parametrize("name", OPTS)
@pytest.mark.in_turn("executor")
def test_the_best_parameters_so_far_stay_the_best(name: str, grads: str, executor: Any) -> None:
    """Early stopping: `best` is what a pure step returned; the steps after it give their own results away."""
    opt = OPTS[name]
    params = {"a": torch.ones(3), "b": torch.ones(2)}
    first = params
    state = opt.init_state(params)
    given = {"good": nan_if(False), "not finite": nan_if(True), "missing": {**nan_if(False), "a": None}}[grads]
    if executor == "compiled" and (name != "kernel" or grads != "missing"):
        pytest.skip("one compilation is enough: the copies are made after the executors have run")
    for _ in range(2):
        before = (given, state, params)
        params, state = opt.step(given, state, params, executor=executor)
        assert memory((params, state)).isdisjoint(memory(before))
    best, best_state = params, state
    kept = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (best, best_state))
    start = pytree.tree_map(torch.clone, first)
    params, state = opt.step(given, state, params, executor=executor)
    for _ in range(3):
        params, state = opt.step(given, state, params, donate=True, executor=executor)
    torch.testing.assert_close((best, best_state), kept, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(first, start, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTS)
def test_updates_share_no_memory_with_gradients_and_state(name: str) -> None:
    opt, params = OPTS[name], {"a": torch.ones(3), "b": torch.ones(2)}
    state, grads = opt.init_state(params), nan_if(False)
    for executor in (None, "leaf", "foreach"):
        updates, after = opt.update(grads, state, params, executor=executor)
        assert memory(updates).isdisjoint(memory((grads, state, after, params)))


def test_counters_stay_one_tensor() -> None:
    """Copies too: parameters that count alike share a counter, also where some of them have no gradient."""
    opt, params = ps.adam(0.1), {k: torch.ones(2) for k in "abcd"}
    state = opt.init_state(params)
    _, state = opt.step({"a": torch.ones(2), "b": torch.ones(2), "c": None, "d": None}, state, params)
    steps = ps.find(state, ps.AdamState).step
    assert steps["a"] is steps["b"]
    assert steps["c"] is steps["d"]
    assert [int(x) for x in steps.values()] == [1, 1, 0, 0]


def test_a_mask_that_selects_nothing_writes_nothing() -> None:
    t = ps.masked(ps.dog(), False)
    grads, params = {"a": torch.full((3,), 2.0)}, {"a": torch.ones(3)}
    t.step(grads, t.init_state(params), params)
    assert grads["a"].tolist() == [2, 2, 2]
