"""The problem that every oracle is run on, in numpy alone, and the file its trajectory goes to.

A script `make_<topic>.py` runs another library on this problem and calls `record`; it needs that library, which nothing else
here does. `tests/test_oracles.py` runs purestep on the same problem and compares. The gradient is a formula, so that no
library's differentiation is in the way; it depends on the parameters and on the step, so that errors do not hide.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent
CHECKPOINTS = (1, 2, 3, 10, 30)
"""The steps after which the parameters are compared."""

Arrays = dict[str, Any]


def start() -> Arrays:
    """A matrix, a vector and a 0-d parameter, in float64."""
    return {
        "matrix": np.array([[0.5, -1.25, 2.0], [-0.75, 0.1, 1.5], [0.3, -0.2, 0.9], [1.1, 0.6, -1.7]]),
        "vector": np.array([1.0, -2.0, 0.25]),
        "number": np.array(0.8),
    }


def value(params: Mapping[str, Any], t: int) -> float:
    """The loss at step `t` = 0, 1, …: a bowl that moves a little, with ripples."""
    total = 0.0
    for p, c, a in _with_constants(params, t):
        total += float(np.sum(0.5 * a * (p - c) ** 2 - 0.06 * np.cos(5.0 * p + 0.1 * t)))
    return total


def gradient(params: Mapping[str, Any], t: int) -> Arrays:
    """The gradient of `value` with respect to the parameters."""
    found = [a * (p - c) + 0.3 * np.sin(5.0 * p + 0.1 * t) for p, c, a in _with_constants(params, t)]
    return dict(zip(params, found))


def curvature(params: Mapping[str, Any], t: int) -> Arrays:
    """The diagonal of its Hessian."""
    found = [a + 1.5 * np.cos(5.0 * p + 0.1 * t) for p, c, a in _with_constants(params, t)]
    return dict(zip(params, found))


def _with_constants(params: Mapping[str, Any], t: int) -> list[tuple[Any, Any, Any]]:
    found = []
    for name, p in params.items():
        p = np.asarray(p, dtype=np.float64)
        k = np.arange(p.size, dtype=np.float64).reshape(p.shape)
        found.append((p, 0.1 * np.cos(0.7 * t) + 0.05 * k, {"matrix": 1.0, "vector": 3.0, "number": 0.5}[name] + 0.2 * k))
    return found


def follow(step: Callable[[Arrays, Arrays, int], Mapping[str, Any]], params: Arrays | None = None) -> list[Arrays]:
    """The parameters at each checkpoint, when `step(params, grads, t)` makes the new ones."""
    params = start() if params is None else params
    found = []
    for t in range(max(CHECKPOINTS)):
        params = {name: np.asarray(p, dtype=np.float64) for name, p in step(params, gradient(params, t), t).items()}
        if t + 1 in CHECKPOINTS:
            found.append(params)
    return found


def record(topic: str, made_with: Mapping[str, str], runs: list[dict[str, Any]]) -> None:
    """Write `tests/oracles/<topic>.json`.

    Args:
        topic: the file's name.
        made_with: package -> version.
        runs: dicts with `name` (of the factory in purestep), `options` (its arguments), `oracle` (what was run, as a
            reader would call it) and `trajectory` (from `follow`). Optional: `part`, True if the factory gives updates that
            are to be added with a `scale(...)` of that number after it; `before`, the same before it; `value`,
            `value_and_grad` and `hessian` (the diagonal), True if it asks for the extra argument; `eval`, True to compare `eval_params`; `spoiled`, the
            steps at which the first number of the first gradient is NaN. Among the options, a transform is a dict of `name`
            and `options`, and a function of the step is ``{"of_step": expression}``.
    """
    lines = ",\n".join(json.dumps({**r, "trajectory": [_listed(p) for p in r["trajectory"]]}) for r in runs)
    (FOLDER / f"{topic}.json").write_text(f'{{"made_with": {json.dumps(dict(made_with))}, "runs": [\n{lines}\n]}}\n')


def _listed(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(p).tolist() for name, p in params.items()}
