"""Small problems with parameters of several shapes, whose gradients depend on the parameters.

A problem is a dict of parameters and a loss; `grads` gives its gradients. Every shape that behaves differently is there:
a matrix, a vector, a 0-d parameter.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Any]
Loss = Callable[[Params], Tensor]


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Params, Loss]:
    """A two-layer network with a learned temperature on random data."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(16, 3, generator=g, dtype=torch.float64), torch.randn(16, 2, generator=g, dtype=torch.float64)
    params = {
        "hidden.weight": torch.randn(4, 3, generator=g, dtype=torch.float64) * 0.7,
        "hidden.bias": torch.randn(4, generator=g, dtype=torch.float64) * 0.1,
        "out.weight": torch.randn(2, 4, generator=g, dtype=torch.float64) * 0.7,
        "temperature": torch.tensor(1.3, dtype=torch.float64),
    }
    params = {k: v.to(dtype) for k, v in params.items()}
    x, y = x.to(dtype), y.to(dtype)

    def loss(p: Params) -> Tensor:
        h = torch.tanh(x @ p["hidden.weight"].T + p["hidden.bias"])
        return ((p["temperature"] * (h @ p["out.weight"].T) - y) ** 2).mean()

    return params, loss


def logistic(dtype: torch.dtype = torch.float64) -> tuple[Params, Loss]:
    """Logistic regression with a separable answer that decay keeps finite."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(24, 5, generator=g, dtype=torch.float64).to(dtype)
    y = (x[:, 0] > 0).to(dtype)

    def loss(p: Params) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ p["w"] + p["b"], y)

    return {"w": torch.zeros(5, dtype=dtype), "b": torch.zeros((), dtype=dtype)}, loss


def complex_regression(dtype: torch.dtype = torch.complex128) -> tuple[Params, Loss]:
    """A robust regression with complex unknowns; climbing it stays finite too."""
    g = torch.Generator().manual_seed(2)
    a = torch.randn(6, 4, generator=g, dtype=torch.complex128).to(dtype)
    b = torch.randn(6, generator=g, dtype=torch.complex128).to(dtype)

    def loss(p: Params) -> Tensor:
        return torch.log1p((a @ p["z"] * p["scale"] - b).abs() ** 2).mean()

    return {"z": torch.randn(4, generator=g, dtype=torch.complex128).to(dtype), "scale": torch.ones((), dtype=dtype)}, loss


def matrices(dtype: torch.dtype = torch.float64) -> tuple[Params, Loss]:
    """A two-layer network whose parameters are matrices: a wide, a tall and a square one."""
    g = torch.Generator().manual_seed(3)
    shapes = {"wide": (3, 5), "tall": (4, 3), "square": (4, 4)}
    x, y = (
        torch.randn(16, 5, generator=g, dtype=torch.float64).to(dtype),
        torch.randn(16, 4, generator=g, dtype=torch.float64).to(dtype),
    )

    def loss(p: Params) -> Tensor:
        h = torch.tanh(torch.tanh(x @ p["wide"].T) @ p["tall"].T)
        return ((h @ p["square"].T - y) ** 2).mean()

    return {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for k, s in shapes.items()}, loss


PROBLEMS = {"mlp": mlp, "logistic": logistic, "complex": complex_regression, "matrices": matrices}


def grads(loss: Loss, params: Params) -> Params:
    """The gradients at `params`, detached."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in params.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values()))))


def clone(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def difference(a: Any, b: Any) -> float:
    """The largest difference between two trees of the same structure, relative to the largest value in each leaf."""
    xs, spec = torch.utils._pytree.tree_flatten(a)
    ys, other = torch.utils._pytree.tree_flatten(b)
    assert spec == other, f"structures differ: {spec} and {other}"
    worst = 0.0
    for x, y in zip(xs, ys):
        if isinstance(x, Tensor):
            assert x.shape == y.shape
            assert x.dtype == y.dtype
            assert x.isfinite().all()
            assert y.isfinite().all()
            if x.numel():
                worst = max(worst, float((x - y).abs().max() / y.abs().max().clamp_min(1e-3)))
        else:
            assert x == y
    return worst


def through_a_file(x: Any, weights_only: bool = True) -> Any:
    """What is left of it after it was saved and loaded."""
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def closure_of(params: list[Any]) -> Callable[[], Tensor]:
    """The sum of squares of these parameters, as an optimizer wants it."""

    def closure() -> Tensor:
        for p in params:
            p.grad = None
        loss = torch.stack([(p * p).sum() for p in params]).sum()
        loss.backward()
        return loss.detach()

    return closure
