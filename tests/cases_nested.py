"""The part of the registry for transforms that are put around another, and for averages of the parameters."""

from __future__ import annotations

from typing import Any

import torch

import purestep as ps
from tests.case import Case


def _growing(step: Any) -> Any:
    return 1 + step


def _every_other(step: Any) -> Any:
    return step % 2 == 1


def _first_two(step: Any) -> Any:
    return step < 2


CLIPPED = ps.chain(ps.clip_by_global_norm(0.1), ps.sgd(lr=0.1, momentum=0.9))

CASES = [
    Case(
        "skip_if_nonfinite",
        ps.skip_if_nonfinite,
        ({"transform": ps.adamw(lr=0.01, weight_decay=0.1)}, {"transform": CLIPPED, "max_consecutive": 2}),
        covers=("SkipState",),
    ),
    Case(
        "accumulate",
        ps.accumulate,
        (
            {"transform": ps.adam(lr=0.01), "k": 2},
            {"transform": CLIPPED, "k": 3, "average": False},
            {"transform": ps.sgd(lr=ps.schedules.cosine(0.1, total_steps=20), momentum=0.9), "k": _growing},
            {"transform": ps.skip_if_nonfinite(ps.accumulate(ps.adam(lr=0.01), 2)), "k": 1},
        ),
        covers=("AccumulateState",),
    ),
    Case(
        "lookahead",
        ps.lookahead,
        (
            {"transform": ps.adam(lr=0.01), "k": 2, "alpha": 0.3},
            {"transform": CLIPPED},
            {"transform": ps.accumulate(ps.sgd(lr=0.1, momentum=0.9), 2), "k": 3, "alpha": 0.8},
        ),
        covers=("LookaheadState",),
    ),
    Case(
        "mechanic",
        ps.mechanic,
        (
            {"transform": ps.sgd(lr=1.0, momentum=0.5), "s_init": 1e-2, "num_betas": 3},
            {"transform": ps.adam(lr=1.0, eps=1e-3), "s_init": 1e-3, "weight_decay": 0.2, "eps": 1e-4},
            {"transform": ps.accumulate(ps.adam(lr=1.0, eps=1e-3), 2), "s_init": 1e-2, "weight_decay": 0.0},
        ),
        covers=("MechanicState",),
        lacks={"alone": "the factor is one for all parameters"},
    ),
    Case(
        "quantize_state",
        ps.quantize_state,
        (
            {"transform": ps.adamw(lr=0.01, weight_decay=0.1), "bits": 8, "min_size": 8},
            {"transform": ps.adamw(lr=0.01), "bits": 16, "min_size": 8},
            {"transform": ps.accumulate(CLIPPED, 2), "bits": 8, "min_size": 0},
            {"transform": ps.rmsprop(lr=0.01, momentum=0.9, centered=True), "bits": 16, "min_size": 0},
        ),
        covers=("dequantize_state",),
        smooth=False,
        lacks={"kept": "what is encoded is decoded for map_params, and encoded again"},
    ),
    Case(
        "state_dtype",
        ps.state_dtype,
        (
            {"transform": ps.adamw(lr=0.01, weight_decay=0.1), "dtype": torch.float64},
            {"transform": ps.accumulate(CLIPPED, 2), "dtype": torch.float64},
        ),
    ),
    Case(
        "master_weights",
        ps.master_weights,
        ({"transform": ps.adamw(lr=0.01, weight_decay=0.1)}, {"transform": CLIPPED}),
        covers=("MasterWeightsState",),
    ),
    Case(
        "stochastic_rounding",
        ps.stochastic_rounding,
        ({"transform": ps.adamw(lr=0.01, weight_decay=0.1), "seed": 3}, {"transform": CLIPPED}),
        covers=("StochasticRoundingState",),
    ),
    Case(
        "kahan",
        ps.kahan,
        ({"transform": ps.adamw(lr=0.01, weight_decay=0.1)}, {"transform": CLIPPED}),
        covers=("KahanState",),
    ),
    Case(
        "conditionally",
        ps.conditionally,
        (
            {"predicate": _every_other, "transform": ps.trace(0.9)},
            {"predicate": _first_two, "transform": ps.scale_by_adam(), "otherwise": "zero"},
        ),
        step=-0.1,
        covers=("ConditionallyState",),
    ),
    Case("ema_params", lambda **options: ps.chain(ps.sgd(lr=0.1, momentum=0.9), ps.ema_params(**options)), ({"decay": 0.9}, {"decay": lambda t: 1 / (t + 2)}), covers=("EmaParamsState",)),
    Case("average_params", lambda **options: ps.chain(ps.adam(lr=0.1), ps.average_params(**options)), ({}, {"start": 1, "every": 2}), covers=("AverageParamsState",)),
]  # fmt: skip
