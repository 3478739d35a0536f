"""Runs that began in other packages go on here with their numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import purestep as ps

pytestmark = pytest.mark.frameworks
SHAPES = {"w": (4, 3), "b": (4,)}


def parameters(size: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn((size * shape[0], *shape[1:]), generator=generator) for k, shape in SHAPES.items()}


def gradients(params: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    return {k: torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + ord(k))) for k, p in params.items()}


def theirs(optimizer: torch.optim.Optimizer, params: dict[str, Tensor], steps: range) -> dict[str, Tensor]:
    own = dict(zip(params, optimizer.param_groups[0]["params"]))
    for step in steps:
        for k, g in gradients(params, step).items():
            own[k].grad = g
        optimizer.step()
    return {k: p.detach().clone() for k, p in own.items()}


def ours(opt: Any, params: dict[str, Tensor], state: Any, steps: range) -> dict[str, Tensor]:
    for step in steps:
        params, state = opt.step(gradients(params, step), state, params)
    return params


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for k, x in expected.items():
        torch.testing.assert_close(found[k], x, rtol=tolerance, atol=tolerance)


SAME: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (ps.adamw(0.01), {"lr": 0.01}),
    "Lion": (ps.lion(0.01, weight_decay=0.1), {"lr": 0.01, "weight_decay": 0.1}),
    "AdaBelief": (ps.adabelief(0.01), {"lr": 0.01}),
    "Yogi": (ps.yogi(0.01), {"lr": 0.01}),
    "AdEMAMix": (ps.ademamix(0.01), {"lr": 0.01}),
    "Adan": (ps.adan(0.01), {"lr": 0.01}),
    "NovoGrad": (ps.novograd(0.01), {"lr": 0.01}),
    "SignSGD": (ps.signum(0.01), {"lr": 0.01}),
    "RAdam": (ps.radam(0.01), {"lr": 0.01}),
    "ScheduleFreeSGD": (ps.schedule_free_sgd(0.1), {"lr": 0.1}),
}


@pytest.mark.parametrize("name", SAME)
def test_pytorch_optimizer(name: str) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    opt, options = SAME[name]
    params = parameters()
    optimizer = getattr(package, name)([nn.Parameter(p.clone()) for p in params.values()], **options)
    getattr(optimizer, "train", lambda: None)()  # some begin with averages
    now = theirs(optimizer, params, range(7))
    state = ps.convert.from_pytorch_optimizer(opt, now, optimizer)
    close(ours(opt, now, state, range(7, 10)), theirs(optimizer, params, range(7, 10)), 1e-5)


@pytest.mark.parametrize(
    ("name", "opt", "message"),
    [
        ("MADGRAD", ps.madgrad(), "must have the number of steps under 'step', but have 0"),
        ("SOAP", ps.soap(), "has 'GG', 'Q'"),
        ("Shampoo", ps.shampoo(), "has 'inv_pre_cond_0'"),
        ("LARS", ps.lars(), "the learning rate is no part of its momentum"),
    ],
)
def test_pytorch_optimizers_that_keep_something_else(name: str, opt: ps.Transform, message: str) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    params = parameters()
    optimizer = getattr(package, name)([nn.Parameter(p.clone()) for p in params.values()])
    now = theirs(optimizer, params, range(3))
    with pytest.raises(ValueError, match=message):
        ps.convert.from_pytorch_optimizer(opt, now, optimizer)


@pytest.mark.parametrize("bits", [8, 32])
def test_bitsandbytes(bits: int) -> None:
    package = pytest.importorskip("bitsandbytes")
    params = parameters(size=400)  # small tensors are kept in 32 bits
    made = package.optim.AdamW8bit if bits == 8 else package.optim.AdamW32bit
    own = [nn.Parameter(p.clone()) for p in params.values()]
    optimizer = made(own, lr=0.01, weight_decay=0.1)
    now = theirs(optimizer, params, range(5))
    assert (optimizer.state[own[0]]["state1"].dtype == torch.uint8) == (bits == 8)
    opt = ps.adamw(0.01, weight_decay=0.1)
    state = ps.convert.from_bitsandbytes(opt, now, optimizer)
    found, expected = ours(opt, now, state, range(5, 6)), theirs(optimizer, params, range(5, 6))
    for k, x in expected.items():  # they forget some bits at every step
        error, moved = (found[k] - x).abs().mean(), (x - now[k]).abs().mean()
        assert error <= (5e-3 if bits == 8 else 1e-5) * moved


@pytest.mark.parametrize("factory", ["adam", "adamw"])
def test_torchopt(factory: str) -> None:
    package = pytest.importorskip("torchopt")
    params = parameters()
    transform = getattr(package, factory)(lr=0.01)
    now, state = params, transform.init(params)
    for step in range(10):
        if step == 7:
            opt = getattr(ps, factory)(0.01)
            found = ours(opt, now, ps.convert.from_torchopt(opt, now, state), range(7, 10))
        updates, state = transform.update(gradients(params, step), state, params=now, inplace=False)
        now = package.apply_updates(now, updates, inplace=False)
    close(found, now, 1e-5)


@pytest.mark.parametrize("factory", ["adam", "adamw"])
def test_optax(factory: str) -> None:
    package, jax = pytest.importorskip("optax"), pytest.importorskip("jax")
    params = parameters()
    transform = getattr(package, factory)(0.01)
    now = jax.tree.map(lambda x: jax.numpy.asarray(x.numpy()), params)
    state = transform.init(now)

    def numbers(x: Any) -> Any:
        return jax.tree.map(lambda y: torch.tensor(jax.device_get(y)), x)

    for step in range(10):
        if step == 7:
            opt = getattr(ps, factory)(0.01, **({"weight_decay": 1e-4} if factory == "adamw" else {}))
            found = ours(opt, numbers(now), ps.convert.from_optax(opt, numbers(now), state), range(7, 10))
        grads = jax.tree.map(lambda x: jax.numpy.asarray(x.numpy()), gradients(params, step))
        updates, state = transform.update(grads, state, now)
        now = package.apply_updates(now, updates)
    close(found, numbers(now), 1e-5)
