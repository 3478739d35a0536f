"""torch's fused kernels against the mathematics, at every dtype for which they are used, on sizes around the vector width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import purestep as ps
from purestep import optim
from purestep._executors.chains import CPU_DTYPES, FUSED_DTYPES

SIZES = [*range(1, 36), 63, 64, 65, 127, 128, 129, 1000, 4097]
"""Full vectors of 4 to 64 numbers, and what is left over."""

CHAINS: dict[str, Any] = {
    "sgd": ps.sgd(lr=0.1),
    "sgd, decay": ps.sgd(lr=0.1, weight_decay=0.1),
    "sgd, momentum": ps.sgd(lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd, nesterov": ps.sgd(lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "adam": ps.adam(lr=0.1, weight_decay=0.1, eps=1e-3),
    "adam, amsgrad": ps.adam(lr=0.1, amsgrad=True, eps=1e-3),
    "adamw": ps.adamw(lr=0.1, eps=1e-3),
    "adagrad": ps.adagrad(lr=0.1, weight_decay=0.1),
    "rmsprop": ps.rmsprop(lr=0.1, eps=1e-3),
    "asgd": ps.asgd(lr=0.1, weight_decay=0.1),
    "nadam": ps.nadam(lr=0.1, eps=1e-3),
    "lars": ps.lars(lr=0.1),
    "accumulate": ps.accumulate(ps.sgd(lr=0.1), 1),
}


def trained(opt: Any, params: list[Tensor], grads: list[list[Tensor]], **options: Any) -> list[Tensor]:
    params = [p.clone() for p in params]
    state = opt.init_state(params)
    for gs in grads:
        params, state = opt.step([g.clone() for g in gs], state, params, **options)
    return params


@pytest.mark.parametrize("dtype", sorted(FUSED_DTYPES, key=str), ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_every_executor_moves_every_number(name: str, dtype: torch.dtype) -> None:
    """torch's `_fused_sgd_` for the CPU leaves full vectors of half precision where they are."""
    generator = torch.Generator().manual_seed(0)
    opt = CHAINS[name]

    def random() -> list[Tensor]:
        return [torch.rand(n, generator=generator, dtype=torch.float64).add(0.5).to(dtype) for n in SIZES]

    params, grads = random(), [random(), random()]
    wanted = trained(opt, [p.double() for p in params], [[g.double() for g in gs] for gs in grads], executor="leaf")
    limit = 8 * torch.finfo(dtype).eps
    for options in ({"donate": True}, {}, {"executor": "foreach", "donate": True}, {"executor": "leaf"}):
        for found, p in zip(trained(opt, params, grads, **options), wanted):
            difference = (found.double() - p).abs().max() / p.abs().max().clamp(min=1.0)
            assert difference <= limit, (options, len(p))


@pytest.mark.parametrize("dtype", sorted(FUSED_DTYPES, key=str), ids=str)
@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_half_precision_sgd_trains(dtype: torch.dtype, flags: dict[str, Any], momentum: float) -> None:
    mine, theirs = (torch.nn.Parameter(torch.ones(64, dtype=dtype)) for _ in range(2))
    first = optim.SGD([mine], lr=0.1, momentum=momentum, **flags)
    second = torch.optim.SGD([theirs], lr=0.1, momentum=momentum, foreach=False)
    for _ in range(5):
        for p, optimizer in ((mine, first), (theirs, second)):
            p.grad = torch.ones_like(p)
            optimizer.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_the_table_of_dtypes_names_kernels_that_are_right() -> None:
    """The kernels that the table leaves out are wrong with this torch: a dtype may come back when torch has mended it."""
    p = torch.ones(64, dtype=torch.bfloat16)
    torch._fused_sgd_(
        [p], [torch.ones_like(p)], [], lr=0.1, weight_decay=0.0, momentum=0.0, dampening=0.0, nesterov=False, maximize=False,
        is_first_step=False,
    )  # fmt: skip
    assert bool((p != 1).all()) is (torch.bfloat16 in CPU_DTYPES["sgd"])


@pytest.mark.parametrize("options", [{}, {"donate": True}, {"executor": "foreach"}, {"executor": "leaf"}], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_buffer_that_is_given_before_the_first_step_counts(options: dict[str, Any], nesterov: bool) -> None:
    opt, p = ps.sgd(lr=1.0, momentum=0.9, nesterov=nesterov), torch.zeros(3)
    state = ps.map_params(lambda b: b + 10.0, opt.init_state(p))
    p, _ = opt.step(torch.ones(3), state, p, **options)
    torch.testing.assert_close(p, torch.full((3,), -10.0))


@pytest.mark.parametrize("donate", [False, True])
def test_the_first_gradient_is_not_dampened_by_any_kernel(donate: bool) -> None:
    opt, p = ps.sgd(lr=1.0, momentum=0.5, dampening=0.25), torch.zeros(40)
    state = opt.init_state(p)
    for _ in range(2):
        p, state = opt.step(torch.ones(40), state, p, donate=donate)
    torch.testing.assert_close(p, torch.full((40,), -1.0 - (0.5 + 0.75)))
