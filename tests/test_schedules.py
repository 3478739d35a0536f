"""Schedules against torch's schedulers and optax's closed forms, on ints and on tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import purestep as ps
from purestep import schedules
from purestep.value import Schedule

STEPS = 12


def torch_values(scheduler: Any, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    driver = scheduler(optimizer, **options)
    values = []
    for _ in range(STEPS):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        driver.step()
    return values


CASES: dict[str, tuple[Schedule, list[float]]] = {
    "constant": (schedules.constant(0.5), [0.5] * STEPS),
    "linear": (
        schedules.linear(0.5, 0.05, total_steps=8),
        torch_values(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=8),
    ),
    "cosine": (
        schedules.cosine(0.5, total_steps=STEPS, end=0.1),
        torch_values(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS, eta_min=0.1),
    ),
    "warmup_cosine": (  # optax.warmup_cosine_decay_schedule(0.1, 0.5, warmup_steps=4, decay_steps=10, end_value=0.2), written out
        schedules.warmup_cosine(0.5, warmup_steps=4, total_steps=10, end=0.2, start=0.1),
        [0.1 + 0.4 * t / 4 if t < 4 else 0.2 + 0.15 * (1 + math.cos(math.pi * min((t - 4) / 6, 1))) for t in range(STEPS)],
    ),
    "no warm-up": (schedules.warmup_cosine(0.5, warmup_steps=0, total_steps=4), [0.25 * (1 + math.cos(math.pi * min(t / 4, 1))) for t in range(STEPS)]),
    "only warm-up": (schedules.warmup_cosine(0.5, warmup_steps=4, total_steps=4), [0.125 * min(t, 4) if t < 4 else 0.0 for t in range(STEPS)]),
    "no steps": (schedules.linear(0.5, 0.1, total_steps=0), [0.1] * STEPS),
    "a function": (ps.sgd(lr=lambda step: 0.5 / (step + 1)).hyperparams["lr"], [0.5 / (t + 1) for t in range(STEPS)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    schedule, expected = CASES[name]
    assert [schedule(t) for t in range(STEPS)] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert all(isinstance(schedule(t), float) for t in range(STEPS))


@pytest.mark.parametrize("name", CASES)
def test_tensors_vmap_and_compile(name: str) -> None:
    schedule, expected = CASES[name]
    steps = torch.arange(STEPS, dtype=torch.float64)
    wanted = torch.tensor(expected, dtype=torch.float64)
    for t in (torch.tensor(5), torch.tensor(5.0, dtype=torch.float64)):
        torch.testing.assert_close(torch.as_tensor(schedule(t), dtype=torch.float64), wanted[5], rtol=1e-6, atol=1e-7)
    if isinstance(schedule(steps[0]), torch.Tensor):
        torch.testing.assert_close(torch.func.vmap(schedule)(steps), wanted, rtol=1e-12, atol=1e-12)
        compiled = torch.compile(schedule, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(torch.stack([compiled(t) for t in steps]), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("executor", [None, "leaf", "foreach"])
def test_called_with_the_number_of_the_update(executor: Any) -> None:
    """0 at the first update, one more at each; per parameter, so a parameter that waits does not run ahead."""
    seen: list[float] = []

    def record(step: Any) -> float:
        seen.append(float(step))
        return 1.0

    t = ps.chain(ps.scale(record), ps.scale(-1.0))
    p = {"a": torch.zeros(1), "b": torch.zeros(1)}
    state = t.init_state(p)
    for g in ({"a": torch.ones(1), "b": None}, {"a": torch.ones(1), "b": torch.ones(1)}):
        p, state = t.step(g, state, p, executor=executor)
    assert sorted(seen) == [0.0, 0.0, 1.0]
    assert state[0].step == {"a": torch.tensor(2.0), "b": torch.tensor(1.0)}


def test_every_hyperparameter_can_follow_a_schedule() -> None:
    half = schedules.linear(1.0, 0.0, total_steps=2)
    t = ps.adam(lr=half, betas=(schedules.constant(0.9), 0.999), eps=schedules.constant(1e-8), weight_decay=half)
    p = torch.ones(3, dtype=torch.float64)
    mine, state = p, t.init_state(p)
    theirs = p.clone().requires_grad_()
    reference = torch.optim.Adam([theirs])
    for k in range(4):
        g = torch.full((3,), 0.1 * (k + 1), dtype=torch.float64)
        value = max(1.0 - k / 2, 0.0)
        reference.param_groups[0].update(lr=value, weight_decay=value)
        theirs.grad = g.clone()
        reference.step()
        mine, state = t.step(g, state, mine)
    torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-14)


def test_a_whole_transform_follows_a_schedule() -> None:
    t = ps.chain(ps.clip_by_global_norm(schedules.linear(1.0, 0.0, total_steps=2)), ps.scale(-1.0))
    p = {"w": torch.zeros(1)}
    state = t.init_state(p)
    moves = []
    for _ in range(3):
        new, state = t.step({"w": torch.full((1,), 8.0)}, state, p)
        moves.append(-new["w"].item())
    assert moves == pytest.approx([1.0, 0.5, 0.0], rel=1e-6)
