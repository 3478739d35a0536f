"""Learned optimizers: pytrees of tensors as arguments, and first states that ask for arguments."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import purestep as ps
from purestep import optim


class LearnedState(NamedTuple):
    step: ps.Scalar
    mean: Tensor

    @classmethod
    def init(cls, p: Tensor) -> LearnedState:
        return cls(ps.counter(p), torch.zeros_like(p))


def network(g: Tensor, mean: Tensor, weights: Any) -> Tensor:
    """Two features of each element, four hidden units, one number."""
    hidden = torch.tanh(torch.stack([g, mean], -1) @ weights["in"] + weights["bias"])
    return (hidden @ weights["out"]).squeeze(-1)


@ps.leafwise(LearnedState)
def learned(
    g: Tensor, s: LearnedState, p: Tensor, weights: ps.Weights, lr: ps.Hyper = 0.1, decay: ps.Hyper = 0.9
) -> tuple[Tensor, LearnedState]:
    mean = decay * s.mean + (1 - decay) * g
    return -lr * (g + network(g, mean, weights)), LearnedState(s.step + 1, mean)


class TogetherState(NamedTuple):
    means: list[Tensor]
    scale: Tensor

    @classmethod
    def init(cls, params: list[Tensor], decay: Any, weights: Any) -> TogetherState:
        return cls([torch.zeros_like(p) + weights["bias"].sum().detach() for p in params], torch.as_tensor(decay))


@ps.whole(TogetherState)
def together(
    gs: list[Tensor], s: TogetherState, params: list[Tensor], weights: ps.Weights, decay: ps.Hyper = 0.9
) -> tuple[list[Tensor], TogetherState]:
    means = [decay * m + (1 - decay) * g for m, g in zip(s.means, gs)]
    return [-0.1 * network(g, m, weights) for g, m in zip(gs, means)], TogetherState(means, s.scale)


DTYPE = torch.float64
MAKE = {
    "leafwise": learned,
    "whole": together,
    "chained": lambda weights: ps.chain(ps.clip_by_global_norm(1.0), ps.trace(0.5), learned(weights), ps.scale(0.5)),
    "nested": lambda weights: ps.accumulate(learned(weights), 2),
    "masked": lambda weights: ps.masked(learned(weights), lambda path, p: p.ndim > 0),
}
each = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def weights_of(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"in": (2, 4), "bias": (4,), "out": (4, 1)}
    return {k: torch.randn(shape, generator=g, dtype=DTYPE) / 2 for k, shape in shapes.items()}


@functools.cache
def parameters() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {k: torch.randn(shape, generator=g, dtype=DTYPE) for k, shape in {"w": (3, 2), "b": (3,), "n": ()}.items()}


@functools.cache
def gradients(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return {k: torch.randn(p.shape, generator=g, dtype=DTYPE) for k, p in parameters().items()}


for _step in range(4):  # vmap draws no random numbers, so they are drawn now
    gradients(_step)


def run(opt: Any, steps: int = 4, **how: Any) -> tuple[Any, Any]:
    params = tree_map(torch.clone, parameters())
    state = opt.init_state(params)
    for step in range(steps):
        params, state = opt.step(gradients(step), state, params, **how)
    return params, state


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True))


def near(a: Any, b: Any) -> None:
    torch.testing.assert_close(tree_leaves(a), tree_leaves(b), rtol=1e-10, atol=1e-12)


def test_the_numbers_are_those_of_the_function() -> None:
    weights, p = weights_of(), parameters()
    found, state = run(learned(weights, lr=0.2))
    mean = tree_map(torch.zeros_like, p)
    for step in range(4):
        g = gradients(step)
        mean = {k: 0.9 * mean[k] + 0.1 * g[k] for k in p}
        p = {k: p[k] - 0.2 * (g[k] + network(g[k], mean[k], weights)) for k in p}
    near(found, p)
    near(state.mean, mean)
    assert state.step["w"] == 4


@each
def test_every_mode_computes_the_same(make: Any) -> None:
    opt = make(weights_of())
    expected = run(opt)
    for how in ({"donate": True}, {"executor": "leaf"}, {"executor": "foreach"}, {"compile": True}):
        near(run(opt, **how), expected)
    own = {k: nn.Parameter(p.clone()) for k, p in parameters().items()}
    optimizer = optim.Optimizer(list(own.items()), opt)
    for step in range(4):
        for p, g in zip(own.values(), gradients(step).values()):
            p.grad = g
        optimizer.step()
    near([p.detach() for p in own.values()], list(expected[0].values()))


def test_what_was_given_stays() -> None:
    weights, params = weights_of(), parameters()
    opt = learned(weights)
    state = opt.init_state(params)
    before = tree_map(torch.clone, (weights, params, state, gradients(0)))
    grads = gradients(0)
    for how in ({}, {"executor": "leaf"}):
        opt.step(grads, state, params, **how)
        assert same((weights, params, state, grads), before)
    new, after = opt.step(grads, state, params, donate=True)  # what was given away is overwritten
    assert all(new[k] is params[k] for k in params)
    assert all(after.mean[k] is state.mean[k] for k in params)


@pytest.mark.parametrize("make", [learned, MAKE["chained"], MAKE["nested"]], ids=["leafwise", "chained", "nested"])
def test_derivatives_with_respect_to_the_weights(make: Any) -> None:
    weights = weights_of()

    def loss(out: Tensor) -> Tensor:
        opt = make({**weights, "out": out})
        return sum((p**2).sum() for p in run(opt)[0].values())

    assert torch.autograd.gradcheck(loss, weights["out"].clone().requires_grad_())
    through = torch.func.grad(loss)(weights["out"])
    own = weights["out"].clone().requires_grad_()
    near(torch.autograd.grad(loss(own), own)[0], through)
    tangent = torch.func.jvp(loss, (weights["out"],), (torch.ones_like(own),))[1]
    near(tangent, through.sum())


@pytest.mark.parametrize("every", [None, 2])
def test_an_unrolled_run(every: int | None) -> None:
    """As a value that goes through `unroll`, also where segments are computed again."""
    batches = torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=DTYPE)

    def meta(weights: Any, lr: Any) -> Tensor:
        trained = ps.meta.unroll(
            learned(weights, lr),
            lambda p, x: ((p - x) ** 2).sum(),
            torch.zeros(3, dtype=DTYPE),
            batches,
            checkpoint_every=every,
        )
        return trained.losses.mean()

    def by_hand(weights: Any, lr: Any) -> Tensor:
        p = mean = torch.zeros(3, dtype=DTYPE)
        losses = []
        for x in batches:
            losses.append(((p - x) ** 2).sum())
            g = 2 * (p - x)
            mean = 0.9 * mean + 0.1 * g
            p = p - lr * (g + network(g, mean, weights))
        return torch.stack(losses).mean()

    given = (weights_of(), torch.tensor(0.05, dtype=DTYPE))
    for f in (torch.func.grad(meta, (0, 1)), torch.func.grad_and_value(meta, (0, 1))):
        assert f(*given)
    near(torch.func.grad(meta, (0, 1))(*given), torch.func.grad(by_hand, (0, 1))(*given))
    found = ps.meta.es_grad(lambda w: meta(w, 0.05), num_samples=4)(given[0])
    near(found, ps.meta.es_grad(lambda w: by_hand(w, 0.05), num_samples=4)(given[0]))


def test_a_population_has_weights_of_its_own() -> None:
    members = [learned(weights_of(k), lr=0.1 * (k + 1)) for k in range(3)]
    population = ps.stack(members)
    dims = ps.in_dims(population, weights=0)
    assert tree_leaves(dims.hyperparams["weights"]) == [0, 0, 0]
    assert dims.hyperparams["lr"] == 0
    found = torch.func.vmap(lambda opt: run(opt)[0], in_dims=(dims,))(population)
    for k, member in enumerate(members):
        near({n: x[k] for n, x in found.items()}, run(member)[0])
    one = ps.take(population, 1)
    assert same(one.hyperparams["weights"], weights_of(1))
    shared = learned(weights_of(), lr=torch.tensor([0.1, 0.2], dtype=DTYPE))
    dims = ps.in_dims(ps.chain(shared, ps.scale(torch.tensor([1.0, 2.0]))))
    assert dims.hyperparams == {"weights": {"in": None, "bias": None, "out": None}, "lr": 0, "decay": None, "factor": 0}
    found = torch.func.vmap(lambda opt: run(opt)[0], in_dims=(ps.in_dims(shared),))(shared)
    near({n: x[1] for n, x in found.items()}, run(learned(weights_of(), lr=0.2))[0])


def test_dims_of_a_state_beside_weights() -> None:
    opt, members = learned(weights_of(), lr=torch.tensor([0.1, 0.2, 0.3], dtype=DTYPE)), torch.randn(3, 5, dtype=DTYPE)
    dims = ps.out_dims(ps.chain(opt, ps.trace(0.9)), members)
    state = torch.func.vmap(ps.chain(opt, ps.trace(0.9)).init_state, out_dims=dims)(members)
    assert ps.find(state, LearnedState).mean.shape == (3, 5)
    population = ps.stack([learned(weights_of(k)) for k in range(3)])
    assert ps.out_dims(population, members, weights=0).mean == 0


def test_a_compiled_step() -> None:
    opt = learned(weights_of())
    expected = run(opt)
    step, (params, state) = torch.compile(opt.step, fullgraph=True), (parameters(), opt.init_state(parameters()))
    for k in range(4):
        params, state = step(gradients(k), state, params)
    near((params, state), expected)


def test_values() -> None:
    opt = learned(weights_of())
    assert opt == learned(weights_of())
    assert opt != learned(weights_of(1))
    again = opt.replace(weights=weights_of(1))
    assert same(again.hyperparams["weights"], weights_of(1))
    assert same(opt.hyperparams["weights"], weights_of())
    assert same(ps.get_hyperparams(opt, opt.init_state(parameters()))["weights"], weights_of())
    numbers = ps.tensors(opt).hyperparams
    assert numbers["lr"].dtype == torch.float64
    assert same(numbers["weights"], weights_of())
    scheduled = learned(weights_of(), lr=ps.schedules.linear(0.1, 0.0, total_steps=4))
    first = run(scheduled, 1)[0]
    near(first, run(opt, 1)[0])
    assert opt.program() == "# learned, one parameter at a time\n"
    grads, params = gradients(0), parameters()
    told = str(opt.explain(grads, opt.init_state(params), params))
    assert "learned     learned   3" in told
    for odd in (3.0, {}, {"in": 1.0}, None):
        with pytest.raises(TypeError, match="learned: weights must be a pytree of tensors, such as"):
            learned(odd)
    with pytest.raises(TypeError, match="weights must be a pytree"):
        opt.replace(weights=1.0)


@pytest.mark.parametrize("form", ["dict", "list", "tuple", "tensor"])
def test_under_the_wrapper_they_are_an_option(form: str) -> None:
    """Saved with the others; read at each step; replaced by the user's own."""

    @ps.leafwise()
    def linear(g: Tensor, p: Tensor, weights: ps.Weights, lr: ps.Hyper = 0.1) -> Tensor:
        (w,) = tree_leaves(weights)
        return -lr * torch.stack([g, p], -1) @ w

    make: Any = {"dict": lambda w: {"w": w}, "list": lambda w: [w], "tuple": lambda w: (w,), "tensor": lambda w: w}[form]
    w = torch.tensor([1.0, 0.5])
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    first, second = optim.Optimizer([p], linear(make(w))), optim.Optimizer([q], linear(make(w * 7), lr=0.3))

    def step(optimizer: Any) -> Tensor:
        (x,) = optimizer.param_groups[0]["params"]
        x.grad = torch.ones(3)
        optimizer.step()
        return x.detach().clone()

    now = step(first)
    torch.testing.assert_close(now, torch.full((3,), 1 - 0.1 * 1.5))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        q.copy_(p)
    assert torch.equal(step(second), step(first))
    with torch.no_grad():
        w.mul_(0)
    assert torch.equal(step(first), step(first))  # the weights are read at each step
    second.param_groups[0]["weights"] = make(torch.tensor([2.0, 0.0]))
    before = q.detach().clone()
    torch.testing.assert_close(step(second), before - 0.2)
    torch.testing.assert_close(step(copy.deepcopy(second)), before - 0.4)


@pytest.mark.parametrize("how", ["pure", "wrapper"])
def test_a_closed_over_tensor_is_followed_beside_them(how: str) -> None:
    other = torch.tensor(2.0, dtype=DTYPE, requires_grad=True)

    @ps.leafwise()
    def scaled(g: Tensor, p: Tensor, weights: ps.Weights) -> Tensor:
        return -g * weights["w"] * other

    opt, p = scaled({"w": torch.tensor(3.0, dtype=DTYPE)}), torch.ones(2, dtype=DTYPE)
    if how == "pure":
        found, _ = opt.step(torch.ones_like(p), opt.init_state(p), p)
        assert torch.autograd.grad(found.sum(), other)[0] == -6
        return
    p = nn.Parameter(p)
    optimizer = optim.Optimizer([p], opt)
    p.grad = torch.ones_like(p)
    optimizer.step()
    near(p.detach(), torch.full_like(p, -5.0))


def test_other_kinds_of_parameters() -> None:
    weights = {k: w.float() for k, w in weights_of().items()}
    wide = {k: p.float() for k, p in parameters().items()}
    opt = learned(weights)
    half, short = ps.state_dtype(opt, torch.float32), tree_map(Tensor.bfloat16, wide)
    found, _ = half.step(short, half.init_state(short), short)
    assert {p.dtype for p in found.values()} == {torch.bfloat16}
    z = torch.randn(3, dtype=torch.complex64)
    both, _ = opt.step(z, opt.init_state(z), z)
    apart, _ = opt.step(torch.view_as_real(z), opt.init_state(torch.view_as_real(z)), torch.view_as_real(z))
    torch.testing.assert_close(torch.view_as_real(both), apart)
    two = {"a": wide["w"], "b": wide["b"]}
    with_none, state = opt.step({"a": None, "b": wide["b"]}, opt.init_state(two), two)
    assert torch.equal(with_none["a"], wide["w"])
    assert state.step["a"] == 0


# ------------------------------------------------------------------------------------------- first states that ask for arguments


def test_a_whole_state_asks_for_arguments() -> None:
    weights, params = weights_of(), parameters()
    state = together(weights, decay=0.7).init_state(params)
    assert state.scale == pytest.approx(0.7)
    near(state.means, {k: torch.full_like(p, weights["bias"].sum().item()) for k, p in params.items()})


class AroundState(NamedTuple):
    first: list[Tensor]
    inner: Any

    @classmethod
    def init(cls, params: list[Tensor], inner: Any, start: Any) -> AroundState:
        return cls([torch.full_like(p, float(start)) for p in params], inner)


@ps.nested(AroundState)
def around(
    gs: list[Tensor], s: AroundState, params: list[Tensor], transform: ps.Inner, start: ps.Hyper = 3.0
) -> tuple[list[Tensor], AroundState]:
    us, inner = transform.update(gs, s.inner, params)
    return us, AroundState(s.first, inner)


def test_a_nested_state_asks_for_arguments() -> None:
    opt = around(ps.adam(0.1), start=2.0)
    state = opt.init_state(parameters())
    assert set(torch.cat([x.flatten() for x in tree_leaves(state.first)]).tolist()) == {2.0}
    _, state = opt.step(gradients(0), state, parameters())
    assert ps.find(state, ps.AdamState).step["w"] == 1


def test_an_option_that_is_changed_before_the_first_step_counts() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.Optimizer([p], around(ps.sgd(0.1), start=2.0))
    optimizer.param_groups[0]["start"] = 5.0
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["first"].tolist() == [5.0] * 3


def test_an_init_that_asks_for_what_there_is_not_is_refused() -> None:
    with pytest.raises(TypeError, match="The init of AroundState asks for 'start', which is no argument of wrong: it may ask"):

        @ps.nested(AroundState)
        def wrong(gs: Any, s: Any, params: Any, transform: ps.Inner, begin: ps.Hyper = 3.0) -> Any:
            return gs, s
