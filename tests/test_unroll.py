"""Differentiating through training: several steps, with respect to the initial parameters and the learning rate.

A network of two layers is trained for a few steps, and its last loss is differentiated, in three ways that must agree: with
the stateful optimizer and `torch.autograd.grad`, with the pure functions and `torch.autograd.grad`, and with the pure
functions and `torch.func.grad`. Finite differences of the same loss, in float64, are the oracle.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import purestep as ps
from purestep import optim
from tests.cases import CLASSES, Options
from tests.problems import difference

Params = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Unroll:
    """How an algorithm is unrolled. The options are such that every part of it is used within a few steps."""

    options: tuple[Options, ...] = ({},)
    lr: float = 0.1
    steps: tuple[int, ...] = (2, 5)
    bias: bool = True
    """Whether it treats anything but matrices."""
    nudge: float = 1e-5
    """By how much of itself a finite difference changes the learning rate."""
    rough: str = ""
    """Why finite differences tell nothing, if so."""
    agreement: float = 1e-10
    """Between derivatives that were computed in different ways."""


UNROLLS = {
    "SGD": Unroll(
        ({"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True})
    ),
    "Adam": Unroll(({"eps": 1e-3, "weight_decay": 0.1}, {"eps": 1e-3, "amsgrad": True, "betas": (0.8, 0.7)})),
    "AdamW": Unroll(({"eps": 1e-3, "weight_decay": 0.1}, {"eps": 1e-3, "amsgrad": True, "betas": (0.8, 0.7)})),
    "Adamax": Unroll(({"eps": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.7)},)),
    "NAdam": Unroll(({"eps": 1e-3, "weight_decay": 0.1}, {"eps": 1e-3, "decoupled_weight_decay": True, "weight_decay": 0.1})),
    "RAdam": Unroll(({"eps": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.9)},), steps=(2, 5, 8)),  # rectified from the 6th on
    "Adagrad": Unroll(({"eps": 1e-3, "weight_decay": 0.1, "lr_decay": 0.2}, {"initial_accumulator_value": 0.1})),
    "Adadelta": Unroll(({"eps": 1e-3, "weight_decay": 0.1, "rho": 0.7},), lr=1.0),
    "RMSprop": Unroll(
        ({"eps": 1e-3, "weight_decay": 0.1, "alpha": 0.8}, {"eps": 1e-3, "alpha": 0.8, "momentum": 0.7, "centered": True})
    ),
    "Rprop": Unroll(lr=0.01),
    "ASGD": Unroll(
        ({"lambd": 0.1, "t0": 2.0, "weight_decay": 0.1},),
        nudge=3e-2,  # its state keeps the learning rate in float32, as torch's: a difference must be far above the last place
    ),
    "Adafactor": Unroll(({"weight_decay": 0.1}, {"d": 2.0, "eps": (1e-4, 1e-2), "beta2_decay": -0.5})),
    "Muon": Unroll(
        ({"weight_decay": 0.1}, {"nesterov": False, "momentum": 0.5, "adjust_lr_fn": "match_rms_adamw"}),
        bias=False,
        rough="Newton-Schulz runs in bfloat16, whose steps are far larger than a finite difference",
        agreement=0.1,  # products in bfloat16, of which some are rounded once under torch.func, and twice without
    ),
}
"""By the name of torch's class, whose factory has the same name in lower case."""

NOT_UNROLLED = {
    "LBFGS": "its line search and its history branch on the values of losses",
    "SparseAdam": "torch cannot differentiate twice through the sparse gradient of an embedding",
}

RUNS = [
    pytest.param(name, options, steps, id=f"{name}-{i}-{steps}")
    for name in CLASSES
    if name not in NOT_UNROLLED
    for i, options in enumerate(UNROLLS[name].options)
    for steps in UNROLLS[name].steps
]
each_run = pytest.mark.parametrize(("name", "options", "steps"), RUNS)
SMOOTH = [run for run in RUNS if not UNROLLS[run.values[0]].rough]  # type: ignore[index]
ROUGH = [run for run in RUNS if UNROLLS[run.values[0]].rough]  # type: ignore[index]


def test_every_class_is_unrolled_or_has_a_reason() -> None:
    assert set(CLASSES) <= UNROLLS.keys() | NOT_UNROLLED.keys()
    assert not UNROLLS.keys() & NOT_UNROLLED.keys()


# ------------------------------------------------------------------------------------------------------------- the problem


class MLP(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 4, bias=bias)
        self.out = nn.Linear(4, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x)))


class Problem:
    """A network, data, and the loss of given parameters. A `dead` input is 0 in all the data."""

    def __init__(self, name: str, dead: bool = False) -> None:
        torch.manual_seed(1)
        self.module = MLP(UNROLLS[name].bias).double()
        self.x = torch.randn(12, 3, dtype=torch.float64)
        self.y = torch.randn(12, 2, dtype=torch.float64)
        if dead:
            self.x[:, 1] = 0.0
        self.params = {k: p.detach().clone() for k, p in self.module.named_parameters()}
        self.lr = torch.tensor(UNROLLS[name].lr, dtype=torch.float64)

    def loss(self, params: Params) -> Tensor:
        return ((functional_call(self.module, params, (self.x,)) - self.y) ** 2).mean()


def factory(name: str) -> Callable[..., ps.Transform]:
    return getattr(ps, name.lower())


def pure(problem: Problem, name: str, options: Options, steps: int, gradient: Callable[[Params], Params]) -> Any:
    """The last loss as a function of the learning rate and the initial parameters."""

    def last(lr: Tensor, params: Params) -> Tensor:
        transform = factory(name)(lr=lr, **options)
        state = transform.init_state(params)
        for _ in range(steps):
            params, state = transform.step(gradient(params), state, params)
        return problem.loss(params)

    return last


def by_func(problem: Problem) -> Callable[[Params], Params]:
    return torch.func.grad(problem.loss)


def by_autograd(problem: Problem) -> Callable[[Params], Params]:
    def gradient(params: Params) -> Params:
        """The parameters themselves may not require any: then they are leaves here."""
        leaves = {k: p if p.requires_grad else p.clone().requires_grad_() for k, p in params.items()}
        recorded = any(p.requires_grad for p in params.values())
        grads = torch.autograd.grad(problem.loss(leaves), list(leaves.values()), create_graph=recorded)
        return dict(zip(leaves, grads))

    return gradient


def stateful(problem: Problem, name: str, options: Options, steps: int, of_class: bool) -> Any:
    """The same with the stateful optimizer, made by the class or of the transform."""

    def last(lr: Tensor, leaves: Params) -> Tensor:
        params = {k: p.clone() for k, p in leaves.items()}
        if of_class:
            optimizer: Any = getattr(optim, name)(params.values(), lr=lr, **options, differentiable=True)
        else:
            optimizer = optim.Optimizer(params.values(), factory(name)(lr=lr, **options), differentiable=True)
        for _ in range(steps):
            looked_at = {k: p.clone() for k, p in params.items()}  # a step writes to the parameters themselves
            grads = torch.autograd.grad(problem.loss(looked_at), list(looked_at.values()), create_graph=True)
            for p, g in zip(params.values(), grads):
                p.grad = g
            optimizer.step()
        return problem.loss(params)

    return last


def derivatives(last: Any, problem: Problem) -> dict[str, Tensor]:
    """With respect to everything, by torch.autograd."""
    inputs = {"lr": problem.lr.clone().requires_grad_(), **{k: p.clone().requires_grad_() for k, p in problem.params.items()}}
    value = last(inputs["lr"], {k: inputs[k] for k in problem.params})
    grads = torch.autograd.grad(value, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(inputs, grads))


def functional_derivatives(last: Any, problem: Problem) -> dict[str, Tensor]:
    """The same by torch.func."""
    of_lr, of_params = torch.func.grad(last, argnums=(0, 1))(problem.lr, problem.params)
    return {"lr": of_lr, **of_params}


def slopes_of(last: Any, problem: Problem, nudge: float, h: float = 1e-5) -> dict[str, Tensor]:
    """Finite differences with respect to the learning rate, and to each parameter along a direction.

    They are central, and extrapolated: their error is of the order of h^4.
    """

    def slope(step: Callable[[float], tuple[Tensor, Params]], h: float) -> Tensor:
        wide = (last(*step(h)) - last(*step(-h))) / (2 * h)
        narrow = (last(*step(h / 2)) - last(*step(-h / 2))) / h
        return (4 * narrow - wide) / 3

    slopes = {"lr": slope(lambda d: (problem.lr * (1 + d), problem.params), nudge) / problem.lr}
    for k, v in directions(problem).items():
        slopes[k] = slope(lambda d, k=k, v=v: (problem.lr, {**problem.params, k: problem.params[k] + d * v}), h)  # type: ignore[misc]
    return slopes


def directions(problem: Problem) -> Params:
    g = torch.Generator().manual_seed(5)
    return {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in problem.params.items()}


def assert_slopes(derivatives: dict[str, Tensor], last: Any, problem: Problem, nudge: float) -> None:
    along = {k: (derivatives[k] * v).sum() for k, v in directions(problem).items()}
    for k, slope in slopes_of(last, problem, nudge).items():
        expected = derivatives["lr"] if k == "lr" else along[k]
        assert float(slope) == pytest.approx(float(expected), rel=1e-6, abs=1e-8), k


# ------------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(("name", "options", "steps"), SMOOTH)
def test_finite_differences(name: str, options: Options, steps: int) -> None:
    problem = Problem(name)
    last = pure(problem, name, options, steps, by_func(problem))
    ours = functional_derivatives(last, problem)
    assert ours["lr"] != 0
    assert_slopes(ours, last, problem, UNROLLS[name].nudge)


@each_run
def test_autograd_and_func_agree(name: str, options: Options, steps: int) -> None:
    problem = Problem(name)
    with_func = functional_derivatives(pure(problem, name, options, steps, by_func(problem)), problem)
    with_autograd = derivatives(pure(problem, name, options, steps, by_autograd(problem)), problem)
    assert all(x.isfinite().all() and x.count_nonzero() for x in with_func.values())
    assert difference(with_func, with_autograd) <= UNROLLS[name].agreement


@each_run
@pytest.mark.parametrize("of_class", [False, True], ids=["transform", "class"])
def test_the_stateful_optimizer_agrees(name: str, options: Options, steps: int, of_class: bool) -> None:
    if of_class and "differentiable" not in inspect.signature(getattr(torch.optim, name)).parameters:
        pytest.skip(f"torch.optim.{name} has no differentiable=True, and so ours has none")
    problem = Problem(name)
    wrapped = derivatives(stateful(problem, name, options, steps, of_class), problem)
    expected = derivatives(pure(problem, name, options, steps, by_autograd(problem)), problem)
    assert difference(wrapped, expected) <= 1e-10


@each_run
def test_a_recorded_trajectory_is_the_plain_one(name: str, options: Options, steps: int) -> None:
    """The value that is differentiated is what torch's class trains to."""
    problem = Problem(name)
    ours = pure(problem, name, options, steps, by_func(problem))(problem.lr, problem.params)
    leaves = {k: p.clone().requires_grad_() for k, p in problem.params.items()}
    optimizer = getattr(torch.optim, name)(leaves.values(), lr=UNROLLS[name].lr, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.loss(leaves).backward()
        optimizer.step()
    assert float(ours) == pytest.approx(float(problem.loss(leaves).detach()), rel=1e-10)


@pytest.mark.parametrize(("name", "options", "steps"), ROUGH)
def test_rough_derivatives_are_near_those_without_rounding(
    name: str, options: Options, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite differences confirm the derivatives of the same text in float64, and those in bfloat16 are near them."""
    problem = Problem(name)
    last = pure(problem, name, options, steps, by_autograd(problem))
    rough = derivatives(last, problem)
    monkeypatch.setattr(Tensor, "bfloat16", lambda x: x)
    exact = derivatives(last, problem)
    assert 1e-4 < difference(rough, exact) <= UNROLLS[name].agreement
    assert_slopes(exact, lambda lr, params: last(lr.clone().requires_grad_(), params).detach(), problem, UNROLLS[name].nudge)


@each_run
def test_a_dead_input(name: str, options: Options, steps: int) -> None:
    """Its weights never get a gradient but 0, in no step; their second moments stay exactly 0."""
    problem = Problem(name, dead=True)
    gradient = by_func(problem)
    assert (gradient(problem.params)["hidden.weight"][:, 1] == 0).all()
    last = pure(problem, name, options, steps, gradient)
    slopes = assert_finite(problem, name, options, steps)
    assert slopes["lr"] != 0
    if not UNROLLS[name].rough:
        assert_slopes(slopes, last, problem, UNROLLS[name].nudge)


@each_run
@pytest.mark.parametrize("zeros", ["one coordinate", "a tensor", "all"])
@pytest.mark.in_turn("zeros")
def test_gradients_that_pass_through_zero(name: str, options: Options, steps: int, zeros: str) -> None:
    """At a minimum along some coordinates, where the gradient is 0 but its derivative is not."""
    problem = Problem(name)
    start, goal = problem.params, {k: p + torch.sin(5 * p) for k, p in problem.params.items()}
    first = next(iter(goal))
    if zeros == "one coordinate":
        goal[first][0, 0] = start[first][0, 0]
    else:
        goal |= {k: start[k].clone() for k in (goal if zeros == "all" else [first])}
    problem.loss = lambda params: sum(((p - goal[k]) ** 2).sum() for k, p in params.items())  # type: ignore[method-assign,return-value,assignment]
    gradient = by_func(problem)(start)
    assert gradient[first][0, 0] == 0
    assert_finite(problem, name, options, steps)


def assert_finite(problem: Problem, name: str, options: Options, steps: int) -> dict[str, Tensor]:
    """In all three ways, which agree."""
    with_func = functional_derivatives(pure(problem, name, options, steps, by_func(problem)), problem)
    with_autograd = derivatives(pure(problem, name, options, steps, by_autograd(problem)), problem)
    wrapped = derivatives(stateful(problem, name, options, steps, of_class=False), problem)
    assert all(x.isfinite().all() for slopes in (with_func, with_autograd, wrapped) for x in slopes.values())
    assert UNROLLS[name].rough or difference(with_func, with_autograd) <= 1e-10
    assert difference(wrapped, with_autograd) <= 1e-10
    return with_func
