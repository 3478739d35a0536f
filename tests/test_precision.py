"""Parameters of 16 bits: a wider state, master weights, stochastic rounding and Kahan's summation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import purestep as ps
from purestep import optim
from purestep.transforms.precision import at_random

HALF = [torch.bfloat16, torch.float16]
INNER: dict[str, Any] = {
    "sgd": ps.sgd(0.01),
    "momentum": ps.sgd(0.01, momentum=0.9, weight_decay=0.1),
    "adamw": ps.adamw(0.01),
    "clipped": ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(0.01)),
    "accumulated": ps.accumulate(ps.adam(0.01), 2),
    "muon": ps.partition({"m": ps.muon(0.01), "v": ps.adamw(0.01)}, ps.by_ndim({2: "m"}, default="v")),
}
AROUND: dict[str, Any] = {
    "state": lambda t: ps.state_dtype(t, torch.float32),
    "master": ps.master_weights,
    "stochastic": lambda t: ps.stochastic_rounding(t, seed=5),
    "kahan": ps.kahan,
    "kahan, state": lambda t: ps.kahan(ps.state_dtype(t, torch.float32)),
}
halves = pytest.mark.parametrize("dtype", HALF, ids=str)
inners = pytest.mark.parametrize("inner", INNER)
arounds = pytest.mark.parametrize("around", AROUND)


def parameters(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(6, 5, generator=g).to(dtype),
        "b": torch.randn(5, generator=g).to(dtype),
        "n": torch.ones((), dtype=dtype),
    }


def gradients(params: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return {k: torch.randn(p.shape, generator=g).to(p.dtype) for k, p in params.items()}


def run(opt: Any, params: dict[str, Tensor], steps: int = 5, **how: Any) -> tuple[dict[str, Tensor], Any]:
    state = opt.init_state(params)
    if how.get("donate"):
        params = {k: p.clone() for k, p in params.items()}
    for step in range(steps):
        params, state = opt.step(gradients(params, step), state, params, **how)
    return params, state


def same(a: Any, b: Any) -> bool:
    first, second = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
    return len(first) == len(second) and all(
        (x is None and y is None) or (torch.equal(x, y) and x.dtype == y.dtype) for x, y in zip(first, second)
    )


def near(found: Any, expected: Any, bits: float = 1.0) -> None:
    """Equal, except for a last bit where another order of operations rounds otherwise: of 16 bits, and of a state's 32."""
    first, second = (torch.utils._pytree.tree_leaves(x) for x in (found, expected))
    assert len(first) == len(second)
    for x, y in zip(first, second):
        assert x.dtype == y.dtype
        eps = torch.finfo(x.dtype).eps if x.dtype in HALF else 1e-5
        torch.testing.assert_close(x.float(), y.float(), rtol=1.01 * eps * bits, atol=eps * bits / 8)


# -------------------------------------------------------------------------------------------------------------------- modes


@halves
@inners
@arounds
def test_every_mode_computes_the_same(dtype: torch.dtype, inner: str, around: str) -> None:
    opt, params = AROUND[around](INNER[inner]), parameters(dtype)
    before = {k: p.clone() for k, p in params.items()}
    expected = run(opt, params)
    assert same(params, before)
    assert {p.dtype for p in expected[0].values()} == {dtype}
    near(run(opt, params, donate=True)[0], expected[0])
    near(run(opt, params, executor="leaf")[0], expected[0])
    near(run(opt, params, executor="foreach")[0], expected[0])

    own = [nn.Parameter(p.clone()) for p in params.values()]
    optimizer = optim.Optimizer(own, opt)
    for step in range(5):
        for p, g in zip(own, gradients(params, step).values()):
            p.grad = g
        optimizer.step()
    near([p.detach() for p in own], list(expected[0].values()))


@halves
@arounds
def test_members_are_single_runs(dtype: torch.dtype, around: str) -> None:
    opt = AROUND[around](INNER["clipped"])
    members = [parameters(dtype), {k: p * 2 for k, p in parameters(dtype).items()}]
    together = {k: torch.stack([m[k] for m in members]) for k in members[0]}

    def member(p: dict[str, Tensor]) -> dict[str, Tensor]:
        state = opt.init_state(p)
        for k in range(3):
            p, state = opt.step({n: (x.float() * (k + 1)).to(x.dtype) for n, x in p.items()}, state, p)
        return p

    found = torch.func.vmap(member)(together)
    for i, m in enumerate(members):
        near({k: x[i] for k, x in found.items()}, member(m), 2.0)


@halves
@arounds
@pytest.mark.in_turn("dtype")
def test_a_compiled_step(dtype: torch.dtype, around: str) -> None:
    opt, params = AROUND[around](ps.adamw(0.01)), parameters(dtype)
    expected, state = run(opt, params, 3)
    compiled = torch.compile(opt.step, fullgraph=True)
    now, s = params, opt.init_state(params)
    for step in range(3):
        now, s = compiled(gradients(params, step), s, now)
    near(now, expected, 2.0)  # Inductor contracts products and sums: a last bit of float32 decides some roundings
    assert {x.dtype for x in torch.utils._pytree.tree_leaves(s)} == {x.dtype for x in torch.utils._pytree.tree_leaves(state)}


@halves
@arounds
@pytest.mark.parametrize("named", [False, True])
def test_a_run_is_resumed(dtype: torch.dtype, around: str, named: bool) -> None:
    """Through a flat mapping, and through an optimizer's state dict."""
    opt, params = AROUND[around](INNER["accumulated"]), parameters(dtype)
    now, state = run(opt, params, 3)
    state = ps.load_state_dict(opt.init_state(now), ps.state_dict(state))
    expected = run(opt, params)[0]
    for step in range(3, 5):
        now, state = opt.step(gradients(params, step), state, now)
    assert same(now, expected)

    def make(values: dict[str, Tensor]) -> tuple[list[nn.Parameter], Any]:
        own = [nn.Parameter(p.clone()) for p in values.values()]
        return own, optim.Optimizer(list(zip(values, own)) if named else own, opt)

    ends = []
    for interrupted in (False, True):
        own, optimizer = make(params)
        for step in range(5):
            if step == 3 and interrupted:
                saved = copy.deepcopy(optimizer.state_dict())
                own, optimizer = make(dict(zip(params, [p.detach() for p in own])))
                optimizer.load_state_dict(saved)
            for p, g in zip(own, gradients(params, step).values()):
                p.grad = g
            optimizer.step()
        ends.append([p.detach() for p in own])
    assert same(*ends)
    near(ends[0], list(expected.values()))


# -------------------------------------------------------------------------------------------------------------------- numbers


@halves
@inners
def test_master_weights_are_a_run_in_float32(dtype: torch.dtype, inner: str) -> None:
    params = parameters(dtype)
    now, state = run(ps.master_weights(INNER[inner]), params)
    full = {k: p.float() for k, p in params.items()}
    s = INNER[inner].init_state(full)
    for step in range(5):
        grads = {k: g.float() for k, g in gradients(params, step).items()}
        full, s = INNER[inner].step(grads, s, full)
    assert same(state.master, full)
    assert all(torch.equal(now[k], x.to(dtype)) for k, x in full.items())


@halves
def test_a_parameter_that_was_written_to_is_the_new_master(dtype: torch.dtype) -> None:
    opt, p = ps.master_weights(ps.sgd(1e-5)), torch.ones(3, dtype=dtype)
    p, state = opt.step(torch.ones_like(p), opt.init_state(p), p)
    p = torch.tensor([1.0, 5.0, 1.0], dtype=dtype)  # two elements are as the step has left them
    p, state = opt.step(torch.ones_like(p), state, p)
    torch.testing.assert_close(state.master, torch.tensor([1 - 2e-5, 5 - 1e-5, 1 - 2e-5]), rtol=1e-7, atol=0)


@halves
def test_small_updates_add_up(dtype: torch.dtype) -> None:
    """A thousand updates that are each a hundredth of the distance to the next number."""
    eps = torch.finfo(dtype).eps
    for around in ("master", "kahan", "stochastic", None):
        opt = ps.sgd(eps / 200) if around is None else AROUND[around](ps.sgd(eps / 200))
        start = torch.linspace(1.5, 1.9, 500).to(dtype)
        p, state = start, opt.init_state(start)
        for _ in range(1000):
            p, state = opt.step(torch.ones_like(p), state, p)
        moved = (start.float() - p.float()) / (1000 * eps / 200)
        if around is None:
            assert moved.abs().max() == 0
        elif around == "stochastic":  # right in the mean: of 500 walks, each as long as it is wide
            assert abs(moved.mean().item() - 1) < 0.1
        else:
            assert (moved - 1).abs().max() < 0.15


@halves
def test_a_state_of_32_bits_follows_what_16_bits_lose(dtype: torch.dtype) -> None:
    params = {"p": torch.ones(3, dtype=dtype)}
    plain, wide = ps.scale_by_adam(), ps.state_dtype(ps.scale_by_adam(), torch.float32)
    found = []
    for opt in (plain, wide):
        state = opt.init_state(params)
        for step in range(200):
            _, state = opt.update({"p": torch.full((3,), 1.0 if step < 100 else 0.5, dtype=dtype)}, state, params)
        found.append(ps.find(state, ps.AdamState).exp_avg_sq["p"])
    exact = (1 - 0.999**100) * 0.999**100 + 0.25 * (1 - 0.999**100)
    torch.testing.assert_close(found[1], torch.full((3,), exact), rtol=1e-4, atol=0)
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32


def test_what_is_wide_already_is_left_alone() -> None:
    params = {k: p.float() for k, p in parameters(torch.bfloat16).items()} | {"z": torch.ones(2, dtype=torch.float64)}
    for inner in ("adamw", "clipped", "muon"):
        expected = run(INNER[inner], params)[0]
        for around in AROUND:
            assert same(run(AROUND[around](INNER[inner]), params)[0], expected)
    assert ps.kahan(ps.sgd(0.1)).init_state(params).compensation == dict.fromkeys(params)
    assert ps.master_weights(ps.sgd(0.1)).init_state(params).master == dict.fromkeys(params)
    widest = ps.find(ps.state_dtype(ps.adam(), torch.float32).init_state(params), ps.AdamState)
    assert widest.exp_avg["z"].dtype == torch.float64


@halves
def test_a_parameter_that_was_written_to_forgets_what_rounding_took(dtype: torch.dtype) -> None:
    opt, p = ps.kahan(ps.sgd(1.0)), torch.full((3,), 1000.0).to(dtype)
    eps = torch.finfo(dtype).eps * 512  # the distance to the next number
    g = torch.full((3,), 0.375 * eps).to(dtype)
    p, state = opt.step(g, opt.init_state(p), p)
    assert torch.equal(p, torch.full((3,), 1000.0).to(dtype))  # rounding took all of it
    p = torch.tensor([1000.0, 0.0, -1.0]).to(dtype)
    p, state = opt.step(torch.zeros_like(p), state, p)
    assert torch.equal(p, torch.tensor([1000.0, 0.0, -1.0]).to(dtype))
    torch.testing.assert_close(state.compensation.float(), torch.tensor([-0.375 * eps, 0.0, 0.0]), rtol=1e-2, atol=0)


@halves
def test_half_a_distance_is_kept(dtype: torch.dtype) -> None:
    """Where the sum would be rounded to the next number, the even one, though it was rounded to this one."""
    eps = torch.finfo(dtype).eps
    opt, p = ps.kahan(ps.sgd(1.0)), torch.tensor([1 + eps]).to(dtype)
    p, state = opt.step(torch.tensor([0.498 * eps]).to(dtype), opt.init_state(p), p)
    state = state._replace(compensation=torch.tensor([-eps / 2]).to(dtype))
    p, state = opt.step(torch.zeros_like(p), state, p)
    assert (p.float() + state.compensation.float()).item() == 1 + eps / 2


@halves
@pytest.mark.parametrize("around", ["master", "kahan", "stochastic"])
def test_what_treats_16_bits_sees_them_within_a_wider_state(dtype: torch.dtype, around: str) -> None:
    params = parameters(dtype)
    inner = INNER["adamw"]
    outside, outside_state = run(ps.state_dtype(AROUND[around](inner), torch.float32), params)
    inside, state = run(AROUND[around](ps.state_dtype(inner, torch.float32)), params)
    assert same(outside, inside)
    assert same(outside_state, state)
    if around != "stochastic":
        assert all(x is not None for x in outside_state[0].values())


@halves
@pytest.mark.parametrize("donate", [False, True])
def test_a_whole_transform_computes_in_the_dtype_of_its_state(dtype: torch.dtype, donate: bool) -> None:
    """The slow weights of `lookahead` are a mean in float32 of parameters that are rounded once an update."""
    params = {"p": torch.linspace(0.5, 1.5, 7).to(dtype)}
    opt = ps.state_dtype(ps.lookahead(ps.sgd(0.01), k=2), torch.float32)
    found, state = run(opt, params, 4, donate=donate)
    p, slow = params["p"].float(), params["p"].float()
    for step in range(4):
        p = (p if step % 2 else slow.to(dtype).float() if step else p) - 0.01 * gradients(params, step)["p"].float()
        if step % 2:
            slow = slow.lerp(p, 0.5)
            p = slow
        p = p.to(dtype).float()
    torch.testing.assert_close(state.slow["p"], slow, rtol=1e-6, atol=0)
    assert torch.equal(found["p"].float(), p)


@halves
def test_a_loss_is_computed_at_parameters_of_the_models_dtype(dtype: torch.dtype) -> None:
    seen = set()

    def value_and_grad(p: Tensor) -> tuple[Tensor, Tensor]:
        seen.add(p.dtype)
        return (p.float() ** 2).sum(), 2 * p

    for inner in (ps.lbfgs(line_search_fn="strong_wolfe"), ps.chain(ps.sam(0.05), ps.adamw(0.1))):
        for around in ("state", "master", "kahan, state"):
            opt, p = AROUND[around](inner), torch.linspace(1, 2, 3).to(dtype)
            state = opt.init_state(p)
            for _ in range(3):
                p, state = opt.step(2 * p, state, p, value_and_grad=value_and_grad)
            assert p.dtype == dtype
            assert p.float().norm() < 2.4
    assert seen == {dtype}


@pytest.mark.parametrize("how", ["narrow", "own"])
@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("inner", ["adamw", "accumulated", "lookahead"])
def test_a_loaded_state_has_the_dtype_that_is_asked_for(how: str, dtype: torch.dtype, wide: torch.dtype, inner: str) -> None:
    """Whether it was saved in it or not."""
    transform = ps.lookahead(ps.adamw(0.01)) if inner == "lookahead" else INNER[inner]
    p = nn.Parameter(torch.randn(3, 2).to(dtype))
    asked, plain = (optim.Optimizer([p], t) for t in (ps.state_dtype(transform, wide), transform))
    for optimizer in (asked, plain):
        p.grad = torch.randn(3, 2).to(dtype)
        optimizer.step()
    before = {k: x.clone() for k, x in asked.state[p].items()}
    saved = copy.deepcopy((asked if how == "own" else plain).state_dict())
    asked.load_state_dict(saved)
    assert {k: x.dtype for k, x in asked.state[p].items()} == {k: x.dtype for k, x in before.items()}
    assert {x.dtype for k, x in before.items() if x.dim()} == {wide}
    if how == "own":
        assert all(torch.equal(asked.state[p][k], x) for k, x in before.items())


def test_a_loaded_state_is_as_wide_as_is_asked_for() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    first, second = (optim.Optimizer([p], ps.state_dtype(ps.adamw(0.1), d)) for d in (torch.float32, torch.float64))
    first.step()
    second.load_state_dict(first.state_dict())
    second.step()
    assert second.state[p]["exp_avg"].dtype == torch.float64
    first.load_state_dict(second.state_dict())
    assert first.state[p]["exp_avg"].dtype == torch.float32


@halves
@arounds
def test_a_plain_run_goes_on_with_more_precision(dtype: torch.dtype, around: str) -> None:
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    plain, asked = optim.Optimizer([p], ps.adamw(0.01)), optim.Optimizer([p], AROUND[around](ps.adamw(0.01)))
    p.grad = torch.ones_like(p)
    plain.step()
    asked.load_state_dict(copy.deepcopy(plain.state_dict()))
    asked.step()
    assert asked.state[p]["step"] == 2
    assert asked.state[p]["exp_avg"].dtype == (dtype if around in ("stochastic", "kahan") else torch.float32)


# -------------------------------------------------------------------------------------------------------- stochastic rounding


@halves
@pytest.mark.parametrize("size", [1.0, -3.7, 1e-3, 2e-7, -3e-6, 1000.7])
def test_rounding_is_right_in_the_mean(dtype: torch.dtype, size: float) -> None:
    """To one of the two next numbers, of which the mean over many steps is the number itself."""
    x = torch.full((1,), size * 1.000123)
    found = at_random(x.expand(40_000), dtype, torch.arange(40_000)).float()
    near = x.to(dtype)
    around = {near.view(torch.int16).item() + k for k in (-1, 0, 1)}
    assert {v.to(dtype).view(torch.int16).item() for v in found.unique()} <= around
    assert len(found.unique()) <= 2
    distance = (found.max() - found.min()).item()
    assert abs(found.double().mean().item() - x.item()) <= max(
        0.0125 * distance, abs(x.item()) * 1e-6
    )  # five standard deviations


@halves
def test_exact_numbers_stay(dtype: torch.dtype) -> None:
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for count in (1, 7, 1000):
        found = at_random(bits.float(), dtype, torch.tensor(count))
        assert torch.equal(found.nan_to_num(nan=12345.0), bits.nan_to_num(nan=12345.0))
        assert torch.equal(found.isnan(), bits.isnan())
        assert torch.equal(found.signbit()[~bits.isnan()], bits.signbit()[~bits.isnan()])


@halves
def test_seeds_steps_and_places_differ_and_repeat(dtype: torch.dtype) -> None:
    params = {k: torch.linspace(1, 1.9, 300).to(dtype) for k in ("a", "b")}
    grads = {k: torch.full((300,), 1e-3).to(dtype) for k in params}

    def first(seed: Any, steps: int = 1) -> dict[str, Tensor]:
        opt = ps.stochastic_rounding(ps.sgd(1.0), seed=seed)
        now, state = params, opt.init_state(params)
        for _ in range(steps):
            now, state = opt.step(grads, state, params if steps > 1 else now)
        return now

    assert same(first(1), first(1))
    assert not torch.equal(first(1)["a"], first(2)["a"])
    assert not torch.equal(first(1)["a"], first(1)["b"])
    assert not torch.equal(first(1)["a"], first(1, steps=2)["a"])
    batch = ps.stochastic_rounding(ps.sgd(1.0), seed=torch.tensor([1, 2]))
    found = torch.func.vmap(lambda opt: opt.step(grads, opt.init_state(params), params)[0], in_dims=(ps.in_dims(batch),))(batch)
    for i, seed in enumerate((1, 2)):
        assert all(torch.equal(found[k][i], x) for k, x in first(seed).items())


@halves
def test_no_derivative_passes_the_rounding(dtype: torch.dtype) -> None:
    x = torch.linspace(1, 2, 5, requires_grad=True)
    assert not at_random(x, dtype, torch.tensor(1)).requires_grad


@halves
@arounds
def test_memory_stays_laid_out_as_it_is(dtype: torch.dtype, around: str) -> None:
    params = {
        "image": torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 3).to(dtype).t(),
    }
    opt = AROUND[around](ps.adamw(0.1))
    found, _ = opt.step(params, opt.init_state(params), params)
    assert {k: p.stride() for k, p in found.items()} == {k: p.stride() for k, p in params.items()}


# ---------------------------------------------------------------------------------------------------------------- wrong calls


def test_what_cannot_be_is_refused() -> None:
    for name in ("master_weights", "stochastic_rounding", "kahan"):
        with pytest.raises(TypeError, match=f"{name} takes a transform, but got .*Did you mean to call it: adamw"):
            getattr(ps, name)(ps.adamw)
    with pytest.raises(TypeError, match="state_dtype takes a transform, but got 3"):
        ps.state_dtype(3, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"such as torch.float32, but got torch.int8"):
        ps.state_dtype(ps.adamw(), torch.int8)


def test_they_are_values() -> None:
    opt = ps.stochastic_rounding(ps.state_dtype(ps.adamw(0.1), torch.float32), seed=3)
    assert opt.replace(lr=0.2).hyperparams["lr"] == 0.2
    assert opt.hyperparams["seed"] == 3
    assert ps.master_weights(ps.state_dtype(ps.adamw(), torch.float32)) == ps.master_weights(ps.adamw())


@pytest.mark.parametrize("bits", [8, 16])
def test_with_a_quantized_state(bits: Any) -> None:
    params = {"w": torch.randn(64, 70, generator=torch.Generator().manual_seed(0)).bfloat16(), "b": torch.zeros(3).bfloat16()}
    expected = run(ps.master_weights(ps.adamw(0.01)), params, 20)[0]
    for opt in (
        ps.master_weights(ps.quantize_state(ps.adamw(0.01), bits)),
        ps.quantize_state(ps.master_weights(ps.adamw(0.01)), bits),
    ):
        found, state = run(opt, params, 20)
        moved = (expected["w"].float() - params["w"].float()).abs().mean()
        assert (found["w"].float() - expected["w"].float()).abs().mean() <= 0.1 * moved
        dtypes = {x.dtype for x in ps.state_dict(state).values()}
        assert (torch.uint8 if bits == 8 else torch.bfloat16) in dtypes
