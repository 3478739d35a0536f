"""What the functions of a transform, and losses, close over: followed for derivatives as any other input is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import purestep as ps

# ----------------------------------------------------------------- in a step, where nothing that is given requires grad


class Kept(NamedTuple):
    """The state of a learned transform: what it returned last."""

    last: list[Tensor]

    @classmethod
    def init(cls, params: list[Tensor]) -> Kept:
        return cls([torch.zeros_like(p) for p in params])


class Around(NamedTuple):
    """The state of a learned transform around another."""

    last: list[Tensor]
    inner: Any

    @classmethod
    def init(cls, params: list[Tensor], inner: Any) -> Around:
        return cls([torch.zeros_like(p) for p in params], inner)


def learned(w: Tensor, **options: Any) -> ps.Transform:
    """A whole transform with a number of a network's."""

    @ps.whole(Kept, **options)
    def network(gs: list[Tensor], s: Kept, params: list[Tensor]) -> Any:
        made = [(x + w * g).to(g.dtype) for x, g in zip(s.last, gs)]
        if options.get("scales"):
            return w * 2, Kept([g.clone() for g in gs])
        if options.get("moves"):
            return [p - 0.1 * x for p, x in zip(params, made)], Kept(made)
        return made, Kept(made)

    return network()


def leafwise(w: Tensor) -> ps.Transform:
    """A leaf function that closes over `w`."""

    @ps.leafwise()
    def scaled(g: Tensor, p: Tensor) -> Tensor:
        return w * g

    return scaled()


def hidden(w: Tensor) -> ps.Transform:
    """A whole transform that lets the updates through, and keeps something that depends on `w` for the next time."""

    @ps.whole(Kept)
    def later(gs: list[Tensor], s: Kept, params: list[Tensor]) -> Any:
        return [g + x for g, x in zip(gs, s.last)], Kept([w * g for g in gs])

    return later()


def around(w: Tensor, inner: ps.Transform) -> ps.Transform:
    """A learned transform around another."""

    @ps.nested(Around)
    def outer(gs: list[Tensor], s: Around, params: list[Tensor], transform: ps.Inner) -> Any:
        us, inner = transform.update(gs, s.inner, params, donate=True)
        return [w * u for u in us], Around([u.clone() for u in us], inner)

    return outer(inner)


CAPTURED: dict[str, Callable[[Tensor], Any]] = {
    "sgd": lambda w: ps.sgd(lr=lambda t: w * 1.0),
    "momentum": lambda w: ps.sgd(lr=lambda t: w / (t + 1), momentum=0.9),
    "adamw": lambda w: ps.adamw(lr=lambda t: w * 0.5, betas=(lambda t: w * 0.9, 0.99), eps=1e-3),
    "schedule": lambda w: ps.adamw(lr=ps.schedules.join([ps.schedules.constant(0.1), lambda t: w * 0.3], [1]), eps=1e-3),
    "decay": lambda w: ps.chain(ps.scale_by_adam(eps=1e-3), ps.add_decayed_weights(lambda t: w * 0.1), ps.scale(-0.1)),
    "clip": lambda w: ps.chain(ps.clip_by_global_norm(lambda t: w * 0.1), ps.sgd(lr=0.1, momentum=0.9)),
    "clipped": lambda w: ps.chain(ps.clip_by_global_norm(0.1), ps.sgd(lr=lambda t: w * 0.1)),
    "whole": lambda w: ps.chain(ps.scale_by_adam(eps=1e-3), learned(w), ps.trace(0.9), ps.scale(-0.1)),
    "scales": lambda w: ps.chain(ps.trace(0.9), learned(w, scales=True), ps.scale_by_adam(eps=1e-3), ps.scale(-0.1)),
    "moves": lambda w: ps.chain(ps.trace(0.9), learned(w, moves=True)),
    "later": lambda w: ps.chain(ps.trace(0.9), hidden(w), ps.sgd(0.1, momentum=0.9)),
    "nested": lambda w: around(w, ps.adamw(0.1, eps=1e-3)),
    "inner": lambda w: around(w, ps.adamw(lambda t: w * 0.1, eps=1e-3)),
    "accumulate": lambda w: ps.accumulate(ps.adamw(lambda t: w * 0.1, eps=1e-3), 2),
    "skip": lambda w: ps.skip_if_nonfinite(ps.adamw(lambda t: w * 0.1, eps=1e-3)),
    "lookahead": lambda w: ps.lookahead(ps.adamw(lambda t: w * 0.1, eps=1e-3), k=2, alpha=0.5),
    "conditionally": lambda w: ps.chain(ps.conditionally(lambda t: t != 1, learned(w)), ps.sgd(0.1, momentum=0.9)),
    "masked": lambda w: ps.chain(
        ps.masked(ps.trace(lambda t: w * 0.1), ps.by_path({"b": True}, default=False)), ps.scale(-0.1)
    ),
    "partition": lambda w: ps.partition(
        {"x": ps.adamw(0.1, eps=1e-3), "y": ps.sgd(lambda t: w * 0.1, momentum=0.9)}, ps.by_path({"a": "x"}, default="y")
    ),
    "value": lambda w: ps.polyak_sgd(),
    "leaf": lambda w: ps.chain(ps.clip_by_global_norm(1.0), leafwise(w), ps.trace(0.9), ps.scale(-0.1)),
}

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "few": {"a": (3,), "b": (2, 2)},
    "many": {"a": (3,), "b": (2, 2), **{f"c{k}": (k % 5,) for k in range(20)}},
    "large": {"a": (70000,), "b": (3,)},
}


def trained(
    name: str, shapes: str, w: Tensor, *, donate: bool = False, executor: Any = None, update: bool = False, **options: Any
):
    """A number that three steps lead to, with what was given before and after."""
    opt = CAPTURED[name](w)
    generator = torch.Generator().manual_seed(0)
    dtype = options.get("dtype", torch.float64)
    params: Any = {k: torch.randn(s, dtype=dtype, generator=generator) for k, s in SHAPES[shapes].items()}
    if options.get("followed"):
        params = {k: p.requires_grad_() for k, p in params.items()}
    state = opt.init_state(params)
    for _ in range(3):
        grads = {k: torch.randn(p.shape, dtype=dtype, generator=generator) for k, p in params.items()}
        extras = {"value": 3 * w} if name == "value" else {}
        if update:
            updates, state = opt.update(grads, state, params, donate=donate, executor=executor, **extras)
            params = ps.apply_updates(params, updates)
        else:
            params, state = opt.step(grads, state, params, donate=donate, executor=executor, **extras)
    return torch.stack([(p.real.sin() * 0.1).sum() for p in params.values()]).sum()


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", CAPTURED)
@pytest.mark.in_turn("shapes")
def test_what_functions_close_over_has_derivatives(name: str, shapes: str) -> None:
    """As where everything requires grad, and under torch.func; whoever runs it, and whatever was given away."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    value = trained(name, shapes, w, followed=True)
    (wanted,) = torch.autograd.grad(value, w)
    assert wanted != 0
    torch.testing.assert_close(torch.func.grad(lambda w: trained(name, shapes, w))(w.detach()), wanted)
    near = [trained(name, shapes, w.detach() + d) for d in (1e-6, -1e-6)]
    torch.testing.assert_close((near[0] - near[1]) / 2e-6, wanted, rtol=1e-4, atol=1e-6)
    for executor in (None, "foreach", "leaf", "compiled"):
        for donate in (False, True):
            for update in (False, True):
                found = trained(name, shapes, w, donate=donate, executor=executor, update=update)
                torch.testing.assert_close(found.detach(), value.detach())
                torch.testing.assert_close(torch.autograd.grad(found, w)[0], wanted, msg=f"{executor} {donate} {update}")
                with torch.no_grad():
                    torch.testing.assert_close(
                        trained(name, shapes, w, donate=donate, executor=executor, update=update), value.detach()
                    )


@pytest.mark.parametrize("name", CAPTURED)
def test_second_derivatives_of_what_functions_close_over(name: str) -> None:
    """Reverse over reverse, and the forward derivative, against those of torch.func."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(trained(name, "few", w), w, create_graph=True)
    wanted = torch.func.grad(torch.func.grad(lambda w: trained(name, "few", w)))(w.detach())
    second = torch.autograd.grad(first, w)[0] if first.requires_grad else torch.zeros_like(wanted)
    torch.testing.assert_close(second, wanted)
    _, forward = torch.func.jvp(lambda w: trained(name, "few", w), (w.detach(),), (torch.ones_like(wanted),))
    torch.testing.assert_close(forward, first.detach())


def test_schedules_are_called_once_for_each_step() -> None:
    """Also where it is asked what they bring in."""
    calls = []

    def rate(t: Any) -> float:
        calls.append(t)
        return 0.1

    opt = ps.chain(ps.trace(0.9), ps.scale_by_learning_rate(rate))
    params = {"a": torch.ones(3), "b": torch.ones(2)}
    state = opt.init_state(params)
    for _ in range(3):
        params, state = opt.step(params, state, params)
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("apply", [False, True])
def test_sparse_rows_with_a_learned_rate(apply: bool, donate: bool) -> None:
    """Rows of a sparse gradient are followed as dense ones are."""

    def value(w: Tensor, sparse: bool, p: Tensor, g: Tensor) -> Tensor:
        opt = ps.sgd(lr=lambda t: w * (t + 1))
        state = opt.init_state(p)
        for _ in range(2):
            given = g.to_sparse(1) if sparse else g
            if apply:
                p, state = opt.step(given, state, p, donate=donate)
            else:
                u, state = opt.update(given, state, p, donate=donate)
                p = p + (u.to_dense() if sparse else u)
        return (p**3).sum()

    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    p = torch.arange(6.0, dtype=torch.float64).reshape(3, 2)
    found = torch.autograd.grad(value(w, True, p.clone(), g), w)[0]
    torch.testing.assert_close(found, torch.autograd.grad(value(w, False, p.clone(), g), w)[0])


def test_derivatives_by_parameters_pass_through_sparse_rows() -> None:
    """Rows that a sparse gradient has depend on what they were, as the others do."""
    p = torch.arange(6.0, dtype=torch.float64).reshape(3, 2).requires_grad_()
    g = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    opt = ps.sgd(lr=0.1)
    new, _ = opt.step(g.to_sparse(1), opt.init_state(p), p)
    torch.testing.assert_close(torch.autograd.grad(new.sum(), p)[0], torch.ones_like(p))


def test_a_learned_rate_under_the_wrapper() -> None:
    """`differentiable=True` follows it, and without it nothing is recorded."""
    for differentiable in (True, False):
        w = torch.tensor(0.7, requires_grad=True)
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = ps.optim.Optimizer(
            [p.clone() if differentiable else p], ps.sgd(lr=lambda t, w=w: w * 1.0), differentiable=differentiable
        )
        (q,) = optimizer.param_groups[0]["params"]
        q.grad = torch.full((3,), 2.0)
        optimizer.step()
        torch.testing.assert_close(q.detach(), torch.full((3,), 1 - 1.4))
        if differentiable:
            torch.testing.assert_close(torch.autograd.grad(q.sum(), w)[0], torch.tensor(-6.0))


def test_a_learned_rate_under_vmap_and_backward() -> None:
    """A batch of steps inside of torch.func.vmap, and a graph outside of it."""
    w = torch.tensor(0.7, requires_grad=True)
    opt = ps.sgd(lr=lambda t: w * 1.0, momentum=0.9)

    def trained(p: Tensor, g: Tensor) -> Tensor:
        state = opt.init_state(p)
        for _ in range(2):
            p, state = opt.step(g, state, p)
        return p

    p, g = torch.ones(4, 3), torch.arange(12.0).reshape(4, 3)
    together = torch.func.vmap(trained)(p, g)
    alone = torch.stack([trained(*x) for x in zip(p, g)])
    torch.testing.assert_close(together, alone)
    found, wanted = [torch.autograd.grad((x**2).sum(), w)[0] for x in (together, alone)]
    torch.testing.assert_close(found, wanted)
    assert wanted != 0


@pytest.mark.parametrize("name", ["momentum", "adamw", "clip", "whole", "scales", "nested", "moves"])
def test_what_functions_close_over_in_a_compiled_step(name: str) -> None:
    """The same under torch.compile, which sees what is closed over as an input."""
    w = torch.tensor(0.7, requires_grad=True)
    opt = CAPTURED[name](w)
    params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.5]])}
    grads = {"a": torch.tensor([0.3, -0.2]), "b": torch.tensor([[0.4]])}
    state = opt.init_state(params)

    def two(grads: Any, state: Any, params: Any) -> Tensor:
        params, state = opt.step(grads, state, params)
        params, _ = opt.step(grads, state, params)
        return (params["a"] ** 2).sum() + params["b"].sum()

    eager, compiled = [f(grads, state, params) for f in (two, torch.compile(two, backend="aot_eager", fullgraph=True))]
    torch.testing.assert_close(compiled, eager)
    wanted, found = [torch.autograd.grad(x, w)[0] for x in (eager, compiled)]
    torch.testing.assert_close(found, wanted)
    assert wanted != 0


# ------------------------------------------------------------------------------------- in a loss, handed to torch.func


def after(x: Tensor, y: Tensor) -> Tensor:
    return (x**2 * y**3).sum()


LINEAR = torch.nn.Linear(2, 1, device="meta")

BODIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "directly": after,
    "grad": lambda p, t: torch.func.grad(after)(p, t).pow(2).sum(),
    "grad by it": lambda p, t: torch.func.grad(after, 1)(p, t).pow(2).sum(),
    "vmap": lambda p, t: torch.func.vmap(lambda x, y: (x * y * y).sin())(p, t).sum(),
    "vmap of grad": lambda p, t: torch.func.vmap(torch.func.grad(after, 1))(p, t).pow(2).sum(),
    "grad of vmap": lambda p, t: (torch.func.grad(lambda t: torch.func.vmap(after)(p, t).sum())(t) * p).sum(),
    "grad of grad": lambda p, t: torch.func.grad(lambda y: torch.func.grad(after)(p, y).sum())(t).pow(2).sum(),
    "vjp": lambda p, t: torch.func.vjp(lambda x, y: x * y * y, p, t)[1](p)[1].pow(2).sum(),
    "cotangent": lambda p, t: torch.func.vjp(lambda x: x**3, p)[1](t)[0].sum(),
    "jacrev": lambda p, t: torch.func.jacrev(lambda x, y: x**2 * y**3, 1)(p, t).pow(2).sum(),
    "jacfwd": lambda p, t: torch.func.jacfwd(lambda x, y: x**2 * y**3, 1)(p, t).pow(2).sum(),
    "jvp": lambda p, t: torch.func.jvp(lambda x, y: x**2 * y**3, (p, t), (t, p))[1].pow(2).sum(),
    "hessian": lambda p, t: torch.func.hessian(lambda y: after(p, y))(t).pow(2).sum(),
    "functional_call": lambda p, t: torch.func.grad(
        lambda q: torch.func.functional_call(LINEAR, q, (p[None],)).pow(2).sum()
    )({"weight": t[None], "bias": t[:1]})["weight"].pow(2).sum(),
}  # fmt: skip


SOUGHT = {"grad by it", "vmap of grad", "grad of vmap", "grad of grad", "vjp", "jacrev"}
"""Those that take a derivative in reverse by what is closed over: of these, reverse over reverse does not know the tensor again."""


def run_with(body: str, every: int | None, t: Tensor) -> Tensor:
    """A number that training leads to, on a loss that closes over `t`."""
    start = torch.tensor([0.5, 0.7], dtype=torch.float64)
    found = ps.meta.unroll(
        ps.sgd(0.05, momentum=0.5), lambda p: BODIES[body](p, t) + (p**2).sum(), start, 4, checkpoint_every=every
    )
    return found.params.sin().sum() + found.losses[-1]


def derivatives(value: Callable[[Tensor], Tensor], sought: bool = False) -> dict[str, Any]:
    """First and second derivatives of a function of two numbers, in every way there is; if `sought`, one of them is refused."""
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    leaf = t.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    other = t.clone().requires_grad_()
    return {
        "backward": first.detach(),
        "twice": torch.autograd.grad(first.sum(), leaf)[0],
        "computed": torch.autograd.grad(value(other * 1.5), other)[0],
        "grad": torch.func.grad(value)(t),
        "jvp": torch.func.jvp(value, (t,), (torch.flip(t, (0,)),))[1],
        "vmap": torch.func.vmap(torch.func.grad(value))(torch.stack([t, 0.5 * t])),
        "forward over reverse": torch.func.jacfwd(torch.func.jacrev(value))(t),
        "reverse over reverse": refused(value, t) if sought else torch.func.jacrev(torch.func.jacrev(value))(t),
    }


def refused(value: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """What is refused, as it is once the remedy has been taken."""
    with pytest.raises(
        RuntimeError, match=r"torch.func takes derivatives by a tensor .* closes over.*Hand x \* 1 to torch.func"
    ):
        torch.func.jacrev(torch.func.jacrev(value))(t)
    held = {name: BODIES[name] for name in SOUGHT}
    try:
        BODIES.update({name: lambda p, t, body=body: body(p, t * 1) for name, body in held.items()})
        return torch.func.jacrev(torch.func.jacrev(value))(t)
    finally:
        BODIES.update(held)


@pytest.mark.parametrize("body", BODIES)
def test_what_a_loss_hands_to_torch_func(body: str) -> None:
    """With checkpoints as without."""
    wanted = derivatives(lambda t: run_with(body, None, t))
    assert all([x.abs().sum() > 0 for x in wanted.values()])
    torch.testing.assert_close(derivatives(lambda t: run_with(body, 2, t), body in SOUGHT), wanted)


@pytest.mark.parametrize("name", ["grad", "grad by it", "vmap", "jacrev", "jvp"])
@pytest.mark.parametrize("kind", ["implicit", "custom_root", "custom_fixed_point"])
def test_what_an_optimality_hands_to_torch_func(kind: str, name: str) -> None:
    """As where it is an argument: x = a(t) / 4, or what is written as a root or a fixed point of that."""

    def target(t: Tensor) -> Tensor:
        return BODIES[name](torch.tensor([0.5, 0.7], dtype=torch.float64), t) * torch.tensor([0.1, 0.2], dtype=torch.float64)

    def value(t: Tensor, closed: bool) -> Tensor:
        def at(x: Any, *given: Tensor) -> Tensor:
            return target(given[0] if given else t)

        def solver(x: Tensor, *given: Tensor) -> Tensor:
            return at(x, *given) / 4

        stationarity = torch.func.grad(lambda x, *given: ((2 * x - at(x, *given) / 2) ** 2).sum())
        solve = {
            "implicit": lambda: ps.meta.implicit(solver, stationarity),
            "custom_root": lambda: ps.meta.custom_root(lambda x, *given: 4 * x - at(x, *given))(solver),
            "custom_fixed_point": lambda: ps.meta.custom_fixed_point(lambda x, *given: (at(x, *given) / 4 + x) / 2)(solver),
        }[kind]()
        return solve(torch.zeros(2, dtype=torch.float64), *(() if closed else (t,))).sin().sum()

    wanted = derivatives(lambda t: target(t).div(4).sin().sum())
    torch.testing.assert_close(derivatives(lambda t: value(t, False)), wanted)
    torch.testing.assert_close(derivatives(lambda t: value(t, True), name in SOUGHT), wanted)


def test_parameters_of_a_module_in_functional_call() -> None:
    """A module that a loss closes over, called with its own parameters as arguments of a transform."""
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1, dtype=torch.float64)

    def loss(p: Tensor) -> Tensor:
        return (
            torch.func.functional_call(net, dict(net.named_parameters()), (p,)).sum()
            + torch.func.grad(lambda q: torch.func.functional_call(net, q, (p,)).pow(2).sum())(dict(net.named_parameters()))[
                "weight"
            ]
            .pow(2)
            .sum()
        )

    def slopes(every: int | None) -> Any:
        p = torch.tensor([0.5, 0.7], dtype=torch.float64)
        found = ps.meta.unroll(ps.sgd(0.01), loss, p, 4, checkpoint_every=every)
        return torch.autograd.grad(found.params.sum(), list(net.parameters()))

    wanted = slopes(None)
    assert all([x.abs().sum() > 0 for x in wanted])
    torch.testing.assert_close(slopes(2), wanted)


def test_infinite_numbers_that_are_closed_over() -> None:
    """What is exchanged keeps every bit, also where the difference of the two is no number."""

    def value(t: Tensor, every: int | None) -> Tensor:
        def loss(p: Tensor) -> Tensor:
            return torch.func.grad(lambda x, y: (x * y.clamp(-2, 2) ** 2).sum(), 1)(p, t).sum() * p.sum()

        return ps.meta.unroll(ps.sgd(0.01), loss, torch.ones(3, dtype=torch.float64), 2, checkpoint_every=every).params.sum()

    t = torch.tensor([float("inf"), 1.0, -0.0], dtype=torch.float64)
    wanted, found = [torch.func.grad_and_value(value)(t, every) for every in (None, 1)]
    assert wanted[1].isfinite()
    torch.testing.assert_close(found, wanted)


def test_what_nobody_can_see_is_refused() -> None:
    """Never a derivative of 0: a tensor that no operation was seen to meet is named."""
    t = torch.tensor([1.0, 2.0], requires_grad=True)

    def unseen(p: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            u = t * 2
        return (p * u).sum()

    with pytest.raises(RuntimeError, match=r"The loss.* closes over a tensor of shape \(2,\).*Hand it over as an argument"):
        ps.meta.unroll(ps.sgd(0.1), unseen, torch.ones(2), 2, checkpoint_every=1)
    with pytest.raises(RuntimeError, match=r"The optimality function closes over a tensor of shape \(2,\)"):
        ps.meta.custom_root(lambda x: x - torch.func.grad(unseen)(x))(lambda x: x)(torch.ones(2))
