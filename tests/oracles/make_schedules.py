"""Record the values of optax's schedules in `tests/oracles/schedules/optax.json`.

Run it with optax: `JAX_ENABLE_X64=1 python -m tests.oracles.make_schedules`. Each entry is the purestep expression that has
the same values, the optax call as a reader would write it, and its values at steps 0, 1, 2, ….
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from tests.oracles import common

STEPS = 40

SCHEDULES: list[tuple[str, str]] = [
    ("constant(0.3)", "constant_schedule(0.3)"),
    ("linear(0.5, 0.1, total_steps=13)", "linear_schedule(0.5, 0.1, 13)"),
    ("linear(0.0, 0.1, total_steps=30)", "linear_schedule(0.0, 0.1, 30)"),
    ("polynomial(0.5, 0.1, total_steps=13, power=2.0)", "polynomial_schedule(0.5, 0.1, 2.0, 13)"),
    ("polynomial(0.1, 0.4, total_steps=25, power=0.7)", "polynomial_schedule(0.1, 0.4, 0.7, 25)"),
    (
        "join((0.5, polynomial(0.5, 0.1, total_steps=13, power=3.0)), (6,))",
        "polynomial_schedule(0.5, 0.1, 3.0, 13, transition_begin=6)",
    ),
    ("exponential(0.5, gamma=0.9)", "exponential_decay(0.5, 1, 0.9)"),
    ("exponential(0.5, gamma=0.3, step_size=7, end=0.03)", "exponential_decay(0.5, 7, 0.3, end_value=0.03)"),
    ("exponential(0.5, gamma=0.3, step_size=7, staircase=True)", "exponential_decay(0.5, 7, 0.3, staircase=True)"),
    (
        "exponential(0.1, gamma=1.5, step_size=5, staircase=True, end=0.6)",
        "exponential_decay(0.1, 5, 1.5, staircase=True, end_value=0.6)",
    ),
    ("cosine(0.5, total_steps=21)", "cosine_decay_schedule(0.5, 21)"),
    ("cosine(0.5, total_steps=21, end=0.1)", "cosine_decay_schedule(0.5, 21, alpha=0.2)"),
    ("warmup_cosine(0.5, warmup_steps=6, total_steps=30)", "warmup_cosine_decay_schedule(0.0, 0.5, 6, 30)"),
    (
        "warmup_cosine(0.5, warmup_steps=6, total_steps=30, end=0.05, start=0.1)",
        "warmup_cosine_decay_schedule(0.1, 0.5, 6, 30, end_value=0.05)",
    ),
    ("piecewise_constant((0.5, 0.2, 0.1), (7, 20))", "piecewise_constant_schedule(0.5, {7: 0.4, 20: 0.5})"),
    ("piecewise_constant((0.5,), ())", "piecewise_constant_schedule(0.5)"),
    ("piecewise_interpolate((0.5, 0.2, 0.3), (7, 20))", "piecewise_interpolate_schedule('linear', 0.5, {7: 0.4, 20: 1.5})"),
    (
        "piecewise_interpolate((0.1, 0.2, 0.02), (7, 20), shape='cosine')",
        "piecewise_interpolate_schedule('cosine', 0.1, {7: 2.0, 20: 0.1})",
    ),
    ("piecewise_interpolate((0.02, 0.5, 0.02, 0.000002), (12, 34, 40))", "linear_onecycle_schedule(40, 0.5)"),
    ("piecewise_interpolate((0.02, 0.5, 0.000002), (12, 40), shape='cosine')", "cosine_onecycle_schedule(40, 0.5)"),
    ("piecewise_interpolate((0.05, 0.5, 0.01), (9, 30), shape='cosine')", "cosine_onecycle_schedule(30, 0.5, 0.3, 10.0, 5.0)"),
    (
        "join((linear(0.0, 0.5, total_steps=6), exponential(0.5, gamma=0.9, step_size=3)), (6,))",
        "warmup_exponential_decay_schedule(0.0, 0.5, 6, 3, 0.9)",
    ),
    (
        "join((linear(0.0, 0.5, total_steps=6), 0.5, cosine(0.5, total_steps=10)), (6, 20))",
        "join_schedules([linear_schedule(0.0, 0.5, 6), constant_schedule(0.5), cosine_decay_schedule(0.5, 10)], [6, 20])",
    ),
    (
        "join((warmup_cosine(0.5, warmup_steps=2, total_steps=10), warmup_cosine(0.3, warmup_steps=5, total_steps=20, end=0.1)), (10,))",
        "sgdr_schedule([dict(init_value=0.0, peak_value=0.5, warmup_steps=2, decay_steps=10), "
        "dict(init_value=0.0, peak_value=0.3, warmup_steps=5, decay_steps=20, end_value=0.1)])",
    ),
]


def main() -> None:
    found: list[dict[str, Any]] = []
    for ours, theirs in SCHEDULES:
        schedule: Callable[[Any], Any] = eval(theirs, vars(optax))
        found.append(
            {"schedule": ours, "oracle": f"optax.{theirs}", "values": [float(np.asarray(schedule(t))) for t in range(STEPS)]}
        )
    lines = ",\n".join(map(json.dumps, found))
    made_with = json.dumps({"optax": optax.__version__, "jax": jax.__version__})
    (common.FOLDER / "schedules" / "optax.json").write_text(f'{{"made_with": {made_with}, "schedules": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    assert jax.config.jax_enable_x64, "set JAX_ENABLE_X64=1: values are recorded in float64"
    main()
