"""What the algorithms beyond torch.optim have of their own; what they share with all others is tested from the registry."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

import purestep as ps
from tests.problems import difference, grads, mlp


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1, 2, 2), (3, 2), (5,), (), (2, 0, 3), (0,)], ids=str)
def test_sm3_in_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    """The paper's SM3-II, element by element, with the slices as its cover, and an eps inside the root."""
    rng = np.random.default_rng(0)
    t = ps.scale_by_sm3(momentum=0.0, eps=1e-8)
    p = torch.zeros(shape, dtype=torch.float64)
    state = t.init_state(p)
    cover = [np.zeros(n) for n in shape] or [np.zeros(1)]
    places = list(itertools.product(*map(range, shape)))
    for _ in range(4):
        g, expected = rng.normal(size=shape), np.zeros(shape)
        new = [np.zeros_like(x) for x in cover]
        for place in places:
            slices = list(enumerate(place or (0,)))
            v = min(cover[k][i] for k, i in slices) + g[place] ** 2
            for k, i in slices:
                new[k][i] = max(new[k][i], v)
            expected[place] = g[place] / np.sqrt(v + 1e-8)
        cover = new
        u, state = t.update(torch.tensor(g, dtype=torch.float64), state, p)
        torch.testing.assert_close(u, torch.tensor(expected), rtol=1e-10, atol=1e-10)
        kept = state.sum.reshape(-1) if len(shape) < 2 else state.accumulator
        torch.testing.assert_close(kept, torch.tensor(np.concatenate(cover)), rtol=1e-10, atol=1e-10)


def trajectory(t: ps.Transform, steps: int = 10) -> Any:
    params, loss = mlp()
    state = t.init_state(params)
    for _ in range(steps):
        params, state = t.step(grads(loss, params), state, params)
    return params


def test_signum_is_lion_with_equal_betas() -> None:
    assert difference(trajectory(ps.signum(0.01, 0.8, 0.1)), trajectory(ps.lion(0.01, (0.8, 0.8), 0.1))) == 0


def test_adan_without_a_look_ahead_is_adam() -> None:
    assert difference(trajectory(ps.adan(0.01, (0.9, 0.0, 0.99))), trajectory(ps.adam(0.01, (0.9, 0.99)))) <= 1e-12


def test_ademamix_without_its_slow_mean_is_adamw() -> None:
    ours = ps.ademamix(0.01, (0.9, 0.99, 0.999), alpha=0.0, weight_decay=0.1)
    assert difference(trajectory(ours), trajectory(ps.adamw(0.01, (0.9, 0.99), weight_decay=0.1))) <= 1e-12


def test_optimism_of_0_is_none() -> None:
    assert difference(trajectory(ps.optimistic_adam(0.01, beta=0.0)), trajectory(ps.adam(0.01))) <= 1e-12


def test_sm3_of_a_vector_is_adagrad() -> None:
    p, g = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    ours, theirs = ps.sm3(0.1, momentum=0.0, eps=1e-20), ps.adagrad(0.1, eps=0.0)
    a, b, s, r = p, p, ours.init_state(p), theirs.init_state(p)
    for k in range(4):
        a, s = ours.step(g + k, s, a)
        b, r = theirs.step(g + k, r, b)
    assert difference(a, b) <= 1e-12


def test_the_schedulers_of_ademamix() -> None:
    """The half-life that grows in a straight line, as its docstring has it, is the authors' scheduler."""
    start, end, warmup = 0.9, 0.9999, 1000

    def theirs(step: int) -> float:
        def f(beta: float) -> float:
            return math.log(0.5) / math.log(beta) - 1

        a = step / warmup
        return 0.5 ** (1 / ((1 - a) * f(start) + a * f(end) + 1)) if step < warmup else end

    half_life = ps.schedules.linear(math.log(0.5) / math.log(start), math.log(0.5) / math.log(end), total_steps=warmup)
    for t in (0, 1, 10, 500, 999, 1000, 5000):
        assert 0.5 ** (1 / half_life(t + 1)) == pytest.approx(theirs(t + 1), rel=1e-12)


def test_adopt_leaves_its_first_gradient_out() -> None:
    t, p = ps.adopt(lr=0.1), torch.tensor([1.0, 2.0])
    new, state = t.step(torch.tensor([3.0, 0.0]), t.init_state(p), p)
    assert torch.equal(new, p)
    assert torch.equal(state[0].exp_avg_sq, torch.tensor([9.0, 0.0]))


def test_a_learning_rate_of_0_adds_nothing_to_madgrads_sums() -> None:
    """As in the authors' package: a warm-up may begin at 0."""
    t, p = ps.madgrad(lr=0.0), torch.ones(2)
    new, state = t.step(torch.ones(2), t.init_state(p), p)
    assert torch.equal(new, p)
    assert torch.equal(state[1].s, torch.zeros(2))


@pytest.mark.parametrize("make", [ps.sm3, ps.novograd])
def test_complex_parameters_are_refused_by_name(make: Any) -> None:
    with pytest.raises(RuntimeError, match=rf"{make.__name__} cannot treat complex parameters, but 'w' is torch.complex64"):
        make().init_state({"w": torch.zeros(2, dtype=torch.complex64)})


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (ps.lion, {"betas": (0.9, 1.0)}), (ps.adan, {"betas": (0.9, 0.9)}), (ps.adopt, {"eps": 0.0}), (ps.sm3, {"eps": 0.0}),
        (ps.madgrad, {"momentum": 1.0}), (ps.signum, {"momentum": 1.0}), (ps.ademamix, {"alpha": -1.0}), (ps.lars, {"trust_coefficient": -1.0}),
        (ps.fromage, {"lr": -1.0}), (ps.yogi, {"initial_accumulator_value": -1.0}), (ps.novograd, {"weight_decay": -1.0}),
    ],
    ids=lambda x: x.__name__ if callable(x) else "-".join(x),
)  # fmt: skip
def test_values_out_of_their_range(make: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options)).replace("momentum", "momentum|decay")):
        make(**options)
