"""A model, its data, optimizers, and the same training by hand with pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import purestep as ps
from purestep import optim

FALL = ps.schedules.linear(0.02, 0.0, total_steps=40)
WARM = ps.schedules.warmup_cosine(0.05, warmup_steps=3, total_steps=40)

Batch = tuple[Tensor, Tensor]
Factor = Callable[[int], float]


def network() -> nn.Sequential:
    """The same small model at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def data(count: int = 24) -> Batch:
    """The same inputs and targets at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator)


def batches(epochs: int, size: int = 4) -> list[Batch]:
    """What a loader that does not shuffle gives in so many epochs."""
    x, y = data()
    return list(zip(x.split(size), y.split(size))) * epochs


def loss(net: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    return nn.functional.mse_loss(net(batch[0]), batch[1])


# --------------------------------------------------------------------------------------------------------------- optimizers

PLAIN: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
}
"""Classes that torch and purestep have, with their options."""


def plain(namespace: Any, name: str, net: nn.Module, **flags: Any) -> Any:
    return getattr(namespace, name)(net.parameters(), **PLAIN[name], **flags)


def scheduled(lr: Any, factor: Factor) -> Any:
    """A schedule, times what a scheduler of torch's multiplies with."""
    return lambda step: lr(step) * factor(int(step))


def one(step: int) -> float:
    return 1.0


def parts(factor: Factor = one) -> ps.Transform:
    """Matrices and the rest have an algorithm and a schedule each; a mask says what decays; one norm is clipped for all."""
    decay = ps.masked(ps.add_decayed_weights(0.1), lambda path, p: p.ndim > 1 and p.shape[0] > 2)
    matrix = ps.chain(ps.scale_by_adam(betas=(0.8, 0.99)), decay, ps.scale_by_learning_rate(scheduled(WARM, factor)))
    rest = ps.sgd(lr=scheduled(FALL, factor), momentum=0.9)
    return ps.chain(
        ps.clip_by_global_norm(0.7), ps.partition({"matrix": matrix, "rest": rest}, ps.by_ndim({2: "matrix"}, default="rest"))
    )


COMPOSED: dict[str, Callable[..., ps.Transform]] = {
    "parts": parts,
    "accumulated": lambda factor=one: ps.accumulate(ps.adamw(lr=scheduled(FALL, factor), weight_decay=0.1), 4),
    "skipping, averaged": lambda factor=one: ps.skip_if_nonfinite(
        ps.chain(ps.lion(lr=scheduled(FALL, factor)), ps.ema_params(0.5))
    ),
}
"""Transforms that torch has no class for."""


def composed(name: str, net: nn.Module) -> optim.Optimizer:
    return optim.Optimizer(net.named_parameters(), COMPOSED[name]())


def two_groups(namespace: Any, net: nn.Module) -> Any:
    """A partition that torch can say too, with two parameter groups of AdamW."""
    matrix, rest = {"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.03, "weight_decay": 0.0, "betas": (0.8, 0.99)}
    if namespace is optim:
        labels = ps.by_ndim({2: "matrix"}, default="rest")
        return optim.Optimizer(
            net.named_parameters(), ps.partition({"matrix": ps.adamw(**matrix), "rest": ps.adamw(**rest)}, labels)
        )
    params = list(net.parameters())
    groups = [{"params": [p for p in params if p.ndim == 2], **matrix}, {"params": [p for p in params if p.ndim != 2], **rest}]
    return torch.optim.AdamW(groups, lr=0.02)  # transformers asks for the default too


def optimizer(namespace: Any, name: str, net: nn.Module) -> Any:
    """One that torch and purestep both have."""
    return two_groups(namespace, net) if name == "two groups" else plain(namespace, name, net)


BOTH = [*PLAIN, "two groups"]

# ------------------------------------------------------------------------------------------------------- by hand, and compare


def by_hand(transform: ps.Transform, given: Sequence[Any], **options: Any) -> dict[str, Tensor]:
    """The parameters after a training with pure functions."""
    return with_state(transform, given, **options)[0]


def with_state(
    transform: ps.Transform,
    given: Sequence[Any],
    *,
    net: nn.Module | None = None,
    loss: Callable[[Any, Any], Tensor] = loss,
    every: int = 1,
    clip: float | None = None,
) -> tuple[dict[str, Tensor], Any]:
    """The same, and the state: `every` batches make a step, and `clip` bounds the norm of their mean gradient."""
    net = network() if net is None else net
    params = {k: p.detach().clone() for k, p in net.named_parameters()}
    state = transform.init_state(params)
    for i in range(0, len(given), every):
        group = given[i : i + every]

        def mean(params: Any, group: Any = group) -> Tensor:
            values = [loss(lambda *x, **kw: functional_call(net, params, x, kw), batch) for batch in group]
            return sum(values[1:], values[0]) / len(values)

        grads = torch.func.grad(mean)(params)
        if clip is not None:
            scale = min(clip / (float(ps.global_norm(list(grads.values()))) + 1e-6), 1.0)
            grads = {k: g * scale for k, g in grads.items()}
        params, state = transform.step(grads, state, params)
    return params, state


def averages(transform: ps.Transform, given: Sequence[Any], **options: Any) -> dict[str, Tensor]:
    """What the transform says is to be evaluated with after that training."""
    params, state = with_state(transform, given, **options)
    return ps.eval_params(state, params)


def named(net: nn.Module | dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: p.detach() for k, p in (net.items() if isinstance(net, dict) else net.named_parameters())}


def assert_close(found: nn.Module, expected: nn.Module | dict[str, Tensor]) -> None:
    """Equal up to the rounding of float32."""
    torch.testing.assert_close(named(found), named(expected), rtol=1e-5, atol=1e-6)


def assert_same(found: nn.Module, expected: nn.Module | dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    torch.testing.assert_close(named(found), named(expected), rtol=0, atol=0)


def assert_moved(net: nn.Module, start: nn.Module) -> None:
    """No parameter is where it began."""
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), start.parameters()))
