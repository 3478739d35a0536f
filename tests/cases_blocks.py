"""The part of the registry for building blocks: clipping, normalizing, averaging, noise, projections."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import purestep as ps
from tests.case import Case

UNITS = {"complex": "the real and the imaginary part would be taken for a dimension, so complex parameters are refused"}
TOGETHER = {"alone": "the norm of all gradients is in every update"}


@ps.whole(ps.ReduceOnPlateauState, scales=True)
def _plateau_of_norm(
    us: list[Tensor], s: ps.ReduceOnPlateauState, params: list[Tensor], factor: ps.UnitInterval, rtol: ps.NonNegative, patience: int = 1,
    cooldown: int = 0, accumulation_size: int = 1,
) -> Any:  # fmt: skip
    """`reduce_on_plateau`, given a value: the norm of the gradients."""
    function = ps.reduce_on_plateau.declaration.function  # type: ignore[attr-defined]
    options = {"rtol": rtol, "atol": 0.0, "cooldown": cooldown, "accumulation_size": accumulation_size, "min_scale": 1e-3}
    return function(us, s, params, ps.global_norm(us), factor, patience, **options)


def box(low: float, high: float) -> ps.Transform:
    """`project_box`, where it belongs: at the end."""
    return ps.chain(ps.scale(-0.1), ps.project_box(low, high))


def _fall(step: Any) -> Any:
    return 0.1 / (step + 1)


CASES: list[Case] = [
    Case("clip_by_norm", ps.clip_by_norm, ({"max_norm": 0.05}, {"max_norm": 10.0}), step=-0.1),
    Case("clip_by_block_rms", ps.clip_by_block_rms, ({"max_rms": 0.02}, {"max_rms": 10.0}), step=-0.1),
    Case("adaptive_grad_clip", ps.adaptive_grad_clip, ({"clipping": 0.02, "eps": 0.1}, {"clipping": 10.0}, {}), step=-0.1, lacks=UNITS),
    Case("normalize", ps.normalize, ({"eps": 0.1}, {}), step=-0.1, lacks=TOGETHER),
    Case("normalize_by_block", ps.normalize_by_block, ({"eps": 0.1}, {}), step=-0.1),
    Case("centralize", ps.centralize, ({},), step=-0.1, lacks=UNITS),
    Case("sign", ps.sign, ({},), step=-0.01, smooth=False),
    Case("zero_nans", ps.zero_nans, ({},), step=-0.1, covers=("ZeroNansState",)),
    Case("ema", ps.ema, ({"decay": 0.9}, {"decay": 0.5, "debias": False}), step=-0.1, covers=("EmaState",)),
    Case(
        "add_noise",
        ps.add_noise,
        ({"eta": 0.01}, {"eta": 1.0, "gamma": 0.1, "seed": 12345}),
        step=-0.1,
        smooth=False,  # the seed is a whole number
        covers=("AddNoiseState",),
        problems=("logistic", "mlp"),  # the first has fewer parameters: ten rounds of a cipher for each are a lot to compile
    ),
    Case(
        "scale_by_trust_ratio",
        ps.scale_by_trust_ratio,
        ({"min_norm": 0.1, "trust_coefficient": 0.5, "eps": 0.1}, {"trust_coefficient": 0.01}, {}),
        step=-0.1,
    ),
    Case("scale_by_param_block_norm", ps.scale_by_param_block_norm, ({"min_scale": 0.1}, {}), step=-0.1),
    Case("scale_by_param_block_rms", ps.scale_by_param_block_rms, ({"min_scale": 0.1}, {}), step=-0.1),
    Case("scale_by_schedule", ps.scale_by_schedule, ({"schedule": ps.schedules.cosine(0.1, total_steps=8)}, {"schedule": _fall}), step=-1.0),
    Case(
        "reduce_on_plateau",
        _plateau_of_norm,
        ({"factor": 0.5, "rtol": 0.5}, {"factor": 0.3, "rtol": 0.9, "patience": 2, "cooldown": 1, "accumulation_size": 2}),
        step=-0.1,
        smooth=False,
        lacks=TOGETHER,
        covers=("ReduceOnPlateauState",),
    ),
    Case("monitor", ps.monitor, ({},), step=-0.1, covers=("MonitorState", "plot_monitor")),
    Case("keep_params_nonnegative", lambda: ps.chain(ps.scale(-0.1), ps.keep_params_nonnegative()), ({},), smooth=False),
    Case("project_box", box, ({"low": -0.3, "high": 0.4}, {"low": -0.05, "high": 0.05}), smooth=False),
]  # fmt: skip
