"""Gaussian processes of gpytorch: exact ones, and variational ones with natural gradients beside our optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import purestep as ps
from purestep import optim
from tests.frameworks.runs import agree, by_hand, composed, put

gpytorch = pytest.importorskip("gpytorch")

pytestmark = pytest.mark.frameworks

X = torch.linspace(0, 1, 9, dtype=torch.float64)
Y = torch.sin(6 * X) + 0.1 * torch.cos(40 * X)


class Exact(gpytorch.models.ExactGP):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(X, Y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean = gpytorch.means.LinearMean(1)
        self.covariance = gpytorch.kernels.ScaleKernel(
            gpytorch.kernels.RBFKernel(lengthscale_prior=gpytorch.priors.GammaPrior(3.0, 6.0))
        )

    def forward(self, x: Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean(x[:, None] if x.ndim == 1 else x), self.covariance(x))


def exact() -> tuple[Exact, Callable[[], Tensor]]:
    """A model, and the negative of its marginal log likelihood."""
    torch.manual_seed(0)
    gp = Exact().double().train()
    likelihood = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    return gp, lambda: -likelihood(gp(X), Y)


def fit(optimizer: Any, loss: Callable[[], Tensor], steps: int, scheduler: Any = None) -> list[float]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        found = loss()
        found.backward()
        return found

    losses = []
    for _ in range(steps):
        losses.append(float(optimizer.step(closure).detach()))
        if scheduler is not None:
            scheduler.step()
    return losses


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {"lr": 0.1}),
        ("AdamW", {"lr": 0.1, "weight_decay": 0.1}),
        ("LBFGS", {"lr": 0.1, "max_iter": 4}),
        ("LBFGS", {"lr": 1.0, "max_iter": 4, "line_search_fn": "strong_wolfe"}),
    ],
    ids=["Adam", "AdamW", "LBFGS", "LBFGS, strong Wolfe"],
)
def test_an_exact_process_is_fitted_as_with_torch(name: str, options: dict[str, Any]) -> None:
    results = []
    for namespace in (optim, torch.optim):
        gp, loss = exact()
        optimizer = getattr(namespace, name)(gp.parameters(), **options)
        losses = fit(optimizer, loss, 6)
        assert losses[-1] < losses[0]
        gp.eval()
        with torch.no_grad():
            predicted = gp.likelihood(gp(X + 0.05))
        results.append((gp, losses, predicted.mean, predicted.variance))
    agree(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1])
    torch.testing.assert_close(results[0][2:], results[1][2:])


def test_groups_and_a_scheduler_are_torchs() -> None:
    results = []
    for namespace in (optim, torch.optim):
        gp, loss = exact()
        groups = [{"params": gp.mean.parameters()}, {"params": gp.covariance.parameters(), "lr": 0.05}]
        optimizer = namespace.Adam([*groups, {"params": gp.likelihood.parameters()}], lr=0.1)
        fit(optimizer, loss, 6, lr_scheduler.MultiStepLR(optimizer, [2, 4], 0.5))
        results.append(gp)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.025, 0.0125, 0.025])
    agree(*results)


def test_a_composed_transform_is_the_loop_by_hand() -> None:
    gp, loss = exact()
    fit(optim.Optimizer(gp.named_parameters(), composed()), loss, 8)
    other, same = exact()
    agree(gp, by_hand(other, composed(), range(8), lambda net, k: same()))


def test_a_transform_with_a_line_search_is_the_loop_by_hand() -> None:
    """L-BFGS of ours evaluates the closure, here as in the pure function."""
    gp, loss = exact()
    fit(optim.Optimizer(gp.named_parameters(), ps.lbfgs(max_iter=3)), loss, 3)
    other, same = exact()
    params = {name: p.detach().clone() for name, p in other.named_parameters()}
    transform = ps.lbfgs(max_iter=3)
    state = transform.init_state(params)

    def value_and_grad(at: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        put(other, at)
        value = same()
        return value.detach(), dict(zip(at, torch.autograd.grad(value, list(other.parameters()))))

    for _ in range(3):
        params, state = transform.step(value_and_grad(params)[1], state, params, value_and_grad=value_and_grad)
    agree(gp, params)


class Sparse(gpytorch.models.ApproximateGP):  # type: ignore[misc]
    def __init__(self) -> None:
        points = X[::3, None].clone()
        distribution = gpytorch.variational.NaturalVariationalDistribution(len(points))
        super().__init__(gpytorch.variational.VariationalStrategy(self, points, distribution))
        self.mean = gpytorch.means.ConstantMean()
        self.covariance = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x: Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.covariance(x))


def test_natural_gradients_go_beside_it() -> None:
    results = []
    for namespace in (optim, torch.optim):
        torch.manual_seed(0)  # the first call draws where to begin
        gp, likelihood = Sparse().double(), gpytorch.likelihoods.GaussianLikelihood().double()
        bound = gpytorch.mlls.VariationalELBO(likelihood, gp, num_data=len(X))
        natural = gpytorch.optim.NGD(gp.variational_parameters(), num_data=len(X), lr=0.1)
        optimizer = namespace.AdamW([*gp.hyperparameters(), *likelihood.parameters()], lr=0.1)
        for _ in range(6):
            natural.zero_grad()
            optimizer.zero_grad()
            (-bound(gp(X[:, None]), Y)).backward()
            natural.step()
            optimizer.step()
        results.append(gp)
    agree(*results)
