"""What the algorithms have of their own that see all parameters, average them, or ask for more than gradients."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import purestep as ps
from purestep import optim
from tests import cases_modern
from tests.case import Case
from tests.cases_methods import CASES, Given
from tests.problems import clone, difference, grads, mlp

ALGORITHMS = [case for case in (*cases_modern.CASES, *CASES) if case.step is None and not isinstance(case.transform(), Given)]


@pytest.mark.parametrize("case", ALGORITHMS, ids=str)
def test_the_stateful_optimizer_is_the_pure_one(case: Case) -> None:
    """Under `optim.Optimizer`, saved and loaded on the way."""
    t = case.transform()
    params, loss = case.problem()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer, state = optim.Optimizer(leaves.values(), t), t.init_state(params)
    for k in range(6):
        if k == 3:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = optim.Optimizer(leaves.values(), t)
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        loss(leaves).backward()
        optimizer.step()
        params, state = t.step(grads(loss, params), state, params)
    assert difference({name: p.detach() for name, p in leaves.items()}, params) <= 1e-13


WITH_CLOSURE: dict[str, ps.Transform] = {
    "polyak_sgd": ps.polyak_sgd(0.5),
    "sam": ps.chain(ps.sam(0.1), ps.sgd(0.1, momentum=0.9)),
    "adaptive sam": ps.chain(ps.sam(0.5, adaptive=True), ps.adam(0.01)),
    "line search": ps.chain(ps.sgd(2.0), ps.scale_by_backtracking_linesearch(decrease_factor=0.5, increase_factor=4.0)),
}


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("t", WITH_CLOSURE.values(), ids=WITH_CLOSURE)
def test_a_closure_gives_what_they_ask_for(t: ps.Transform, set_to_none: bool) -> None:
    params, loss = mlp()
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer, state = optim.Optimizer(leaves.values(), t), t.init_state(params)

    def closure() -> Any:
        optimizer.zero_grad(set_to_none=set_to_none)
        value = loss(leaves)
        value.backward()
        return value

    def value_and_grad(p: Any) -> Any:
        return loss(p), grads(loss, p)

    for _ in range(4):
        optimizer.step(closure)
        known = {"value": loss(params), "value_and_grad": value_and_grad}
        extras = {name: known[name] for name in t.plan.extras}
        params, state = t.step(grads(loss, params), state, params, **extras)
    assert difference({name: p.detach() for name, p in leaves.items()}, params) <= 1e-13


BEGUN = {
    "schedule_free": ps.schedule_free_sgd(0.1),
    "dog": ps.dog(reps_rel=0.1),
    "ldog": ps.ldog(reps_rel=0.1),
    "prodigy": ps.prodigy(d0=0.01),
}


@pytest.mark.parametrize("t", BEGUN.values(), ids=BEGUN)
def test_weights_loaded_before_the_first_step_are_the_first(t: ps.Transform) -> None:
    """A state that remembers the first parameters remembers those of the first step, whenever the optimizer was made."""
    params, loss = mlp()
    leaves = {name: torch.zeros_like(p).requires_grad_() for name, p in params.items()}
    optimizer, state = optim.Optimizer(leaves.values(), t), t.init_state(params)
    with torch.no_grad():
        for name, p in leaves.items():
            p.copy_(params[name])
    for _ in range(4):
        optimizer.zero_grad()
        loss(leaves).backward()
        optimizer.step()
        params, state = t.step(grads(loss, params), state, params)
    assert difference({name: p.detach() for name, p in leaves.items()}, params) <= 1e-14


# ----------------------------------------------------------------------------------------------------------- schedule-free


@pytest.mark.parametrize("momentum", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_what_is_evaluated_is_the_average_of_z(momentum: float, dtype: torch.dtype) -> None:
    """x is the mean of all z, weighted with the squares of the learning rates, and y lies between them."""
    t, p = ps.chain(ps.clip(5.0), ps.schedule_free(0.1, momentum, warmup_steps=4)), {"a": torch.ones(3, dtype=dtype)}
    state, y, total, weights = t.init_state(p), p, torch.zeros(3, dtype=dtype), 0.0
    for k in range(8):
        g = {"a": torch.randn(3, dtype=dtype)}
        y, state = t.step(g, state, y)
        weight = (0.1 * min(1, (k + 1) / 4)) ** 2
        total, weights = total + weight * state[1].z["a"], weights + weight
        x = ps.eval_params(state, y)["a"]
        torch.testing.assert_close(x, total / weights)
        torch.testing.assert_close(y["a"], momentum * x + (1 - momentum) * state[1].z["a"])


def test_parameters_without_an_update_are_evaluated_as_they_are() -> None:
    t = ps.masked(ps.schedule_free_sgd(0.1), lambda path, p: path != "frozen")
    p = {"a": torch.ones(2), "late": torch.ones(2), "frozen": torch.ones(2)}
    state = t.init_state(p)
    p, state = t.step({"a": torch.ones(2), "late": None, "frozen": torch.zeros(2)}, state, p)
    x = ps.eval_params(state, p)
    assert x["late"] is p["late"] or torch.equal(x["late"], p["late"])
    assert torch.equal(x["frozen"], p["frozen"])


# ------------------------------------------------------------------------------------------------------------ line searches


def test_the_line_search_finds_what_armijo_asks_for() -> None:
    """From any length of the first step, up to the last trial; every member of a batch on its own."""
    c, most = 0.2, 12
    t = ps.chain(
        ps.sgd(1.0), ps.scale_by_backtracking_linesearch(most, slope_rtol=c, decrease_factor=0.5, max_learning_rate=64.0)
    )
    params, loss = mlp()

    def value_and_grad(p: Any) -> Any:
        gradient, value = torch.func.grad_and_value(loss)(p)
        return value, gradient

    def step(lr: Tensor) -> Any:
        state = t.init_state(params)
        state = (*state[:-1], state[-1]._replace(learning_rate=lr))
        f, g = value_and_grad(params)[0], value_and_grad(params)[1]
        new, after = t.step(g, state, params, value_and_grad=value_and_grad)
        square = sum((x**2).sum() for x in g.values())
        return f - loss(new) - c * after[-1].learning_rate * square, after[-1].evaluations

    lrs = torch.tensor([0.01, 1.0, 40.0], dtype=torch.float64)
    slack, evaluations = torch.func.vmap(step)(lrs)
    assert (slack >= 0).all()
    for k in range(3):
        alone = step(lrs[k])
        torch.testing.assert_close(alone[0], slack[k])
        assert alone[1] == evaluations[k]
    assert evaluations[0] == 1
    assert evaluations[2] > 3


def test_a_search_that_finds_no_finite_loss_makes_no_step_and_goes_on() -> None:
    t = ps.chain(ps.sgd(1.0), ps.scale_by_backtracking_linesearch(2, decrease_factor=0.5))
    p = torch.tensor([1.0])
    state = t.init_state(p)

    def value_and_grad(x: Tensor) -> Any:
        return torch.where(x[0] == 1.0, 1.0, math.inf), torch.ones_like(x)

    p, state = t.step(torch.ones(1), state, p, value_and_grad=value_and_grad)
    assert p == 1.0
    assert state[-1].learning_rate == 0.25
    p, _ = t.step(torch.ones(1), state, p, value_and_grad=lambda x: (x[0], torch.ones_like(x)))
    assert p == 1.0 - 0.375


def test_sam_holds_parameters_without_a_gradient_fixed() -> None:
    seen = []

    def value_and_grad(p: Any) -> Any:
        seen.append(clone(p))
        return sum((x**2).sum() for x in p.values()), {k: 2 * x for k, x in p.items()}

    t, p = ps.sam(1.0), {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    updates, _ = t.update({"a": torch.tensor([0.3, 0.4]), "b": None}, t.init_state(p), p, value_and_grad=value_and_grad)
    torch.testing.assert_close(seen[0], {"a": torch.tensor([3.6, 4.8]), "b": torch.tensor([1.0])})
    torch.testing.assert_close(updates["a"], torch.tensor([7.2, 9.6]))
    assert updates["b"] is None


# ------------------------------------------------------------------------------------------------------------------ sophia


def quartic(p: Any) -> Tensor:
    """With a Hessian that is diagonal but for one pair."""
    x, y = p["x"], p["y"][0]
    return (x**4).sum() + (torch.view_as_real(y) ** 2).sum() * 3 + x[0, 0] * x[1, 2]


def quartic_point() -> dict[str, Any]:
    x = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(2, 3)
    return {"none": None, "x": x, "y": (torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128),)}


def test_the_hutchinson_estimate() -> None:
    """It is the diagonal, plus or minus what is beside it; it depends on the seed alone."""
    p = quartic_point()
    beside = torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    found = [ps.hutchinson(quartic, p, seed) for seed in range(20)]
    for h in found:
        assert h["none"] is None
        assert torch.equal(h["y"][0], torch.full((2,), 6 + 6j, dtype=torch.complex128))
        assert torch.equal((h["x"] - 12 * p["x"] ** 2).abs().round(decimals=9), beside)
    sides = {float((h["x"] - 12 * p["x"] ** 2).sum().sign()) for h in found}
    assert sides == {1.0, -1.0}
    assert torch.equal(ps.hutchinson(quartic, p, torch.tensor(3))["x"], found[3]["x"])
    seeds = torch.arange(20)
    batch = torch.func.vmap(lambda seed: ps.hutchinson(quartic, p, seed)["x"])(seeds)
    assert torch.equal(batch, torch.stack([h["x"] for h in found]))


def test_the_hutchinson_signs_are_fair() -> None:
    signs = [ps.hutchinson(lambda p: p[0] @ p[1], [torch.zeros(1000), torch.zeros(1000)], seed) for seed in (1, 2)]
    for x in (signs[0][0], signs[1][0]):  # the product of the two parameters' signs
        assert set(x.tolist()) == {-1.0, 1.0}
        assert abs(x.mean().item()) < 0.1
    assert abs((signs[0][0] * signs[1][0]).mean().item()) < 0.1


def test_the_hutchinson_estimate_compiled() -> None:
    w = torch.randn(4, 3)

    def loss(p: Any) -> Tensor:
        return torch.tanh(w @ p["a"]).square().sum()

    def estimate(p: Any, seed: Tensor) -> Any:
        return ps.hutchinson(loss, p, seed)

    p, seed = {"a": torch.randn(3)}, torch.tensor(7)
    compiled = torch.compile(estimate, fullgraph=True, backend="aot_eager")
    assert difference(compiled(p, seed), estimate(p, seed)) <= 1e-6


def test_sophia_looks_at_an_estimate_when_it_is_due() -> None:
    """On the other steps anything of that form will do; the sign of both changes to climb."""
    params, results = {"a": torch.tensor([1.0, -3.0])}, []
    for junk in (0.0, float("nan")):
        p, t = params, ps.sophia(0.1, gamma=1.0, update_interval=3)
        state = t.init_state(p)
        for k in range(7):
            h = torch.tensor([2.0, 20.0]) if k % 3 == 0 else torch.full((2,), junk)
            p, state = t.step({"a": p["a"] * torch.tensor([2.0, 20.0])}, state, p, hessian={"a": h})
        results.append(p["a"])
    assert torch.equal(*results)
    assert results[0].isfinite().all()
