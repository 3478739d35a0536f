"""One level of vmap, stepped out of: the same numbers as one member after the other, whichever way it is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import purestep as ps
import purestep._executors.tiles
import purestep._executors.vmapped
from tests.problems import difference

MEMBERS = 5
RATES = torch.linspace(0.01, 0.3, MEMBERS, dtype=torch.float64)

OPTIMIZERS = {
    "sgd": ps.sgd(RATES, momentum=0.9, weight_decay=0.1),
    "nesterov": ps.sgd(RATES, momentum=0.9, dampening=0.0, nesterov=True),
    "adamw": ps.adamw(RATES, betas=(0.9, torch.linspace(0.9, 0.999, MEMBERS, dtype=torch.float64))),
    "amsgrad": ps.adam(RATES, amsgrad=True, maximize=True),
    "nadam": ps.nadam(RATES, betas=(torch.linspace(0.5, 0.9, MEMBERS, dtype=torch.float64), 0.99)),
    "radam": ps.radam(RATES),
    "adagrad": ps.adagrad(RATES, lr_decay=0.1),
    "adadelta": ps.adadelta(RATES),
    "rmsprop": ps.rmsprop(RATES, momentum=0.9, centered=True),
    "adamax": ps.adamax(RATES),
    "asgd": ps.asgd(RATES),
    "lion": ps.lion(RATES),
    "schedule": ps.chain(ps.trace(0.9), ps.scale_by_learning_rate(ps.schedules.cosine(RATES, total_steps=10))),
    "shared": ps.adamw(0.1),
}
WAYS = {
    "at once": {},
    "one by one": {"LARGE": 1, "SHORT": 0},
    "in groups": {"FEW": 0, "SHORT": 0, "TILE": 40},
}


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Stacked parameters; a number, a vector and a matrix."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"number": (), "vector": (3,), "matrix": (4, 3)}
    return {
        name: torch.randn(MEMBERS, *shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def advance(opt: Any, state: Any, params: Any, grads: Any) -> Any:
    """One step of one member."""
    return opt.step(grads, state, params)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was done on stacked tensors."""
    results: list[bool] = []
    original = purestep._executors.vmapped.run_stacked

    def run(*args: Any) -> Any:
        result = original(*args)
        results.append(result is not None)
        return result

    monkeypatch.setattr(purestep._executors.vmapped, "run_stacked", run)
    return results


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("apply", [True, False], ids=["step", "update"])
def test_members_are_as_if_alone(name: str, way: str, apply: bool, found: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (purestep._executors.vmapped, purestep._executors.tiles):
        for constant, value in WAYS[way].items():
            if hasattr(module, constant):
                monkeypatch.setattr(module, constant, value)
    opt = OPTIMIZERS[name]
    dims = ps.in_dims(opt)
    function = advance if apply else lambda opt, state, params, grads: opt.update(grads, state, params)
    mapped = vmap(function, in_dims=(dims, 0, 0, 0))
    params, state = drawn(0), vmap(lambda o, p: o.init_state(p), in_dims=(dims, 0))(opt, drawn(0))
    alone = [member(opt, k) for k in range(MEMBERS)]
    singles = [member(params, k) for k in range(MEMBERS)]
    states = [o.init_state(p) for o, p in zip(alone, singles)]
    for k in range(3):
        grads = drawn(k + 1)
        out, state = mapped(opt, state, params, grads)
        outs = []
        for i, o in enumerate(alone):
            x, states[i] = function(o, states[i], singles[i], member(grads, i))
            outs.append(x)
            singles[i] = x if apply else singles[i]
        params = out if apply else params
        assert difference(out, ps.stack(outs)) <= 1e-12
        assert difference(state, ps.stack(states)) <= 1e-12
    assert found
    assert all(found)


def member(x: Any, k: int) -> Any:
    """The part of a pytree that is one member's."""
    return torch.utils._pytree.tree_map(lambda y: y[k] if isinstance(y, Tensor) and y.dim() else y, x)


def test_what_does_not_depend_on_the_member_stays_so(found: list[bool]) -> None:
    """With one gradient for all, the moments are one for all: they leave vmap by None."""
    opt = ps.adamw(RATES)
    params, grads = torch.randn(3), torch.randn(3)
    state = opt.replace(lr=0.1).init_state(params)
    mapped = vmap(lambda o: o.step(grads, state, params), in_dims=(ps.in_dims(opt),), out_dims=(0, None))
    out, after = mapped(opt)
    assert out.shape == (MEMBERS, 3)
    assert after[0].exp_avg.shape == (3,)
    assert not any(found)


def test_counters_that_differ_from_member_to_member(found: list[bool]) -> None:
    opt = ps.adamw(0.1)
    params = drawn(0)
    steps = torch.arange(MEMBERS, dtype=torch.float32)
    states = [tuple([s._replace(step=dict.fromkeys(params, t)) if "step" in s._fields else s for s in opt.init_state(member(params, i))])
              for i, t in enumerate(steps)]  # fmt: skip
    out, after = vmap(opt.step)(drawn(1), ps.stack(states), params)
    alone = [opt.step(member(drawn(1), i), s, member(params, i)) for i, s in enumerate(states)]
    assert difference(out, ps.stack([p for p, _ in alone])) <= 1e-12
    assert difference(after, ps.stack([s for _, s in alone])) <= 1e-12
    assert found == [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_numbers_promote_nothing(dtype: torch.dtype, found: list[bool]) -> None:
    """A column of float64 numbers is no tensor of float64."""
    opt = ps.adamw(RATES)
    params = drawn(0, dtype)
    dims = ps.in_dims(opt)
    state = vmap(lambda o, p: o.init_state(p), in_dims=(dims, 0))(opt, params)
    out, after = vmap(advance, in_dims=(dims, 0, 0, 0))(opt, state, params, drawn(1, dtype))
    assert found == [True]
    assert all(x.dtype == dtype for x in (*out.values(), *after[0].exp_avg_sq.values()))
    alone = [
        advance(member(opt, k), member(state, k), member(params, k), member(drawn(1, dtype), k))[0] for k in range(MEMBERS)
    ]
    assert difference(out, ps.stack(alone)) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("around", ["vmap", "grad", "autograd", "jvp"])
def test_anything_else_that_looks_on_is_not_stepped_over(around: str, found: list[bool]) -> None:
    opt = ps.adamw(RATES)
    params, grads, dims = drawn(0), drawn(1), ps.in_dims(opt)
    state = vmap(lambda o, p: o.init_state(p), in_dims=(dims, 0))(opt, params)

    def total(params: Any) -> Tensor:
        out, _ = vmap(advance, in_dims=(dims, 0, 0, 0))(opt, state, params, grads)
        return torch.stack([x.sum() for x in out.values()]).sum()

    expected = {name: torch.ones_like(p) * (1 - 1e-2 * RATES.view(-1, *[1] * (p.dim() - 1))) for name, p in params.items()}
    if around == "grad":
        assert difference(torch.func.grad(total)(params), expected) <= 1e-12
    elif around == "autograd":
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        total(leaves).backward()
        assert difference({name: p.grad for name, p in leaves.items()}, expected) <= 1e-12
    elif around == "jvp":
        _, tangent = torch.func.jvp(total, (params,), (drawn(2),))
        assert difference(tangent, torch.stack([(drawn(2)[k] * expected[k]).sum() for k in params]).sum()) <= 1e-12
    else:
        twice = vmap(total)({name: torch.stack([p, p]) for name, p in params.items()})
        assert not any(found)
        assert difference(twice, torch.stack([total(params)] * 2)) <= 1e-12
        return
    assert not any(found)


# ---------------------------------------------------------------------------------------------- the state of a population

MATRICES = ps.by_ndim({2: "matrices"}, default="rest")
STRUCTURED: dict[str, ps.Transform] = {
    "adamw": ps.adamw(0.1),
    "without momentum": ps.sgd(0.1),
    "by_ndim": ps.partition({"matrices": ps.muon(0.1), "rest": ps.adam(0.1)}, MATRICES),
    "masked": ps.chain(ps.masked(ps.scale_by_adam(), ps.by_ndim({2: True}, default=False)), ps.scale(-0.1)),
    "frozen": ps.chain(ps.adam(0.1), ps.freeze(ps.by_ndim({1: True}, default=False))),
    "adafactor": ps.adafactor(0.1),
    "shampoo": ps.shampoo(0.1),
    "soap": ps.soap(0.1),
    "sm3": ps.sm3(0.1),
    "within": ps.skip_if_nonfinite(ps.partition({"matrices": ps.adafactor(0.1), "rest": ps.adam(0.1)}, MATRICES)),
    "rates": ps.adafactor(RATES),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_the_state_of_a_population(name: str) -> None:
    """Of a transform and stacked parameters; each member has what it has alone."""
    opt, params = STRUCTURED[name], drawn(0)
    dims, each = ps.out_dims(opt, params), ps.in_dims(opt)
    state = vmap(lambda o, p: o.init_state(p), in_dims=(each, 0), out_dims=dims)(opt, params)
    assert dims == ps.out_dims(
        ps.take(opt, 0).init_state(ps.take(params, 0)) if name == "rates" else opt.init_state(ps.take(params, 0))
    )
    step = vmap(advance, in_dims=(each, dims, 0, 0), out_dims=(0, dims))
    found = params
    for i in range(3):
        found, state = step(opt, state, found, drawn(i + 1))
    for k in range(MEMBERS):
        own = ps.take(opt, k) if name == "rates" else opt
        p = ps.take(params, k)
        s = own.init_state(p)
        for i in range(3):
            p, s = own.step(ps.take(drawn(i + 1), k), s, p)
        assert difference(ps.take(found, k), p) <= 1e-9


@pytest.mark.parametrize("name", ["by_ndim", "masked", "frozen"])
def test_a_state_of_stacked_parameters_is_refused(name: str) -> None:
    opt, params = STRUCTURED[name], drawn(0)
    if name == "by_ndim":
        opt = ps.partition({"matrices": ps.adamw(0.1), "rest": ps.adam(0.1)}, MATRICES)
    state = opt.init_state(params)
    mapped = torch.utils._pytree.tree_map(lambda x: 0 if isinstance(x, Tensor) and x.dim() else None, state)
    with pytest.raises(ValueError, match=r"was made for stacked parameters. Its mask selects '(vector|matrix|number)'"):
        vmap(lambda s, p, g: opt.step(g, s, p)[0], in_dims=(mapped, 0, 0))(state, params, drawn(1))


def test_a_state_that_a_mask_has_left_is_not_refused() -> None:
    """It was made before the parameter was frozen, for parameters of these shapes."""
    opt, params = ps.adam(0.1), drawn(0)
    dims = ps.out_dims(opt, params)
    state = vmap(opt.init_state, out_dims=dims)(params)
    frozen = ps.masked(opt, {"number": True, "vector": False, "matrix": True})
    moved = vmap(lambda s, p, g: frozen.step(g, s, p)[0], in_dims=(dims, 0, 0))(state, params, drawn(1))
    assert torch.equal(moved["vector"], params["vector"] + drawn(1)["vector"])


def test_out_dims_of_the_wrong_things() -> None:
    with pytest.raises(TypeError, match=r"needs the parameters of all members, too: out_dims\(opt, members\)"):
        ps.out_dims(ps.adam())
    with pytest.raises(TypeError, match="takes members beside a transform only, but got them beside a dict"):
        ps.out_dims({"w": torch.ones(2)}, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="agree in the number of members"):
        ps.out_dims(ps.adam(), {"w": torch.ones(2), "b": torch.ones(3)})
