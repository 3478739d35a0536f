"""States: found by their type, read, and mapped over; by what their fields are declared to be, never by shapes."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from purestep._optimizer.optimizer import Optimizer
from purestep.state import roles_of
from tests.cases import CASES, Case, Options, each_options
from tests.problems import Params, clone, difference, mlp


def begun(case: Case, options: Options, steps: int = 3) -> tuple[ps.Transform, Params, Any]:
    """A transform, and parameters and state after a few steps."""
    t = case.transform(options)
    params, _ = case.problem()
    state = t.init_state(params)
    for k in range(steps):
        params, state = t.step(noise(params, k), state, params, **extras(t))
    return t, params, state


def noise(params: Params, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in params.items()}


def extras(t: ps.Transform) -> dict[str, Any]:
    """What a transform asks for at each update, where it is not a function."""
    if t.plan.extras - {"value"}:
        pytest.skip(f"it needs {', '.join(sorted(t.plan.extras))}, which its own tests give it")
    return {name: torch.tensor(1.0, dtype=torch.float64) for name in t.plan.extras}


# -------------------------------------------------------------------------------------------------------------- map_params


@each_options(capability="kept")
def test_the_identity_changes_nothing(case: Case, options: Options) -> None:
    _, _, state = begun(case, options)
    same = ps.map_params(lambda x: x, state, rest=lambda x: x)
    leaves, spec = pytree.tree_flatten(state)
    others, other = pytree.tree_flatten(same)
    assert spec == other
    assert all(torch.equal(x, y) if isinstance(x, Tensor) else x is y for x, y in zip(leaves, others))
    assert shares(leaves) == shares(others)


def shares(leaves: list[Any]) -> list[int]:
    """For each leaf, where the same one comes first: counters that parameters share stay shared."""
    return [next(k for k, y in enumerate(leaves) if y is x) for x in leaves]


@each_options(capability="kept")
def test_a_snapshot_shares_nothing_with_the_original(case: Case, options: Options) -> None:
    """`map_params(torch.clone, state)` is a copy: a step to which the original is given away does not change it."""
    _, _, state = begun(case, options)
    snapshot = ps.map_params(torch.clone, state)
    held = {x.untyped_storage()._cdata for x in pytree.tree_leaves(state) if isinstance(x, Tensor)}
    assert held.isdisjoint(x.untyped_storage()._cdata for x in pytree.tree_leaves(snapshot) if isinstance(x, Tensor))


@each_options(capability="kept")
def test_exactly_what_is_like_a_parameter(case: Case, options: Options) -> None:
    """What the function sees has its parameter's shape and dtype; what it does not see, not even as `rest`, has the shape of none."""
    _, params, state = begun(case, options)

    def like(x: Tensor, p: Tensor) -> Any:
        assert x.shape == p.shape
        assert x.dtype == p.dtype
        return "seen"

    def other(x: Tensor, p: Tensor) -> Any:
        oblong = p.dim() == 2 and p.shape[0] != p.shape[1]  # a factor may be of the shape of a vector or a square
        assert not (oblong and x.shape == p.shape)
        return "seen"

    left = [x for x in pytree.tree_leaves(ps.map_params(like, state, params, rest=other)) if isinstance(x, Tensor)]
    shapes = {p.shape for p in params.values() if p.dim()}
    assert not [x.shape for x in left if x.shape in shapes]


def test_counters_and_factors_are_left_alone_unless_asked_for() -> None:
    params = {"matrix": torch.ones(3, 1), "vector": torch.ones(3), "number": torch.tensor(1.0)}
    state = ps.scale_by_adafactor().init_state(params)
    assert state.row_var["matrix"].shape == params["matrix"].shape  # and yet no moment
    new = ps.map_params(lambda x: x + 1, state)
    assert {k: x.item() for k, x in new.step.items()} == dict.fromkeys(params, 0)
    assert torch.equal(new.row_var["matrix"], state.row_var["matrix"])
    assert new.row_var["vector"] is None
    assert new.variance["vector"].tolist() == [1, 1, 1]
    assert new.variance["number"].item() == 1
    rest = ps.map_params(lambda x: x, state, rest=lambda x: x + 2)
    assert rest.row_var["matrix"].flatten().tolist() == [2, 2, 2]
    assert len({id(x) for x in rest.step.values()}) == 1  # one counter for all of them, as before


def test_a_nested_state_with_masks_and_no_state() -> None:
    params = {"weight": torch.ones(2), "bias": torch.ones(2)}
    opt = ps.chain(
        ps.clip_by_global_norm(1.0), ps.masked(ps.chain(ps.trace(0.9), ps.scale_by_adam()), lambda path, p: path == "weight")
    )
    state = opt.init_state(params)
    new = ps.map_params(lambda x, p: x + p, state, params)
    (empty, (trace, adam)) = new
    assert empty == ps.EmptyState()
    assert trace.momentum_buffer["weight"].tolist() == adam.exp_avg["weight"].tolist() == [1, 1]
    assert trace.momentum_buffer["bias"] is None
    for x in (torch.ones(2), [torch.ones(2), torch.ones(1)], {"a": {"b": torch.ones(2)}}):
        for t in (ps.trace(0.9), ps.adam()):
            state = t.init_state(x)
            assert difference(ps.map_params(lambda m, p: m * p, state, x), state) == 0


class Network(NamedTuple):
    """Parameters that look like a state."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def init(cls) -> Network:
        return cls(torch.ones(2), torch.ones(3))


def test_parameters_that_look_like_a_state() -> None:
    """A named tuple of parameters inside a field is no state, so its counters are not taken for moments."""
    params = Network.init()
    state = ps.chain(ps.scale_by_adam()).init_state(params)
    new = ps.map_params(lambda x, p: x + p, state, params)
    assert new[0].step == state[0].step
    assert type(new[0].exp_avg) is Network
    assert new[0].exp_avg.bias.tolist() == [1, 1, 1]
    assert ps.find_all(new, Network) == []


class WholeState(NamedTuple):
    """A state with everything in it."""

    step: ps.Scalar
    own: Tensor
    history: tuple[Tensor, ...]
    sums: list[Tensor]
    norms: list[ps.Scalar]
    rows: list[Annotated[Tensor, "a row"]]
    inner: Any

    @classmethod
    def init(cls, params: list[Tensor]) -> WholeState:
        raise NotImplementedError


def test_the_state_of_a_whole_transform() -> None:
    assert roles_of(WholeState) == ["own", "own", "own", "like", "other", "other", "state"]
    one = torch.ones(())
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    inner = ps.trace(0.9).init_state(params)
    state = WholeState(one, one, (one,), params, dict.fromkeys(params, one), dict.fromkeys(params, one), {"x": inner})  # type: ignore[arg-type]
    new = ps.map_params(lambda x: -x, state, rest=lambda x: x + 1)
    assert (new.step, new.own, new.history) == (one, one, (one,))
    assert [x.tolist() for x in new.sums.values()] == [[-1, -1], [-1, -1, -1]]  # type: ignore[attr-defined]
    assert [x.item() for x in (*new.norms.values(), *new.rows.values())] == [2, 2, 2, 2]  # type: ignore[attr-defined]
    assert new.inner["x"].momentum_buffer["a"].tolist() == [0, 0]
    assert ps.find(new, ps.TraceState) is new.inner["x"]


def test_what_else_may_be_given() -> None:
    opt = ps.chain(ps.trace(0.9), ps.scale_by_adam())
    params = {"a": torch.ones(2)}
    state = opt.init_state(params)
    with pytest.raises(ValueError, match="others must have the structure of params, but there is no leaf at 'a'"):
        ps.map_params(lambda x, y: x, state, {"b": torch.ones(2)})
    with pytest.raises(
        ValueError, match=r"other states of the same transform, but at state\[1\] one is AdamState and the other AmsgradState"
    ):
        ps.map_params(lambda x, y: x, state, ps.chain(ps.trace(0.9), ps.scale_by_amsgrad()).init_state(params))
    with pytest.raises(ValueError, match="other states of the same transform"):
        ps.map_params(lambda x, y: x, state, state[:1])
    with pytest.raises(ValueError, match=r"state\[0\]\.momentum_buffer must have the structure"):
        ps.map_params(lambda x, y: x, state, opt.init_state({"b": torch.ones(2)}))
    both = ps.map_params(lambda x, y, p: (x, y, p), state, state, params)
    assert both[1].exp_avg["a"][2] is params["a"]


# ------------------------------------------------------------------------------------------- rows are permuted, and appended


ROWS = {
    "add_noise": "the noise of a number depends on its place",
    "muon": "the iteration in bfloat16 rounds otherwise in another order of rows",
    "scale_by_muon": "the iteration in bfloat16 rounds otherwise in another order of rows",
}
"""Transforms to which the order of a parameter's rows matters, and why; a case may say it itself, in `lacks["rows"]`."""


def permuted(x: Tensor) -> Tensor:
    """The rows in the opposite order, but for the first."""
    if not x.dim():
        return x
    order = [0, *range(len(x) - 1, 0, -1)]
    return x[order]


def each_in_rows() -> pytest.MarkDecorator:
    """Every case under every set of options, but for those to which the order of rows matters."""
    assert set(ROWS) <= {case.name for case in CASES}
    pairs = []
    for case in CASES:
        reason = ROWS.get(case.name, case.lacks.get("rows"))
        marks = pytest.mark.skip(reason=f"{case}: {reason}") if reason else ()
        pairs += [pytest.param(case, options, id=f"{case}-{i}", marks=marks) for i, options in enumerate(case.options)]
    return pytest.mark.parametrize(("case", "options"), pairs)


@each_in_rows()
@pytest.mark.in_turn("options")
def test_rows_permuted_before_or_after_a_step(case: Case, options: Options) -> None:
    t, params, state = begun(case, options)
    factors: list[Tensor] = []
    ps.map_params(lambda x: x, state, rest=lambda x: factors.append(x) if x.dim() else x)
    if factors:
        pytest.skip(f"{case} keeps factors, whose rows are not the parameter's")
    g = noise(params, 7)

    def order(tree: Params) -> Params:
        return {k: permuted(x) for k, x in tree.items()}

    after, new = t.step(g, state, params, **extras(t))
    before = t.step(order(g), ps.map_params(permuted, state), order(params), **extras(t))
    assert difference(before, (order(after), ps.map_params(permuted, new))) <= 1e-10


@pytest.mark.parametrize(
    "name", ["adam", "adamw", "sgd", "rmsprop", "adagrad", "adamax", "nadam", "radam", "adadelta", "rprop", "asgd"]
)
def test_states_of_different_rows_put_together(name: str) -> None:
    """Two sets of rows that are trained on their own are, put together, where they would be had they been one."""
    case = next(c for c in CASES if c.name == name)
    t = case.transform()
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    parts = [whole[:2], whole[2:]]
    state, states = t.init_state(whole), [t.init_state(p) for p in parts]
    for k in range(6):
        g = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        whole, state = t.step(g, state, whole)
        if k == 3:
            states = [ps.map_params(lambda x, y: torch.cat([x, y]), *states)]
            parts = [torch.cat(parts)]
        both = zip(g.split([len(p) for p in parts]), states, parts)
        parts, states = map(list, zip(*[t.step(*one) for one in both]))  # type: ignore[assignment]
    assert difference((parts[0], states[0]), (whole, state)) <= 1e-12


def test_inside_torch_func() -> None:
    """A batch of states, and derivatives through a map."""
    opt, p = ps.adam(), torch.ones(3, 2)

    def halves(p: Tensor) -> Tensor:
        state = opt.init_state(p)
        p, state = opt.step(p, state, p)
        state = ps.map_params(lambda m: m / 2, state)
        assert not isinstance(ps.step_count(state), int)
        return ps.find(state, ps.AdamState).exp_avg * ps.step_count(state)

    opt = opt.replace(lr=ps.schedules.linear(0.1, 0.0, total_steps=10))
    rates = torch.func.vmap(lambda p: ps.get_hyperparams(opt, opt.step(p, opt.init_state(p), p)[1])["lr"] * p.sum())(p)
    assert rates.tolist() == [pytest.approx(0.18)] * 3
    assert torch.func.vmap(halves)(p).tolist() == [[pytest.approx(0.05)] * 2] * 3
    assert torch.func.grad(lambda p: halves(p).sum())(p).flatten().tolist() == [pytest.approx(0.05)] * 6


# ------------------------------------------------------------------------------------------------------------------- find


def test_find() -> None:
    params = {"a": torch.ones(2)}
    opt = ps.chain(ps.clip(1.0), ps.masked(ps.chain(ps.trace(0.5), ps.scale_by_adam()), True), ps.trace(0.9), ps.scale(-0.1))
    state = opt.init_state(params)
    assert ps.find(state, ps.AdamState) is state[1][1]
    assert ps.find(state[1][1], ps.AdamState) is state[1][1]
    assert ps.find_all(state, ps.TraceState) == [state[1][0], state[2]]
    assert ps.find_all(state, ps.RmsState) == []
    with pytest.raises(
        LookupError, match=r"There are 2 states of type TraceState here: state\[1\]\[0\], state\[2\]\. find_all"
    ):
        ps.find(state, ps.TraceState)
    with pytest.raises(
        LookupError,
        match=r"no RmsState in this state; there is TraceState \(state\[1\]\[0\]\), AdamState \(state\[1\]\[1\]\), Trace",
    ):
        ps.find(state, ps.RmsState)
    with pytest.raises(LookupError, match="there is nothing, as its transforms keep none"):
        ps.find(ps.scale(-0.1).init_state(params), ps.TraceState)
    for wrong in (ps.adam, ps.adam(), "AdamState", dict, tuple):
        with pytest.raises(TypeError, match=r"the type of one, such as purestep\.AdamState"):
            ps.find(state, wrong)  # type: ignore[type-var]
        with pytest.raises(TypeError, match=r"the type of one, such as purestep\.AdamState"):
            ps.find_all(state, wrong)  # type: ignore[type-var]


def test_what_is_no_state() -> None:
    """What an optimizer of `purestep.optim` keeps is torch's dict of dicts."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.Adam([p])
    for wrong in (optimizer.state, optimizer.state[p], {"exp_avg": torch.ones(2)}, torch.ones(2), None, ps.adam()):
        for name, call in {
            "find": lambda x: ps.find(x, ps.AdamState),
            "find_all": lambda x: ps.find_all(x, ps.AdamState),
            "step_count": ps.step_count,
            "map_params": lambda x: ps.map_params(torch.zeros_like, x),
        }.items():
            with pytest.raises(
                TypeError, match=rf"^{name} takes the state of a transform, .*optimizer\.state\[p\]\['exp_avg'\]"
            ):
                call(wrong)
    nothing = ps.chain().init_state([torch.ones(2)])
    assert nothing == ps.map_params(torch.zeros_like, nothing) == ()
    assert ps.find_all(nothing, ps.AdamState) == []


# ------------------------------------------------------------------------------------------ step_count and get_hyperparams


def test_steps_are_counted() -> None:
    params, _ = mlp()
    opt = ps.chain(ps.clip_by_global_norm(1.0), ps.adamw())
    state = opt.init_state(params)
    assert ps.step_count(state) == 0
    for _ in range(3):
        _, state = opt.step(params, state, params)
    _, state = opt.step({**params, "hidden.bias": None}, state, params)
    assert ps.step_count(state) == 4
    assert isinstance(ps.step_count(state), int)
    assert ps.find(state, ps.AdamState).step["hidden.bias"].item() == 3
    with pytest.raises(
        LookupError,
        match=r"counts no updates, because no transform needs to know their number. It holds EmptyState, EmptyState",
    ):
        ps.step_count(ps.chain(ps.clip(1.0), ps.scale(-0.1)).init_state(params))


def test_the_hyperparameters_of_the_next_update() -> None:
    """Every schedule at the step of its own transform; a missing gradient holds up nothing but its own parameter."""
    linear = ps.schedules.linear
    opt = ps.chain(
        ps.scale_by_adam(betas=(linear(0.5, 0.9, total_steps=4), 0.99)),
        ps.clip_by_global_norm(linear(1.0, 2.0, total_steps=10)),
        ps.masked(ps.scale(linear(0.0, 1.0, total_steps=10)), False),
        ps.scale_by_learning_rate(lambda t: 1 / (t + 1)),
    )
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    state = opt.init_state(params)
    assert ps.get_hyperparams(opt, state) == {"betas": (0.5, 0.99), "eps": 1e-8, "max_norm": 1.0, "factor": 0.0, "lr": 1.0}
    for b in (None, torch.ones(2), None):
        _, state = opt.step({"a": torch.ones(2), "b": b}, state, params)
    now = ps.get_hyperparams(opt, state)
    assert list(now) == list(opt.hyperparams)
    assert now == {"betas": (pytest.approx(0.8), 0.99), "eps": 1e-8, "max_norm": pytest.approx(1.3), "factor": 0.0, "lr": 0.25}


def test_hyperparameters_that_follow_no_schedule_are_what_they_are() -> None:
    lr = torch.tensor([0.1, 0.2])
    opt = ps.sgd(lr)
    assert ps.get_hyperparams(opt, opt.init_state(torch.zeros(1)))["lr"] is lr
    with pytest.raises(TypeError, match="state of a chain"):
        ps.get_hyperparams(ps.adam(), ps.EmptyState())
    with pytest.raises(
        TypeError, match=r"scale_by_learning_rate\(schedule\(.*has a state of type ScheduleState, but got EmptyState"
    ):
        ps.get_hyperparams(ps.sgd(lambda t: 0.1), ps.sgd(0.1).init_state(torch.zeros(1)))


@pytest.mark.parametrize("lr", [0.1, ps.schedules.cosine(0.1, total_steps=20)], ids=["constant", "scheduled"])
def test_what_it_says_is_what_is_used(lr: Any) -> None:
    opt = ps.sgd(lr)
    p, state = torch.zeros((), dtype=torch.float64), opt.init_state(torch.zeros((), dtype=torch.float64))
    for _ in range(5):
        expected = ps.get_hyperparams(opt, state)["lr"]
        new, state = opt.step(torch.ones((), dtype=torch.float64), state, p)
        assert (p - new).item() == pytest.approx(expected, rel=1e-12)
        p = new


# -------------------------------------------------------------------------------------- grow and prune; see docs/state.md


def rows_of(p: Tensor, keep: Tensor, split: Tensor) -> Tensor:
    return torch.cat([p[keep], p[split] + 0.1])


def functional(opt: ps.Transform, points: Params, keep: Tensor, split: Tensor) -> tuple[Params, Any]:
    """Trained, its rows changed, and trained again, as pure functions."""
    state = opt.init_state(points)
    for k in range(8):
        if k == 4:
            new = {name: p[split] + 0.1 for name, p in points.items()}
            state = ps.map_params(lambda x, y: torch.cat([x[keep], y]), state, opt.init_state(new))
            points = {name: torch.cat([p[keep], new[name]]) for name, p in points.items()}
        points, state = opt.step({name: p.sin() for name, p in points.items()}, state, points, donate=True)
    return points, state


def stateful(make: Any, points: Params, keep: Tensor, split: Tensor) -> tuple[Params, torch.optim.Optimizer]:
    """The same, as code for torch.optim does it, with a group for each parameter."""
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in points.items()}
    optimizer = make([{"params": [p], "name": name} for name, p in leaves.items()])
    for k in range(8):
        for group in optimizer.param_groups if k == 4 else ():
            (old,) = group["params"]
            stored = optimizer.state.pop(old)
            with torch.no_grad():
                new = torch.nn.Parameter(rows_of(old, keep, split))
            for field in set(stored) - {"step"}:
                stored[field] = torch.cat([stored[field][keep], torch.zeros_like(stored[field][split])])
            group["params"] = [new]
            optimizer.state[new] = stored
            leaves[group["name"]] = new
        for p in leaves.values():
            p.grad = p.detach().sin()
        optimizer.step()
    return {name: p.detach() for name, p in leaves.items()}, optimizer


WRAPPERS = {
    "torch.optim.Adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "optim.Adam": lambda groups: optim.Adam(groups, lr=0.1),
    "optim.Adam, fused": lambda groups: optim.Adam(groups, lr=0.1, fused=True),
    "optim.Adam, one by one": lambda groups: optim.Adam(groups, lr=0.1, foreach=False),
    "optim.Optimizer": lambda groups: optim.Optimizer(groups, ps.adam(lr=0.1)),
    "a whole transform": lambda groups: optim.Optimizer(groups, ps.chain(ps.clip_by_global_norm(1e9), ps.adam(lr=0.1))),
}


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("split", [[], [0, 0, 5], [1]], ids=["pruned", "grown", "of the same size"])
def test_points_that_grow_and_are_pruned(make: Any, split: list[int]) -> None:
    """The functional recipe, and code that was written for torch's Adam, are where torch's Adam is; state and groups follow."""
    points = {"position": torch.randn(6, 2), "weight": torch.randn(6)}
    keep, rows = torch.tensor([True, False, True, True, True, True]), torch.tensor(split, dtype=torch.long)
    expected, _ = functional(ps.adam(lr=0.1), clone(points), keep, rows)
    found, optimizer = stateful(make, points, keep, rows)
    assert difference(found, expected) <= 1e-6
    assert found["weight"].shape == (5 + len(split),)
    assert len(optimizer.state) == 2
    for group in optimizer.param_groups:
        (p,) = group["params"]
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert optimizer.state[p]["step"].item() == 8
    again = make([{"params": [torch.nn.Parameter(p)], "name": name} for name, p in found.items()])
    again.load_state_dict(optimizer.state_dict())
    if isinstance(again, Optimizer):
        assert difference(again.state_dict(), optimizer.state_dict()) == 0


def test_new_rows_begin_as_init_state_says() -> None:
    """Rprop's step sizes begin at lr, not at 0."""
    opt, p = ps.rprop(lr=0.3), torch.ones(2)
    state = opt.init_state(p)
    p, state = opt.step(p, state, p)
    p, state = opt.step(p, state, p)
    state = ps.map_params(lambda x, y: torch.cat([x, y]), state, opt.init_state(torch.ones(1)))
    assert ps.find(state, ps.RpropState).step_size.tolist() == [pytest.approx(0.36)] * 2 + [pytest.approx(0.3)]
