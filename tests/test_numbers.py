"""Trajectories, against torch.optim and against each other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import purestep as ps
from tests.cases import CASES, Case, Options, each_options, each_problem
from tests.problems import PROBLEMS, clone, difference, grads, mlp

WITH_TWIN = [case for case in CASES if case.twin]
STEPS = 50


def torch_trajectory(case: Case, options: Options, problem: Any, dtype: torch.dtype, **flags: Any) -> Any:
    params, loss = problem(dtype)
    leaves = [p.clone().requires_grad_() for p in params.values()]
    assert case.twin is not None
    optimizer = case.twin(leaves, **options, **flags)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(dict(zip(params, leaves))).backward()
        optimizer.step()
    return dict(zip(params, [p.detach() for p in leaves]))


def pure_trajectory(t: ps.Transform, problem: Any, dtype: torch.dtype, steps: int = STEPS, **how: Any) -> Any:
    params, loss = problem(dtype)
    params = clone(params)
    state = t.init_state(params)
    for _ in range(steps):
        params, state = t.step(grads(loss, params), state, params, **how)
    return params, state


@each_problem(WITH_TWIN)
@pytest.mark.parametrize("executor", [None, "foreach", "leaf"])
@pytest.mark.in_turn("executor")
def test_equals_torch(case: Case, options: Options, problem: str, executor: Any) -> None:
    follows(case, options, problem, executor, torch.float64, 1e-12)


@each_problem(WITH_TWIN, "float32")
@pytest.mark.parametrize("executor", [None, "foreach", "leaf"])
@pytest.mark.in_turn("executor")
def test_equals_torch_in_float32(case: Case, options: Options, problem: str, executor: Any) -> None:
    follows(case, options, problem, executor, torch.float32, 1e-6)


@each_problem(WITH_TWIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_every_step_equals_torchs(case: Case, options: Options, problem: str, dtype: torch.dtype) -> None:
    """From torch's parameters and state, all along its trajectory."""
    params, loss = PROBLEMS[problem](dtype)
    theirs, ours = ([p.clone().requires_grad_() for p in params.values()] for _ in range(2))
    assert case.twin is not None
    a, b = case.twin(theirs, **options, foreach=False), getattr(ps.optim, case.twin.__name__)(ours, **options)
    for _ in range(STEPS):
        a.zero_grad()
        loss(dict(zip(params, theirs))).backward()
        before = copy.deepcopy(a.state_dict())
        for p, q in zip(ours, theirs):
            p.data.copy_(q.data)
            p.grad = q.grad.clone()
        if before["state"]:
            b.load_state_dict(before)
        a.step()
        b.step()
        assert (
            difference(list(map(torch.detach, ours)), list(map(torch.detach, theirs)))
            <= {torch.float64: 1e-14, torch.float32: 1e-6}[dtype]
        )


def follows(case: Case, options: Options, problem: str, executor: Any, dtype: torch.dtype, tolerance: float) -> None:
    ours, _ = pure_trajectory(case.transform(options), PROBLEMS[problem], dtype, executor=executor)
    theirs = torch_trajectory(case, options, PROBLEMS[problem], dtype, foreach=False)
    distance = difference(ours, theirs)
    if distance > tolerance and dtype == torch.float32:
        exact = torch_trajectory(case, options, PROBLEMS[problem], torch.float64, foreach=False)
        exact = {k: v.float() for k, v in exact.items()}  # then it is rounding: of torch's, or what one rounding has grown to
        runs = [theirs, *[nudged(case, options, problem, ulps) for ulps in (-3, -2, -1, 1, 2, 3)]]
        error = max(difference(run, exact) for run in runs)
        assert distance <= 2 * error
        assert difference(ours, exact) <= error
    else:
        assert distance <= tolerance


def nudged(case: Case, options: Options, problem: str, ulps: int) -> Any:
    """torch's trajectory in float32 from parameters and of a loss that differ in the last digits: how far rounding carries."""

    def begun(dtype: torch.dtype) -> Any:
        params, loss = PROBLEMS[problem](dtype)
        factor = 1 + ulps * torch.finfo(dtype).eps
        return {k: p * factor for k, p in params.items()}, lambda p: loss(p) * factor

    return torch_trajectory(case, options, begun, torch.float32, foreach=False)


@each_options(WITH_TWIN, "complex")
def test_complex_parameters_are_pairs_of_reals(case: Case, options: Options) -> None:
    ours, _ = pure_trajectory(case.transform(options), PROBLEMS["complex"], torch.complex128)
    theirs = torch_trajectory(case, options, PROBLEMS["complex"], torch.complex128, foreach=False)
    assert difference(ours, theirs) <= 1e-11


@each_options()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.in_turn("dtype")
def test_dtypes_are_kept(case: Case, options: Options, dtype: torch.dtype) -> None:
    keeps(case, options, dtype)


@each_options(capability="complex")
def test_complex_dtypes_are_kept(case: Case, options: Options) -> None:
    keeps(case, options, torch.complex64)


def keeps(case: Case, options: Options, dtype: torch.dtype) -> None:
    """An update neither promotes nor demotes a parameter or a state, in any mode."""
    if dtype.is_complex and "complex" in case.lacks:
        pytest.skip(case.lacks["complex"])
    t = case.transform(options)
    params = {"m": torch.randn(3, 2).to(dtype), "v": torch.randn(3).to(dtype), "s": torch.randn(()).to(dtype)}
    params = {k: p for k, p in params.items() if case.treats(p)}
    g = {k: torch.randn_like(p) for k, p in params.items()}
    state = t.init_state(params)
    wanted = [x.dtype for x in torch.utils._pytree.tree_leaves(state) if x is not None]
    for executor in (None, "foreach", "leaf"):
        new, after = t.step(g, state, params, executor=executor)
        assert {p.dtype for p in new.values()} == {dtype}
        assert [x.dtype for x in torch.utils._pytree.tree_leaves(after) if x is not None] == wanted
        updates, _ = t.update(g, state, params, executor=executor)
        assert {u.dtype for u in updates.values()} == {dtype}


def test_a_float32_state_of_bfloat16_parameters_stays() -> None:
    t = ps.adamw(0.1)
    params = [torch.randn(3).bfloat16()]
    state = t.init_state([p.float() for p in params])
    for donate in (False, True):
        params, state = t.step([torch.randn(3).bfloat16()], state, params, donate=donate)
        assert params[0].dtype == torch.bfloat16
        assert state[0].exp_avg[0].dtype == torch.float32


def test_clipping_equals_torchs() -> None:
    params, loss = mlp()
    g = {k: 10 * v for k, v in grads(loss, params).items()}
    leaves = [p.clone().requires_grad_() for p in params.values()]
    for max_norm in (0.5, 1e9):
        for p, x in zip(leaves, g.values()):
            p.grad = x.clone()
        torch.nn.utils.clip_grad_norm_(leaves, max_norm)
        t = ps.clip_by_global_norm(max_norm)
        clipped, _ = t.update(g, t.init_state(params), params)
        assert difference(clipped, dict(zip(g, [p.grad for p in leaves]))) == 0
    for p, x in zip(leaves, g.values()):
        p.grad = x.clone()
    torch.nn.utils.clip_grad_value_(leaves, 0.1)
    t = ps.clip(0.1)
    clipped, _ = t.update(g, t.init_state(params), params)
    assert difference(clipped, dict(zip(g, [p.grad for p in leaves]))) == 0


def test_a_late_parameter_counts_its_own_updates() -> None:
    """A parameter that is unfrozen later gets the bias correction of its own first step."""
    params = {"early": torch.ones(2), "late": torch.ones(2)}
    t = ps.adam(lr=0.1)
    state = t.init_state(params)
    g = torch.full((2,), 0.5)
    for _ in range(5):
        params, state = t.step({"early": g, "late": None}, state, params, donate=True)
    assert state[1].step == {"early": torch.tensor(5.0), "late": torch.tensor(0.0)}
    before = params["late"].clone()
    params, state = t.step({"early": g, "late": g}, state, params, donate=True)
    torch.testing.assert_close(before - params["late"], torch.full((2,), 0.1))
    assert state[1].step == {"early": torch.tensor(6.0), "late": torch.tensor(1.0)}
