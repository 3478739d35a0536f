"""What the tests of the tools share: a model, data, a composed transform, and the loop by hand that a tool's run is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import purestep as ps

STEPS = 8


def model(seed: int = 0) -> nn.Sequential:
    """In double precision, in which a difference of rounding stays one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [(randn(6, 4), randn(6, 2)) for _ in range(steps)]


def loss_of(call: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(call(x), y)


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[Any], after: Callable[[], Any] = lambda: None
) -> None:
    """The loop that everybody writes. `after` is called at the end of each step."""
    for batch in data:
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        after()


def wide(path: str, p: Tensor) -> bool:
    return p.numel() > 10


def composed(every: int = 2) -> ps.Transform:
    """Accumulation around a clipped partition, whose parts have a mask and schedules."""
    lr = ps.schedules.linear(0.1, 0.02, total_steps=6)
    matrices = ps.chain(ps.scale_by_adam(), ps.masked(ps.add_decayed_weights(0.1), wide), ps.scale_by_learning_rate(lr))
    parts = {"matrices": matrices, "rest": ps.sgd(lr=lr, momentum=0.9)}
    split = ps.partition(parts, ps.by_ndim({2: "matrices"}, default="rest"))
    return ps.accumulate(ps.chain(ps.clip_by_global_norm(0.5), split), every)


def put(net: nn.Module, params: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(params[name])


def by_hand(
    net: nn.Module, transform: ps.Transform, data: Iterable[Any], loss: Callable[[Any, Any], Tensor] = loss_of
) -> dict[str, Tensor]:
    """The parameters of a model after one step of the pure function for each batch."""
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    state = transform.init_state(params)
    for batch in data:
        grads = torch.autograd.grad(loss(net, batch), list(net.parameters()))
        params, state = transform.step(dict(zip(params, grads)), state, params)
        put(net, params)
    return params


def agree(mine: nn.Module | Mapping[str, Tensor], theirs: nn.Module | Mapping[str, Tensor], **tolerance: float) -> None:
    """The parameters are equal, to rounding."""
    found, expected = (dict(x.named_parameters() if isinstance(x, nn.Module) else x) for x in (mine, theirs))
    assert list(found) == list(expected)
    assert any(bool(x.ne(0).any()) for x in expected.values())
    for name, x in expected.items():
        torch.testing.assert_close(found[name].detach(), x.detach(), msg=lambda text, name=name: f"{name}: {text}", **tolerance)
