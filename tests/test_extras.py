"""Extra arguments: they reach whoever asks for them, through whatever it is composed with; errors say who asks, and for what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import purestep as ps
from purestep import optim
from tests.problems import Params, difference


@ps.whole()
def polyak(gs: list[Tensor], s: Any, params: list[Tensor], lower_bound: ps.Hyper = 0.0, *, value: ps.Extra) -> Any:
    """Steps as long as the loss is high."""
    return ps.multiply(gs, -(value - lower_bound) / ps.global_norm(gs) ** 2), s


@ps.whole()
def halve(gs: list[Tensor], s: Any, params: list[Tensor], *, value_and_grad: ps.Extra) -> Any:
    """Half a gradient step, from half of the way."""
    _, grads = value_and_grad([p - g / 2 for p, g in zip(params, gs)])
    return [-g / 2 for g in grads], s


@ps.whole()
def second_order(gs: list[Tensor], s: Any, params: list[Tensor], *, hessian: ps.Extra) -> Any:
    """What no closure gives."""
    return [-g / hessian for g in gs], s


@ps.whole()
def newton(gs: list[Tensor], s: Any, params: list[Tensor], *, hessian: ps.ExtraTree) -> Any:
    """What no closure gives, for each parameter."""
    return [-g / h for g, h in zip(gs, hessian, strict=True)], s


def is_a(path: str, p: Tensor) -> bool:
    return path == "a"


AROUND: dict[str, Callable[[ps.Transform], ps.Transform]] = {
    "alone": lambda t: t,
    "chain": lambda t: ps.chain(ps.clip(10.0), t, ps.scale(1.0)),
    "masked": lambda t: ps.masked(ps.chain(t, ps.scale(1.0)), is_a),
    "chain in mask in chain": lambda t: ps.chain(ps.masked(ps.chain(ps.masked(t, is_a), ps.scale(1.0)), is_a), ps.scale(1.0)),
    "partition": lambda t: ps.partition({"a": t, "b": ps.scale(0.0)}, lambda path, p: path),
    "skip_if_nonfinite": lambda t: ps.skip_if_nonfinite(t),
    "accumulate": lambda t: ps.accumulate(ps.masked(t, is_a), 1),
}
"""Ways to compose a transform, after which it still is given what it asks for. All but the first two act on `a` alone."""


def points() -> Params:
    return {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])}


def loss(p: Params) -> Tensor:
    return p["a"].square().sum() + p["b"].square().sum()


def gradients(p: Params) -> Params:
    return {k: 2 * x for k, x in p.items()}


def value_and_grad(p: Params) -> tuple[Tensor, Params]:
    return loss(p), gradients(p)


def stateful(transform: ps.Transform) -> tuple[Params, torch.optim.Optimizer, Callable[[], Tensor]]:
    """Parameters, their optimizer, and a closure."""
    params = {k: p.requires_grad_() for k, p in points().items()}
    optimizer = optim.Optimizer(params.items(), transform)

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = loss(params)
        found.backward()
        return found

    return params, optimizer, closure


# ------------------------------------------------------------------------------------------------------ they reach who asks


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_a_value_reaches_who_asks_for_it(around: Any) -> None:
    """Of a gradient of some parameters, Polyak's step is the loss over its squared norm."""
    params, t = points(), around(polyak())
    g = gradients(params)
    new, _ = t.step(g, t.init_state(params), params, value=loss(params))
    everything = around in (AROUND["alone"], AROUND["chain"], AROUND["skip_if_nonfinite"])
    length = loss(params) / sum(x.square().sum() for k, x in g.items() if everything or k == "a")
    assert difference(new["a"], params["a"] - length * g["a"]) <= 1e-6
    also, optimizer, closure = stateful(t)
    optimizer.step(closure)
    assert difference({k: p.detach() for k, p in also.items()}, new) <= 1e-6


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_a_function_reaches_who_asks_for_it(around: Any) -> None:
    """It gets a function of the parameters it acts on; the others are held fixed."""
    params, t = points(), around(halve())
    new, _ = t.step(gradients(params), t.init_state(params), params, value_and_grad=value_and_grad)
    assert new["a"].tolist() == [1.0, -2.0]  # half of the way is the minimum
    also, optimizer, closure = stateful(t)
    optimizer.step(closure)
    assert difference({k: p.detach() for k, p in also.items()}, new) <= 1e-6


@pytest.mark.parametrize("kind", ["number", "tensor", "tensor of shape (1,)"])
def test_what_a_closure_may_return(kind: str) -> None:
    params, optimizer, closure = stateful(polyak())
    convert = {"number": Tensor.item, "tensor": lambda x: x, "tensor of shape (1,)": lambda x: x.reshape(1)}[kind]
    optimizer.step(lambda: convert(closure()))  # type: ignore[arg-type, return-value]
    assert difference(params["a"].detach(), torch.tensor([0.5, -1.0])) <= 1e-6


@pytest.mark.parametrize("around", ["alone", "masked"])
def test_compiled_and_batched(around: str) -> None:
    t, params = ps.chain(AROUND[around](polyak()), AROUND[around](halve())), points()
    state = t.init_state(params)

    def step(p: Params) -> Params:
        return t.step(gradients(p), state, p, value=loss(p), value_and_grad=value_and_grad)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert difference(compiled(params), step(params)) <= 1e-6
    batch = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    members = [step(params), step({k: 2 * p for k, p in params.items()})]
    expected = {k: torch.stack([m[k] for m in members]) for k in params}
    assert difference(torch.func.vmap(step)(batch), expected) <= 1e-6


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("missing", [False, True])
def test_a_tree_reaches_who_asks_for_it(around: Any, missing: bool) -> None:
    """It gets the leaves of the parameters it acts on; no one looks at the others."""
    params, t = points(), around(newton())
    some = missing or around not in (AROUND["alone"], AROUND["chain"], AROUND["skip_if_nonfinite"])
    g = {**gradients(params), "b": None} if missing else gradients(params)
    hessian = {"b": None if some else torch.tensor([4.0]), "a": torch.tensor([2.0, 4.0])}  # in another order
    new, _ = t.step(g, t.init_state(params), params, hessian=hessian)
    assert new["a"].tolist() == [0.0, -1.0]
    if missing or not some:  # elsewhere a mask lets the gradient through as it is
        assert new["b"].tolist() == ([0.5] if missing else [0.25])


def test_a_tree_may_have_any_structure_and_derivatives() -> None:
    t = ps.chain(newton(), ps.scale(1.0))
    for make in (lambda x: x, lambda x: [x, None], lambda x: {"a": (x, [x])}):
        p, g, h = make(torch.tensor([3.0])), make(torch.tensor([2.0])), make(torch.tensor([4.0], requires_grad=True))
        new, _ = t.step(g, t.init_state(p), p, hessian=h)
        first = torch.utils._pytree.tree_leaves(new)[0]
        assert first.tolist() == [2.5]
        first.sum().backward()
        assert torch.utils._pytree.tree_leaves(h)[0].grad.item() == 0.125


def test_a_tree_compiled_and_batched() -> None:
    t, params = AROUND["masked"](newton()), points()
    state = t.init_state(params)

    def step(p: Params) -> Params:
        return t.step(gradients(p), state, p, hessian={k: x.square() for k, x in p.items()})[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert difference(compiled(params), step(params)) <= 1e-6
    batch = {k: torch.stack([p, 2 * p]) for k, p in params.items()}
    members = [step(params), step({k: 2 * p for k, p in params.items()})]
    expected = {k: torch.stack([m[k] for m in members]) for k in params}
    assert difference(torch.func.vmap(step)(batch), expected) <= 1e-6


# ----------------------------------------------------------------------------------------------------------------- errors


def test_a_tree_that_is_none() -> None:
    """The error names the first path."""
    params, t = points(), ps.chain(ps.clip(10.0), newton())
    cases: dict[str, Any] = {
        r"^hessian must have the structure of params, but there is no leaf at 'b'\.$": {"a": torch.ones(2)},
        r"^hessian must have the structure of params, but": 1.0,
        r"^newton needs hessian for every gradient, but at 'b' it is None\.$": {"a": torch.ones(2), "b": None},
        r"^hessian at 'a' has shape \(3,\), but the parameter has shape \(2,\)\.$": {"a": torch.ones(3), "b": torch.ones(1)},
        r"^hessian at 'b' has dtype torch\.float64, but": {"a": torch.ones(2), "b": torch.ones(1, dtype=torch.float64)},
    }
    for match, hessian in cases.items():
        with pytest.raises((TypeError, ValueError), match=match):
            t.step(gradients(params), t.init_state(params), params, hessian=hessian)


def test_a_tree_and_anything_do_not_go_together() -> None:
    params, t = points(), ps.chain(newton(), second_order())
    with pytest.raises(
        TypeError,
        match=r"^hessian must be one thing for all transforms, but for second_order it is any argument .* for newton a tree",
    ):
        t.step(gradients(params), t.init_state(params), params, hessian=params)
    with pytest.raises(TypeError, match="f cannot have sparse='rows', because its argument h holds whole tensors"):

        @ps.whole(sparse="rows")
        def f(gs: Any, s: Any, params: Any, *, h: ps.ExtraTree) -> Any: ...


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("make", [polyak, halve])
def test_missing(around: Any, make: Any) -> None:
    """The error says who asks, how to give it, and how the stateful optimizer does."""
    params, t = points(), around(make())
    (name,) = t.plan.extras
    state = t.init_state(params)
    for method in (t.step, t.update):
        with pytest.raises(
            TypeError,
            match=rf"^{make.__name__} needs {name}: give it to each update, step\(grads, state, params, {name}=\.\.\.\)\. "
            r"An optimizer of purestep\.optim takes it from the closure, step\(closure\)\.$",
        ):
            method(gradients(params), state, params)
    with pytest.raises(TypeError, match=rf"^{make.__name__} needs {name}: .*, and not 'values'\. An optimizer"):
        t.step(gradients(params), state, params, values=1.0)
    _, optimizer, closure = stateful(t)
    closure()
    with pytest.raises(
        TypeError, match=rf"^{make.__name__} needs {name}, so step needs a closure: step\(closure\), which clears"
    ):
        optimizer.step()


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_unknown(around: Any) -> None:
    params, t = points(), around(polyak())
    one = torch.tensor(1.0)
    with pytest.raises(TypeError, match=r"^This transform has no use for 'loss', 'val': polyak asks for 'value'\.$"):
        t.step(gradients(params), t.init_state(params), params, value=one, val=one, loss=one)
    t = ps.adam()
    with pytest.raises(TypeError, match=r"^This transform has no use for 'value': no part of it asks for an extra argument\.$"):
        t.step(gradients(params), t.init_state(params), params, value=one)


def test_everyone_who_asks_is_named() -> None:
    params, t = points(), ps.chain(polyak(), ps.masked(halve(), is_a), second_order())
    given = {"value": torch.tensor(1.0), "value_and_grad": value_and_grad, "hessian": 1.0}
    with pytest.raises(
        TypeError,
        match="no use for 'x': polyak asks for 'value', halve asks for 'value_and_grad', second_order asks for 'hessian'",
    ):
        t.step(gradients(params), t.init_state(params), params, **given, x=1)
    for name, who in (("value", "polyak"), ("value_and_grad", "halve"), ("hessian", "second_order")):
        with pytest.raises(TypeError, match=f"^{who} needs {name}: "):
            t.step(gradients(params), t.init_state(params), params, **{k: x for k, x in given.items() if k != name})


@pytest.mark.parametrize("make", [second_order, newton])
def test_what_no_closure_gives(make: Any) -> None:
    params, t = points(), make()
    with pytest.raises(TypeError, match=rf"{make.__name__} needs hessian.*An optimizer of purestep\.optim cannot give it\.$"):
        t.step(gradients(params), t.init_state(params), params)
    _, optimizer, closure = stateful(t)
    for step in (optimizer.step, lambda: optimizer.step(closure)):
        with pytest.raises(
            TypeError,
            match=rf"{make.__name__} needs hessian, which an optimizer cannot give it: a closure gives value and value_and_grad\. "
            r"Call the transform itself: transform\.step\(grads, state, params, hessian=\.\.\.\)\.",
        ):
            step()


@pytest.mark.parametrize("wrong", [None, "3", (1.0, 2.0), torch.ones(2), torch.ones(1)], ids=str)
def test_a_value_that_is_none(wrong: Any) -> None:
    params, t = points(), ps.chain(ps.clip(1.0), polyak())
    with pytest.raises(TypeError, match=r"^value, the loss for polyak, must be a number or a 0-d tensor, but is"):
        t.step(gradients(params), t.init_state(params), params, value=wrong)


@pytest.mark.parametrize("make", [polyak, halve, ps.lbfgs])
@pytest.mark.parametrize("wrong", [None, (1.0, 2.0), torch.ones(2)], ids=str)
def test_a_closure_that_returns_no_loss(make: Any, wrong: Any) -> None:
    """Nothing has changed then."""
    params, optimizer, closure = stateful(ps.chain(make(), ps.scale(1.0)))
    name = make().declaration.name
    with pytest.raises(
        TypeError, match=f"^What the closure returns, the loss for {name}, must be a number or a 0-d tensor, but is"
    ):
        optimizer.step(lambda: (closure(), wrong)[1])
    assert difference({k: p.detach() for k, p in params.items()}, points()) == 0


@pytest.mark.parametrize("around", ["alone", "chain", "masked"])
def test_a_function_that_is_none(around: str) -> None:
    params, t = points(), AROUND[around](halve())
    cases: dict[str, Any] = {
        r"^value_and_grad, which halve needs, must be a function from parameters to \(value, gradients\), but got 3": 3,
        r"must return \(value, gradients\).*grad_and_value returns them the other way around": lambda p: value_and_grad(p)[
            ::-1
        ],
        r"must return \(value, gradients\), the value a 0-d tensor": gradients,
        r"the gradients of value_and_grad must have the structure of params, but there is no leaf at 'b'": lambda p: (
            loss(p),
            {"a": p["a"]},
        ),
        r"The gradient of 'a' has shape \(3,\), but the parameter has shape \(2,\)": lambda p: (
            loss(p),
            {**p, "a": torch.ones(3)},
        ),
        r"value_and_grad gives no gradient at 'a', where grads have one": lambda p: (loss(p), {**p, "a": None}),
    }
    for match, function in cases.items():
        with pytest.raises((TypeError, ValueError), match=match):
            t.step(gradients(params), t.init_state(params), params, value_and_grad=function)
