"""Transforms around transforms, and averages of parameters: what they decide, in every mode and under the wrapper."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from purestep._engine.nesting import Inner
from tests.cases import Case
from tests.cases_nested import CASES
from tests.problems import clone, difference, grads, mlp

BAD = (float("nan"), float("inf"), -float("inf"))
NESTED = [case for case in CASES if not case.name.endswith("_params")]


def same(a: Any, b: Any) -> bool:
    """Bit for bit, signs of zeros too."""
    xs, ys = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(xs) == len(ys) and all(
        torch.equal(x, y) and torch.equal(x.signbit(), y.signbit()) if isinstance(x, Tensor) else x == y for x, y in zip(xs, ys)
    )


def gradients(t: int, params: dict[str, Tensor], bad: bool = False) -> dict[str, Tensor]:
    """Of step `t`; if `bad` one number is not finite."""
    g = {k: torch.cos(p + t) for k, p in params.items()}
    if bad:
        first = next(iter(g))
        g[first] = g[first].clone()
        g[first].view(-1)[0] = BAD[t % 3]
    return g


PARAMS = {
    "w": torch.tensor([[1.0, -0.0], [0.5, 0.25]], dtype=torch.float64),
    "b": torch.tensor([0.0, -2.0], dtype=torch.float64),
}


def train(
    t: ps.Transform, steps: int = 8, bad: Any = (), params: Any = PARAMS, step: Callable[..., Any] | None = None, **how: Any
) -> list[tuple[Any, Any]]:
    """Parameters and state after each step."""
    params, state = clone(params), t.init_state(params)
    seen = []
    for i in range(steps):
        params, state = (step or t.step)(gradients(i, params, i in bad), state, params, **how)
        seen.append((clone(params), clone(state)))
    return seen


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(torch.tanh(self.one(x)))
        return out


def backward(model: nn.Module, optimizer: Any, t: int) -> Tensor:
    g = torch.Generator().manual_seed(t)
    x = torch.randn(5, 3, generator=g, dtype=torch.float64)
    optimizer.zero_grad()
    loss = (model(x) ** 2).mean()
    loss.backward()
    return loss


def values(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------- every mode


@pytest.mark.parametrize("case", NESTED, ids=str)
@pytest.mark.parametrize("donate", [False, True])
def test_flags_that_are_not_read(case: Case, donate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator does: the inner transform always runs, and its updates and state are chosen by `where`."""
    for options in case.options:
        t = case.transform(options)
        expected = train(t, donate=donate)
        with monkeypatch.context() as patch:
            patch.setattr(Inner, "read", lambda self, flag: flag if isinstance(flag, Tensor) else bool(flag))
            patch.setattr("purestep._core.maths.readable", lambda x: False)
            assert difference(train(t, donate=donate), expected) <= 1e-13
            params, state = clone(PARAMS), t.init_state(PARAMS)
            new, after = t.step(gradients(0, params), state, params, donate=True)
            assert all(new[k] is params[k] for k in params)
            for a, b in zip(pytree.tree_leaves(after), pytree.tree_leaves(state)):
                assert a is b or b.dim() == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_waited_for(case: Case) -> None:
    """On a device whose values cannot be read: reading one is an error there."""
    params = {k: p.to("meta") for k, p in PARAMS.items()}
    t = case.transform()
    state = t.init_state(params)
    for donate in (False, True):
        params, state = t.step({k: torch.ones_like(p) for k, p in params.items()}, state, params, donate=donate)


SKIPPING = ps.skip_if_nonfinite(ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(lr=0.1)), max_consecutive=1)


@pytest.mark.parametrize("how", [{}, {"donate": True}, {"executor": "leaf"}, {"executor": "foreach"}], ids=str)
def test_skips_in_every_mode(how: dict[str, Any]) -> None:
    assert difference(train(SKIPPING, bad=(2, 5), **how), train(SKIPPING, bad=(2, 5))) <= 1e-13


def test_skips_compiled() -> None:
    step = torch.compile(SKIPPING.step, fullgraph=True, backend="aot_eager")
    assert difference(train(SKIPPING, bad=(2, 5), step=step), train(SKIPPING, bad=(2, 5))) <= 1e-12


# ----------------------------------------------------------------------------------------------------- skip_if_nonfinite


def test_a_skipped_update_changes_nothing() -> None:
    t = ps.skip_if_nonfinite(ps.adamw(lr=0.1))
    seen = train(t, 6, bad=(1, 2, 4))
    for i in (1, 2, 4):
        assert same(seen[i][0], seen[i - 1][0])
        assert same(seen[i][1].inner, seen[i - 1][1].inner)
    assert [int(s.skipped) for _, s in seen] == [0, 1, 2, 2, 3, 3]
    assert [int(s.in_a_row) for _, s in seen] == [0, 1, 2, 0, 1, 0]


def test_too_many_in_a_row_are_let_through() -> None:
    t = ps.skip_if_nonfinite(ps.sgd(lr=0.1), max_consecutive=2)
    seen = train(t, 5, bad=(1, 2, 3))
    assert [int(s.skipped) for _, s in seen] == [0, 1, 2, 2, 2]
    assert all(x.isfinite().all() for x in seen[2][0].values())
    assert not seen[3][0]["w"].isfinite().all()


def test_a_large_number_is_finite() -> None:
    """A sum of squares, or of numbers, would be infinite."""
    p = torch.zeros(3, dtype=torch.float16)
    t = ps.skip_if_nonfinite(ps.scale(-1.0))
    g = torch.full((3,), 60000.0, dtype=torch.float16)
    for executor in (None, "leaf"):
        assert t.step(g, t.init_state(p), p, executor=executor)[0].tolist() == [-60000.0] * 3
    z = torch.tensor([1.7e308 + 1.7e308j], dtype=torch.complex128)
    assert t.step(z, t.init_state(z), z)[0].isfinite().all()


def test_each_member_of_a_batch_is_skipped_alone() -> None:
    t = ps.skip_if_nonfinite(ps.adam(lr=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)))

    def run(t: ps.Transform, spoil: Tensor) -> Any:
        params, state = PARAMS, t.init_state(PARAMS)
        for i in range(4):
            g = gradients(i, params)
            g["w"] = g["w"] * torch.where(spoil == i, torch.nan, 1.0)
            params, state = t.step(g, state, params)
        return params, state

    spoil = torch.tensor([1, 2, 9])
    together = torch.func.vmap(run, in_dims=(ps.in_dims(t), 0))(t, spoil)
    assert together[1].skipped.tolist() == [1, 1, 0]
    for i, lr in enumerate((0.1, 0.2, 0.3)):
        assert difference(pytree.tree_map(lambda x, i=i: x[i], together), run(t.replace(lr=lr), spoil[i])) <= 1e-12


@pytest.mark.parametrize("level", ["autograd", "torch.func"])
def test_derivatives_through_a_skip_are_finite(level: str) -> None:
    def final(lr: Tensor) -> Tensor:
        t = ps.skip_if_nonfinite(ps.adam(lr))
        params, state = PARAMS, t.init_state(PARAMS)
        for i in range(4):
            params, state = t.step(gradients(i, params, i == 1), state, params)
        return sum((p.sum() for p in params.values()), torch.zeros(()))

    lr = torch.tensor(0.1, dtype=torch.float64)
    if level == "autograd":
        (slope,) = torch.autograd.grad(final(lr.requires_grad_()), lr)
        lr = lr.detach()
    else:
        slope = torch.func.grad(final)(lr)
    numeric = (final(lr + 1e-6) - final(lr - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, numeric.detach(), rtol=1e-6, atol=1e-8)


def test_missing_gradients_do_not_count() -> None:
    t = ps.skip_if_nonfinite(ps.sgd(lr=0.1, momentum=0.9))
    state = t.init_state(PARAMS)
    params, state = t.step({"w": None, "b": torch.ones(2, dtype=torch.float64)}, state, PARAMS)
    assert torch.equal(params["w"], PARAMS["w"])
    assert not torch.equal(params["b"], PARAMS["b"])
    params, state = t.step({"w": None, "b": torch.full((2,), torch.nan, dtype=torch.float64)}, state, params)
    assert int(state.skipped) == 1


def test_sparse_gradients() -> None:
    p = torch.ones(4, 2)
    t = ps.skip_if_nonfinite(ps.sgd(lr=0.1))
    for value, expected in ((1.0, 0.9), (float("nan"), 1.0)):
        g = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.full((1, 2), value), (4, 2), check_invariants=True)
        new, _ = t.step(g, t.init_state(p), p)
        torch.testing.assert_close(new, torch.ones(4, 2).index_fill(0, torch.tensor(1), expected))
    t = ps.skip_if_nonfinite(ps.adam())
    state = t.init_state(p)
    with pytest.raises(RuntimeError, match="scale_by_adam is not compatible with sparse gradients"):
        t.step(g, state, p)


def on_b(path: str, p: Tensor) -> bool:
    return path == "b"


def labels(path: str, p: Tensor) -> str:
    return "off" if path == "b" else "on"


FROZEN: dict[str, Callable[[], ps.Transform]] = {
    "freeze": lambda: ps.chain(ps.clip_by_global_norm(1.0), ps.adam(lr=0.1), ps.freeze(on_b)),
    "freeze first": lambda: ps.chain(ps.freeze(on_b), ps.adam(lr=0.1)),
    "freeze by a tree": lambda: ps.chain(ps.adam(lr=0.1), ps.freeze({"w": False, "b": True})),
    "partition": lambda: ps.partition({"on": ps.adam(lr=0.1), "off": ps.set_to_zero()}, labels),
    "partition of freeze": lambda: ps.partition({"on": ps.adam(lr=0.1), "off": ps.chain(ps.adam(), ps.freeze())}, labels),
    "zero after sgd": lambda: ps.chain(ps.sgd(lr=0.1), ps.scale(lambda t: 0.5), ps.masked(ps.set_to_zero(), on_b)),
    "zero, then decay": lambda: ps.chain(ps.masked(ps.set_to_zero(), on_b), ps.sgd(lr=0.1)),
    "off before zero": lambda: ps.chain(ps.masked(ps.add_decayed_weights(0.0), on_b), ps.freeze(on_b), ps.adam(lr=0.1)),
    "in accumulate": lambda: ps.accumulate(ps.chain(ps.adam(lr=0.1), ps.freeze(on_b)), 2),
    "in accumulate in skip": lambda: ps.skip_if_nonfinite(ps.accumulate(ps.chain(ps.adam(lr=0.1), ps.freeze(on_b)), 2)),
    "in lookahead": lambda: ps.lookahead(ps.chain(ps.adam(lr=0.1), ps.freeze(on_b)), k=2),
    "in kahan": lambda: ps.kahan(ps.chain(ps.adam(lr=0.1), ps.freeze(on_b))),
    "in master_weights": lambda: ps.master_weights(ps.chain(ps.adam(lr=0.1), ps.freeze(on_b))),
    "now and then": lambda: ps.conditionally(
        lambda t: t % 2 == 0, ps.chain(ps.adam(lr=0.1), ps.freeze(on_b)), otherwise="zero"
    ),
}
"""Transforms in which "b" is frozen."""

COUNTS: dict[str, Callable[[], ps.Transform]] = {
    "state before zero": lambda: ps.chain(ps.adam(lr=0.1), ps.masked(ps.set_to_zero(), on_b)),
    "norm before zero": lambda: ps.chain(ps.clip_by_global_norm(1.0), ps.masked(ps.set_to_zero(), on_b), ps.sgd(lr=0.1)),
    "passes through": lambda: ps.masked(ps.adam(lr=0.1), {"w": True, "b": False}),
    "passes now and then": lambda: ps.conditionally(lambda t: t % 2 == 1, ps.chain(ps.adam(lr=0.1), ps.freeze(on_b))),
    "slow weights": lambda: ps.chain(ps.lookahead(ps.masked(ps.sgd(lr=0.1), lambda path, p: path == "w")), ps.freeze(lambda path, p: False)),
}  # fmt: skip
"""Transforms in which the gradient of "b" reaches a parameter or a state."""


def spoiled(t: ps.Transform, name: str, value: float = float("nan"), steps: int = 5, step: Any = None, **how: Any) -> Any:
    """Parameters and states, where the gradient of one parameter is not finite at the second step and the fourth."""
    params, state = clone(PARAMS), t.init_state(PARAMS)
    for i in range(steps):
        g = gradients(i, params)
        g[name] = torch.full_like(g[name], value) if i in (1, 3) else g[name]
        params, state = (step or t.step)(g, state, params, **how)
    return params, state


@pytest.mark.parametrize("how", [{}, {"donate": True}, {"executor": "leaf"}, {"executor": "foreach"}], ids=str)
@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_frozen_does_not_count(name: str, how: dict[str, Any], value: float) -> None:
    inner = FROZEN[name]()
    t = ps.skip_if_nonfinite(inner)
    params, state = spoiled(t, "b", value, **how)
    expected = spoiled(t, "b", 1.0, **how)
    assert same(params, expected[0])
    assert same(params["b"], PARAMS["b"]) or "decay" in name
    assert int(state.skipped) == int(state.in_a_row) == 0
    assert int(spoiled(t, "w", value, **how)[1].skipped) == 2


@pytest.mark.parametrize("name", COUNTS)
def test_what_reaches_a_parameter_or_a_state_counts(name: str) -> None:
    params, state = spoiled(ps.skip_if_nonfinite(COUNTS[name]()), "b")
    assert int(state.skipped) == 2
    assert all(x is None or x.isfinite().all() for x in pytree.tree_leaves((params, state)))


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_where_no_flag_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = ps.skip_if_nonfinite(FROZEN[name]())
    expected = spoiled(t, "b", 1.0)
    monkeypatch.setattr(Inner, "read", lambda self, flag: flag if isinstance(flag, Tensor) else bool(flag))
    monkeypatch.setattr("purestep._core.maths.readable", lambda x: False)
    for donate in (False, True):
        params, state = spoiled(t, "b", donate=donate)
        assert difference(params, expected[0]) <= 1e-13
        assert int(state.skipped) == 0


@pytest.mark.parametrize("name", ["freeze", "partition", "in accumulate"])
def test_frozen_while_compiled(name: str) -> None:
    t = ps.skip_if_nonfinite(FROZEN[name]())
    step = torch.compile(t.step, fullgraph=True, backend="aot_eager")
    params, state = spoiled(t, "b", step=step)
    assert difference(params, spoiled(t, "b", 1.0)[0]) <= 1e-12
    assert int(state.skipped) == 0
    assert int(spoiled(t, "w", step=step)[1].skipped) == 2


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_in_each_member_of_a_batch(name: str) -> None:
    t = ps.skip_if_nonfinite(FROZEN[name]())

    def run(factor: Tensor) -> Any:
        params, state = PARAMS, t.init_state(PARAMS)
        for i in range(3):
            g = gradients(i, params)
            params, state = t.step({"w": g["w"] * factor[0], "b": g["b"] * factor[1]}, state, params)
        return params, state.skipped

    factors = torch.tensor([[1.0, 1.0], [1.0, torch.nan], [torch.nan, 1.0], [2.0, torch.inf]], dtype=torch.float64)
    params, skipped = torch.func.vmap(run)(factors)
    assert skipped.tolist() == [0, 0, 3, 0]
    for i, factor in enumerate(factors):
        assert difference({k: x[i] for k, x in params.items()}, run(factor)[0]) <= 1e-12


@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("groups", [False, True])
def test_frozen_under_an_optimizer(name: str, groups: bool) -> None:
    def run(value: float) -> Any:
        w, b = (nn.Parameter(p.clone()) for p in PARAMS.values())
        named = [("w", w), ("b", b)]
        given: Any = [{"params": [named[0]]}, {"params": [named[1]], **({} if "partition" in name else {"lr": 0.5})}]
        optimizer = optim.Optimizer(given if groups else named, ps.skip_if_nonfinite(FROZEN[name]()))
        for i in range(4):
            w.grad, b.grad = torch.cos(w.detach() + i), torch.full_like(b, value)
            optimizer.step()
        return {"w": w.detach(), "b": b.detach()}, optimizer

    params, optimizer = run(torch.nan)
    assert same(params, run(1.0)[0])
    assert not any(int(x) for name, x in optimizer.shared.items() if name.endswith("skipped"))


def test_derivatives_with_something_frozen_are_finite() -> None:
    def final(lr: Tensor) -> Tensor:
        t = ps.skip_if_nonfinite(ps.chain(ps.adam(lr), ps.freeze(on_b)))
        return spoiled(t, "b", steps=4)[0]["w"].sum()

    lr = torch.tensor(0.1, dtype=torch.float64)
    numeric = (final(lr + 1e-6) - final(lr - 1e-6)) / 2e-6
    torch.testing.assert_close(torch.func.grad(final)(lr), numeric, rtol=1e-6, atol=1e-8)
    lr.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(final(lr), lr)[0], numeric.detach(), rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------- accumulate


def test_parts_of_a_batch_are_the_batch() -> None:
    inner = ps.chain(ps.clip_by_global_norm(0.5), ps.adamw(lr=ps.schedules.cosine(0.1, total_steps=5)))
    t = ps.accumulate(inner, 3)
    params, state = PARAMS, t.init_state(PARAMS)
    expected, theirs = PARAMS, inner.init_state(PARAMS)
    for i in range(9):
        before, old = params, state
        params, state = t.step(gradients(i, expected), state, params)
        if i % 3 < 2:
            assert same(params, before)
            assert same(state.inner, old.inner)
            updates, _ = t.update(gradients(i, expected), old, before)
            assert all((u == 0).all() for u in updates.values())
        else:
            parts = [gradients(j, expected) for j in range(i - 2, i + 1)]
            mean = {k: sum((g[k] for g in parts), torch.zeros(())) / 3 for k in expected}
            expected, theirs = inner.step(mean, theirs, expected)
            assert difference(params, expected) <= 1e-14
            assert difference(state.inner, theirs) <= 1e-14
    assert int(state.step) == 3
    assert ps.find(state, ps.AdamState).step["w"] == 3


def test_a_sum() -> None:
    t = ps.accumulate(ps.scale(-1.0), 2, average=False)
    state, p = t.init_state(torch.zeros(1)), torch.zeros(1)
    for g in (1.0, 2.0):
        p, state = t.step(torch.tensor([g]), state, p)
    assert p.item() == -3


def test_a_schedule_of_k() -> None:
    t = ps.accumulate(ps.scale(-1.0), lambda step: 1 + step)
    seen = [int(s.step) for _, s in train(t, 10)]
    assert seen == [1, 1, 2, 2, 2, 3, 3, 3, 3, 4]


def test_counters_inside_and_outside() -> None:
    """What stands outside counts every call, what stands inside the real updates; under the wrapper they have names of their own."""
    inside = ps.accumulate(ps.chain(ps.scale_by_adam(), ps.scale_by_learning_rate(lambda t: 0.1 / (t + 1))), 2)
    t = ps.chain(inside, ps.scale(lambda t: 1 / (t + 1)))
    assert t.plan.keys[-1] == ("step",)
    assert {name for keys in t.plan.keys[1:-1] for name in keys} == {"0.step", "exp_avg", "exp_avg_sq"}
    model = Model()
    optimizer = optim.Optimizer(model.named_parameters(), t)
    params = values(model)
    state = t.init_state(params)
    for i in range(6):
        backward(model, optimizer, i)
        g = {k: p.grad for k, p in model.named_parameters()}
        params, state = t.step(g, state, params)
        optimizer.step()
        assert difference(values(model), params) <= 1e-14
    own = optimizer.state[model.one.weight]
    assert (own["step"], own["0.step"]) == (6, 3)


# -------------------------------------------------------------------------------------------------- lookahead, conditionally


def test_lookahead_meets_to_the_last_bit() -> None:
    t = ps.lookahead(ps.adam(lr=0.1), k=3, alpha=0.3)
    for i, (params, state) in enumerate(train(t, 7)):
        assert same(ps.eval_params(state, params), state.slow)
        assert same(params, state.slow) == (i % 3 == 2)


def test_slow_weights_begin_where_training_does() -> None:
    """A model that is loaded after the optimizer was made is what the first step finds."""
    model = Model()
    optimizer = optim.Optimizer(model.parameters(), ps.lookahead(ps.sgd(lr=0.1), k=2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    before = values(model)
    backward(model, optimizer, 0)
    optimizer.step()
    assert all(torch.equal(optimizer.state[p]["slow"], before[k]) for k, p in model.named_parameters())


def test_mechanic_begins_small_and_learns() -> None:
    """The first update is `s_init` times the inner one's; then the parameters are x0 + s times the sum of all of these."""
    t, inner = ps.mechanic(ps.adam(lr=1.0), s_init=0.01, num_betas=3), ps.adam(lr=1.0)
    params, state, theirs = clone(PARAMS), t.init_state(PARAMS), inner.init_state(PARAMS)
    total = {k: torch.zeros_like(p) for k, p in PARAMS.items()}
    for i in range(8):
        g = gradients(0, params)
        us, theirs = inner.update(g, theirs, params)
        total = {k: x + us[k] for k, x in total.items()}
        params, state = t.step(g, state, params)
        factor = state.s.sum()
        if i == 0:
            assert factor.item() == pytest.approx(0.01, rel=1e-12)
        expected = {k: PARAMS[k] + factor * x for k, x in total.items()}
        assert difference(params, expected) <= 1e-5  # eps = 1e-8 beside a factor of 0.01
    assert same(state.inner, theirs) or difference(state.inner, theirs) <= 1e-12
    assert same(state.x0, PARAMS)
    assert state.s.count_nonzero() == 3
    assert factor > 0.02


def test_mechanic_under_the_optimizer() -> None:
    """It begins where training does; the factor is where it can be looked at, and the learning rate inside is scheduled."""
    model = Model()
    optimizer = optim.Optimizer(model.parameters(), ps.mechanic(ps.sgd(lr=1.0, momentum=0.9), s_init=0.1))
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.3)
    before = values(model)
    t = ps.mechanic(ps.sgd(lr=lambda step: 0.9**step, momentum=0.9), s_init=0.1)
    params, state = values(model), t.init_state(values(model))
    for i in range(6):
        backward(model, optimizer, i)
        params, state = t.step({k: p.grad for k, p in model.named_parameters()}, state, params)
        optimizer.step()
        scheduler.step()
        assert difference(values(model), params) <= 1e-13
    assert all(torch.equal(optimizer.state[p]["x0"], before[k]) for k, p in model.named_parameters())
    assert difference(optimizer.shared["s"], state.s) <= 1e-13
    assert optimizer.param_groups[0]["s_init"] == 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex128])
def test_mechanic_keeps_dtypes(dtype: torch.dtype) -> None:
    """Complex parameters are the pairs of reals they are."""
    t = ps.mechanic(ps.sgd(lr=1.0, momentum=0.5), s_init=0.1)
    p = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=torch.float64)
    state, x = t.init_state(p), p.to(dtype) if not dtype.is_complex else torch.view_as_complex(p.view(2, 2))
    other = t.init_state(x)
    for _ in range(5):
        p, state = t.step(p, state, p)
        x, other = t.step(x, other, x)
        assert x.dtype == dtype
        found = torch.view_as_real(x).flatten() if dtype.is_complex else x.double()
        assert (found - p).norm() <= (1e-14 if dtype.is_complex else 0.02)  # it began 2.3 away from 0


def test_conditions() -> None:
    for otherwise, rest in (("pass", 1.0), ("zero", 0.0)):
        t = ps.conditionally(lambda step: step == 1, ps.scale(5.0), otherwise=otherwise)
        p = torch.zeros(1)
        state = t.init_state(p)
        for i in range(3):
            u, state = t.update(torch.ones(1), state, p)
            assert u.item() == (5.0 if i == 1 else rest)


# ------------------------------------------------------------------------------------------------------------------ averages


@pytest.mark.parametrize(
    ("reader", "twin", "when"),
    [
        (ps.ema_params(0.9), {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, lambda t: True),
        (ps.average_params(), {}, lambda t: True),
        (ps.average_params(start=2, every=3), {}, lambda t: t > 2 and (t - 2) % 3 == 0),
    ],
)
def test_the_averages_of_torch(reader: ps.Transform, twin: dict[str, Any], when: Callable[[int], bool]) -> None:
    """Of AveragedModel; the parameters themselves are those without an average."""
    model, plain = Model(), Model()
    t = ps.chain(ps.sgd(lr=0.1, momentum=0.9), reader)
    optimizer, theirs = optim.Optimizer(model.named_parameters(), t), torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    average = AveragedModel(plain, **twin)
    params, state = values(model), t.init_state(values(model))
    (name,) = [n for n in t.plan.keys[-1] if n in ("ema", "average")]
    for i in range(1, 9):
        backward(plain, theirs, i)
        backward(model, optimizer, i)
        params, state = t.step({k: p.grad for k, p in model.named_parameters()}, state, params)
        theirs.step()
        optimizer.step()
        if when(i):
            average.update_parameters(plain)
        assert difference(values(model), values(plain)) <= 1e-13
        if i > 5:
            expected = values(average.module)
            assert difference(ps.eval_params(state, params), expected) <= 1e-13
            assert difference({k: optimizer.state[p][name] for k, p in model.named_parameters()}, expected) <= 1e-13


def test_averages_are_found_wherever_they_are() -> None:
    averaged = ps.chain(ps.sgd(lr=0.1), ps.ema_params(0.5))
    for t in (
        ps.skip_if_nonfinite(averaged),
        ps.chain(ps.clip(1.0), ps.conditionally(lambda t: t >= 0, averaged)),
        ps.partition({"x": averaged, "y": ps.sgd(lr=0.1)}, {"w": "x", "b": "y"}),
        ps.masked(averaged, {"w": True, "b": False}),
    ):
        params, state = train(t, 3)[-1]
        found = ps.eval_params(state, params)
        assert not torch.equal(found["w"], params["w"])
    assert torch.equal(found["b"], params["b"])


# --------------------------------------------------------------------------------------------------------- masks and groups


def test_masks_inside_and_outside() -> None:
    inner = ps.chain(
        ps.add_decayed_weights(0.1, mask=lambda path, p: p.ndim > 1), ps.clip_by_global_norm(0.3), ps.sgd(lr=0.1, momentum=0.9)
    )
    inside, outside = (
        ps.accumulate(ps.masked(inner, {"w": True, "b": False}), 2),
        ps.masked(ps.accumulate(inner, 2), {"w": True, "b": False}),
    )
    alone = train(ps.accumulate(inner, 2), 4, params={"w": PARAMS["w"]})[-1][0]
    for t in (inside, outside):
        for how in ({}, {"executor": "leaf"}, {"donate": True}):
            assert difference(train(t, 4, **how)[-1][0]["w"], alone["w"]) <= 1e-14  # type: ignore[arg-type]
    state = outside.init_state(PARAMS)
    assert state.acc["b"] is None
    assert ps.find(state, ps.TraceState).momentum_buffer["b"] is None


@pytest.mark.parametrize("around", [True, False])
def test_partitions(around: bool) -> None:
    """A transform around a partition, and one in each part of it, are the same here; under the wrapper, too."""
    labels = lambda path, p: "matrices" if p.ndim == 2 else "rest"  # noqa: E731
    parts = {"matrices": ps.muon(lr=0.1), "rest": ps.adamw(lr=0.01)}
    if around:
        t = ps.accumulate(ps.partition(parts, labels), 2)
    else:
        t = ps.partition({k: ps.accumulate(x, 2) for k, x in parts.items()}, labels)
    plain = ps.partition(parts, labels)
    model = Model()
    optimizer = optim.Optimizer(model.named_parameters(), t)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.01]
    params, expected = values(model), values(model)
    state, theirs, before = t.init_state(params), plain.init_state(params), params
    for i in range(6):
        backward(model, optimizer, i)
        g = {k: p.grad for k, p in model.named_parameters()}
        params, state = t.step(g, state, params)
        optimizer.step()
        if i % 2:
            mean = {k: (x + before[k]) / 2 for k, x in g.items()}
            expected, theirs = plain.step(mean, theirs, expected)
        before = {k: x.clone() for k, x in g.items()}
        assert difference(values(model), params) <= 1e-14
        assert difference(params, expected) <= 1e-12


def test_groups_have_their_own_options() -> None:
    """The hyperparameters inside are options of the groups, and schedulers drive them."""
    model = Model()
    groups = [{"params": list(model.one.parameters()), "lr": 0.3}, {"params": list(model.two.parameters())}]
    optimizer = optim.Optimizer(groups, ps.skip_if_nonfinite(ps.adamw(lr=0.1, weight_decay=0.1)))
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    twin = Model()
    theirs = torch.optim.AdamW(
        [{"params": list(twin.one.parameters()), "lr": 0.3}, {"params": list(twin.two.parameters())}], lr=0.1, weight_decay=0.1
    )
    slower = torch.optim.lr_scheduler.ExponentialLR(theirs, 0.5)
    for i in range(5):
        backward(model, optimizer, i)
        if i == 2:
            model.one.weight.grad.fill_(torch.nan)  # type: ignore[union-attr]
        else:
            backward(twin, theirs, i)
            theirs.step()
        optimizer.step()
        scheduler.step()
        slower.step()
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in theirs.param_groups]
    assert difference(values(model), values(twin)) <= 1e-12
    assert sorted(optimizer.state[model.one.bias]) == ["exp_avg", "exp_avg_sq", "step"]
    assert sorted(optimizer.shared) == ["in_a_row", "skipped"]  # in the state of the first parameter
    assert optimizer.shared["skipped"] == 1


def test_own_options_must_agree() -> None:
    model = Model()
    groups = [{"params": list(model.one.parameters()), "alpha": 0.3}, {"params": list(model.two.parameters())}]
    optimizer = optim.Optimizer(groups, ps.lookahead(ps.sgd(lr=0.1)))
    backward(model, optimizer, 0)
    with pytest.raises(ValueError, match="lookahead sees the parameters of all groups together, so alpha must be the same"):
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------------- checkpoints

WRAPPED = {
    "accumulate": lambda: ps.accumulate(ps.adagrad(lr=0.1, initial_accumulator_value=0.1), 3),
    "accumulate in skip": lambda: ps.skip_if_nonfinite(ps.accumulate(ps.adam(lr=0.1), 2), max_consecutive=3),
    "lookahead": lambda: ps.lookahead(ps.adamw(lr=0.1), k=3),
    "mechanic": lambda: ps.mechanic(ps.adamw(lr=1.0, weight_decay=0.1), s_init=0.01, num_betas=4),
    "mechanic in skip": lambda: ps.skip_if_nonfinite(ps.accumulate(ps.mechanic(ps.sgd(lr=1.0, momentum=0.9), s_init=0.1), 2)),
    "conditionally": lambda: ps.chain(ps.conditionally(lambda t: t % 2 == 0, ps.trace(0.9)), ps.sgd(lr=0.1)),
    "two": lambda: ps.chain(ps.accumulate(ps.trace(0.9), 2), ps.accumulate(ps.trace(0.5), 2), ps.scale(-0.1)),
    "averages": lambda: ps.chain(ps.sgd(lr=0.1), ps.average_params(start=2), ps.ema_params(0.9)),
}


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
@pytest.mark.parametrize("route", ["state dict", "file", "deepcopy", "into a used one"])
@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.in_turn("cut")
def test_going_on_from_a_checkpoint(name: str, route: str, cut: int) -> None:
    """Wherever it is cut, nothing is counted twice and nothing is lost; the two go different ways afterwards."""
    t = WRAPPED[name]()
    model = Model()
    optimizer = optim.Optimizer(model.named_parameters(), t)
    params, state = values(model), t.init_state(values(model))

    def go(model: nn.Module, optimizer: Any, i: int) -> None:
        backward(model, optimizer, i)
        optimizer.step()

    for i in range(cut):
        go(model, optimizer, i)
    if route == "deepcopy":
        again, (other,) = copy.deepcopy((optimizer, (model,)))
    else:
        other = Model()
        other.load_state_dict(model.state_dict())
        again = optim.Optimizer(other.named_parameters(), t)
        if route == "into a used one":
            go(other, again, 99)
            other.load_state_dict(model.state_dict())
        saved = optimizer.state_dict()
        if route == "file":
            file = io.BytesIO()
            torch.save({k: x for k, x in saved.items() if k == "state"}, file)
            file.seek(0)
            saved = {**saved, "state": torch.load(file)["state"]}
        else:
            saved = copy.deepcopy(saved)
        again.load_state_dict(saved)
    for i in range(cut, 7):
        go(model, optimizer, i)
    for i in range(cut, 7):
        go(other, again, i)
    assert difference(values(other), values(model)) == 0
    fresh = Model()
    for i in range(7):
        backward(fresh, optim.SGD(fresh.parameters(), lr=0.1), i)
        params, state = t.step({k: p.grad for k, p in fresh.named_parameters()}, state, params)
        fresh.load_state_dict(params)
    assert difference(values(model), params) <= 1e-13


# -------------------------------------------------------------------------------------------------------- arguments and values


def test_extra_arguments_pass_through() -> None:
    """A closure reaches what asks for it, however deep it is."""
    model, twin = Model(), Model()
    optimizer = optim.Optimizer(model.parameters(), ps.skip_if_nonfinite(ps.accumulate(ps.lbfgs(max_iter=3), 1)))
    theirs = optim.Optimizer(twin.parameters(), ps.lbfgs(max_iter=3))
    for i in range(3):
        optimizer.step(lambda: backward(model, optimizer, i))  # noqa: B023
        theirs.step(lambda: backward(twin, theirs, i))  # noqa: B023
    assert difference(values(model), values(twin)) <= 1e-12
    with pytest.raises(TypeError, match=r"lbfgs needs value_and_grad, so step needs a closure"):
        optimizer.step()
    t = ps.skip_if_nonfinite(ps.lbfgs())
    with pytest.raises(TypeError, match="lbfgs needs value_and_grad: give it to each update"):
        t.step(PARAMS, t.init_state(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="no use for 'value'"):
        ps.accumulate(ps.sgd(), 2).step(PARAMS, None, PARAMS, value=1.0)


def test_frozen_parameters_beside_an_extra_argument() -> None:
    model, twin = Model(), Model()
    for m in (model, twin):
        m.one.weight.requires_grad_(False)
    optimizer = optim.Optimizer(model.parameters(), ps.accumulate(ps.lbfgs(max_iter=3), 1))
    theirs = optim.Optimizer(twin.parameters(), ps.lbfgs(max_iter=3))
    for i in range(2):
        optimizer.step(lambda: backward(model, optimizer, i))  # noqa: B023
        theirs.step(lambda: backward(twin, theirs, i))  # noqa: B023
    assert difference(values(model), values(twin)) <= 1e-12
    assert torch.equal(model.one.weight, Model().one.weight)


def test_parameters_that_are_thawed_later() -> None:
    """They come in with the step at which they get their first gradient."""
    model = Model()
    model.one.weight.requires_grad_(False)
    t = ps.lookahead(ps.accumulate(ps.adam(lr=0.1), 2), k=3)
    optimizer = optim.Optimizer(model.named_parameters(), t)
    params, state = values(model), t.init_state(values(model))
    for i in range(7):
        model.one.weight.requires_grad_(i > 2)
        backward(model, optimizer, i)
        params, state = t.step({k: p.grad for k, p in model.named_parameters()}, state, params)
        optimizer.step()
        assert difference(values(model), params) <= 1e-14


def test_differentiable() -> None:
    """Autograd runs through the wrapper's steps, skipped ones too."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    p = w.clone()
    optimizer = optim.Optimizer([p], ps.accumulate(ps.skip_if_nonfinite(ps.adam(lr)), 2), differentiable=True)
    for i in range(6):
        looked_at = p.clone()  # a step writes to the parameters themselves
        p.grad = torch.full_like(p, torch.nan) if i == 3 else torch.cos(looked_at)
        optimizer.step()
    p.sum().backward()
    assert lr.grad is not None
    assert lr.grad.isfinite()
    assert lr.grad != 0


def test_reading_a_state() -> None:
    t = ps.accumulate(ps.adamw(lr=ps.schedules.linear(1.0, 0.0, total_steps=4)), 2)
    _, state = train(t, 6)[-1]
    assert ps.get_hyperparams(t, state)["lr"] == 0.25
    assert ps.step_count(state) == 3
    half = ps.map_params(lambda x: x[:1], state)
    assert [half.acc["w"].shape, ps.find(half, ps.AdamState).exp_avg["w"].shape] == [(1, 2), (1, 2)]


def test_hyperparameters_are_those_of_both() -> None:
    t = ps.lookahead(ps.chain(ps.clip_by_global_norm(1.0), ps.sgd(lr=0.1)), alpha=0.4)
    assert t.hyperparams == {"alpha": 0.4, "max_norm": 1.0, "weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "lr": 0.1}
    assert t.switches == {"k": 5, "nesterov": False}
    changed = t.replace(lr=0.2, alpha=0.5, k=6)
    assert changed == ps.lookahead(ps.chain(ps.clip_by_global_norm(1.0), ps.sgd(lr=0.2)), k=6)
    assert pytree.tree_leaves(t) == [0.4, 1.0, 0.0, 0.0, 0.0, 0.1]
    with pytest.raises(ValueError, match="alpha must be a number in"):
        t.replace(alpha=2.0)


def test_the_state_is_that_of_the_inner_transform() -> None:
    inner = ps.chain(ps.clip_by_global_norm(1.0), ps.adam())
    for t in (ps.accumulate(inner, 2), ps.skip_if_nonfinite(ps.lookahead(inner))):
        state = t.init_state(PARAMS)
        found = state.inner if isinstance(state, ps.AccumulateState) else state.inner.inner
        assert same(found, inner.init_state(PARAMS))
        assert pytree.tree_structure(found) == pytree.tree_structure(inner.init_state(PARAMS))
    with pytest.raises(TypeError, match="accumulate needs its own state, AccumulateState, but got tuple"):
        ps.accumulate(inner, 2).step(PARAMS, inner.init_state(PARAMS), PARAMS)
    other = ps.accumulate(ps.trace(0.9), 2).init_state(PARAMS)
    with pytest.raises(TypeError, match="scale_by_adam needs its own state, AdamState, but got TraceState"):
        ps.accumulate(ps.scale_by_adam(), 2).step(PARAMS, other, PARAMS)


def test_around_nothing() -> None:
    t = ps.accumulate(ps.chain(), 2)
    params, state = train(t, 2)[-1]
    assert not same(params, PARAMS)
    assert state.inner == ()
    assert ps.skip_if_nonfinite(ps.chain()) == ps.skip_if_nonfinite(ps.chain())


def test_the_program_is_shown() -> None:
    source = ps.chain(ps.clip(1.0), ps.accumulate(ps.sgd(lr=0.1), 2), ps.scale(2.0)).program()
    assert "# accumulate(2, average=True), around:" in source
    assert source.count("def program") == 3


class Kept(NamedTuple):
    last: list[Tensor]
    inner: Any

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> Kept:
        return cls([torch.zeros_like(p) for p in params], inner)


def test_bad_arguments() -> None:
    with pytest.raises(
        TypeError, match=r"accumulate wraps a transform, but transform is .* Did you mean to call it: scale\(...\)"
    ):
        ps.accumulate(ps.scale, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="accumulate: k must be an integer of at least 1, but got 0"):
        ps.accumulate(ps.sgd(), 0)
    with pytest.raises(ValueError, match="lookahead: k must be"):
        ps.lookahead(ps.sgd(), k=0)
    with pytest.raises(ValueError, match="num_betas must be an integer of at least 1, but got 0"):
        ps.mechanic(ps.sgd(), num_betas=0)
    with pytest.raises(ValueError, match="num_betas must be an integer of at most 16, but got 17"):
        ps.mechanic(ps.sgd(), num_betas=17)
    with pytest.raises(ValueError, match="s_init must be a number above 0"):
        ps.mechanic(ps.sgd(), s_init=0.0)
    with pytest.raises(ValueError, match="max_consecutive must be an integer of at least 0, but got -1"):
        ps.skip_if_nonfinite(ps.sgd(), max_consecutive=-1)
    with pytest.raises(TypeError, match="conditionally takes a function of the step and a transform"):
        ps.conditionally(ps.sgd(), lambda t: True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="otherwise must be 'pass' or 'zero', but got 'skip'"):
        ps.conditionally(lambda t: True, ps.sgd(), otherwise="skip")
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        ps.average_params(every=0)
    with pytest.raises(TypeError, match=r"nested takes a state, a NamedTuple with .* 'inner' as its last field"):
        ps.nested(ps.TraceState)
    with pytest.raises(
        TypeError, match=r"plain is nested, so it must take a transform, but no argument is annotated with purestep.Inner"
    ):

        @ps.nested(Kept)
        def plain(gs: Any, s: Any, params: Any, k: float) -> Any: ...


def test_what_a_function_must_return() -> None:
    @ps.nested(Kept)
    def forgetful(gs: list[Tensor], s: Kept, params: list[Tensor], transform: Inner) -> Any:
        us, _ = transform.update(gs, s.inner, params)
        return us, Kept(gs, None)

    t = forgetful(ps.sgd())
    with pytest.raises(TypeError, match=r"forgetful must return \(updates, Kept\) with the state of the inner transform"):
        t.step(PARAMS, t.init_state(PARAMS), PARAMS)


def test_select() -> None:
    a, b, one = torch.tensor(1.0), torch.tensor(2.0), torch.ones(2)
    yes, no = torch.tensor(True), torch.tensor(False)
    x, y = {"n": [a, a], "s": ps.TraceState(a, one)}, {"n": [b, b], "s": ps.TraceState(b, 2 * one)}
    assert ps.select(True, x, y) is x
    found = ps.select(no, x, y)
    assert found["n"][0] is found["n"][1]
    assert same(found, y)
    assert same(ps.select(yes, x, y), x)
    with pytest.raises(ValueError, match="same structure, but got a list of 1 and a list of 2"):
        ps.select(yes, [a], [a, b])
    with pytest.raises(ValueError, match="cannot choose between 1 and 2"):
        ps.select(yes, 1, 2)


def test_a_deep_nest_trains() -> None:
    t = ps.lookahead(ps.skip_if_nonfinite(ps.accumulate(ps.chain(ps.clip_by_global_norm(1.0), ps.adam(lr=0.05)), 2)), k=4)
    params, loss = mlp()
    state = t.init_state(params)
    first = float(loss(params))
    for _ in range(200):
        params, state = t.step(grads(loss, params), state, params, donate=True)
    assert float(loss(ps.eval_params(state, params))) < 0.5 * first


@pytest.mark.parametrize("donate", [False, True])
def test_updates_are_not_in_the_memory_of_a_sum(donate: bool) -> None:
    """What `accumulate` adds up in place may be what comes out of it, where the inner transform lets it pass."""
    mask = {"w": True, "b": False}
    t = ps.chain(ps.accumulate(ps.masked(ps.scale(0.5), mask), 2), ps.scale(-0.1))
    p = {"w": torch.zeros(1), "b": torch.zeros(1)}
    state = t.init_state(p)
    updates = []
    for k in range(4):
        u, state = t.update({name: torch.full((1,), k + 1.0) for name in p}, state, p, donate=donate)
        updates.append(u)
    assert [round(u["w"].item(), 4) for u in updates] == [0, -0.075, 0, -0.175]
    assert [round(u["b"].item(), 4) for u in updates] == [0, -0.15, 0, -0.35]
    alone = ps.accumulate(ps.masked(ps.scale(0.5), mask), 2)
    state = alone.init_state(p)
    held = []
    for k in range(4):
        u, state = alone.update({name: torch.full((1,), k + 1.0) for name in p}, state, p, donate=donate)
        held.append(u["b"])
    assert [x.item() for x in held] == [0, 1.5, 0, 3.5]


COUNTERS: dict[str, Any] = {
    "accumulate": lambda: ps.chain(ps.add_noise(0.1, 0.5, seed=1), ps.accumulate(ps.adam(0.01), 2)),
    "accumulate, every step": lambda: ps.chain(
        ps.add_noise(0.1, 0.5, seed=1), ps.accumulate(ps.sgd(0.1), lambda step: 1 + step)
    ),
    "whole inside": lambda: ps.chain(ps.add_noise(0.1, 0.5, seed=1), ps.accumulate(ps.prodigy(), 2)),
    "two whole inside": lambda: ps.accumulate(ps.chain(ps.add_noise(0.1, 0.5, seed=1), ps.dog()), 2),
}


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("name", COUNTERS)
def test_each_whole_transform_of_an_optimizer_has_its_own_counter(name: str, foreach: bool | None) -> None:
    """accumulate counts the updates of what it wraps, noise before it counts all (found by tests/test_generated.py)."""
    make = COUNTERS[name]
    expected, opt = {"w": torch.ones(3, 2, dtype=torch.float64)}, make()
    state = opt.init_state(expected)
    w = torch.nn.Parameter(expected["w"].clone())
    optimizer = optim.Optimizer([("w", w)], make(), foreach=foreach)
    for k in range(7):
        g = torch.full((3, 2), 0.1 * k + 0.1, dtype=torch.float64)
        expected, state = opt.step({"w": g}, state, expected, executor="leaf")
        w.grad = g
        optimizer.step()
    torch.testing.assert_close(w.detach(), expected["w"], rtol=1e-10, atol=1e-10)
    names = [
        n for own, link in zip(opt.plan.keys, opt.links) if link.transform.declaration.whole for n in own if n.endswith("step")
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_a_part_without_gradients_does_not_count(foreach: bool | None) -> None:
    make = lambda: ps.partition({"a": ps.prodigy(), "b": ps.dog()}, ps.by_ndim({2: "a"}, default="b"))  # noqa: E731
    opt, expected = make(), {"w": torch.ones(3, 2, dtype=torch.float64), "v": torch.ones(3, dtype=torch.float64)}
    state = opt.init_state(expected)
    params = {n: torch.nn.Parameter(x.clone()) for n, x in expected.items()}
    optimizer = optim.Optimizer(params.items(), make(), foreach=foreach)
    for k in range(6):
        grads = {n: None if n == "v" and k % 2 else 0.3 * x for n, x in expected.items()}
        for n, g in grads.items():
            params[n].grad = g
        expected, state = opt.step(grads, state, expected, executor="leaf")
        optimizer.step()
    for n, x in expected.items():
        torch.testing.assert_close(params[n].detach(), x, rtol=1e-10, atol=1e-10)
