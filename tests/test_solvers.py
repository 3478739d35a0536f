"""Solvers as people write them, in `implicit` and its decorators: keyword arguments, and any torch.optim inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import purestep as ps
from tests.problems import difference
from tests.test_meta import PENALTIES, START, A, Y, closed, exact, normal, ridge

# ------------------------------------------------------------------------------------------------------- keyword arguments


def ridge_of(x: Tensor, *, theta: Tensor, data: dict[str, Any]) -> Tensor:
    return ridge(x, theta, data["a"], data["y"][0])


def closed_of(init: Tensor, *, theta: Tensor, data: dict[str, Any]) -> Tensor:
    return closed(theta, data["a"], data["y"][0])


SLOPE = torch.func.grad(ridge_of)
DATA = {"a": A, "y": (Y, "a name")}
KINDS: dict[str, Callable[[], Any]] = {
    "implicit": lambda: ps.meta.implicit(closed_of, SLOPE),
    "custom_root": lambda: ps.meta.custom_root(SLOPE)(closed_of),
    "custom_fixed_point": lambda: ps.meta.custom_fixed_point(lambda x, **given: x - 0.03 * SLOPE(x, **given))(closed_of),
}


@pytest.mark.parametrize("kind", KINDS)
def test_keyword_arguments(kind: str) -> None:
    """They have the derivatives of positional ones, in every mode: two tensors and a pytree with a string in it."""
    solve = KINDS[kind]()

    def found(theta: Tensor, a: Tensor, y: Tensor) -> Tensor:
        return solve(START, theta=theta, data={"a": a, "y": (y, "a name")})

    given = PENALTIES, A, Y
    wanted = torch.func.jacrev(closed, (0, 1, 2))(*given)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(found, (0, 1, 2))(*given), wanted, rtol=1e-7, atol=1e-8)
    leaves = [x.clone().requires_grad_() for x in given]
    slopes = torch.autograd.grad(found(*leaves).sum(), leaves)
    assert difference(list(slopes), [x.sum(0) for x in wanted]) <= 1e-7
    batch = torch.stack([PENALTIES, PENALTIES + 1])
    together = torch.func.vmap(torch.func.grad(lambda t: found(t, A, Y).sum()))(batch)
    for i in range(2):
        assert difference(together[i], torch.func.grad(lambda t: closed(t).sum())(batch[i])) <= 1e-7


def test_a_keyword_may_have_the_name_of_anything() -> None:
    """What the first argument is called is the solver's own business."""
    solve = ps.meta.custom_root(lambda z, init: z - 2 * init)(lambda z, init: 2 * init)
    assert torch.func.grad(lambda a: solve(torch.zeros(()), init=a))(torch.tensor(3.0)) == 2


# ------------------------------------------------------------------------------------------------- an optimizer of torch.optim


def loop(make: Callable[[Any], torch.optim.Optimizer], steps: int, closure: bool = True) -> Callable[..., Tensor]:
    """Ridge regression as training loops are written."""

    def solver(init: Tensor, theta: Tensor) -> Tensor:
        x = nn.Parameter(init.detach().clone())
        optimizer = make([x])

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            value = ridge(x, theta)
            value.backward()
            return value

        for _ in range(steps):
            if closure:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        return x

    return solver


EXACT = {"line_search_fn": "strong_wolfe", "tolerance_grad": 1e-12, "tolerance_change": 1e-15, "max_iter": 40}
SOLVERS: dict[str, Callable[..., Tensor]] = {
    "torch SGD": loop(lambda xs: torch.optim.SGD(xs, lr=0.035, momentum=0.6), 250, closure=False),
    "torch LBFGS": loop(lambda xs: torch.optim.LBFGS(xs, **EXACT), 3),
    "purestep SGD": loop(lambda xs: ps.optim.SGD(xs, lr=0.035, momentum=0.6), 250, closure=False),
    "purestep LBFGS": loop(lambda xs: ps.optim.LBFGS(xs, **EXACT), 3),
}
WANTED = torch.func.jacrev(closed)(PENALTIES)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "mode", ["value", "no_grad", "backward", "grad", "jacrev", "jacfwd", "jvp", "jacfwd of jacrev", "jacrev of jacrev"]
)
def test_a_solver_with_an_optimizer_inside(name: str, mode: str) -> None:
    minimum = functools.partial(ps.meta.implicit(SOLVERS[name], torch.func.grad(ridge)), START)
    weights = Y[:4]
    if mode in ("value", "no_grad"):
        with torch.set_grad_enabled(mode == "value"):
            found, wanted = minimum(PENALTIES), closed(PENALTIES)
        assert not found.requires_grad
    elif mode == "backward":
        theta = PENALTIES.clone().requires_grad_()
        (minimum(theta) * weights).sum().backward()
        found, wanted = theta.grad, WANTED.T @ weights
    elif mode == "grad":
        found, wanted = torch.func.grad(lambda t: (minimum(t) * weights).sum())(PENALTIES), WANTED.T @ weights
    elif mode == "jvp":
        found, wanted = torch.func.jvp(minimum, (PENALTIES,), (weights,))[1], WANTED @ weights
    elif " of " in mode:
        first, second = [getattr(torch.func, way) for way in mode.split(" of ")]
        found, wanted = first(second(minimum))(PENALTIES), first(second(closed))(PENALTIES)
    else:
        found, wanted = getattr(torch.func, mode)(minimum)(PENALTIES), WANTED
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_plain_loop_under_no_grad() -> None:
    """It records what it needs, as its own business."""
    with torch.no_grad():
        found = ps.meta.implicit(loop(lambda xs: torch.optim.SGD(xs, lr=0.035), 3, closure=False), torch.func.grad(ridge))(
            START, PENALTIES
        )
    assert found.abs().sum() > 0


@pytest.mark.parametrize("inside", [False, True])
def test_an_optimizer_under_vmap_is_refused(inside: bool) -> None:
    """Alone or around a gradient; what made a member of it is an argument, or closed over."""
    batch = torch.stack([PENALTIES, PENALTIES + 1])
    message = (
        r"cannot be batched by torch.func.vmap. Write it with torch.func.grad and Transform.step, or call it for each member"
    )

    def minimum(theta: Tensor) -> Tensor:
        if not inside:
            return ps.meta.implicit(SOLVERS["torch SGD"], torch.func.grad(ridge))(START, theta)
        return ps.meta.implicit(loop_over(theta), lambda x: torch.func.grad(ridge)(x, theta))(START)

    for function in (minimum, torch.func.grad(lambda t: minimum(t).sum())):
        with pytest.raises(RuntimeError, match=message):
            torch.func.vmap(function)(batch)
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(lambda t: torch.func.vmap(minimum)(t).sum())(batch)


def loop_over(theta: Tensor) -> Callable[[Tensor], Tensor]:
    """A solver that closes over its penalties."""

    def solver(init: Tensor) -> Tensor:
        x = nn.Parameter(init.clone())
        optimizer = torch.optim.LBFGS([x], **EXACT)

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            value = ridge(x, theta)
            value.backward()
            return value

        for _ in range(3):
            optimizer.step(evaluate)
        return x

    return solver


@pytest.mark.parametrize("mode", ["grad", "jacrev", "jacfwd", "jacfwd of jacrev"])
def test_what_a_solver_closes_over(mode: str) -> None:
    """Penalties that torch.func follows are plain numbers to the solver, and the derivatives are there."""

    def minimum(theta: Tensor) -> Tensor:
        seen = 2 * theta  # on the innermost level
        return ps.meta.implicit(loop_over(seen), lambda x: torch.func.grad(ridge)(x, seen))(START)

    def known(theta: Tensor) -> Tensor:
        return closed(2 * theta)

    if mode == "grad":
        found, wanted = [torch.func.grad(lambda t, f=f: f(t).sum())(PENALTIES) for f in (minimum, known)]
    elif mode == "jacfwd of jacrev":
        found, wanted = [torch.func.jacfwd(torch.func.jacrev(f))(PENALTIES) for f in (minimum, known)]
    else:
        found, wanted = [getattr(torch.func, mode)(f)(PENALTIES) for f in (minimum, known)]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_batch_that_a_solver_closes_over() -> None:
    """It runs inside of vmap, for each member, if it is made for that."""
    targets = normal(3, 12, seed=41)

    def minimum(theta: Tensor, y: Tensor) -> Tensor:
        return ps.meta.implicit(lambda init, t: closed(t, A, y), lambda x, t: torch.func.grad(ridge)(x, t, A, y))(START, theta)

    found = torch.func.vmap(torch.func.jacrev(minimum), in_dims=(None, 0))(PENALTIES, targets)
    wanted = torch.func.vmap(torch.func.jacrev(lambda t, y: closed(t, A, y)), in_dims=(None, 0))(PENALTIES, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("every", [None, 1])
def test_a_solver_within_a_checkpointed_loop(every: int | None) -> None:
    """A minimum that a loss asks for, whose solver trains with torch.optim, and closes over what a segment exchanges."""
    factor = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def outer(solve: Any, scale: Tensor) -> Tensor:
        def loss(p: Tensor) -> Tensor:
            x = solve(p * scale)
            return (x**2).sum() + (p**2).sum()

        return ps.meta.unroll(ps.sgd(0.1), loss, 0.1 * PENALTIES, 3, checkpoint_every=every).params.sum()

    def by_optimizer(theta: Tensor) -> Tensor:
        def solver(init: Tensor, theta: Tensor) -> Tensor:
            return SOLVERS["torch LBFGS"](init * factor, theta)

        return ps.meta.implicit(solver, torch.func.grad(ridge))(START, theta)

    scale = torch.tensor(0.7, dtype=torch.float64)
    known = functools.partial(outer, closed)
    found = functools.partial(outer, by_optimizer)
    wanted = torch.func.grad(known)(scale)
    if every is None:  # torch.func.grad of implicit in a checkpointed segment is refused by torch: "escaped?"
        torch.testing.assert_close(torch.func.grad(found)(scale), wanted, rtol=1e-6, atol=1e-7)
    leaf = scale.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(found(leaf), leaf)[0], wanted, rtol=1e-6, atol=1e-7)


def test_a_solver_of_both_kinds() -> None:
    """backward() at the start, and torch.func at the end: levels that the solver begins are its own."""

    def solver(init: Tensor, theta: Tensor) -> Tensor:
        x = loop(lambda xs: torch.optim.SGD(xs, lr=0.035, momentum=0.6), 20, closure=False)(init, theta).detach()
        for _ in range(3):
            x = x - torch.linalg.solve(torch.func.hessian(ridge)(x, theta), torch.func.grad(ridge)(x, theta))
        return x

    minimum = functools.partial(ps.meta.implicit(solver, torch.func.grad(ridge)), START)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(minimum)(PENALTIES), WANTED, rtol=1e-9, atol=1e-9)


def test_a_solver_that_fails_leaves_torch_func_as_it_was() -> None:
    def failing(init: Tensor, theta: Tensor) -> Tensor:
        raise LookupError("nothing found")

    def outer(theta: Tensor) -> Tensor:
        with pytest.raises(LookupError, match="nothing found"):
            ps.meta.implicit(failing, torch.func.grad(ridge))(START, theta)
        return (theta**2).sum()

    assert difference(torch.func.grad(outer)(PENALTIES), 2 * PENALTIES) == 0
    both = torch.func.vmap(torch.func.grad(outer))(torch.stack([PENALTIES, PENALTIES]))
    assert difference(both[1], 2 * PENALTIES) == 0


def test_what_a_solver_records_is_not_kept() -> None:
    """A solver whose history reaches a network that it closes over returns constants."""
    net = nn.Linear(4, 4, dtype=torch.float64)

    def solver(init: Tensor, theta: Tensor) -> Tensor:
        return exact(init, theta) + 0 * net(init)

    theta = PENALTIES.clone().requires_grad_()
    x = ps.meta.implicit(solver, torch.func.grad(ridge))(START, theta)
    (slope,) = torch.autograd.grad(x.sum(), [net.weight], allow_unused=True)
    assert slope is None
