"""The part of the registry for algorithms beyond torch.optim that see all parameters, or ask for more than gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from purestep.compose import Composite
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
        known = {"value": value_and_grad(params)[0], "value_and_grad": value_and_grad, "hessian": hessian(params)}
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


def hessian(params: Any) -> Any:
    """The diagonal of its Hessian."""
    leaves, spec = pytree.tree_flatten(params)
    at = [None if p is None else torch.view_as_real(p) if p.is_complex() else p for p in leaves]
    found = [None if x is None else 1.0 + 0.9 * torch.cos(3 * x) for x in at]
    pairs = [h if h is None or not p.is_complex() else torch.view_as_complex(h) for h, p in zip(found, leaves)]
    return pytree.tree_unflatten(pairs, spec)


def given(make: Callable[..., ps.Transform], step: float = 1.0) -> Callable[..., ps.Transform]:
    """The factory of a transform that is given its extra arguments."""
    return lambda **options: Given([make(**options) if step == 1.0 else ps.chain(make(**options), ps.scale(step))])


TOGETHER = {"alone": "what one parameter does depends on the others"}
OWN_STATE = {**TOGETHER, "donation": "a whole transform makes its state anew"}
NORMS = {"complex": "its numbers are those of real tensors, and complex parameters are refused"}
DECOMPOSED: Options = {
    "smooth": False,  # no derivative goes through the decompositions
    "lacks": {
        "complex": "the decompositions are those of real matrices, and complex parameters are refused",
        "unread": "whether a decomposition is due is asked of the counter: most steps do without, and it costs far more",
    },
}


def _has_elements(p: Tensor) -> bool:
    return p.numel() > 0


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
    Case(
        "dadapt_adamw",
        ps.dadapt_adamw,
        (
            {"lr": 1.0, "d0": 0.01, "weight_decay": 0.1},
            {"lr": 0.5, "betas": (0.7, 0.9), "eps": 1e-3, "d0": 1e-3, "growth_rate": 1.5, "use_bias_correction": True},
            {"lr": 0.1, "d0": 1e-3, "maximize": True},
        ),
        lacks=OWN_STATE,
        least={"growth_rate": 1.0},
    ),
    Case(
        "prodigy",
        ps.prodigy,
        (
            {"lr": 1.0, "d0": 0.01, "weight_decay": 0.1},
            {"lr": 0.5, "betas": (0.7, 0.9), "beta3": 0.8, "eps": 1e-3, "d0": 1e-3, "d_coef": 0.5, "growth_rate": 1.5},
            {"lr": 0.1, "d0": 1e-3, "use_bias_correction": True, "safeguard_warmup": True, "maximize": True},
        ),
        lacks=OWN_STATE,
        least={"growth_rate": 1.0},
    ),
    Case("scale_by_dadapt_adam", ps.scale_by_dadapt_adam, ({"d0": 0.01},), covers=("DAdaptState",), lacks=OWN_STATE),
    Case("scale_by_prodigy", ps.scale_by_prodigy, ({"d0": 0.01},), covers=("ProdigyState",), lacks=OWN_STATE),
    Case("polyak_sgd", given(ps.polyak_sgd), ({"max_learning_rate": 0.2}, {"f_min": -1.0, "eps": 0.1, "lr": 0.1, "positive": True}), lacks=TOGETHER),
    Case("scale_by_polyak", given(ps.scale_by_polyak, -1.0), ({"f_min": -1.0, "max_learning_rate": 0.1},), lacks=TOGETHER),
    Case("sam", given(ps.sam, -0.1), ({"rho": 0.1}, {"rho": 0.5, "adaptive": True}), lacks={**TOGETHER, "direction": "a gradient of exactly 0 has no direction to ascend in: the derivative there is finite, and means nothing"}),
    Case(
        "sophia",
        given(ps.sophia),
        (
            {"lr": 0.05, "gamma": 0.5, "update_interval": 3, "weight_decay": 0.1},
            {"lr": 0.05, "betas": (0.7, 0.9), "eps": 0.1, "gamma": 0.3, "clip_threshold": None, "update_interval": 1},
            {"lr": 0.01, "eps": 0.1, "update_interval": 2, "maximize": True},
        ),
        smooth=False,
        lacks=OWN_STATE,
    ),
    Case("scale_by_sophia", given(ps.scale_by_sophia, -0.01), ({"eps": 0.1, "update_interval": 2},), smooth=False, lacks=OWN_STATE, covers=("SophiaState",)),
    Case(
        "scale_by_backtracking_linesearch",
        given(lambda **options: ps.chain(ps.sgd(0.5), ps.scale_by_backtracking_linesearch(**options))),
        ({}, {"max_backtracking_steps": 3, "slope_rtol": 0.1, "decrease_factor": 0.5, "increase_factor": 2.0, "atol": 1e-3, "rtol": 1e-3}),
        smooth=False,
        lacks={**OWN_STATE, "unread": "it stops when every search of the batch has ended"},
        covers=("BacktrackingLinesearchState",),
    ),
    Case(
        "galore",
        ps.galore,
        (
            {"lr": 0.01, "rank": 1, "update_proj_gap": 2, "weight_decay": 0.1},
            {"lr": 0.02, "rank": 1, "update_proj_gap": 3, "scale": 1.0, "betas": (0.7, 0.9), "eps": 1e-3},
            {"lr": 0.01, "rank": 1, "maximize": True},
        ),
        **DECOMPOSED,
    ),
    Case("scale_by_galore", ps.scale_by_galore, ({"rank": 1, "update_proj_gap": 2},), step=-0.01, covers=("GaloreState",), **DECOMPOSED),
    Case(
        "shampoo",
        ps.shampoo,
        (
            {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.1, "eps": 0.1},
            {"lr": 0.1, "eps": 0.01, "update_freq": 3},
            {"lr": 0.01, "eps": 1.0, "maximize": True},
        ),
        treats=_has_elements,
        **DECOMPOSED,
    ),
    Case("scale_by_shampoo", ps.scale_by_shampoo, ({"eps": 0.1, "update_freq": 2},), step=-0.1, treats=_has_elements, covers=("ShampooState",), **DECOMPOSED),
    Case(
        "soap",
        ps.soap,
        (
            # where a mean of squares has no inverse, the basis of what it leaves out is anything: so only the shorter sides here
            {"lr": 0.02, "weight_decay": 0.1, "precondition_frequency": 2, "max_precond_dim": 3},
            {"lr": 0.02, "betas": (0.7, 0.9), "shampoo_beta": 0.8, "eps": 1e-3, "precondition_frequency": 1, "max_precond_dim": 3},
            {"lr": 0.01, "max_precond_dim": 3, "maximize": True},
        ),
        treats=_has_elements,
        **DECOMPOSED,
    ),
    Case("scale_by_soap", ps.scale_by_soap, ({"precondition_frequency": 2, "max_precond_dim": 3},), step=-0.01, treats=_has_elements, covers=("SoapState",), **DECOMPOSED),
]  # fmt: skip
