"""What is misspelt, does not go together, or did not converge, is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from tests.cases import CASES
from tests.problems import PROBLEMS

PARAMS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}

# ---------------------------------------------------------------------------------------------------------- executors


@pytest.mark.parametrize("name", ["Foreach", "for-each", "", "fuse", True, 1])
@pytest.mark.parametrize("method", ["step", "update"])
def test_there_is_no_such_executor(method: str, name: Any) -> None:
    """The error lists those there are, before anything has changed."""
    opt = ps.sgd(lr=0.1, momentum=0.9)
    state = opt.init_state(PARAMS)
    with pytest.raises(ValueError, match=r"executor must be None or one of 'leaf', 'foreach', 'fused', 'compiled', but is "):
        getattr(opt, method)(PARAMS, state, PARAMS, executor=name)


def test_update_has_no_fused_kernel() -> None:
    """They write parameters."""
    opt = ps.adamw(lr=0.1)
    with pytest.raises(ValueError, match=r"executor='fused'.*update makes updates alone. Use step"):
        opt.update(PARAMS, opt.init_state(PARAMS), PARAMS, executor="fused")
    new, _ = opt.step(PARAMS, opt.init_state(PARAMS), PARAMS, executor="fused")
    torch.testing.assert_close(new, opt.step(PARAMS, opt.init_state(PARAMS), PARAMS)[0])


def test_a_transform_that_moves_parameters_has_no_fused_kernel() -> None:
    """Nor is it ignored where the last transform returns parameters, unless it is put around one that has a kernel."""

    @ps.whole(moves=True)
    def moved(gs: Any, s: Any, params: Any) -> Any:
        return [p - g for p, g in zip(params, gs)], s

    opt = moved()
    with pytest.raises(
        RuntimeError,
        match=r"A fused step \(fused=True, executor='fused'\) needs a chain that ends in what a torch._fused_\* kernel computes",
    ):
        opt.step(PARAMS, opt.init_state(PARAMS), PARAMS, executor="fused")
    around = ps.lookahead(ps.adamw(0.1), k=2)
    new, _ = around.step(PARAMS, around.init_state(PARAMS), PARAMS, executor="fused")
    torch.testing.assert_close(new, around.step(PARAMS, around.init_state(PARAMS), PARAMS)[0])


# ------------------------------------------------------------------------------------------------------ linear equations

SOLVERS: dict[str, Any] = {
    "solve_cg": ps.meta.solve_cg,
    "solve_normal_cg": ps.meta.solve_normal_cg,
    "solve_neumann": ps.meta.solve_neumann,
}
B = {"x": torch.tensor([1.0, 3.0], dtype=torch.float64), "y": torch.tensor(2.0, dtype=torch.float64)}


def times(k: Any) -> Any:
    return lambda x: {name: k * y for name, y in x.items()}


@pytest.mark.parametrize("name", ["solve_cg", "solve_neumann"])
def test_what_is_not_solved_is_warned_of(name: str) -> None:
    """A = 0 (or 30, for the series) has no solution that they could find."""
    k = 0.0 if name == "solve_cg" else 30.0
    with pytest.warns(ps.meta.ConvergenceWarning, match=rf"{name} did not converge in maxiter=100: the residual is "):
        SOLVERS[name](times(k), B)
    x, info = SOLVERS[name](times(k), B, return_info=True)
    assert not info.converged
    residual = (
        torch.stack([((B[n] - k * x[n]) ** 2).sum() for n in B]).sum() / torch.stack([(y**2).sum() for y in B.values()]).sum()
    )
    last = abs(1 - k) if name == "solve_neumann" else 1.0  # the residual is that without the last term
    torch.testing.assert_close(last * info.residual, residual.sqrt())
    SOLVERS[name](times(k), B, tol=0.0, maxiter=3)  # asked for


def test_few_products_are_warned_of() -> None:
    """Also of the normal equations; and a right-hand side that is not finite is not solved."""
    matrix = torch.diag(torch.arange(1.0, 9.0, dtype=torch.float64))
    b = torch.ones(8, dtype=torch.float64)
    for name in ("solve_cg", "solve_normal_cg"):
        with pytest.warns(ps.meta.ConvergenceWarning, match=f"{name} did not converge in maxiter=3"):
            SOLVERS[name](matrix.mv, b, maxiter=3)
        x, info = SOLVERS[name](matrix.mv, b, return_info=True)
        assert info.converged
        assert info.residual <= 1e-10
        torch.testing.assert_close(x, b / matrix.diagonal())
        with pytest.warns(ps.meta.ConvergenceWarning, match="residual is nan"):
            SOLVERS[name](matrix.mv, b * float("nan"))
        x, info = SOLVERS[name](matrix.mv, 0 * b, return_info=True)
        assert info.converged
        assert info.residual == 0
        assert not x.any()


def test_each_member_of_a_batch_tells_for_itself() -> None:
    """Inside of torch.func, and there is a warning too."""
    ks = torch.tensor([2.0, 0.0], dtype=torch.float64)
    b = torch.tensor([1.0, 3.0], dtype=torch.float64)
    x, info = torch.func.vmap(lambda k: ps.meta.solve_cg(lambda x: k * x, b, return_info=True))(ks)
    assert info.converged.tolist() == [True, False]
    torch.testing.assert_close(x[0], b / 2)
    with pytest.warns(ps.meta.ConvergenceWarning, match=r"the residual is 1 of"):
        torch.func.vmap(lambda k: ps.meta.solve_cg(lambda x: k * x, b))(ks)
    x, info = torch.func.vmap(lambda k: ps.meta.solve_neumann(lambda x: k * x, b, return_info=True))(
        torch.tensor([0.5, 30.0], dtype=torch.float64)
    )
    assert info.converged.tolist() == [True, False]
    torch.testing.assert_close(x[0], 2 * b)


def test_an_implicit_derivative_that_is_not_there_is_warned_of() -> None:
    """A loss that is flat at its minimum has no derivative of the minimum."""
    flat = ps.meta.implicit(lambda x, a: a.clone(), lambda x, a: (x - a) ** 3)
    with pytest.warns(ps.meta.ConvergenceWarning, match="solve_cg did not converge"):
        torch.func.grad(lambda a: flat(torch.zeros(2), a).sum())(torch.ones(2))
    a = torch.ones(2, requires_grad=True)
    with pytest.warns(ps.meta.ConvergenceWarning, match="solve_cg did not converge"):
        flat(torch.zeros(2), a).sum().backward()


# ----------------------------------------------------------------------------------------------------------- saved states


class UserState(NamedTuple):
    """A state of a user's."""

    step: ps.Scalar
    last: Tensor

    @classmethod
    def init(cls, p: Tensor) -> UserState:
        return cls(ps.counter(p), torch.zeros_like(p))


@ps.leafwise(UserState)
def users(g: Tensor, s: UserState, p: Tensor) -> tuple[Tensor, UserState]:
    return g + s.last, UserState(s.step + 1, g * 1)


class UserWholeState(NamedTuple):
    """Another."""

    count: Tensor
    inner: Any

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> UserWholeState:
        return cls(torch.zeros(()), inner)


@ps.nested(UserWholeState)
def users_around(gs: list[Tensor], s: UserWholeState, params: list[Tensor], transform: ps.Inner) -> Any:
    us, inner = transform.update(gs, s.inner, params)
    return us, UserWholeState(s.count + 1, inner)


TRANSFORMS = {
    **{case.name: case.transform for case in CASES},
    "users": users,
    "users_around": lambda: users_around(ps.adam(lambda t: 0.1)),
    "scheduled": lambda: ps.chain(ps.clip_by_global_norm(lambda t: 1.0), ps.sgd(lambda t: 0.1)),
    "partition": lambda: ps.partition({"x": ps.adam(0.1), "y": ps.sgd(0.1)}, lambda path, p: "x" if p.ndim > 1 else "y"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_saved_state_is_loaded_by_default(name: str, tmp_path: Path) -> None:
    """`torch.load` makes nothing but what it knows, which is every state."""
    case = next((c for c in CASES if c.name == name), None)
    params, _ = PROBLEMS["mlp"](torch.float32) if case is None else case.problem()
    params = {k: p for k, p in params.items() if case is None or case.treats(p)}
    opt = TRANSFORMS[name]()
    state = opt.init_state(params)
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert type(loaded) is type(state)
    olds, news = [pytree.tree_flatten_with_path(x)[0] for x in (state, loaded)]
    assert len(olds) == len(news)
    for (place, old), (other, new) in zip(olds, news):
        assert place == other
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
