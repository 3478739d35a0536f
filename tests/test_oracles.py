"""Numbers against other libraries: their trajectories are data, recorded by the scripts beside them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import purestep as ps
from tests.oracles import common

RUNS = [run for path in sorted(common.FOLDER.glob("*.json")) for run in json.loads(path.read_text())["runs"]]


def label(run: dict[str, Any]) -> str:
    return f"{run['name']}-{run['options']}"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("run", RUNS, ids=label)
def test_the_oracles_trajectory(run: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    if dtype == torch.float32 and "float32" in run:
        pytest.skip(run["float32"])  # the reason is data on the run
    transform: ps.Transform = made(run)
    if "before" in run:
        transform = ps.chain(ps.scale(run["before"]), transform)
    if "part" in run:
        transform = ps.chain(transform, ps.scale(run["part"]))
    params = {name: torch.tensor(p, dtype=dtype) for name, p in common.start().items()}
    state = transform.init_state(params)
    expected = iter(run["trajectory"])
    for t in range(max(common.CHECKPOINTS)):
        extras: dict[str, Any] = {}
        if run.get("value"):
            extras["value"] = torch.tensor(common.value(arrays(params), t), dtype=dtype)
        if run.get("value_and_grad"):
            extras["value_and_grad"] = lambda p, t=t: (
                torch.tensor(common.value(arrays(p), t), dtype=dtype),
                gradients(p, t, dtype),
            )
        if run.get("hessian"):
            found = common.curvature(arrays(params), t)
            extras["hessian"] = {name: torch.tensor(x, dtype=dtype) for name, x in found.items()}
        grads = gradients(params, t, dtype)
        if t in run.get("spoiled", ()):
            next(iter(grads.values())).view(-1)[0] = torch.nan
        params, state = transform.step(grads, state, params, **extras)
        if t + 1 in common.CHECKPOINTS:
            found = ps.eval_params(state, params) if run.get("eval") else params
            check(found, next(expected), tolerance, f"after {t + 1} steps")


def check(params: dict[str, Tensor], expected: dict[str, Any], tolerance: float, where: str) -> None:
    for name, p in params.items():
        x = torch.tensor(expected[name], dtype=torch.float64)
        difference = (p.double() - x).norm() / x.norm().clamp_min(1e-3)
        assert difference <= tolerance, f"{name} {where}: {difference:.1e}"


def gradients(params: dict[str, Tensor], t: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.tensor(g, dtype=dtype) for name, g in common.gradient(arrays(params), t).items()}


def arrays(params: dict[str, Tensor]) -> dict[str, Any]:
    return {name: p.detach().double().numpy() for name, p in params.items()}


def made(x: dict[str, Any]) -> ps.Transform:
    """A transform, as `name` and `options`."""
    options = {k: plain(v) for k, v in x["options"].items()}
    if x["name"] == "chain":
        return ps.chain(*options["transforms"])
    transform: ps.Transform = getattr(ps, x["name"])(**options)
    return transform


def plain(x: Any) -> Any:
    """JSON has no tuples, no transforms, and no functions."""
    if isinstance(x, dict):
        return eval(f"lambda step: {x['of_step']}") if "of_step" in x else made(x)
    return tuple([plain(y) for y in x]) if isinstance(x, list) else x


def test_the_gradient_is_the_values() -> None:
    """The oracles' problem is consistent: finite differences of its value give its gradient."""
    params, h = common.start(), 1e-6
    found = common.gradient(params, 3)
    for name, p in params.items():
        for index in np.ndindex(p.shape):
            up, down = ({k: x.copy() for k, x in params.items()} for _ in range(2))
            up[name][index] += h
            down[name][index] -= h
            slope = (common.value(up, 3) - common.value(down, 3)) / (2 * h)
            assert slope == pytest.approx(float(np.asarray(found[name])[index]), abs=1e-7)
