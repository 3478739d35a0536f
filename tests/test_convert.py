"""States that come from torch.optim, and go there: both sides go on with the same numbers."""

from __future__ import annotations

import copy
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import purestep as ps

ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "Adadelta": ("adadelta", {"lr": 0.5, "weight_decay": 0.1}),
    "Adafactor": ("adafactor", {"lr": 0.1}),
    "Adagrad": ("adagrad", {"lr": 0.1, "lr_decay": 0.1}),
    "Adam": ("adam", {"lr": 0.1, "weight_decay": 0.1}),
    "amsgrad": ("adam", {"lr": 0.1, "amsgrad": True}),
    "AdamW": ("adamw", {"lr": 0.1, "weight_decay": 0.1}),
    "Adamax": ("adamax", {"lr": 0.1}),
    "ASGD": ("asgd", {"lr": 0.1, "t0": 2}),
    "Muon": ("muon", {"lr": 0.1}),
    "NAdam": ("nadam", {"lr": 0.1}),
    "RAdam": ("radam", {"lr": 0.1}),
    "RMSprop": ("rmsprop", {"lr": 0.1, "momentum": 0.9}),
    "centered": ("rmsprop", {"lr": 0.1, "centered": True, "momentum": 0.9}),
    "Rprop": ("rprop", {"lr": 0.1}),
    "SGD": ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "plain": ("sgd", {"lr": 0.1}),
    "SparseAdam": ("sparse_adam", {"lr": 0.1}),
}
CLASSES = {"amsgrad": "Adam", "centered": "RMSprop", "plain": "SGD"}
SHAPES = {"Muon": {"b": (3, 2), "a": (2, 4)}}
USUAL = {"b": (3, 2), "a": (4,), "c": ()}
each = pytest.mark.parametrize("name", ALGORITHMS)


def begin(name: str, named: bool = False, backwards: bool = False) -> tuple[Any, dict[str, Tensor], torch.optim.Optimizer]:
    """The transform, parameters in float64, and torch's optimizer of copies of them."""
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES.get(name, USUAL)
    params = {k: torch.randn(shape, generator=generator, dtype=torch.float64) for k, shape in shapes.items()}
    factory, options = ALGORITHMS[name]
    copies = [(k, nn.Parameter(p.clone())) for k, p in params.items()]
    copies = copies[::-1] if backwards else copies
    optimizer = getattr(torch.optim, CLASSES.get(name, name))(copies if named else [p for _, p in copies], **options)
    return getattr(ps, factory)(**options), params, optimizer


def gradients(params: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    return {
        k: torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + ord(k)), dtype=p.dtype)
        for k, p in params.items()
    }


def theirs(
    optimizer: torch.optim.Optimizer, params: dict[str, Tensor], steps: range, backwards: bool = False
) -> dict[str, Tensor]:
    keys = list(params)[::-1] if backwards else list(params)
    own = [p for g in optimizer.param_groups for p in g["params"]]
    for step in steps:
        found = gradients(params, step)
        for k, p in zip(keys, own):
            p.grad = found[k].to_sparse() if isinstance(optimizer, torch.optim.SparseAdam) and p.dim() else found[k]
        optimizer.step()
    return {k: p.detach().clone() for k, p in zip(keys, own)}


def ours(opt: Any, params: dict[str, Tensor], state: Any, steps: range) -> tuple[dict[str, Tensor], Any]:
    for step in steps:
        params, state = opt.step(gradients(params, step), state, params)
    return params, state


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for k, x in expected.items():
        torch.testing.assert_close(found[k], x, rtol=tolerance, atol=tolerance)


@each
@pytest.mark.parametrize("form", ["optimizer", "state dict", "names in another order"])
def test_a_run_of_torchs_goes_on(name: str, form: str) -> None:
    backwards = form == "names in another order"
    opt, params, optimizer = begin(name, named=backwards, backwards=backwards)
    if name == "SparseAdam":
        del params["c"]  # a number has no sparse gradient
        optimizer = torch.optim.SparseAdam(
            [(k, nn.Parameter(params[k].clone())) for k in (["a", "b"] if backwards else ["b", "a"])], **ALGORITHMS[name][1]
        )
    now = theirs(optimizer, params, range(3), backwards)
    before = copy.deepcopy(optimizer.state_dict())
    state = ps.convert.from_torch(opt, now, optimizer.state_dict() if form == "state dict" else optimizer)
    found, state = ours(opt, now, state, range(3, 6))
    assert str(optimizer.state_dict()) == str(before)  # nothing of it was written to
    close(found, theirs(optimizer, params, range(3, 6), backwards))
    # the same structure as from the beginning, which a step would refuse otherwise
    assert ps.state_dict(state).keys() == ps.state_dict(ours(opt, params, opt.init_state(params), range(1))[1]).keys()


@each
@pytest.mark.parametrize("named", [False, True])
def test_a_pure_run_goes_on_in_torch(name: str, named: bool) -> None:
    opt, params, optimizer = begin(name, named=named, backwards=named)
    if name == "SparseAdam":
        pytest.skip("torch's takes sparse gradients only, and a pure run of these is tested the other way around")
    params, state = ours(opt, params, opt.init_state(params), range(3))
    before = ps.state_dict(state)
    lr = optimizer.param_groups[0]["lr"]
    ps.convert.to_torch(opt, params, state, optimizer)
    keys = list(params)[::-1] if named else list(params)
    with torch.no_grad():
        for k, p in zip(keys, [p for g in optimizer.param_groups for p in g["params"]]):
            p.copy_(params[k])
    found = theirs(optimizer, params, range(3, 6), named)
    assert optimizer.param_groups[0]["lr"] == lr
    assert all(torch.equal(x, before[k]) for k, x in ps.state_dict(state).items())  # torch writes to its own
    # NAdam's product of momenta is a float32 number, which torch goes on with in the parameters' dtype once it has loaded it
    close(found, ours(opt, params, state, range(3, 6))[0], 1e-8 if name == "NAdam" else 1e-12)


def bowl(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    x, y = params["x"], params["y"]
    f = lambda p: ((p["x"] - 1) ** 2).sum() + 10 * ((p["y"] - p["x"].sum() ** 2) ** 2).sum()  # noqa: E731
    return f({"x": x, "y": y}), torch.func.grad(f)(params)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_goes_on_both_ways(search: str | None) -> None:
    params = {"x": torch.tensor([0.3, -0.2], dtype=torch.float64), "y": torch.tensor(0.1, dtype=torch.float64)}
    options: dict[str, Any] = {"lr": 0.1, "max_iter": 3, "history_size": 3, "line_search_fn": search}
    opt = ps.lbfgs(**options)

    def run(optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Tensor]:
        own = dict(zip(params, optimizer.param_groups[0]["params"]))

        def closure() -> float:
            value, grads = bowl({k: p.detach() for k, p in own.items()})
            for k, p in own.items():
                p.grad = grads[k]
            return value

        for _ in range(steps):
            optimizer.step(closure)
        return {k: p.detach().clone() for k, p in own.items()}

    def pure(now: dict[str, Tensor], state: Any, steps: int) -> tuple[dict[str, Tensor], Any]:
        for _ in range(steps):
            now, state = opt.step(bowl(now)[1], state, now, value_and_grad=bowl)
        return now, state

    optimizer = torch.optim.LBFGS([nn.Parameter(p.clone()) for p in params.values()], **options)
    now = run(optimizer, 2)
    state = ps.convert.from_torch(opt, now, optimizer)
    found, state = pure(now, state, 2)
    close(found, run(optimizer, 2))
    back = torch.optim.LBFGS([nn.Parameter(p.clone()) for p in found.values()], **options)
    ps.convert.to_torch(opt, found, state, back)
    close(run(back, 2), pure(found, state, 2)[0])


def test_whole_transforms_and_holes_of_this_librarys_optimizers() -> None:
    """State that is kept for all parameters together, and a tree with a hole."""
    opt = ps.chain(ps.accumulate(ps.adam(0.1), 2), ps.clip_by_global_norm(1.0))
    params: dict[str, Any] = {
        "a": torch.ones(3, dtype=torch.float64),
        "hole": None,
        "b": torch.zeros(2, 2, dtype=torch.float64),
    }
    own = [nn.Parameter(p.clone()) for p in params.values() if p is not None]
    optimizer = ps.optim.Optimizer(own, opt)

    def both(now: Any, state: Any, steps: range) -> tuple[Any, Any]:
        for step in steps:
            grads = {k: None if p is None else torch.full_like(p, step + 1.0) for k, p in params.items()}
            for p, g in zip(own, [g for g in grads.values() if g is not None]):
                p.grad = g
            optimizer.step()
            now, state = opt.step(grads, state, now)
        return now, state

    now, state = both(params, opt.init_state(params), range(3))
    again = ps.convert.from_torch(opt, now, optimizer)
    assert all(torch.equal(x, ps.state_dict(state)[k]) for k, x in ps.state_dict(again).items())
    now, state = both(now, again, range(3, 5))
    close({k: now[k] for k in ("a", "b")}, dict(zip(("a", "b"), own)))


def test_what_does_not_fit_is_refused() -> None:
    opt, params, optimizer = begin("Adam")
    theirs(optimizer, params, range(2))
    with pytest.raises(ValueError, match="The optimizer has 3 parameters, but params has 2"):
        ps.convert.from_torch(opt, {"b": params["b"], "a": params["a"]}, optimizer)
    with pytest.raises(ValueError, match=r"of shape \(4,\) for 'b', but scale_by_adam needs \(3, 2\)"):
        ps.convert.from_torch(opt, params, torch_with_shapes(optimizer))
    with pytest.raises(ValueError, match=r"has no 'square_avg'.*: it is another algorithm's"):
        ps.convert.from_torch(ps.rmsprop(), params, optimizer)
    with pytest.raises(TypeError, match="add_decayed_weights needs its own state, EmptyState"):
        ps.convert.to_torch(opt, params, ps.adamw().init_state(params), optimizer)
    parts = ps.partition({"m": ps.sgd(0.1), "v": ps.adam()}, ps.by_ndim({2: "m"}, default="v"))
    with pytest.raises(TypeError, match="convert that of each part alone"):
        ps.convert.from_torch(parts, params, optimizer)


def torch_with_shapes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]
    return saved


def test_another_algorithms_fields_are_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.RMSprop([p])
    p.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match=r"has 'square_avg', which chain.* does not have: it is another algorithm's"):
        ps.convert.from_torch(ps.sgd(0.1), [p], optimizer)


@pytest.mark.parametrize("around", [ps.master_weights, ps.kahan, ps.stochastic_rounding])
def test_a_run_goes_on_with_more_precision(around: Any) -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    opt, params = around(ps.adamw(0.1)), {"w": p.detach()}
    state = ps.convert.from_torch(opt, params, optimizer)
    adam = ps.find(state, ps.AdamState)
    dtype = torch.float32 if around is ps.master_weights else torch.bfloat16
    torch.testing.assert_close(adam.exp_avg["w"], optimizer.state[p]["exp_avg"].to(dtype))
    assert adam.step["w"] == 1
    if around is ps.master_weights:
        assert torch.equal(state.master["w"], p.detach().float())
        assert not state.master["w"].requires_grad
    opt.step({"w": torch.ones_like(p)}, state, params)


@pytest.mark.parametrize("kind", ["one moment", "another block", "no blocks"])
def test_states_of_bitsandbytes_that_do_not_map_are_refused(kind: str) -> None:
    p = nn.Parameter(torch.ones(512))
    optimizer = torch.optim.SGD([p])
    one = {"state1": torch.zeros(512, dtype=torch.uint8), "qmap1": torch.zeros(256), "absmax1": torch.zeros(2)}
    two = {name.replace("1", "2"): x for name, x in one.items()}
    if kind == "another block":
        one["absmax1"] = torch.zeros(8)
    if kind == "no blocks":
        del one["absmax1"]
    optimizer.state[p] = {"step": 3, **one, **({} if kind == "one moment" else two)}
    message = (
        "no state2: of bitsandbytes only Adam"
        if kind == "one moment"
        else "must have 2 scales, one for each block of 256, but has"
    )
    with pytest.raises(ValueError, match=message):
        ps.convert.from_bitsandbytes(ps.adam(), [p], optimizer)


def test_a_run_that_has_not_begun_begins() -> None:
    opt, params, optimizer = begin("Adam")
    state = ps.convert.from_torch(opt, params, optimizer)
    close(ours(opt, params, state, range(3))[0], theirs(optimizer, params, range(3)))


# ----------------------------------------------------------------------------------------------------------- optax, TorchOpt

Theirs = namedtuple("Theirs", "count mu nu")


def some_steps(opt: Any) -> tuple[Any, Any, Any, Any]:
    """Parameters, and the whole state and both moments after three steps."""
    now: Any = {"layer": {"w": torch.ones(3, 2), "b": torch.zeros(2)}, "hole": None}
    state = opt.init_state(now)
    for step in range(3):
        grads = {"layer": {"w": torch.full((3, 2), step + 1.0), "b": torch.full((2,), step - 1.0)}, "hole": None}
        now, state = opt.step(grads, state, now)
    own = ps.find(state, ps.AdamState)
    return now, state, own.exp_avg, own.exp_avg_sq


def equal(found: Any, expected: Any) -> None:
    a, b = ps.state_dict(found), ps.state_dict(expected)
    assert a.keys() == b.keys()
    assert all(torch.equal(x, b[k]) and x.dtype == b[k].dtype for k, x in a.items())


def test_an_adam_of_optax() -> None:
    opt = ps.adamw(0.1)
    now, state, *moments = some_steps(opt)
    mu, nu = ({"layer": {k: x.numpy() for k, x in t["layer"].items()}, "hole": None} for t in moments)
    equal(ps.convert.from_optax(opt, now, ((), (Theirs(np.int32(3), mu, nu), ()))), state)
    with pytest.raises(ValueError, match="with the fields count, mu and nu, but there are 0"):
        ps.convert.from_optax(opt, now, ((), ()))
    with pytest.raises(ValueError, match="mu must have the structure of params"):
        ps.convert.from_optax(opt, now, Theirs(np.int32(3), {"layer": mu["layer"]["w"]}, nu))


def test_an_adam_of_torchopt() -> None:
    """Its lists have the leaves by their sorted keys: b before w, which is the other way around in the parameters."""
    opt = ps.adamw(0.1)
    now, state, *moments = some_steps(opt)
    mu, nu = ([t["layer"]["b"], t["layer"]["w"]] for t in moments)
    counts = [torch.tensor(3), torch.tensor(3)]
    again = ps.convert.from_torchopt(opt, now, (Theirs(counts, mu, nu), ()))
    equal(again, state)
    ones = {"layer": {"w": torch.ones(3, 2), "b": torch.ones(2)}, "hole": None}
    opt.step(ones, again, now, donate=True)
    assert torch.equal(mu[0], ps.find(state, ps.AdamState).exp_avg["layer"]["b"])  # what was given is not written to
    with pytest.raises(ValueError, match="TorchOpt's mu must have one entry for each parameter, 2, but has 1"):
        ps.convert.from_torchopt(opt, now, Theirs(counts, mu[:1], nu))
