"""The part of the registry for algorithms beyond torch.optim that treat each parameter on its own."""

from __future__ import annotations

import purestep as ps
from tests.case import Case

JUMP = {"standstill": "eps is added to the learning rate unless that is 0, as in the authors' package: there it jumps"}
REFUSED = {"complex": "refused by name: what it keeps for a parameter has no real and imaginary part"}

CASES: list[Case] = [
    Case(
        "lion",
        ps.lion,
        ({"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.02, "betas": (0.7, 0.8), "maximize": True}, {"lr": 0.0}),
        smooth=False,
    ),
    Case("scale_by_lion", ps.scale_by_lion, ({}, {"betas": (0.5, 0.8)}), step=-0.01, smooth=False, covers=("LionState",)),
    Case(
        "adabelief",
        ps.adabelief,
        (
            {"lr": 0.01, "eps": 1e-3, "weight_decay": 0.1},
            {"lr": 0.01},
            {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-8, "maximize": True},
        ),
    ),
    Case("scale_by_adabelief", ps.scale_by_adabelief, ({}, {"betas": (0.5, 0.8), "eps": 0.1}), step=-0.01, covers=("AdaBeliefState",)),
    Case(
        "yogi",
        ps.yogi,
        (
            {"lr": 0.05, "weight_decay": 0.1},
            {"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-2, "initial_accumulator_value": 0.1, "maximize": True},
            {"lr": 0.05, "initial_accumulator_value": 0.0},
        ),
    ),
    Case("scale_by_yogi", ps.scale_by_yogi, ({"initial_accumulator_value": 0.1}, {"eps": 0.1}), step=-0.01, covers=("YogiState",)),
    Case(
        "lars",
        ps.lars,
        (
            {"lr": 1.0, "trust_coefficient": 0.02, "weight_decay": 0.1, "eps": 1e-3},
            {"lr": 10.0},
            {"lr": 0.5, "trust_coefficient": 0.05, "momentum": 0.5, "nesterov": True, "maximize": True},
            {"lr": 0.5, "trust_coefficient": 0.05, "momentum": 0.0},
        ),
    ),
    Case(
        "lamb",
        ps.lamb,
        (
            {"lr": 0.01, "eps": 0.1, "weight_decay": 0.1},
            {"lr": 0.01},
            {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-3, "maximize": True},
        ),
    ),
    Case(
        "signum",
        ps.signum,
        ({"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "momentum": 0.5, "maximize": True}),
        smooth=False,
    ),
    Case("sign_sgd", ps.sign_sgd, ({"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "maximize": True}), smooth=False),
    Case(
        "novograd",
        ps.novograd,
        (
            {"lr": 0.01, "weight_decay": 0.1},
            {"lr": 0.01},
            {"lr": 0.01, "betas": (0.7, 0.25), "eps": 1e-2, "maximize": True},
        ),
        lacks=REFUSED,
    ),
    Case("scale_by_novograd", ps.scale_by_novograd, ({}, {"betas": (0.5, 0.8), "eps": 0.1}), step=-0.01, lacks=REFUSED, covers=("NovoGradState",)),
    Case(
        "adan",
        ps.adan,
        (
            {"lr": 0.01, "weight_decay": 0.1},
            {"lr": 0.01},
            {"lr": 0.01, "betas": (0.9, 0.7, 0.8), "eps": 1e-3, "maximize": True},
        ),
    ),
    Case("scale_by_adan", ps.scale_by_adan, ({}, {"betas": (0.5, 0.6, 0.8), "eps": 0.1}), step=-0.01, covers=("AdanState",)),
    Case(
        "adopt",
        ps.adopt,
        (
            {"lr": 0.01, "weight_decay": 0.1},
            {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-2, "maximize": True},
            {"lr": 0.01, "use_clipping": False, "eps": 0.1},
        ),
    ),
    Case("scale_by_adopt", ps.scale_by_adopt, ({}, {"betas": (0.5, 0.8), "eps": 0.1, "use_clipping": False}), step=-0.01),
    Case(
        "ademamix",
        ps.ademamix,
        (
            {"lr": 0.01, "weight_decay": 0.1},
            {"lr": 0.01, "betas": (0.7, 0.9, 0.95), "alpha": 2.0, "eps": 1e-3, "maximize": True},
            {"lr": 0.01, "alpha": ps.schedules.linear(0.0, 5.0, total_steps=3)},
        ),
    ),
    Case("scale_by_ademamix", ps.scale_by_ademamix, ({}, {"betas": (0.5, 0.8, 0.9), "alpha": 1.0, "eps": 0.1}), step=-0.01, covers=("AdEMAMixState",)),
    Case("fromage", ps.fromage, ({"lr": 0.1, "min_norm": 0.1}, {"lr": 0.01}, {"lr": 0.2, "maximize": True})),
    Case("scale_by_fromage", ps.scale_by_fromage, ({"lr": 0.1}, {"lr": 0.5})),
    Case("sm3", ps.sm3, ({"lr": 0.1}, {"lr": 0.1, "momentum": 0.5, "eps": 1e-2, "maximize": True}), lacks=REFUSED, smooth=False),
    Case("scale_by_sm3", ps.scale_by_sm3, ({}, {"momentum": 0.0, "eps": 0.1}), step=-0.1, lacks=REFUSED, smooth=False, covers=("SM3State",)),
    Case(
        "optimistic_gradient_descent",
        ps.optimistic_gradient_descent,
        ({"lr": 0.1}, {"lr": 0.05, "alpha": 0.7, "beta": 1.5, "maximize": True}),
    ),
    Case(
        "scale_by_optimistic_gradient",
        ps.scale_by_optimistic_gradient,
        ({}, {"alpha": 0.5, "beta": 0.1}),
        step=-0.1,
        covers=("OptimisticState",),
    ),
    Case("optimistic_adam", ps.optimistic_adam, ({"lr": 0.01}, {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3, "alpha": 0.7, "beta": 0.3, "maximize": True})),
    Case(
        "madgrad",
        ps.madgrad,
        (
            {"lr": 0.01, "weight_decay": 0.1},
            {"lr": 0.01, "momentum": 0.0},
            {"lr": 0.02, "momentum": 0.5, "eps": 1e-3, "maximize": True},
        ),
        lacks=JUMP,
    ),
    Case("scale_by_madgrad", ps.scale_by_madgrad, ({"lr": 0.01, "eps": 1e-3}, {"lr": 0.1, "momentum": 0.5}), lacks=JUMP, covers=("MadgradState",)),
]  # fmt: skip
