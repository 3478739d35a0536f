"""L-BFGS: torch's numbers and evaluations, one by one; members of a batch that are where they are alone; its parts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.lbfgs import _cubic_interpolate
from torch.utils import _pytree as pytree

import purestep as ps
from purestep.algorithms.lbfgs import LBFGS, History, LBFGSState, Point, is_long, lbfgs, minimum_of_cubic, newton
from tests.problems import clone, complex_regression, difference, logistic, mlp

Options = dict[str, Any]
Problem = Callable[[torch.dtype], tuple[dict[str, Tensor], Callable[[Any], Tensor]]]
WOLFE = "strong_wolfe"
STEPS = 22


def banana(x: Tensor) -> Tensor:
    """Rosenbrock's function in any number of dimensions, whose minimum is at ones."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def rosenbrock(dtype: torch.dtype, n: int = 2) -> tuple[dict[str, Tensor], Callable[[Any], Tensor]]:
    return {"x": torch.linspace(-1.2, 1.0, n, dtype=torch.float64).to(dtype)}, lambda p: banana(p["x"])


PROBLEMS: dict[str, Problem] = {
    "rosenbrock": rosenbrock,
    "rosenbrock-10": lambda dtype: rosenbrock(dtype, 10),
    "logistic": logistic,
    "mlp": mlp,
    "complex": lambda dtype: complex_regression(dtype.to_complex()),
}


class Counted:
    """`value_and_grad` of a loss, by autograd as in a closure, which counts its calls."""

    def __init__(self, loss: Callable[[Any], Tensor]) -> None:
        self.loss, self.calls = loss, 0

    def __call__(self, params: Any) -> tuple[Tensor, Any]:
        self.calls += 1
        leaves = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
        loss = self.loss(leaves)
        return loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))


class Theirs:
    """torch.optim.LBFGS on the same problem."""

    def __init__(self, params: dict[str, Tensor], loss: Callable[[Any], Tensor], options: Options) -> None:
        self.leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
        self.loss, self.calls = loss, 0
        self.optimizer = torch.optim.LBFGS(self.leaves.values(), **options)

    def step(self) -> dict[str, Tensor]:
        def closure() -> Tensor:
            self.calls += 1
            self.optimizer.zero_grad()
            loss = self.loss(self.leaves)
            loss.backward()
            return loss

        self.optimizer.step(closure)
        return {k: p.detach().clone() for k, p in self.leaves.items()}

    def move(self, params: dict[str, Tensor]) -> None:
        for k, p in self.leaves.items():
            p.data.copy_(params[k])

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.state[next(iter(self.leaves.values()))]


def step(opt: ps.Transform, f: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """One update; the gradient that is passed is of no consequence."""
    return opt.step(pytree.tree_map(torch.zeros_like, params), state, params, value_and_grad=f)


# ----------------------------------------------------------------------------------------------------------------- numbers

OPTIONS: dict[str, Options] = {
    "default": {},
    "history of 3": {"history_size": 3},
    "history of 1": {"history_size": 1},
    "4 iterations": {"max_iter": 4},
    "1 iteration": {"max_iter": 1},
    "7 evaluations": {"max_eval": 7},
    "1 evaluation": {"max_eval": 1, "max_iter": 3},
    "many of both": {"max_iter": 60, "max_eval": 1000},
    "half": {"lr": 0.4},
    "loose gradient": {"tolerance_grad": 1e-3},
    "loose change": {"tolerance_change": 1e-4},
}
RATES: dict[str, Options] = {  # of the kind that suits: a small step without a search, and a far first trial with one
    "small": {"lr": 0.01, "max_iter": 5},
    "tenth": {"lr": 0.1},
    "far": {"lr": 2.0, "line_search_fn": WOLFE},
    "farther": {"lr": 8.0, "line_search_fn": WOLFE},
}
SEARCHES = [{**o, "line_search_fn": search} for o in OPTIONS.values() for search in (None, WOLFE)]
SEARCH_IDS = [f"{name}-{search}" for name in OPTIONS for search in ("fixed", "wolfe")]


def compare_updates(problem: Problem, dtype: torch.dtype, options: Options, tolerance: float) -> None:
    """Every update, each begun with torch's state where ours ended: a difference of one rounding would grow from step to step."""
    params, loss = problem(dtype)
    f, theirs, opt = Counted(loss), Theirs(params, loss, options), lbfgs(**options)
    state = opt.init_state(params)
    for _ in range(STEPS):
        params, state = step(opt, f, state, params)
        expected = theirs.step()
        if not all([x.isfinite().all() for x in expected.values()]):  # without a line search a run may diverge, torch's too
            assert [x.isfinite().all() for x in params.values()] == [x.isfinite().all() for x in expected.values()]
            return
        assert difference(params, expected) <= tolerance
        assert f.calls == theirs.calls == state.func_evals == theirs.state["func_evals"]
        assert state.n_iter == theirs.state["n_iter"]
        assert len(state.old_dirs) == len(state.old_stps) == len(state.ro) == len(theirs.state.get("ro") or [])
        theirs.move(params)
        state = taken(theirs.state, state)


def taken(theirs: dict[str, Any], ours: LBFGSState) -> LBFGSState:
    """torch's state, in the dtypes of ours."""

    def like(x: Any, y: Tensor) -> Tensor:
        return torch.as_tensor(x, dtype=y.dtype).clone()

    fields = {name: theirs[name] for name in LBFGSState._fields if theirs.get(name) is not None}
    kinds = {"old_dirs": ours.d, "old_stps": ours.d, "ro": ours.H_diag}
    return ours._replace(
        **{
            name: tuple(like(y, kinds[name]) for y in x) if isinstance(x, list) else like(x, getattr(ours, name))
            for name, x in fields.items()
        }
    )


@pytest.mark.parametrize("options", [*SEARCHES, *RATES.values()], ids=[*SEARCH_IDS, *RATES])
@pytest.mark.parametrize("problem", list(PROBLEMS))
@pytest.mark.in_turn("problem")
def test_each_update_is_torchs(problem: str, options: Options) -> None:
    compare_updates(PROBLEMS[problem], torch.float64, options, 1e-10)


@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.1}, {"history_size": 2}, {"max_iter": 1, "line_search_fn": WOLFE}],
    ids=["default", "tenth", "history", "wolfe"],
)
@pytest.mark.parametrize("problem", ["rosenbrock", "rosenbrock-10", "logistic", "complex"])
def test_each_update_is_torchs_in_float32(problem: str, options: Options) -> None:
    compare_updates(PROBLEMS[problem], torch.float32, options, 1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"lr": 2.0}, {"max_eval": 7}, {"history_size": 3}], ids=["default", "far", "evaluations", "history"]
)
@pytest.mark.parametrize("problem", ["rosenbrock", "logistic", "complex"])
def test_trajectory_is_torchs(problem: str, options: Options) -> None:
    """Left to themselves, where the problem does not blow rounding errors up."""
    params, loss = PROBLEMS[problem](torch.float64)
    options = {**options, "line_search_fn": WOLFE}
    f, theirs, opt = Counted(loss), Theirs(params, loss, options), lbfgs(**options)
    state = opt.init_state(params)
    for _ in range(STEPS):
        params, state = step(opt, f, state, params)
        assert difference(params, theirs.step()) <= 1e-10
        assert f.calls == theirs.calls


@pytest.mark.parametrize("search", [None, WOLFE], ids=["fixed", "wolfe"])
def test_state_is_torchs(search: str | None) -> None:
    """Everything that torch keeps, after as many updates."""
    params, loss = mlp()
    options: Options = {"max_iter": 4, "history_size": 5, "line_search_fn": search}
    f, theirs, opt = Counted(loss), Theirs(params, loss, options), lbfgs(**options)
    state = opt.init_state(params)
    for _ in range(4):
        params, state = step(opt, f, state, params)
        theirs.step()
        theirs.move(params)
    assert len(state.ro) == 5
    for name, x in state._asdict().items():
        found = theirs.state[name]
        for a, b in zip(x, found) if isinstance(x, tuple) else [(x, found)]:
            assert torch.as_tensor(a - b).abs().max() <= 1e-12 * max(1.0, float(torch.as_tensor(b).abs().max())), name


def test_parameters_of_two_dtypes() -> None:
    def problem(dtype: torch.dtype) -> tuple[dict[str, Tensor], Callable[[Any], Tensor]]:
        params = {"a": torch.tensor([-1.2, 0.3], dtype=torch.float32), "b": torch.tensor([1.0, 0.5], dtype=torch.float64)}
        return params, lambda p: banana(torch.cat([p["a"].double(), p["b"]]))

    compare_updates(problem, torch.float64, {"line_search_fn": WOLFE, "max_iter": 3}, 1e-6)
    params, loss = problem(torch.float64)
    opt = lbfgs()
    params, state = step(opt, Counted(loss), opt.init_state(params), params)
    assert [p.dtype for p in params.values()] == [torch.float32, torch.float64]
    assert state.d.dtype == torch.float64


# ------------------------------------------------------------------------------------------------------------------- parts


def test_direction_is_that_of_the_dense_inverse() -> None:
    """The two loops against the BFGS formula, with matrices."""
    g = torch.randn(6, dtype=torch.float64)
    steps = torch.randn(4, 6, dtype=torch.float64)
    hessian = torch.diag(torch.linspace(1.0, 5.0, 6, dtype=torch.float64))
    changes = steps @ hessian
    ro = [1 / float(s @ y) for s, y in zip(steps, changes)]
    scale = float(steps[-1] @ changes[-1] / (changes[-1] @ changes[-1]))
    eye = torch.eye(6, dtype=torch.float64)
    inverse = scale * eye
    for s, y, r in zip(steps, changes, ro):
        inverse = (eye - r * torch.outer(s, y)) @ inverse @ (eye - r * torch.outer(y, s)) + r * torch.outer(s, s)
    history = History(tuple(changes), tuple(steps), tuple(ro), scale)
    torch.testing.assert_close(newton(g, history, Tensor.item), -inverse @ g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(newton(changes[-1], history, Tensor.item), -steps[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["numbers", "tensors", "batch"])
def test_interpolation_is_torchs(form: str) -> None:
    """On random points, on straight lines, where there is no minimum, and either way around."""
    random = torch.randn(200, 6, dtype=torch.float64).tolist()
    line = [[0.0, 1.0, -1.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 2.0, 5.0, 2.0]]
    rows = torch.tensor(random + line, dtype=torch.float64)

    def ours(row: Any) -> Any:
        x1, f1, g1, x2, f2, g2 = row
        low, high = ps.minimum(x1, x2), ps.maximum(x1, x2)
        return minimum_of_cubic(Point(x1, f1, g1), Point(x2, f2, g2), low, high)

    run: dict[str, Callable[[], Tensor]] = {
        "numbers": lambda: torch.tensor([ours(row) for row in rows.tolist()], dtype=torch.float64),
        "tensors": lambda: torch.stack([ours(row.unbind()) for row in rows]),
        "batch": lambda: torch.func.vmap(lambda row: ours(row.unbind()))(rows),
    }
    theirs = torch.stack([torch.as_tensor(_cubic_interpolate(*row.unbind())) for row in rows])
    torch.testing.assert_close(run[form](), theirs, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_interpolation_finds_the_minimum_of_a_cubic() -> None:
    def point(t: float) -> Point:
        return Point(t, t**3 - 3 * t, 3 * t**2 - 3)  # least at 1

    assert minimum_of_cubic(point(0.0), point(3.0), 0.0, 3.0) == pytest.approx(1.0, abs=1e-14)
    assert minimum_of_cubic(point(3.0), point(0.0), 1.5, 3.0) == 1.5


def test_no_history_is_the_method_of_barzilai_and_borwein() -> None:
    a = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)
    x = [torch.ones(3, dtype=torch.float64)]
    x.append(x[0] - min(1.0, 1 / float(a.sum())) * a * x[0])
    for _ in range(8):
        s, y = x[-1] - x[-2], a * (x[-1] - x[-2])
        x.append(x[-1] - (s @ y) / (y @ y) * a * x[-1])
    opt = lbfgs(max_iter=9, max_eval=100, history_size=0)
    params = {"x": x[0]}
    found, state = step(opt, Counted(lambda p: (a * p["x"] ** 2).sum() / 2), opt.init_state(params), params)
    torch.testing.assert_close(found["x"], x[9], rtol=1e-10, atol=1e-14)
    assert state.ro == ()


# ------------------------------------------------------------------------------------------------------------------ ending


def test_nothing_moves_at_the_minimum() -> None:
    params = {"x": torch.ones(4, dtype=torch.float64)}
    f, opt = Counted(lambda p: banana(p["x"])), lbfgs()
    before = opt.init_state(params)
    after, state = step(opt, f, before, params)
    assert torch.equal(after["x"], params["x"])
    assert (f.calls, state.func_evals, state.n_iter) == (1, 1, 0)
    assert all(torch.equal(a, b) for a, b in zip(tensors(state)[2:], tensors(before)[2:]))


ENDS: dict[str, tuple[Options, tuple[int, int]]] = {  # a quadratic bowl, which the second direction solves
    "iterations": ({"max_iter": 1}, (1, 1)),
    "evaluations": ({"max_eval": 2}, (2, 1)),
    "gradient": ({"tolerance_grad": 1e3}, (1, 0)),
    "direction": ({"tolerance_change": 1e9}, (1, 1)),
    "change": ({"tolerance_change": 5.0}, (2, 1)),
    "no iteration": ({"max_iter": 0}, (1, 0)),
    "the minimum": ({}, (3, 2)),
    "nothing": ({"tolerance_change": -1.0, "tolerance_grad": -1.0, "max_iter": 7, "max_eval": 99}, (7, 7)),
}


@pytest.mark.parametrize(("options", "expected"), ENDS.values(), ids=list(ENDS))
def test_an_update_ends(options: Options, expected: tuple[int, int]) -> None:
    """Evaluations and iterations, where each of the conditions ends an update."""
    params = {"x": torch.tensor([2.0, 1.0], dtype=torch.float64)}
    f, opt = Counted(lambda p: 2 * (p["x"] ** 2).sum()), lbfgs(**options)
    _, state = step(opt, f, opt.init_state(params), params)
    assert (int(state.func_evals), int(state.n_iter)) == expected
    assert f.calls == expected[0]


@pytest.mark.parametrize("most", [1, 2, 5, 9])
def test_one_evaluation_more_than_allowed(most: int) -> None:
    """What a search has begun, it ends; but it makes no more than one evaluation too many."""
    params = {"x": torch.zeros(2, dtype=torch.float64)}
    f, opt = Counted(lambda p: p["x"].sum()), lbfgs(max_eval=most, line_search_fn=WOLFE)  # it can go on for ever
    _, state = step(opt, f, opt.init_state(params), params)
    assert f.calls == state.func_evals == most + 1


def test_a_state_is_never_written_on() -> None:
    """The same arguments give the same results, bit for bit, and are what they were."""
    params, loss = mlp()
    f, opt = Counted(loss), lbfgs(max_iter=3, history_size=4, line_search_fn=WOLFE)
    state = opt.init_state(params)
    for _ in range(3):
        grads = f(params)[1]
        given = (grads, state, params)
        kept, versions = clone(given), [x._version for x in tensors(given)]
        results = [opt.step(*given, value_and_grad=f) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(tensors(given), tensors(kept)))
        assert [x._version for x in tensors(given)] == versions
        assert all(torch.equal(a, b) for a, b in zip(tensors(results[0]), tensors(results[1])))
        grads = {k: g.zero_() for k, g in grads.items()}  # what a user does with a gradient does not reach the state
        assert all(torch.equal(a, b) for a, b in zip(tensors(results[0]), tensors(results[1])))
        params, state = results[0]


def test_a_gradient_that_is_used_again() -> None:
    """A function that gives out the same buffer each time, as `p.grad` is."""
    params, loss = mlp()
    buffers = {k: torch.empty_like(p) for k, p in params.items()}

    def reused(p: Any) -> tuple[Tensor, Any]:
        value, grads = Counted(loss)(p)
        for k, g in grads.items():
            buffers[k].copy_(g)
        return value, buffers

    opt = lbfgs(line_search_fn=WOLFE)
    a, _ = step(opt, Counted(loss), opt.init_state(params), params)
    b, _ = step(opt, reused, opt.init_state(params), params)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_first_trial_that_is_much_too_far() -> None:
    """The bracket shrinks by many orders of magnitude, as torch's does."""
    params = {"x": torch.tensor([0.5, -0.3], dtype=torch.float64)}
    options: Options = {"lr": 2.0**20, "line_search_fn": WOLFE, "max_iter": 4, "max_eval": 60}

    def loss(p: Any) -> Tensor:
        return torch.cosh(p["x"]).log().sum() + (p["x"] ** 4).sum()

    theirs, opt, f = Theirs(params, loss, options), lbfgs(**options), Counted(loss)
    found, _ = step(opt, f, opt.init_state(params), params)
    assert difference(found, theirs.step()) <= 1e-10
    assert f.calls == theirs.calls > 20


def test_learning_rate_zero_does_not_move() -> None:
    params, loss = rosenbrock(torch.float64)
    for search in (None, WOLFE):
        opt = lbfgs(lr=0.0, line_search_fn=search)
        found, state = step(opt, Counted(loss), opt.init_state(params), params)
        found, state = step(opt, Counted(loss), state, found)
        assert torch.equal(found["x"], params["x"])


# --------------------------------------------------------------------------------------------------------------- torch.func


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def minimized(x: Tensor, opt: ps.Transform, updates: int, state: Any = None, loss: Any = banana) -> tuple[Tensor, Any]:
    """A few updates from here, with gradients by torch.func."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        grad, value = torch.func.grad_and_value(loss)(x)
        return value, grad

    state = opt.init_state(x) if state is None else state
    for _ in range(updates):
        x, state = step(opt, f, state, x)
    return x, state


BATCHED: dict[str, Options] = {
    "fixed": {},
    "fixed, history of 3": {"history_size": 3},
    "fixed, evaluations": {"max_iter": 5, "max_eval": 4},
    "wolfe": {"line_search_fn": WOLFE},
    "wolfe, history of 2": {"line_search_fn": WOLFE, "history_size": 2},
    "wolfe, evaluations": {"line_search_fn": WOLFE, "max_eval": 7},
    "wolfe, iterations": {"line_search_fn": WOLFE, "max_iter": 3},
    "wolfe, no history": {"line_search_fn": WOLFE, "history_size": 0, "max_iter": 5},
}


def starts() -> Tensor:
    """Members that need different numbers of everything; the first is at the minimum."""
    x = torch.randn(6, 4, dtype=torch.float64) * 1.5
    x[0] = 1.0
    x[1] = 1.0 + 1e-4
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("options", BATCHED.values(), ids=list(BATCHED))
def test_members_do_not_know_of_each_other(options: Options, dtype: torch.dtype) -> None:
    """In a batch each member has what it has in a batch of its own, bit for bit: parameters, counters, histories."""
    opt, x = lbfgs(**options), starts().to(dtype)
    run = torch.func.vmap(lambda x: minimized(x, opt, 4))
    together, state = run(x)
    for i in range(len(x)):
        alone, own = run(x[i : i + 1])
        assert torch.equal(together[i], alone[0])
        for name, a, b in zip(LBFGSState._fields, state, own):
            windows = isinstance(a, tuple)
            assert not windows or len(a) >= len(b)
            for u, v in zip(reversed(a), reversed(b)) if windows else [(a, b)]:  # the newest entries stand last
                assert torch.equal(u[i], v[0]), name
            assert not windows or all(u[i].count_nonzero() == 0 for u in a[: len(a) - len(b)])


@pytest.mark.parametrize(
    "options", [o for o in BATCHED.values() if len(o) > 1], ids=[k for k, o in BATCHED.items() if len(o) > 1]
)
def test_a_batch_gives_each_member_what_it_gets_alone(options: Options) -> None:
    """Against the ordinary call, whose sums are rounded otherwise; so only as far as that is not blown up."""
    opt, x = lbfgs(**options), starts()
    together, state = torch.func.vmap(lambda x: minimized(x, opt, 2))(x)
    for i in range(len(x)):
        alone, own = minimized(x[i], opt, 2)
        assert difference(together[i], alone) <= 1e-10
        assert (state.func_evals[i], state.n_iter[i]) == (own.func_evals, own.n_iter)
        assert sum(int(r[i] != 0) for r in state.ro) == len(own.ro)


def test_a_batch_of_problems_and_learning_rates() -> None:
    """The optimizer itself is batched; each member has its own loss."""
    rates = torch.tensor([1.0, 0.5, 0.3, 2.0], dtype=torch.float64)
    scales = torch.tensor([1.0, 5.0, 20.0, 0.3], dtype=torch.float64)
    x = torch.tensor([0.5, -0.4, 1.1], dtype=torch.float64)

    def solved(opt: ps.Transform, scale: Tensor) -> tuple[Tensor, Any]:
        return minimized(x, opt, 2, loss=lambda x: (scale * x**2 + x**4 - x).sum())

    opt = lbfgs(lr=rates, line_search_fn=WOLFE)
    together, state = torch.func.vmap(solved, in_dims=(ps.in_dims(opt), 0))(opt, scales)
    assert len(set(state.func_evals.tolist())) > 1
    for i in range(4):
        alone, own = solved(opt.replace(lr=float(rates[i])), scales[i])
        assert difference(together[i], alone) <= 1e-10
        assert state.func_evals[i] == own.func_evals


@pytest.mark.parametrize("search", [None, WOLFE], ids=["fixed", "wolfe"])
def test_members_that_have_finished_stand_still(search: str | None) -> None:
    """From the update on in which a member meets its tolerance it does not change in any bit; the others go on."""
    opt, x = (
        lbfgs(lr=1.0 if search else 0.5, tolerance_grad=1e-5, tolerance_change=0.0, max_iter=8, line_search_fn=search),
        starts(),
    )
    update = torch.func.vmap(lambda x, state: minimized(x, opt, 1, state))
    slope = torch.func.vmap(torch.func.grad(banana))
    state = torch.func.vmap(opt.init_state)(x)
    finished: list[int] = []  # how many, before each update
    for _ in range(12):
        done = [i for i in range(len(x)) if slope(x)[i].abs().max() <= 1e-5]
        after, new = update(x, state)
        for i in done:
            assert torch.equal(after[i], x[i])
            assert new.func_evals[i] == state.func_evals[i] + 1
            for name, a, b in zip(LBFGSState._fields[1:], new[1:], state[1:]):
                for u, v in zip(reversed(a), reversed(b)) if isinstance(a, tuple) else [(a, b)]:  # the newest stand last
                    assert torch.equal(u[i], v[i]), name
        finished.append(len(done))
        x, state = after, new
    assert finished[0] == 1
    assert len(set(finished)) > 3


def test_evaluations_are_those_of_the_slowest_member() -> None:
    opt, x, calls = lbfgs(line_search_fn=WOLFE), starts(), 0

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        grad, value = torch.func.grad_and_value(banana)(x)
        return value, grad

    _, state = torch.func.vmap(lambda x: step(opt, f, opt.init_state(x), x))(x)
    assert calls == int(state.func_evals.max())
    assert int(state.func_evals.min()) == 1


def test_nested_batches() -> None:
    opt = lbfgs(line_search_fn=WOLFE, history_size=3)
    x = starts()
    flat = torch.func.vmap(lambda x: minimized(x, opt, 2)[0])(x)
    nested = torch.func.vmap(torch.func.vmap(lambda x: minimized(x, opt, 2)[0]))(x.reshape(2, 3, 4))
    assert torch.equal(nested.reshape(6, 4), flat)


def test_a_member_that_diverges_takes_no_one_along() -> None:
    x = starts()
    x[3] = 1e200  # its loss is infinite
    opt = lbfgs(line_search_fn=WOLFE)
    found, _ = torch.func.vmap(lambda x: minimized(x, opt, 3))(x)
    others = [0, 1, 2, 4, 5]
    alone, _ = torch.func.vmap(lambda x: minimized(x, opt, 3))(x[others])
    assert torch.equal(found[others], alone)


@pytest.mark.parametrize("options", [{"max_iter": 3}, {"max_iter": 6, "line_search_fn": WOLFE}], ids=["fixed", "wolfe"])
def test_derivatives(options: Options) -> None:
    """Of the result with respect to the start and the learning rate, in both directions, against finite differences."""
    x = torch.tensor([-1.2, 1.0, 0.5], dtype=torch.float64)
    lr = torch.tensor(0.3, dtype=torch.float64)

    def final(x: Tensor, lr: Tensor) -> Tensor:
        return minimized(x, lbfgs(lr=lr, **options), 2)[0]

    inputs = (x.requires_grad_(), lr.requires_grad_())
    assert torch.autograd.gradcheck(final, inputs, check_forward_ad=True, eps=1e-7, atol=1e-4, rtol=1e-4)
    reverse = torch.func.jacrev(final)(x.detach(), lr.detach())
    torch.testing.assert_close(torch.func.jacfwd(final)(x.detach(), lr.detach()), reverse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("search", [None, WOLFE], ids=["fixed", "wolfe"])
@pytest.mark.parametrize("start", [1.0, 0.0], ids=["minimum", "straight"])
def test_derivatives_are_finite(start: float, search: str | None) -> None:
    """At the minimum, where nothing moves; and on a parabola, where a search has denominators that are 0."""
    x = torch.full((3,), start, dtype=torch.float64)

    def final(x: Tensor) -> Tensor:
        return minimized(x, lbfgs(line_search_fn=search), 2, loss=lambda x: ((x - 1) ** 2).sum())[0].sum()

    assert torch.func.grad(final)(x).isfinite().all()


@pytest.mark.parametrize("search", [None, WOLFE], ids=["fixed", "wolfe"])
def test_traced(search: str | None) -> None:
    """A recorded update holds for other values, and is a batch's too."""
    opt = lbfgs(max_iter=2, max_eval=3, line_search_fn=search)
    x, y = starts()[2], starts()[3]

    def update(x: Tensor) -> Tensor:
        return minimized(x, opt, 1)[0]

    torch.testing.assert_close(make_fx(update)(x)(y), update(y), rtol=1e-12, atol=1e-12)
    batched = torch.func.vmap(update)
    assert torch.equal(make_fx(batched)(torch.stack([x, x]))(torch.stack([y, x])), batched(torch.stack([y, x])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_compiled(dtype: torch.dtype) -> None:
    """One graph, with the state going in and out of it; in its histories there are zeros where there might be entries."""
    opt = lbfgs(max_iter=2, line_search_fn=WOLFE)

    def update(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return minimized(x, opt, 1, state)

    x = starts()[2].to(dtype)
    compiled = torch.compile(update, backend="eager", fullgraph=True)
    found, state = compiled(*compiled(x, opt.init_state(x)))
    expected, own = update(*update(x, opt.init_state(x)))
    torch.testing.assert_close([found, *state[:4]], [expected, *own[:4]])
    torch.testing.assert_close([r for r in state.ro if r], list(own.ro))


def value_and_grad(x: Tensor) -> tuple[Tensor, Tensor]:
    grad, value = torch.func.grad_and_value(banana)(x)
    return value, grad


@pytest.mark.parametrize("around", [lambda t: t, ps.skip_if_nonfinite, lambda t: ps.chain(t, ps.scale(1.0))])
@pytest.mark.parametrize("options", [{"line_search_fn": WOLFE}, {"lr": 1e-3, "max_iter": 9}], ids=["wolfe", "fixed"])
def test_a_long_step_is_left_out_of_the_graph(options: Options, around: Any) -> None:
    """Its loss is compiled; what is before it and behind it is in graphs of their own."""
    opt, graphs = around(lbfgs(**options)), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    compiled_loss = torch.compile(value_and_grad, backend=backend, fullgraph=True)

    def update(x: Tensor, state: Any, f: Any) -> Any:
        x, state = opt.step(2 * x, state, x, value_and_grad=f)
        return x + 1.0, state

    x = starts()[2]
    found, own = torch.compile(update, backend=backend)(x, opt.init_state(x), compiled_loss)
    expected, state = update(x, opt.init_state(x), value_and_grad)
    assert torch.equal(found, expected)
    assert same_tensors(own, state)
    assert max(graphs) < 60
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Compile the loss instead"):
        torch.compile(update, backend="eager", fullgraph=True)(x, opt.init_state(x), value_and_grad)


def same_tensors(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def test_how_many_evaluations_are_written_out() -> None:
    """In an update that cannot take more than 8 evaluations, and never takes fewer than it may."""
    for options, long in (
        ({"max_iter": 8}, False), ({"max_iter": 9}, True), ({"max_iter": 9, "max_eval": 8}, False),
        ({"max_iter": 6, "line_search_fn": WOLFE}, False), ({"max_iter": 7, "line_search_fn": WOLFE}, True),
        ({"max_iter": 50, "max_eval": 7, "line_search_fn": WOLFE}, False), ({"max_eval": 1, "line_search_fn": WOLFE}, False),
    ):  # fmt: skip
        opt = lbfgs(tolerance_grad=-1.0, tolerance_change=-1.0, **{"lr": 1e-4, **options})
        assert is_long(opt.links[0].transform.arguments) == long
        x = starts()[2]
        _, state = opt.step(x, opt.init_state(x), x, value_and_grad=value_and_grad)
        assert long or int(state.func_evals) <= 8


# ------------------------------------------------------------------------------------------------- gradients that are None

PARTS = {
    "a": torch.tensor([-1.2, 0.3], dtype=torch.float64),
    "b": torch.tensor([-0.0, 1.5], dtype=torch.float64),
    "z": torch.tensor([0.5 - 0.2j], dtype=torch.complex128),
    "c": torch.tensor([[0.7], [-0.4]], dtype=torch.float64),
}


def coupled(p: dict[str, Tensor]) -> Tensor:
    """Every part matters for every other."""
    x = torch.cat([torch.view_as_real(p[k]).flatten() if p[k].is_complex() else p[k].flatten() for k in PARTS])
    return banana(x) + (x**2).sum() / 3


class Partial:
    """`value_and_grad` with None for some, or with gradients there that are not to be looked at."""

    def __init__(self, missing: str, given: bool = False) -> None:
        self.missing, self.given, self.inner = missing, given, Counted(coupled)

    def __call__(self, params: Any) -> tuple[Tensor, Any]:
        loss, g = self.inner(params)
        return loss, {k: None if k in self.missing and not self.given else x for k, x in g.items()}

    def grads(self) -> Any:
        return {k: None if k in self.missing else torch.zeros_like(p) for k, p in PARTS.items()}


def some_updates(
    opt: ps.Transform, missing: str, params: Any, state: Any, updates: int, given: bool = False, **how: Any
) -> Any:
    f = Partial(missing, given)
    for _ in range(updates):
        params, state = opt.step(f.grads(), state, params, value_and_grad=f, **how)
    return params, state


def alone(opt: ps.Transform, missing: str, params: Any, state: Any, updates: int) -> Any:
    """The same updates of the others alone."""
    fixed = {k: p for k, p in params.items() if k in missing}
    moved = {k: p for k, p in params.items() if k not in missing}
    f = Counted(lambda p: coupled({**p, **fixed}))
    state = opt.init_state(moved) if state is None else state
    for _ in range(updates):
        moved, state = step(opt, f, state, moved)
    return {k: fixed.get(k, moved.get(k)) for k in params}, state


MISSING: dict[str, Options] = {
    "fixed": {"lr": 0.1, "max_iter": 4},
    "wolfe": {"line_search_fn": WOLFE, "max_iter": 4},
    "history of 2": {"line_search_fn": WOLFE, "max_iter": 4, "history_size": 2},
}


@pytest.mark.parametrize("how", [{}, {"donate": True}, {"executor": "leaf"}], ids=str)
@pytest.mark.parametrize("missing", ["a", "b", "z", "bz", "ac"])
@pytest.mark.parametrize("options", MISSING.values(), ids=list(MISSING))
def test_none_leaves_a_parameter_and_optimizes_the_others(options: Options, missing: str, how: dict[str, Any]) -> None:
    opt = lbfgs(**options)
    start = {k: p.clone() for k, p in PARTS.items()}
    params, state = some_updates(opt, missing, start, opt.init_state(PARTS), 3, given=missing == "b", **how)
    expected, own = alone(opt, missing, PARTS, None, 3)
    for k in missing:
        assert torch.equal(torch.view_as_real(params[k]) if k == "z" else params[k].signbit(),
                           torch.view_as_real(PARTS[k]) if k == "z" else PARTS[k].signbit())  # fmt: skip
        assert torch.equal(params[k], PARTS[k])
    assert difference(params, expected) <= 1e-12
    assert coupled(params) < coupled(PARTS)
    for name in ("func_evals", "n_iter", "t", "ro", "H_diag", "prev_loss"):
        torch.testing.assert_close(getattr(state, name), getattr(own, name), rtol=1e-9, atol=1e-12)
    assert state.d.shape == state.prev_flat_grad.shape == (8,)
    assert int(state.d.count_nonzero()) == own.d.numel()
    assert int(state.prev_flat_grad.isnan().sum()) == 8 - own.d.numel()
    assert all(x.isfinite().all() for x in (*state.old_dirs, *state.old_stps))


@pytest.mark.parametrize(
    "sequence", [("", "b"), ("b", ""), ("a", "b"), ("a", "bz", "a"), ("", "c", ""), ("z", "", "z")], ids=str
)
@pytest.mark.parametrize("options", MISSING.values(), ids=list(MISSING))
def test_other_gradients_are_none(options: Options, sequence: tuple[str, ...]) -> None:
    """Then the update is the first of a new state; `a` and `b` are of one size, so that no shape tells them apart."""
    opt = lbfgs(**options)
    params, state = PARTS, opt.init_state(PARTS)
    evaluations = iterations = 0
    for missing in sequence:
        expected, own = alone(opt, missing, params, None, 2)
        params, state = some_updates(opt, missing, params, state, 2)
        assert difference(params, expected) <= 1e-12
        evaluations, iterations = evaluations + int(own.func_evals), iterations + int(own.n_iter)
        assert (int(state.func_evals), int(state.n_iter)) == (evaluations, iterations)
        assert len(state.ro) == len(own.ro)


def test_none_in_each_member_of_a_batch_and_compiled() -> None:
    opt = lbfgs(line_search_fn=WOLFE, max_iter=3)

    def run(p: Any) -> Any:
        state = opt.init_state(p)
        for missing in ("b", "b", "a", ""):

            def f(p: Any, missing: str = missing) -> Any:
                grad, value = torch.func.grad_and_value(coupled)(p)
                return value, {k: None if k in missing else g for k, g in grad.items()}

            p, state = opt.step(Partial(missing).grads(), state, p, value_and_grad=f)
        return p, state.n_iter  # fmt: skip

    batch = {k: torch.stack([p, p * 0.5, p - 1]) for k, p in PARTS.items()}
    together, iterations = torch.func.vmap(run)(batch)
    for i in range(3):
        own, n = run({k: p[i] for k, p in batch.items()})
        assert difference({k: p[i] for k, p in together.items()}, own) <= 1e-10
        assert int(iterations[i]) == int(n)
    real = {k: p for k, p in PARTS.items() if k != "z"}

    def f(p: Any) -> Any:
        grad, value = torch.func.grad_and_value(lambda p: coupled({**p, "z": PARTS["z"]}))(p)
        return value, {**grad, "b": None}

    def once(p: Any, state: Any) -> Any:
        return opt.step({**p, "b": None}, state, p, value_and_grad=f)

    compiled = torch.compile(once, backend="eager", fullgraph=True)
    found, expected = (run(*run(real, opt.init_state(real)))[0] for run in (compiled, once))
    assert difference(found, expected) <= 1e-12
    assert torch.equal(found["b"], PARTS["b"])


def test_derivatives_through_an_update_without_a_gradient_are_finite() -> None:
    def final(lr: Tensor) -> Tensor:
        opt = lbfgs(lr, max_iter=2)
        params, state = PARTS, opt.init_state(PARTS)
        for missing in ("b", "b", ""):

            def f(p: Any, missing: str = missing) -> Any:
                grad, value = torch.func.grad_and_value(coupled)(p)
                return value, {k: None if k in missing else g for k, g in grad.items()}

            params, state = opt.step(Partial(missing).grads(), state, params, value_and_grad=f)
        return coupled(params)

    lr = torch.tensor(0.1, dtype=torch.float64)
    slope = torch.func.grad(final)(lr)
    assert slope.isfinite()
    assert slope
    (own,) = torch.autograd.grad(final(lr.requires_grad_()), lr)
    torch.testing.assert_close(slope, own)


AROUND: dict[str, Callable[[ps.Transform], ps.Transform]] = {
    "masked": lambda t: ps.partition({"on": t, "off": ps.set_to_zero()}, {"a": "on", "b": "on", "z": "off", "c": "on"}),
    "accumulate": lambda t: ps.accumulate(t, 1),
    "skip": ps.skip_if_nonfinite,
    "master_weights": ps.master_weights,
}


@pytest.mark.parametrize("name", AROUND)
def test_none_within_other_transforms(name: str) -> None:
    inner = lbfgs(max_iter=4, line_search_fn=WOLFE)
    opt = AROUND[name](inner)
    params, _ = some_updates(opt, "bz", PARTS, opt.init_state(PARTS), 2)
    assert difference(params, alone(inner, "bz", PARTS, None, 2)[0]) <= 1e-12
    params, _ = some_updates(opt, "az", *some_updates(opt, "bz", PARTS, opt.init_state(PARTS), 1), 2)
    assert difference(params, alone(inner, "az", alone(inner, "bz", PARTS, None, 1)[0], None, 2)[0]) <= 1e-12


def test_a_gradient_that_the_loss_does_not_give() -> None:
    opt = lbfgs()
    f = Partial("b")
    with pytest.raises(ValueError, match="value_and_grad gives no gradient at 'b', where grads have one"):
        opt.step(PARTS, opt.init_state(PARTS), PARTS, value_and_grad=f)
    nothing = dict.fromkeys(PARTS)
    params, state = opt.step(nothing, opt.init_state(PARTS), PARTS, value_and_grad=f)
    assert difference(params, PARTS) == 0
    assert int(state.func_evals) == 0


@pytest.mark.parametrize("when", [(0, 1, 2, 3), (0, 1), (2, 3), (1,), (1, 2)], ids=str)
@pytest.mark.parametrize("options", MISSING.values(), ids=list(MISSING))
def test_the_class_takes_none_for_zero_as_torch_does(options: Options, when: tuple[int, ...]) -> None:
    def run(cls: Any) -> tuple[dict[str, Tensor], list[float]]:
        p = {k: PARTS[k].clone().requires_grad_() for k in PARTS}
        optimizer = cls(p.values(), **options)
        seen = []
        for i in range(4):

            def closure(i: int = i) -> Tensor:
                optimizer.zero_grad()
                loss = coupled({**p, "b": p["b"].detach()} if i in when else p)
                loss.backward()
                return loss

            seen.append(optimizer.step(closure).item())
        return {k: x.detach() for k, x in p.items()}, seen

    (ours, losses), (theirs, expected) = run(LBFGS), run(torch.optim.LBFGS)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert difference(ours, theirs) <= 1e-8


# ------------------------------------------------------------------------------------------------------------------ errors


def test_errors() -> None:
    params, loss = mlp()
    f = Counted(loss)
    opt = lbfgs(line_search_fn="armijo")
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        step(opt, f, opt.init_state(params), params)
    opt = lbfgs()
    with pytest.raises(TypeError, match="needs value_and_grad"):
        opt.step(params, opt.init_state(params), params)
    fewer = {k: p for k, p in params.items() if k != "temperature"}
    with pytest.raises(ValueError, match="its state is for 24 numbers, but the parameters have 25"):
        step(opt, f, opt.init_state(fewer), params)
    for wrong in ({"max_iter": 1.5}, {"history_size": 2.0}):
        with pytest.raises(TypeError, match="must be an integer"):
            lbfgs(**wrong)
    for negative in ({"lr": -1.0}, {"max_iter": -1}, {"history_size": -1}):
        with pytest.raises(ValueError, match="at least 0"):
            lbfgs(**negative)


# --------------------------------------------------------------------------------------------------------------- the class


def trained(cls: Any, options: Options) -> tuple[Any, Any, Callable[[], Tensor]]:
    """A small network, its optimizer, and the closure."""
    g = torch.Generator().manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.5)
    x, y = torch.randn(20, 3, generator=g).double(), torch.randn(20, 1, generator=g).double()
    optimizer = cls(model.parameters(), **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        return loss

    return model, optimizer, closure


def weights(model: Any) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters()}


TRAINING: dict[str, Options] = {
    "wolfe": {"line_search_fn": WOLFE, "max_iter": 4, "history_size": 5},
    "fixed": {"lr": 0.3, "max_iter": 4, "history_size": 5},
}


@pytest.mark.parametrize("options", TRAINING.values(), ids=list(TRAINING))
def test_class_is_torchs(options: Options) -> None:
    model, optimizer, closure = trained(LBFGS, options)
    other, theirs, their_closure = trained(torch.optim.LBFGS, options)
    for _ in range(5):
        assert optimizer.step(closure).item() == pytest.approx(theirs.step(their_closure).item(), rel=1e-10)
        assert difference(weights(model), weights(other)) <= 1e-10
    assert optimizer.param_groups[0].keys() == theirs.param_groups[0].keys()
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in theirs.param_groups[0].items() if k != "params"
    }


@pytest.mark.parametrize("after", [0, 1, 4], ids=["fresh", "begun", "trained"])
@pytest.mark.parametrize("options", TRAINING.values(), ids=list(TRAINING))
@pytest.mark.parametrize(
    ("source", "target"),
    [(LBFGS, torch.optim.LBFGS), (torch.optim.LBFGS, LBFGS), (LBFGS, LBFGS)],
    ids=["to torch", "from torch", "to itself"],
)
def test_checkpoints(source: Any, target: Any, options: Options, after: int) -> None:
    """Saved by one in the middle of training and loaded by the other, both go on as one."""
    model, optimizer, closure = trained(source, options)
    for _ in range(after):
        optimizer.step(closure)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    other, resumed, other_closure = trained(target, options)
    file.seek(0)
    saved, state = torch.load(file)
    other.load_state_dict(saved)
    resumed.load_state_dict(state)
    for _ in range(3):
        optimizer.step(closure)
        resumed.step(other_closure)
        assert difference(weights(other), weights(model)) <= 1e-10


def test_checkpoints_share_no_memory_with_what_torch_overwrites() -> None:
    """Without a file in between."""
    for source, target in ((LBFGS, torch.optim.LBFGS), (torch.optim.LBFGS, LBFGS)):
        model, optimizer, closure = trained(source, TRAINING["wolfe"])
        for _ in range(3):
            optimizer.step(closure)
        other, resumed, other_closure = trained(target, TRAINING["wolfe"])
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
        for _ in range(3):
            optimizer.step(closure)
        for _ in range(3):
            resumed.step(other_closure)
        assert difference(weights(other), weights(model)) <= 1e-10


def test_checkpoint_has_torchs_layout() -> None:
    _, optimizer, closure = trained(LBFGS, TRAINING["wolfe"])
    _, theirs, their_closure = trained(torch.optim.LBFGS, TRAINING["wolfe"])
    assert optimizer.state_dict() == theirs.state_dict()
    for _ in range(3):
        optimizer.step(closure)
        theirs.step(their_closure)
    found, expected = optimizer.state_dict(), theirs.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys() == {0}
    found, expected = found["state"][0], expected["state"][0]
    assert found.keys() == expected.keys()
    assert {name: type(found[name]) for name in COUNTS} == {name: type(expected[name]) for name in COUNTS}
    assert {name: type(found[name]) for name in FLOATS} == dict.fromkeys(FLOATS, float)
    for name in TENSORS:
        assert type(found[name]) is type(expected[name]), name
        kinds = [[(x.shape, x.dtype) for x in tensors(state[name])] for state in (found, expected)]
        assert kinds[0] == kinds[1], name
    assert len(found["al"]) == len(expected["al"])


COUNTS = ("func_evals", "n_iter")
FLOATS = ("t", "prev_loss")  # torch's t is a number or a tensor, as it comes
TENSORS = ("d", "prev_flat_grad", "H_diag", "old_dirs", "old_stps", "ro")


def test_a_checkpoint_is_a_snapshot() -> None:
    _, optimizer, closure = trained(LBFGS, TRAINING["wolfe"])
    for _ in range(2):
        optimizer.step(closure)
    saved = optimizer.state_dict()["state"][0]
    kept = copy.deepcopy(saved)
    optimizer.step(closure)
    assert saved["n_iter"] == kept["n_iter"]
    assert len(saved["ro"]) == len(kept["ro"])
    for name in ("d", "prev_flat_grad", "H_diag"):
        assert torch.equal(saved[name], kept[name])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on(copied: Callable[[Any], Any]) -> None:
    _, optimizer, closure = trained(LBFGS, TRAINING["wolfe"])
    optimizer.step(closure)
    again = copied(optimizer).state_dict()["state"][0]
    saved = optimizer.state_dict()["state"][0]
    assert again.keys() == saved.keys()
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(saved)))


def test_one_group() -> None:
    def group() -> dict[str, Any]:
        return {"params": [torch.ones(1, requires_grad=True)]}

    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        LBFGS([group(), group()])
    optimizer = LBFGS([group()])
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        optimizer.add_param_group(group())
    assert len(optimizer.param_groups) == 1


def test_class_errors() -> None:
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        LBFGS([p], line_search_fn="armijo")
    optimizer = LBFGS([p])
    p.grad = torch.ones(2)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()
    optimizer.param_groups[0]["line_search_fn"] = "armijo"
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        optimizer.step(lambda: (p**2).sum())


@pytest.mark.parametrize("frozen", [False, True], ids=["unused", "frozen"])
def test_parameters_without_a_gradient_count_as_zeros(frozen: bool) -> None:
    """As in torch: the history has room for them."""
    found = []
    for cls in (LBFGS, torch.optim.LBFGS):
        x = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)
        unused = torch.ones(3, dtype=torch.float64, requires_grad=not frozen)
        optimizer = cls([unused, x], line_search_fn=WOLFE, max_iter=5)

        def closure(x: Tensor = x, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = banana(x)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        assert torch.equal(unused, torch.ones_like(unused))
        found.append((x.detach(), optimizer.state_dict()["state"][0]["d"]))
    assert difference(found[0], found[1]) <= 1e-10


def test_moved_before_the_first_step() -> None:
    """A model that is cast after its optimizer was made is optimized in its new dtype."""
    found = []
    for cls in (LBFGS, torch.optim.LBFGS):
        x = torch.nn.Parameter(torch.tensor([-1.2, 1.0]))
        optimizer = cls([x], line_search_fn=WOLFE, max_iter=5)
        x.data = x.data.double()

        def closure(x: Tensor = x, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = banana(x)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        found.append((x.detach(), optimizer.state_dict()["state"][0]["d"]))
    assert difference(found[0], found[1]) <= 1e-10
