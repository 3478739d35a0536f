"""The part of the registry for algorithms beyond torch.optim that see all parameters, or ask for more than gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from purestep.transform import Composite
from tests.case import Case, Options


class Given(Composite):
    """A transform that is given its extra arguments, as if by a user, so that it can be tested as any other.

    They are those of a loss of its own, whose gradient is a formula, whatever the loss is that the gradients are of.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{self.children[0]!r} with {', '.join(self.children[0].plan.extras)}>"

    def _split(self, state: Any) -> list[Any]:
        return self.children[0]._split(state)

    def _join(self, states: Any) -> Any:
        return self.children[0]._join(states)

    def _advance(self, grads: Any, state: Any, params: Any, apply: bool, donate: bool, executor: Any, extras: Any) -> Any:
        known = {"value": value_and_grad(params)[0], "value_and_grad": value_and_grad}
        extras = {**extras, **{name: known[name] for name in self.children[0].plan.extras}}
        return self.children[0]._advance(grads, state, params, apply, donate, executor, extras)


def value_and_grad(params: Any) -> Any:
    """A bowl with ripples around 0.3."""
    leaves, spec = pytree.tree_flatten(params)
    at = [None if p is None else torch.view_as_real(p) if p.is_complex() else p for p in leaves]
    total = sum(((0.5 * (x - 0.3) ** 2 - 0.1 * torch.cos(3 * x)).sum() for x in at if x is not None), torch.zeros(()))
    grads = [None if x is None else x - 0.3 + 0.3 * torch.sin(3 * x) for x in at]
    pairs = [g if g is None or not p.is_complex() else torch.view_as_complex(g) for g, p in zip(grads, leaves)]
    return total, pytree.tree_unflatten(pairs, spec)


def given(make: Callable[..., ps.Transform]) -> Callable[..., ps.Transform]:
    """The factory of a transform that is given its extra arguments."""
    return lambda **options: Given([make(**options)])


OWN_STATE = {"donation": "a whole transform makes its state anew"}
NORMS = {"complex": "its numbers are those of real tensors, and complex parameters are refused"}

CASES: list[Case] = [
    Case("schedule_free", ps.schedule_free, ({"lr": 0.1}, {"lr": 0.05, "momentum": 0.5, "warmup_steps": 3, "r": 1.0}), covers=("ScheduleFreeState",)),
    Case(
        "schedule_free_sgd",
        ps.schedule_free_sgd,
        (
            {"lr": 0.3, "weight_decay": 0.1},
            {"lr": 0.3, "momentum": 0.5, "warmup_steps": 5, "weight_lr_power": 1.0, "r": 0.5},
            {"lr": 0.001, "weight_decay": 0.1, "momentum": 1.0, "maximize": True},
            {"lr": 0.0},
        ),
    ),
    Case(
        "schedule_free_adamw",
        ps.schedule_free_adamw,
        (
            {"lr": 0.02, "weight_decay": 0.1},
            {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3, "warmup_steps": 4, "weight_lr_power": 1.0, "r": 1.0},
            {"lr": 0.001, "weight_decay": 0.1, "maximize": True},
        ),
    ),
    Case(
        "dog",
        ps.dog,
        (
            {"lr": 1.0, "reps_rel": 0.1, "weight_decay": 0.1},
            {"lr": 0.5, "init_eta": 0.2, "eps": 0.1},
            {"lr": 0.1, "reps_rel": 0.01, "maximize": True},
        ),
        lacks=OWN_STATE,
    ),
    Case(
        "ldog",
        ps.ldog,
        ({"lr": 1.0, "reps_rel": 0.1, "weight_decay": 0.1}, {"lr": 0.5, "reps_rel": 0.02, "eps": 0.1}, {"lr": 0.1, "maximize": True}),
        lacks=NORMS,
    ),
    Case("scale_by_dog", ps.scale_by_dog, ({"reps_rel": 0.1}, {"init_eta": 0.1}), step=-1.0, covers=("DogState",), lacks=OWN_STATE),
    Case("scale_by_ldog", ps.scale_by_ldog, ({"reps_rel": 0.1}, {"reps_rel": 0.2, "eps": 0.1}), step=-1.0, covers=("LDogState",), lacks=NORMS),
]  # fmt: skip
