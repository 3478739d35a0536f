"""Inside torch.func: batches, derivatives with respect to everything, and nothing but finite numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.utils import _pytree as pytree

import purestep as ps
from tests.cases import Case, Options, each, each_options, tensor
from tests.problems import difference, grads, mlp


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """Where vmap has no rule for an operation it loops, with a warning that in some places goes past Python's filters."""
    functorch._set_vmap_fallback_enabled(False)
    yield
    functorch._set_vmap_fallback_enabled(True)


def tensors_of(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def used(t: ps.Transform) -> ps.Transform:
    """The transform with its hyperparameters as tensors, and strengths of exactly 0 (which switch it off) left as they are."""
    values = {
        name: pytree.tree_map(tensor, value) for name, value in t.hyperparams.items() if value != 0.0 and not callable(value)
    }
    return t.replace(**values)


# -------------------------------------------------------------------------------------------------------------- derivatives


@each(smooth=True)
@pytest.mark.parametrize("where", ["random", "zero gradient", "zero gradient and state"])
@pytest.mark.in_turn("where")
def test_gradcheck(case: Case, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Derivatives of a step with respect to gradients, parameters, state and every hyperparameter, in both directions."""
    if where != "random" and "direction" in case.lacks:
        pytest.skip(case.lacks["direction"])
    t = used(case.transform())
    if isinstance(t.hyperparams.get("eps"), Tensor):  # the slope at zero is 1/eps
        t = t.replace(eps=torch.tensor(0.1, dtype=torch.float64))
    params, loss = case.problem()
    state, g = t.init_state(params), grads(loss, params)
    if where != "zero gradient and state":  # away from zero, where a second moment ends
        state = pytree.tree_map(
            lambda x: 2 + x if is_counter(x) else torch.rand_like(x) + 0.1 if isinstance(x, Tensor) else x, state
        )
    if where != "random":
        if case.name.startswith("clip"):
            pytest.skip("the slope of a norm at zero is taken to be 0, while finite differences see 1")
        g = {k: torch.zeros_like(x) for k, x in g.items()}
    leaves, spec = pytree.tree_flatten((t, g, state, params))
    floating = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and not is_counter(x)]
    leaves = [x.double() if is_counter(x) else x for x in leaves]  # no finite difference survives a counter's rounding
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)

    def function(*xs: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for i, x in zip(floating, xs):
            filled[i] = x
        t, g, state, params = pytree.tree_unflatten(filled, spec)
        nothing = sum((0 * x.sum() for x in xs), torch.zeros((), dtype=torch.float64))
        return tuple(x + nothing for x in tensors_of(t.step(g, state, params)))  # gradcheck wants them all to depend on it

    inputs = [leaves[i].detach().clone().requires_grad_() for i in floating]
    if where == "zero gradient and state":  # no finite difference crosses the edge; test_finite_at_exact_zeros asks for numbers
        inputs = [x if i in changeable(leaves, floating, spec) else x.detach() for i, x in zip(floating, inputs)]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True, atol=1e-5, rtol=1e-3)


def is_counter(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0 and x.dtype == torch.float32


def changeable(leaves: list[Any], floating: list[int], spec: Any) -> set[int]:
    """The leaves of (transform, gradients, _, parameters)."""
    numbered = pytree.tree_unflatten(list(range(len(leaves))), spec)
    return {*pytree.tree_leaves(numbered[0]), *pytree.tree_leaves(numbered[1]), *pytree.tree_leaves(numbered[3])} & set(
        floating
    )


@each_options()
@pytest.mark.parametrize("level", ["autograd", "torch.func"])
@pytest.mark.in_turn("level")
def test_finite_at_exact_zeros(case: Case, options: Options, level: str) -> None:
    """A gradient and a state that are exactly 0 give finite derivatives, through two steps."""
    t = used(case.transform(options))
    params = {"a": torch.tensor([0.0, 1.0]), "b": torch.zeros(2, 2)}
    target = {"a": torch.tensor([0.0, 2.0]), "b": torch.zeros(2, 2)}
    params = {k: p for k, p in params.items() if case.treats(p)}

    def outer(t: ps.Transform, params: Any) -> Tensor:
        state = t.init_state(params)
        for _ in range(2):
            g = {k: 2 * (params[k] - target[k]) for k in params}
            params, state = t.step(g, state, params)
        return sum((((p - 1) ** 2).sum() for p in params.values()), torch.zeros(()))

    if level == "torch.func":
        found = (
            torch.func.grad(outer, argnums=(0, 1))(t, params)
            if tensors_of(t) and all_tensors(t)
            else torch.func.grad(outer, 1)(t, params)
        )
    else:
        inputs = [x.detach().clone().requires_grad_() for x in tensors_of((t, params))]
        leaves, spec = pytree.tree_flatten((t, params))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        for i, x in zip(places, inputs):
            leaves[i] = x
        outer(*pytree.tree_unflatten(leaves, spec)).backward()
        found = [x.grad for x in inputs if x.grad is not None]
    assert tensors_of(found)
    assert all(x.isfinite().all() for x in tensors_of(found))


def all_tensors(t: ps.Transform) -> bool:
    return all(isinstance(x, Tensor) for x in pytree.tree_leaves(t))


@each(smooth=True)
def test_forward_and_reverse_agree(case: Case) -> None:
    t = case.transform()
    params, loss = case.problem()

    def final(lr: Tensor, params: Any) -> Tensor:
        state = t.init_state(params)
        for _ in range(2):
            g = pytree.tree_map(lambda x: x * lr, torch.func.grad(loss)(params))
            params, state = t.step(g, state, params)
        return loss(params)

    x = torch.tensor(0.7, dtype=torch.float64)
    reverse = torch.func.jacrev(final)(x, params)
    forward = torch.func.jacfwd(final)(x, params)
    torch.testing.assert_close(reverse, forward, rtol=1e-9, atol=1e-12)
    step = 1e-6
    numeric = (final(x + step, params) - final(x - step, params)) / (2 * step)
    torch.testing.assert_close(reverse, numeric, rtol=1e-4, atol=1e-8)


@each("standstill", smooth=True)
def test_derivatives_where_strengths_are_zero(case: Case) -> None:
    """At a learning rate and a weight decay that are tensors of exactly 0: forward, reverse, and finite differences."""
    strengths = case.transform().hyperparams.keys() & {"lr", "weight_decay"}
    zeros = {
        name: torch.zeros((), dtype=torch.float64) for name in strengths if not callable(case.transform().hyperparams[name])
    }
    if not zeros:
        pytest.skip(f"{case} has neither")
    function, inputs, along = line(case, case.transform().replace(**zeros))
    check_line(function, inputs, along)


@each(smooth=True)
def test_second_derivatives(case: Case) -> None:
    """The gradient of a step is differentiated along a line, by gradients, parameters, state and hyperparameters at once."""
    function, inputs, along = line(case, case.transform())
    slopes = torch.func.grad(lambda xs: function(xs).sum())
    check_line(slopes, inputs, along)


def line(case: Case, t: ps.Transform) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A step as a function of all tensors that it depends on, away from all edges; where it is looked at, and a direction."""
    t = used(t)
    if isinstance(t.hyperparams.get("eps"), Tensor):  # for as much curvature as a difference can follow
        t = t.replace(eps=torch.tensor(0.1, dtype=torch.float64))
    params, loss = case.problem()
    state = pytree.tree_map(
        lambda x: 2 + x if is_counter(x) else torch.rand_like(x) + 0.1 if isinstance(x, Tensor) else x, t.init_state(params)
    )
    leaves, spec = pytree.tree_flatten((t, grads(loss, params), state, params))
    places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor) and not is_counter(x)]

    def function(xs: list[Tensor]) -> Tensor:
        filled = list(leaves)
        for k, x in zip(places, xs):
            filled[k] = x
        t, g, state, params = pytree.tree_unflatten(filled, spec)
        return sum((wave(x, 1) * x).sum() for x in tensors_of(t.step(g, state, params)) if not is_counter(x))

    inputs = [leaves[k] for k in places]
    return function, inputs, [wave(x, 2) * (1 + x.abs()) for x in inputs]


def wave(x: Tensor, k: int) -> Tensor:
    """Some numbers in the shape of a tensor."""
    return torch.cos(k + torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)


def check_line(function: Any, inputs: list[Tensor], along: list[Tensor]) -> None:
    """Along a line, the derivative of a function is what forward mode, reverse mode and finite differences say."""
    _, forward = torch.func.jvp(function, (inputs,), (along,))
    value, pull = torch.func.vjp(function, inputs)
    weights = pytree.tree_map(lambda x: wave(x, 3), value)
    reverse = sum((x * d).sum() for x, d in zip(pull(weights)[0], along))
    ends = [function([x + k * 1e-6 * d for x, d in zip(inputs, along)]) for k in (1, -1)]
    numeric = pytree.tree_map(lambda a, b: (a - b) / 2e-6, *ends)
    torch.testing.assert_close(forward, numeric, rtol=1e-3, atol=1e-5)
    weighted = sum((x * w).sum() for x, w in zip(tensors_of(forward), tensors_of(weights)))
    torch.testing.assert_close(reverse, weighted, rtol=1e-8, atol=1e-9)


def test_hypergradients_are_a_transform() -> None:
    """The gradient with respect to an optimizer is an optimizer; each entry agrees with finite differences."""
    params, loss = mlp()

    def outer(t: ps.Transform) -> Tensor:
        p, state = params, t.init_state(params)
        for _ in range(5):
            p, state = t.step(torch.func.grad(loss)(p), state, p)
        return loss(p)

    t = ps.tensors(ps.chain(ps.clip_by_global_norm(0.3), ps.adamw(lr=0.05, betas=(0.8, 0.9), eps=0.01, weight_decay=0.1)))
    found = torch.func.grad(outer)(t)
    assert type(found) is type(t)
    leaves, spec = pytree.tree_flatten(t)
    for i, (x, slope) in enumerate(zip(leaves, pytree.tree_leaves(found))):
        values = []
        for sign in (1, -1):
            moved = list(leaves)
            moved[i] = x + sign * 1e-6
            values.append(outer(pytree.tree_unflatten(moved, spec)))
        torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-4, atol=1e-7)


def test_schedules_are_differentiated_too() -> None:
    def outer(t: ps.Transform) -> Tensor:
        p = torch.ones(1)
        state = t.init_state(p)
        for _ in range(3):
            p, state = t.step(torch.ones(1), state, p)
        return p.sum()

    t = ps.tensors(ps.chain(ps.scale_by_learning_rate(ps.schedules.linear(1.0, 0.0, total_steps=2))))
    found = torch.func.grad(outer)(t).hyperparams["lr"]
    # p = 1 - (1 + 1/2 + 0) start - (0 + 1/2 + 1) end
    assert [x.item() for x in pytree.tree_leaves(found)] == [-1.5, -1.5]


# ------------------------------------------------------------------------------------------------------------------ batches


@each_options()
def test_vmap_over_parameters(case: Case, options: Options) -> None:
    """Three models at once, states and all, are three models one by one."""
    t = case.transform(options)
    stacked = {k: torch.stack([p, 2 * p, -p]) for k, p in case.problem()[0].items()}
    _, loss = case.problem()

    def train(params: Any) -> Any:
        state = t.init_state(params)
        for _ in range(3):
            params, state = t.step(torch.func.grad(loss)(params), state, params)
        return params

    together = torch.func.vmap(train)(stacked)
    for i in range(3):
        alone = train({k: p[i] for k, p in stacked.items()})
        assert difference({k: p[i] for k, p in together.items()}, alone) <= 1e-12


@each_options()
def test_vmap_over_every_hyperparameter(case: Case, options: Options) -> None:
    """A batch of optimizers, made by replacing each hyperparameter in turn with a 1-d tensor."""
    t = case.transform(options)
    params, loss = case.problem()

    def train(t: ps.Transform, params: Any) -> Any:
        state = t.init_state(params)
        for _ in range(3):
            params, state = t.step(torch.func.grad(loss)(params), state, params)
        return params

    for name, value in t.hyperparams.items():
        if value is None or callable(value) or value == 0.0:
            continue
        shares = (1.0, 0.97, 0.9) if name not in case.least else (1.0, 1.1, 1.5)
        batch = pytree.tree_map(
            lambda x, s=shares: x if x is None else torch.tensor([k * x for k in s], dtype=torch.float64), value
        )
        sweep = t.replace(**{name: batch})
        together = torch.func.vmap(train, in_dims=(ps.in_dims(sweep), None))(sweep, params)
        for i in range(3):
            one = t.replace(**{name: pytree.tree_map(lambda x, i=i: x if x is None else x[i].item(), batch)})
            assert difference({k: p[i] for k, p in together.items()}, train(one, params)) <= 1e-12


@each()
def test_nested_vmap_over_optimizers_and_models(case: Case) -> None:
    t = case.transform()
    name, value = next(((n, v) for n, v in t.hyperparams.items() if isinstance(v, float) and v), (None, None))
    if name is None or value is None:
        pytest.skip(f"{case} has no hyperparameter that is a plain number")
    sweep = t.replace(**{name: torch.tensor([value, 0.5 * value], dtype=torch.float64)})
    _, loss = case.problem()
    stacked = {k: torch.stack([p, 2 * p, -p]) for k, p in case.problem()[0].items()}

    def step(t: ps.Transform, params: Any) -> Any:
        return t.step(torch.func.grad(loss)(params), t.init_state(params), params)[0]

    inner = torch.func.vmap(step, in_dims=(None, 0))
    together = torch.func.vmap(inner, in_dims=(ps.in_dims(sweep), None))(sweep, stacked)
    for i in range(2):
        for j in range(3):
            alone = step(t.replace(**{name: value * (1.0, 0.5)[i]}), {k: p[j] for k, p in stacked.items()})
            assert difference({k: p[i, j] for k, p in together.items()}, alone) <= 1e-12


@each()
def test_vmap_over_everything_at_once(case: Case) -> None:
    """A population that differs in all hyperparameters and parameters, its state handed in and out of vmap."""
    members = [nudged(case, share) for share in (1.0, 0.97, 0.9)]
    population = ps.stack(members)
    params, loss = case.problem()
    each = [{k: c * p for k, p in params.items()} for c in (1.0, 0.7, -1.0)]

    def begin(t: ps.Transform, params: Any) -> Any:
        return t.init_state(params)

    def step(t: ps.Transform, state: Any, params: Any) -> Any:
        return t.step(torch.func.grad(loss)(params), state, params)

    dims = ps.in_dims(population)
    held = ps.out_dims(begin(members[0], params))  # torch.func.vmap has to be told where a state has None
    together = ps.stack(each)
    state = torch.func.vmap(begin, in_dims=(dims, 0), out_dims=held)(population, together)
    for _ in range(3):
        together, state = torch.func.vmap(step, in_dims=(dims, held, 0), out_dims=(0, held))(population, state, together)
    for i, (t, p) in enumerate(zip(members, each)):
        own = begin(t, p)
        for _ in range(3):
            p, own = step(t, own, p)
        assert difference([x[i] for x in tensors_of((together, state))], tensors_of((p, own))) <= 1e-12


def nudged(case: Case, share: float) -> ps.Transform:
    """The transform with all its hyperparameters somewhat smaller, or larger where they may not be smaller."""
    t = case.transform()
    values = {name: x for name, x in t.hyperparams.items() if x is not None and not callable(x)}
    return t.replace(
        **{
            name: pytree.tree_map(lambda x, s=1 / share if name in case.least else share: x and s * x, value)
            for name, value in values.items()
        }
    )


@each()
def test_per_sample_hypergradients(case: Case) -> None:
    """vmap over grad over two steps, with respect to all hyperparameters and the parameters, is a loop of grads."""
    params, loss = case.problem()
    members = [(used(nudged(case, share)), {k: c * p for k, p in params.items()}) for share, c in ((1.0, 1.0), (0.9, -0.7))]
    leaves, spec = pytree.tree_flatten(members[0])
    places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]

    def outer(xs: list[Tensor]) -> Tensor:
        filled = list(leaves)
        for k, x in zip(places, xs):
            filled[k] = x
        t, params = pytree.tree_unflatten(filled, spec)
        state = t.init_state(params)
        for _ in range(2):
            params, state = t.step(torch.func.grad(loss)(params), state, params)
        return loss(params)

    each = [tensors_of(member) for member in members]
    together = torch.func.vmap(torch.func.grad(outer))(ps.stack(each))
    for i, alone in enumerate(each):
        assert difference([x[i] for x in together], torch.func.grad(outer)(alone)) <= 1e-10


def test_an_operation_that_falls_back_to_a_loop_is_an_error_here() -> None:
    with pytest.raises(RuntimeError, match="hit the vmap fallback"):
        torch.func.vmap(lambda x: torch.histc(x, 3))(torch.ones(2, 4))


def test_a_batch_without_vmap_is_refused() -> None:
    t, p = ps.sgd(lr=torch.tensor([0.1, 0.2])), torch.ones(2)
    for executor in (None, "leaf"):
        with pytest.raises(ValueError, match=r"must be one number, but got a tensor of shape \(2,\).*vmap.*in_dims"):
            t.step(p, t.init_state(p), p, executor=executor)


@pytest.mark.parametrize(
    "schedule",
    [lambda t: 0.1 / (1 + float(t)), lambda t: 0.1 if t < 3 else 0.01, lambda t: 0.1 / (1 + t.item()), lambda t: math.cos(t)],
    ids=["float", "if", "item", "math"],
)
def test_a_schedule_that_asks_a_batch_for_its_step(schedule: Any) -> None:
    opt, members = ps.adam(schedule), torch.ones(3, 2)
    state = torch.func.vmap(opt.init_state)(members)
    state = tuple([s._replace(step=torch.arange(3.0)) if "step" in s._fields else s for s in state])
    with pytest.raises(TypeError, match=r"The schedule .* cannot be called under vmap.*Compute with the tensor instead"):
        torch.func.vmap(opt.step)(members, state, members)


def test_autograd_alone_is_enough() -> None:
    """Without torch.func: parameters that require grad make a step differentiable."""
    params, loss = mlp()
    leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
    lr = torch.tensor(0.1, requires_grad=True)
    t = ps.chain(ps.clip_by_global_norm(1.0), ps.adam(lr))
    p, state = leaves, t.init_state(leaves)
    for _ in range(2):
        g = dict(zip(p, torch.autograd.grad(loss(p), list(p.values()), create_graph=True)))
        p, state = t.step(g, state, p)
    loss(p).backward()
    assert lr.grad is not None
    assert lr.grad.abs() > 0
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves.values())


def test_counters_in_the_same_memory_with_derivatives_of_their_own() -> None:
    """One counter of two parameters' does not stand for both where one of them is followed."""
    opt = ps.adam(0.1)
    params = {"w": torch.ones(3, 2), "b": torch.ones(3)}
    params, state = opt.step(params, opt.init_state(params), params)

    def moved(a: Tensor, b: Tensor) -> Tensor:
        given = tuple([x._replace(step={"w": a, "b": b}) if isinstance(x, ps.AdamState) else x for x in state])
        return opt.step(params, given, params)[0]["b"].sum()

    t = torch.tensor(3.0)
    expected = torch.func.jacrev(moved, (0, 1))(t, t)
    assert expected[0] == 0
    assert expected[1] != 0
    torch.testing.assert_close(torch.func.jacfwd(moved, (0, 1))(t, t), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(t, torch.ones(()))
        tangents = [torch.autograd.forward_ad.unpack_dual(x).tangent for x in (moved(dual, t), moved(t, dual))]
    assert tangents[0] is None or tangents[0] == 0
    torch.testing.assert_close(tangents[1], expected[1])
    batch = torch.tensor([3.0, 5.0])
    each = torch.stack([torch.func.jacrev(moved, 1)(x, x) for x in batch])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(moved, 1))(batch, batch), each)
    ones = torch.ones(2)
    _, tangent = torch.func.jvp(torch.func.vmap(moved), (batch, batch), (ones, torch.zeros(2)))
    assert tangent.abs().max() == 0
    follows = batch.clone().requires_grad_()
    for other in (follows.detach(), follows.detach().clone().requires_grad_()):
        (found,) = torch.autograd.grad(torch.func.vmap(moved)(other, follows).sum(), follows)
        torch.testing.assert_close(found, each)
