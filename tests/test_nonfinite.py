"""Infinite, NaN, huge, tiny and denormal numbers: every mode gives the same, NaN for NaN. Nothing makes a step vanish."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from tests.cases import CASES, Case, Options
from tests.problems import clone, grads

LONG = int(os.environ.get("PURESTEP_EXAMPLES", "1")) > 1
"""All options of every case, in every mode."""

# A parameter that is infinite already is left out: with decoupled decay, torch's kernel for AdamW multiplies it by 1 - lr*decay,
# and what is written line by line subtracts one infinity from another.

SPECIAL: dict[str, list[float]] = {
    "mixed": [math.inf, 1.0, -math.inf, math.nan, -0.0, 1e-310, 1e200, 0.0, -1e-200, -2.5, 1e30],
    "extreme": [1e200, -1e-200, 1e-310, 0.0, -0.0, 1e30, -1e18, 1.0],
    "inf": [math.inf, 1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0, 23.0, 29.0, 31.0],
    "parameters": [math.nan, 1.0, 1e200, -1e-200, 1e-310, 0.0, -0.0, 1e30, -1e18, -2.5],
    "nan": [1.0, math.nan, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0, 23.0, 29.0, 31.0],
}

FUSES = ("rmsprop", "scale_by_stddev")
"""v - m*m is one operation in a program, as it is in torch's RMSprop: there the square does not overflow by itself."""


def filled(params: Any, values: list[float]) -> Any:
    """These numbers, again and again, in the shapes of the parameters."""
    made, k = {}, 0
    for name, p in params.items():
        n = p.numel()
        made[name] = torch.tensor([values[(k + i) % len(values)] for i in range(n)], dtype=p.dtype).view(p.shape)
        k += n
    return made


def same(found: Any, expected: Any, where: str, tolerance: float = 1e-9) -> None:
    xs, ys = ([x for x in pytree.tree_leaves(t) if isinstance(x, Tensor)] for t in (found, expected))
    for x, y in zip(xs, ys, strict=True):
        x, y = x.detach(), y.detach()
        right = (x == y) | (x.isnan() & y.isnan())
        if x.dtype.is_floating_point:
            right |= x.isfinite() & y.isfinite() & ((x - y).abs() <= tolerance * torch.maximum(x.abs(), y.abs()))
        assert bool(right.all()), f"{where}: {x.flatten()[:13].tolist()} for {y.flatten()[:13].tolist()}"


def trained(case: Case, options: Options, special: str, where: str, how: dict[str, Any], copies: int = 1) -> Any:
    """Three steps, the second with such gradients, or from such parameters."""
    t = case.transform(options)
    params, loss = case.problem(torch.float64)
    g = grads(loss, params)
    odd = filled(params, [x if abs(x) != 1e200 or case.name not in FUSES else x / 1e100 for x in SPECIAL[special]])
    several = [{f"{k}{i}": x for i in range(copies) for k, x in tree.items()} for tree in (params, g, odd)]
    params, g, odd = clone(several)
    if where == "parameters":
        params, odd = odd, clone(g)
    state = t.init_state(params)
    for x in (g, odd, clone(g)):
        params, state = t.step(clone(x), state, params, **how)
    return params, state


def pairs() -> list[Any]:
    return [
        pytest.param(case, options, id=f"{case}-{i}")
        for case in CASES
        for i, options in enumerate(case.options if LONG else case.options[:1])
        if "nonfinite" not in case.lacks
    ]


@pytest.mark.parametrize(("case", "options"), pairs())
def test_every_mode_agrees(case: Case, options: Options) -> None:
    for special in SPECIAL:
        where = "parameters" if special == "parameters" else "gradients"
        ways: list[dict[str, Any]] = [{}, {"donate": True}]
        if LONG or special == "mixed":
            ways += [{"executor": "foreach"}, {"executor": "foreach", "donate": True}]
        try:
            expected = trained(case, options, special, where, {"executor": "leaf"})
        except torch.linalg.LinAlgError:  # there is no decomposition of such a matrix in any mode
            expected = None
        for how in ways:
            if expected is None:
                with pytest.raises(torch.linalg.LinAlgError):
                    trained(case, options, special, where, how)
            else:
                same(trained(case, options, special, where, how), expected, f"{special} {where} {how}")


# ------------------------------------------------------------------------------------------------------ the wrapper and torch


def stepped(optimizer: Any, params: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    for gs in gradients:
        for p, g in zip(params, gs):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


TWINS = [
    ("SGD", {"lr": 0.1}), ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}), ("SGD", {"lr": 0.0}),
    ("Adam", {"lr": 0.1}), ("Adam", {"lr": 0.1, "amsgrad": True}), ("Adam", {"lr": 0.0}), ("Adam", {"betas": (0.0, 0.9)}),
    ("AdamW", {"lr": 0.1}), ("Adagrad", {"lr": 0.1}), ("Adagrad", {"lr": 0.0}), ("RMSprop", {"lr": 0.1}),
    ("RMSprop", {"lr": 0.0, "centered": True}), ("Adadelta", {"lr": 0.1}), ("Adadelta", {"lr": 0.0}), ("ASGD", {"lr": 0.1}),
    ("ASGD", {"lr": 0.0}), ("ASGD", {"lr": 0.0, "lambd": 0.0}), ("Adamax", {"lr": 0.0}), ("NAdam", {"lr": 0.1}),
    ("NAdam", {"lr": 0.0}), ("RAdam", {"lr": 0.1}), ("RAdam", {"lr": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize("count", [3, 20], ids=["few", "many"])
@pytest.mark.parametrize(("name", "options"), TWINS, ids=str)
def test_the_wrapper_is_torch(name: str, options: dict[str, Any], count: int) -> None:
    """NaN where torch's optimizer gives NaN, and nowhere else: a learning rate of 0 included, which makes NaN of infinity."""
    values = [x for x in SPECIAL["mixed"] if abs(x) != 1e200]
    shapes = [(1 + k % 3, 3) for k in range(count)]
    params = [torch.arange(1.0, 1 + 3 * s[0], dtype=torch.float64).view(s) / 8 for s in shapes]
    normal = [torch.ones_like(p) for p in params]
    odd = list(filled(dict(enumerate(params)), values).values())
    found = []
    for module in (optim, torch.optim):
        mine = [torch.nn.Parameter(p.clone()) for p in params]
        steps = [normal, odd] if name == "ASGD" else [normal, odd, normal]  # which decays what is infinite then; see above
        found.append(stepped(getattr(module, name)(mine, **options), mine, steps))
    same(*found, name)


@pytest.mark.parametrize("count", [3, 20], ids=["few", "many"])
@pytest.mark.parametrize("way", ["pure", "donated", "update", "foreach", "leaf", "wrapper"])
def test_an_infinite_gradient_does_not_vanish(way: str, count: int) -> None:
    """Clipping makes 0 of all but the infinite gradient, of which it makes NaN, as torch.nn.utils.clip_grad_norm_ does."""
    t = ps.chain(ps.clip_by_global_norm(1.0), ps.sgd(0.1))
    params = [torch.ones(4) for _ in range(count)]
    g = [torch.tensor([math.inf, 1.0, 2.0, 3.0]) for _ in range(count)]
    if way == "wrapper":
        leaves = [torch.nn.Parameter(p) for p in params]
        (found, *_) = stepped(optim.Optimizer(leaves, t), leaves, [g])
    elif way == "update":
        updates, _ = t.update(g, t.init_state(params), params)
        found = ps.apply_updates(params, updates)[0]
    else:
        how: Any = {"donate": True} if way == "donated" else {} if way == "pure" else {"executor": way}
        found = t.step(g, t.init_state(params), params, **how)[0][0]
    assert found.tolist()[1:] == [1.0, 1.0, 1.0]
    assert found[0].isnan()


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("executor", [None, "foreach", "leaf"])
def test_optimism_forgets_a_nan(donate: bool, executor: Any) -> None:
    """Of the last update nothing is left after the next: as in optax, whose trace is replaced."""
    t, p = ps.scale_by_optimistic_gradient(), torch.zeros(2)
    state = t.init_state(p)
    for g in (1.0, math.nan, 2.0, 5.0):
        u, state = t.update(torch.full((2,), g), state, p, donate=donate, executor=executor)
    assert u.tolist() == [8.0, 8.0]  # 5 + (5 - 2)


def test_adan_forgets_what_it_replaces() -> None:
    """The gradient that Adan keeps is the last one, whatever the one before was."""
    t, p = ps.scale_by_adan(), torch.zeros(2)
    for donate in (False, True):
        state = t.init_state(p)
        for g in (1.0, math.inf, 2.0):
            _, state = t.update(torch.full((2,), g), state, p, donate=donate)
        assert state.pre_grad.tolist() == [2.0, 2.0]
