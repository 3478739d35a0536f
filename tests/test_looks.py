"""Steps on tensors that look like the last ones are not looked at again, and whatever differs is."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import purestep as ps
from purestep import optim
from purestep._engine.guards import MISSES, GuardCache
from tests.problems import difference

DIFFERENT: dict[str, Callable[[Tensor], Any]] = {
    "type": torch.nn.Parameter,
    "requires grad": lambda x: x.clone().requires_grad_(),
    "dtype": Tensor.double,
    "shape": lambda x: x.reshape(-1),
    "strides": lambda x: x.t().contiguous().t(),
    "device": lambda x: x.to("meta"),
    "layout": Tensor.to_sparse,
    "conjugate": lambda x: torch.complex(x, x).conj().imag,
    "missing": lambda x: None,
    "no tensor": lambda x: (x,),
}


class Idle(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def some() -> list[Tensor]:
    return [torch.randn(3, 2), torch.randn(4), torch.randn(())]


def learnt(xs: list[Tensor]) -> GuardCache:
    """At the second time."""
    guards = GuardCache()
    for _ in range(2):
        guards.install(xs)
    return guards


def test_the_same_look() -> None:
    guards = GuardCache()
    assert not guards.check(some())
    guards.install(some())
    assert not guards.check(some())
    guards.install(some())
    assert guards.check(some())
    assert not guards.check(some()[:2])
    assert not guards.check([*some(), torch.ones(1)])


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd", "nadam", "adafactor", "clipped"])
def test_after_some_steps_all_is_known(name: str, donate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is checked that has been."""
    opt = ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.1)) if name == "clipped" else getattr(ps, name)(0.1)
    params, grads = {"v": torch.ones(3), "w": torch.ones(3, 2)}, {"v": torch.ones(3), "w": torch.ones(3, 2)}
    state = opt.init_state(params)
    for _ in range(3):
        params, state = opt.step(grads, state, params, donate=donate)
    for check in ("check_params", "check_gradients", "check_states"):
        monkeypatch.delattr(f"purestep.transform.{check}")
    monkeypatch.delattr("purestep._engine.step_cache.RepeatedStep.takes")
    opt.step(grads, state, params, donate=donate)


@pytest.mark.parametrize("how", DIFFERENT)
def test_another_look(how: str) -> None:
    xs = some()
    guards = learnt(xs)
    assert not guards.check([DIFFERENT[how](xs[0]), *xs[1:]])
    assert guards.check(xs)


def test_other_surroundings() -> None:
    xs = some()
    guards = learnt(xs)
    with torch.no_grad():
        assert not guards.check(xs)
    with Idle():
        assert not guards.check(xs)
    seen: list[object] = []
    torch.func.vmap(lambda x: (seen.append(guards.check(xs)), x)[1])(torch.ones(2))
    assert seen == [None]


def test_what_was_found_does_not_change() -> None:
    """Another thread may learn something else between two looks at it."""
    guards = learnt(some())
    found = guards.check(some())
    for _ in range(2):
        guards.install(some())
    assert found is not None
    assert found is not guards.last
    assert found.matches(some())


def test_donated_steps_after_pure_ones_are_known() -> None:
    opt = ps.adamw(0.1)
    params, grads = {"w": torch.ones(3)}, {"w": torch.ones(3)}
    state = opt.init_state(params)
    for k in range(6):
        params, state = opt.step(grads, state, params, donate=k > 2)
    (guards,) = opt.plan.guards.values()
    assert guards.last is not None
    assert guards.last.facts
    assert opt.explain(grads, state, params, donate=True).cached


def test_what_changes_all_the_time_is_not_learnt_for_ever() -> None:
    guards = GuardCache()
    kinds = [some(), [torch.randn(2)] * 2]
    for k in range(20):
        if not guards.check(kinds[k % 2]):
            guards.install(kinds[k % 2])
    assert guards.misses > MISSES
    last = guards.last
    guards.install(kinds[0])
    assert guards.last is last
    guards = GuardCache()
    for k in range(120):
        if not guards.check(kinds[0][: 1 + k // 6 % 2]):
            guards.install(kinds[0][: 1 + k // 6 % 2])
    assert guards.misses <= MISSES  # most steps were like the one before


def test_nothing_is_kept_alive() -> None:
    params = {"w": torch.ones(3)}
    opt = ps.nadam(0.1)
    state = opt.init_state(params)
    refs = [weakref.ref(x) for x in (params["w"], ps.find(state, ps.NAdamState).exp_avg["w"])]
    opt.step({"w": torch.ones(3)}, state, params)
    del params, state
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


WRONG: dict[str, Any] = {
    "a gradient's shape": (lambda g, s, p: ({"w": g["w"].t()}, s, p), r"gradient of 'w' has shape \(2, 3\)"),
    "a gradient's dtype": (lambda g, s, p: ({"w": g["w"].double()}, s, p), "gradient of 'w' has dtype torch.float64"),
    "a state's shape": (lambda g, s, p: (g, ps.map_params(lambda x: x.t(), s), p), r"at 'w' has shape \(2, 3\)"),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ["adamw", "nadam"])
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_still_an_error(what: str, name: str, donate: bool) -> None:
    """After steps that were right."""
    spoil, message = WRONG[what]
    opt = getattr(ps, name)(0.1)
    params = {"w": torch.randn(3, 2)}
    state, grads = opt.init_state(params), {"w": torch.randn(3, 2)}
    for _ in range(3):
        params, state = opt.step(grads, state, params, donate=donate)
    before = copy.deepcopy((params, state))
    with pytest.raises(ValueError, match=message):
        opt.step(*spoil(grads, state, params), donate=donate)
    assert difference((params, state), before) == 0


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ["adamw", "nadam"])
def test_a_missing_gradient_after_others(name: str, donate: bool) -> None:
    opt = getattr(ps, name)(0.1)
    params = {"v": torch.ones(2), "w": torch.ones(2)}
    state, grads = opt.init_state(params), {"v": torch.ones(2), "w": torch.ones(2)}
    for _ in range(2):
        params, state = opt.step(grads, state, params, donate=donate)
    expected = params["w"].clone()
    after, _ = opt.step({"v": torch.ones(2), "w": None}, state, params, donate=donate)
    assert torch.equal(after["w"], expected)
    assert (after["v"] < expected).all()


@pytest.mark.parametrize("name", ["adamw", "nadam"])
@pytest.mark.parametrize("where", ["params", "grads", "state", "lr"])
def test_derivatives_after_steps_without(name: str, where: str) -> None:
    """The same shapes, and something that requires grad: it is recorded."""
    opt = getattr(ps, name)(0.1)
    params, grads = {"w": torch.randn(3)}, {"w": torch.randn(3)}
    state = opt.init_state(params)
    for _ in range(3):
        params, state = opt.step(grads, state, params)
    if where == "lr":
        source = torch.tensor(0.1, requires_grad=True)
        opt = opt.replace(lr=source)
    else:
        tensors = {"params": params, "grads": grads}.get(where)
        source = (
            (ps.map_params(lambda x: x.requires_grad_(), state), state)[1] if tensors is None else tensors["w"].requires_grad_()
        )
    after, _ = opt.step(grads, state, params)
    (slope,) = torch.autograd.grad(
        after["w"].sum(), [source if isinstance(source, Tensor) else source_of(state)], allow_unused=False
    )
    assert slope.isfinite().all()
    assert slope.abs().sum() > 0


def source_of(state: Any) -> Tensor:
    """The first mean of a state."""
    found: list[Tensor] = []
    ps.map_params(lambda x: found.append(x) or x, state)
    return found[0]


def test_grad_mode_is_looked_at() -> None:
    """Parameters that require grad, first where nothing is recorded and then where it is."""
    opt = ps.adamw(0.1)
    params = {"w": torch.randn(3, requires_grad=True)}
    grads = {"w": torch.randn(3)}
    state = opt.init_state(params)
    for _ in range(2):
        with torch.no_grad():
            opt.step(grads, state, params)
    after, _ = opt.step(grads, state, params)
    assert after["w"].requires_grad


SHAPES = [(6, 5), (40,), (6, 5), (5, 6), (30,)]


def test_what_is_known_need_not_suit_a_kernel() -> None:
    """A gradient in another order of memory is known after pure steps, and a kernel still may not have it."""
    opt = ps.adamw(0.1)
    grads = {"w": torch.randn(4, 3).t()}
    params = {"w": torch.randn(3, 4)}
    state = opt.init_state(params)
    for _ in range(3):
        params, state = opt.step(grads, state, params)
    expected, others = copy.deepcopy((params, state))
    for _ in range(3):
        params, state = opt.step(grads, state, params, donate=True)
        expected, others = opt.step(grads, others, expected, executor="leaf")
    assert difference((params, state), (expected, others)) <= 1e-6


def test_a_state_of_other_sizes_is_still_an_error() -> None:
    """The parameter looks as it did in earlier steps, but its state is that of a smaller one: a kernel would write beyond it."""
    p = torch.nn.Parameter(torch.ones(40))
    optimizer = optim.AdamW([p], lr=0.1)
    for size in (40, 30):
        optimizer.state.pop(p, None)
        p.data = torch.ones(size)
        for _ in range(4 if size == 40 else 1):
            p.grad = torch.ones(size)
            optimizer.step()
    p.data, p.grad = torch.ones(40), torch.ones(40)
    with pytest.raises(RuntimeError, match="size"):
        optimizer.step()


@pytest.mark.parametrize("name", ["AdamW", "Adagrad"])
def test_a_state_in_another_order_of_memory(name: str) -> None:
    """A kernel would read it in the wrong order: it is looked at again where a kernel may run that did not before."""
    results = []
    for library in (torch.optim, optim):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        optimizer = getattr(library, name)([p], lr=0.1, foreach=True)
        for k in range(6):
            p.grad = torch.randn(4, 3, dtype=torch.float64)
            if k == 1:
                for field, x in optimizer.state[p].items():
                    if x.dim():
                        optimizer.state[p][field] = x.t().contiguous().t()
            if k == 3 and library is optim:
                optimizer.param_groups[0]["foreach"] = None
            optimizer.step()
        results.append(p.detach())
    assert difference(*results) <= 1e-12


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam"])
def test_an_optimizer_whose_parameters_change(name: str) -> None:
    """Their data is exchanged for others', of other sizes and back; gradients come in other orders in memory."""
    results = []
    for library in (torch.optim, optim):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
        q = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
        optimizer = getattr(library, name)([p, q], lr=0.1, weight_decay=0.1)
        for shape in SHAPES:
            if p.shape != shape:
                optimizer.state.pop(p, None)
                p.data = torch.randn(shape, dtype=torch.float64)
            for k in range(3):
                g = torch.randn(shape, dtype=torch.float64)
                p.grad = g.t().contiguous().t() if k == 1 and g.dim() == 2 else g
                q.grad = torch.randn(3, dtype=torch.float64)
                optimizer.step()
        results.append([p.detach(), q.detach()])
    assert difference(*results) <= 1e-12


def test_two_models_with_one_transform() -> None:
    """They take turns, with as many tensors each; and each is right."""
    opt = ps.sgd(0.1, momentum=0.9)
    models = [{"w": torch.randn(3, 2)}, {"w": torch.randn(7)}]
    expected = [{"w": m["w"].clone()} for m in models]
    states, others = [opt.init_state(m) for m in models], [opt.init_state(m) for m in models]
    for _ in range(3):
        for k in (0, 1):
            g = {"w": torch.ones_like(models[k]["w"])}
            models[k], states[k] = opt.step(g, states[k], models[k], donate=True)
            expected[k], others[k] = opt.step(g, others[k], expected[k], executor="leaf")
    assert difference(models, expected) <= 1e-6


@pytest.mark.parametrize("surroundings", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_many_models_with_one_transform(surroundings: Any) -> None:
    """More than are kept in mind."""
    opt = ps.adam(0.1)
    with surroundings():
        for n in range(1, 21):
            params = [torch.ones(2) for _ in range(n)]
            state = opt.init_state(params)
            for _ in range(2):
                params, state = opt.step([torch.ones(2)] * n, state, params)
            assert all(torch.allclose(p, torch.full((2,), 0.8)) for p in params)
    assert len(opt.plan.guards) <= 8


@pytest.mark.parametrize("first", [0.0, 0.1])
def test_another_chain_on_the_same_tensors_is_decided_anew(first: float) -> None:
    """Without decay torch's SGD computes all of it, with decay after the momentum nothing of torch's does."""
    make = lambda: ps.chain(ps.trace(0.9), ps.add_decayed_weights(first), ps.scale_by_learning_rate(0.1))  # noqa: E731
    results = []
    for flags in ({}, {"foreach": False}):
        p = torch.nn.Parameter(torch.arange(6.0, dtype=torch.float64))
        optimizer = optim.Optimizer([p], make(), **flags)
        ran = []
        for k in range(9):
            p.grad = torch.full_like(p, 0.1 * k)
            if k == 5:
                optimizer.param_groups[0]["weight_decay"] = 0.1 - first
            ran.append(optimizer.explain().parts[-1].executor)
            optimizer.step()
        results.append(p.detach())
        if not flags:
            assert [ran[4], ran[8]] == (["fused", "foreach"] if first == 0.0 else ["foreach", "fused"])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
