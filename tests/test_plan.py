"""Structures: what is known of a chain without a number; one serves all transforms that differ in numbers alone."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.utils
import torch.utils.checkpoint
from torch import Tensor

import purestep as ps
import purestep._engine.plan
from purestep import optim
from purestep._core.cache import DeclarationCache
from purestep._engine.plan import structure_of

PARAMS = {"w": torch.ones(3, 2), "b": torch.ones(3)}


def structure(opt: ps.Transform) -> Any:
    return structure_of(opt.links)


ALIKE: dict[str, tuple[ps.Transform, ps.Transform]] = {
    "numbers": (ps.adamw(0.1), ps.adamw(0.2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.5)),
    "tensors": (ps.adamw(torch.tensor(0.1)), ps.adamw(torch.tensor([0.2]))),
    "schedules": (ps.sgd(ps.schedules.constant(0.1)), ps.sgd(ps.schedules.linear(0.1, 0.0, total_steps=5))),
    "masks": (ps.masked(ps.sgd(0.1), True), ps.masked(ps.sgd(0.2), lambda path, p: False)),
    "whole transforms": (ps.clip_by_global_norm(1.0), ps.clip_by_global_norm(2.0)),
    "switches": (ps.sgd(0.1, momentum=0.9), ps.sgd(0.1, momentum=0.9, nesterov=True)),
    "wrapped": (ps.skip_if_nonfinite(ps.adamw(0.1)), ps.skip_if_nonfinite(ps.adamw(0.2))),
}

DIFFERENT: dict[str, tuple[ps.Transform, ps.Transform]] = {
    "off": (ps.adamw(0.1, weight_decay=0.1), ps.adamw(0.1, weight_decay=0.0)),
    "a tensor is never off": (ps.adamw(0.1, weight_decay=torch.tensor(0.0)), ps.adamw(0.1, weight_decay=0.0)),
    "number, tensor": (ps.adamw(0.1), ps.adamw(torch.tensor(0.1))),
    "number, schedule": (ps.sgd(0.1), ps.sgd(ps.schedules.constant(0.1))),
    "schedule in a tuple": (ps.adam(0.1), ps.adam(0.1, betas=(ps.schedules.constant(0.9), 0.99))),
    "device": (ps.adamw(torch.tensor(0.1)), ps.adamw(torch.tensor(0.1, device="meta"))),
    "device of a schedule": (
        ps.sgd(ps.schedules.linear(torch.tensor(0.1), 0.0, total_steps=5)),
        ps.sgd(ps.schedules.linear(torch.tensor(0.1, device="meta"), 0.0, total_steps=5)),
    ),
    "None": (ps.adafactor(0.1), ps.adafactor(0.1, eps=(1e-30, 1e-3))),
    "algorithm": (ps.adam(0.1), ps.adamax(0.1)),
    "masked": (ps.sgd(0.1), ps.masked(ps.sgd(0.1), True)),
    "what is wrapped": (ps.skip_if_nonfinite(ps.chain(ps.scale(1.0), ps.scale(1.0))),
                        ps.chain(ps.skip_if_nonfinite(ps.scale(1.0)), ps.scale(1.0))),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_transforms_that_differ_in_numbers_share_a_structure(name: str) -> None:
    a, b = ALIKE[name]
    assert structure(a) is structure(b)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_more_than_a_number_makes_another_structure(name: str) -> None:
    a, b = DIFFERENT[name]
    assert structure(a) is not structure(b)


def test_the_numbers_are_each_transforms_own() -> None:
    """One structure, and one program: in every order, and nested."""
    grads = {name: torch.full_like(p, 2.0) for name, p in PARAMS.items()}
    makes: tuple[Callable[[float], ps.Transform], ...] = (
        ps.sgd, lambda lr: ps.skip_if_nonfinite(ps.sgd(lr)), lambda lr: ps.masked(ps.sgd(lr), {"w": True, "b": True}),
        lambda lr: ps.chain(ps.clip_by_global_norm(1e9), ps.sgd(lr)),
    )  # fmt: skip
    for make in makes:
        for lr, donate in itertools.product((0.1, 0.3, 0.1, 0.2), (False, True)):
            opt, params = make(lr), {name: p.clone() for name, p in PARAMS.items()}
            new, _ = opt.step(grads, opt.init_state(params), params, donate=donate)
            torch.testing.assert_close(new["w"], torch.full((3, 2), 1 - 2 * lr))


def test_a_warm_vmapped_step_makes_no_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = ps.adamw(torch.tensor([0.1, 0.2]))
    stacked = {name: torch.stack([p, p]) for name, p in PARAMS.items()}
    state = torch.func.vmap(ps.adamw(0.1).init_state)(stacked)
    step = torch.func.vmap(lambda opt, s, p: opt.step(p, s, p), in_dims=(ps.in_dims(opt), 0, 0))
    expected = step(opt, state, stacked)
    monkeypatch.setattr(purestep._engine.plan, "Structure", None)
    torch.testing.assert_close(step(opt, state, stacked), expected, rtol=0, atol=0)


class Graphs:
    """Compile, and count the graphs."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()

    @property
    def count(self) -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    def compiled(self, function: Any) -> Any:
        return torch.compile(function, backend="eager", fullgraph=True)


TRANSFORMS = {
    "adamw": lambda lr: ps.adamw(lr),
    "adafactor": lambda lr: ps.adafactor(lr),
    "quantized": lambda lr: ps.quantize_state(ps.adamw(lr), min_size=4),
    "single": lambda lr: ps.scale(-lr),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_used_meanwhile_makes_no_new_graph(name: str) -> None:
    """A structure, links or a recipe that are found later would be a guard that fails."""
    graphs, opt = Graphs(), TRANSFORMS[name](0.1)
    grads = {name: 2 * p for name, p in PARAMS.items()}
    first = opt.init_state(PARAMS)
    step = graphs.compiled(lambda g, s, p: opt.step(g, s, p))
    params, state = step(grads, first, PARAMS)
    for use in (lambda: opt.hyperparams, lambda: opt.init_state(PARAMS), lambda: opt.step(grads, first, PARAMS)):
        use()
        params, state = step(grads, state, params)
        assert graphs.count == 1


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_as_an_argument_of_a_compiled_function(name: str) -> None:
    """One after the other, one that a pytree function made, and an unpickled one: of the same kind of hyperparameters."""
    make, graphs = TRANSFORMS[name], Graphs()
    state = make(0.1).init_state(PARAMS)
    step = graphs.compiled(lambda opt, g, s, p: opt.step(g, s, p))
    rate = torch.tensor(0.1)
    others = (make(rate), make(rate).replace(), pickle.loads(pickle.dumps(make(rate))))
    mapped = torch.utils._pytree.tree_map(lambda x: x, make(rate))
    expected = make(rate).step(PARAMS, state, PARAMS)
    for k, opt in enumerate((*others, mapped)):
        torch.testing.assert_close(step(opt, PARAMS, state, PARAMS), expected)
        assert graphs.count <= (1 if k < len(others) else 2)


def test_inside_a_higher_order_operator() -> None:
    """Nothing that was there before the trace is written to."""
    opt = ps.adafactor(0.1)
    state = opt.init_state(PARAMS)

    def loss(x: Tensor) -> Tensor:
        return opt.step({"w": x, "b": PARAMS["b"]}, state, PARAMS)[0]["w"].sum()

    x = torch.ones(3, 2, requires_grad=True)
    checkpointed = Graphs().compiled(lambda x: torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False))
    torch.testing.assert_close(checkpointed(x), loss(x))


def test_a_compiled_optimizer_breaks_its_graph_no_more_often() -> None:
    weights = [torch.nn.Parameter(p.clone()) for p in PARAMS.values()]
    optimizer = optim.AdamW(weights, lr=0.1)
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    Graphs()
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        step()
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) <= 1


def test_a_compiled_optimizer_that_has_made_no_step() -> None:
    """Of the steps after the first, which torch.compile gives up on in the middle, it compiles nothing anew either."""
    weights = [torch.nn.Parameter(p.clone()) for p in PARAMS.values()]
    optimizer, graphs = optim.Optimizer(weights, ps.adamw(0.1)), Graphs()
    for w in weights:
        w.grad = torch.ones_like(w)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(3):
        step()
    assert graphs.count <= 1


def test_torch_compile_does_not_trace_the_planning(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = ps.nadam(0.1)
    state = opt.init_state(PARAMS)

    def refused(*_: Any) -> Any:
        raise AssertionError

    for owner in (purestep._engine.plan, purestep.transform):
        monkeypatch.setattr(owner, "structure_of", refused)
    monkeypatch.setattr(purestep._executors.chains.ChainStructure, "__init__", refused)
    compiled = torch.compile(lambda s, p: opt.step(p, s, p), backend="eager", fullgraph=True)
    found = compiled(state, PARAMS)
    monkeypatch.undo()
    torch.testing.assert_close(found, opt.step(PARAMS, state, PARAMS))


@ps.leafwise(off="n")
def added(g: Tensor, p: Tensor, a: float = 0.1, n: Any = 1) -> Tensor:
    return g + a * n


def test_a_switch_that_switches_off() -> None:
    """By its type, too: 0 and False are equal to 0.0, and do not switch off."""
    p = torch.ones(1)
    for n, expected in ((0, 1.0), (0.0, 1.0), (False, 1.0), (2, 1.2), (0.0, 1.0)):
        t = added(n=n)
        assert t.update(p, t.init_state(p), p)[0].item() == pytest.approx(expected)
        assert t.plan.off == (type(n) is float,)


def test_switches_are_each_transforms_own() -> None:
    """Transforms that differ in switches share a structure, but no program."""
    grads = {name: torch.full_like(p, 2.0) for name, p in PARAMS.items()}
    found = []
    for nesterov in (False, True, False):
        opt = ps.sgd(0.1, momentum=0.5, nesterov=nesterov)
        found.append(opt.step(grads, opt.init_state(PARAMS), PARAMS)[0]["b"][0].item())
    assert found == pytest.approx([0.8, 0.7, 0.8])


def test_a_switch_that_cannot_be_hashed() -> None:
    @ps.leafwise()
    def weighted(g: Tensor, p: Tensor, by: list[float]) -> Tensor:
        return g * by[0]

    assert weighted([2.0]).plan.structure is weighted([3.0]).plan.structure
    for factor in (2.0, 3.0):
        t = weighted([factor])
        assert t.update(PARAMS, t.init_state(PARAMS), PARAMS, executor="leaf")[0]["b"].tolist() == [factor] * 3


def test_a_switch_and_a_state_that_lead_to_the_declaration_are_freed() -> None:
    def made() -> Any:
        holder: list[Any] = []

        class State(NamedTuple):
            m: Tensor

            @classmethod
            def init(cls, p: Tensor) -> Any:
                assert len(holder) == 1
                return cls(torch.zeros_like(p))

        class Switch:
            pass

        @ps.leafwise(State)
        def summed(g: Tensor, s: Any, p: Tensor, a: float = 0.1, by: Any = None) -> Any:
            return g * a, State(s.m + g)

        holder.append(summed)
        switch = Switch()
        switch.factory = summed  # type: ignore[attr-defined]  # the reference is the test
        return summed(by=switch), weakref.ref(summed.declaration), weakref.ref(switch)

    opt, *last = made()
    ps.chain(opt, ps.scale(1.0)).init_state(PARAMS)
    del opt
    gc.collect()
    assert [x() for x in last] == [None, None]


def test_a_structure_keeps_no_declaration() -> None:
    def declared() -> Any:
        @ps.whole()
        def halved(gs: list[Tensor], s: Any, ps: list[Tensor], factor: float = 0.5) -> Any:
            return [g * factor for g in gs], s

        return halved

    make = declared()
    opt = ps.chain(make(), ps.sgd(0.1))
    opt.step(PARAMS, opt.init_state(PARAMS), PARAMS)
    key, last = opt.links[0].transform.declaration.key, weakref.ref(opt.links[0].transform.declaration)
    assert any(key in keys for keys in purestep._engine.plan._structures.declarations.values())
    del make, opt
    gc.collect()
    assert last() is None
    assert not any(key in keys for keys in purestep._engine.plan._structures.declarations.values())


def test_a_cache_is_bounded_and_drops_the_oldest() -> None:
    class Declaration:
        def __init__(self, key: int) -> None:
            self.key, self.watched = key, False

    cache: DeclarationCache[str] = DeclarationCache(2)
    a, b = Declaration(-1), Declaration(-2)
    for name, owners in (("x", [a]), ("y", [a, b]), ("z", [b]), ("z", [b])):
        cache.keep(name, name, owners)
    assert list(cache.entries) == ["y", "z"] == list(cache.declarations)
    del a
    gc.collect()
    assert list(cache.entries) == ["z"] == list(cache.declarations)
