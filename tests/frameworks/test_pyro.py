"""Pyro makes one optimizer for each parameter, when it first meets it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import purestep as ps
from purestep import optim
from tests.frameworks.runs import agree, by_hand, composed

pyro = pytest.importorskip("pyro")
dist = pyro.distributions

pytestmark = pytest.mark.frameworks

X = torch.linspace(-1, 1, 12, dtype=torch.float64)
Y = 2 * X - 0.5 + 0.1 * torch.cos(9 * X)


@pytest.fixture(autouse=True)
def begin() -> Iterator[None]:
    pyro.clear_param_store()
    pyro.enable_validation(True)
    yield
    pyro.clear_param_store()


def model() -> None:
    """Point estimates, one of them positive, and a latent variable."""
    slopes = pyro.param("slopes", torch.zeros(2, 3, dtype=torch.float64))
    intercept = pyro.param("intercept", torch.tensor(0.3, dtype=torch.float64))
    noise = pyro.param("noise", torch.tensor(0.5, dtype=torch.float64), constraint=dist.constraints.positive)
    shift = pyro.sample("shift", dist.Normal(X.new_zeros(()), 1.0))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(slopes.sum() * X + intercept + shift, noise), obs=Y)


def guide() -> None:
    place = pyro.param("place", torch.tensor(0.1, dtype=torch.float64))
    width = pyro.param("width", torch.tensor(0.5, dtype=torch.float64), constraint=dist.constraints.positive)
    pyro.sample("shift", dist.Normal(place, width))


def svi(optimizer: Any, steps: int = 8, after: Callable[[], Any] = lambda: None, seed: int = 0) -> dict[str, Tensor]:
    """The unconstrained parameters after steps of stochastic variational inference."""
    pyro.set_rng_seed(seed)
    inference = pyro.infer.SVI(model, guide, optimizer, loss=pyro.infer.Trace_ELBO())
    for _ in range(steps):
        inference.step()
        after()
    return {name: p.detach().clone() for name, p in sorted(pyro.get_param_store().named_parameters())}


def fresh(optimizer: Any, **options: Any) -> dict[str, Tensor]:
    pyro.clear_param_store()
    return svi(optimizer, **options)


def rates(name: str) -> dict[str, Any]:
    """Arguments for each parameter."""
    return {"lr": 0.01, "weight_decay": 0.0} if name in ("noise", "width") else {"lr": 0.1, "weight_decay": 0.1}


@pytest.mark.parametrize("arguments", [{"lr": 0.05}, rates], ids=["the same", "for each parameter"])
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "NAdam", "Adagrad"])
def test_variational_inference_takes_torchs_steps(name: str, arguments: Any) -> None:
    mine, theirs = (fresh(pyro.optim.PyroOptim(getattr(namespace, name), arguments)) for namespace in (optim, torch.optim))
    assert list(mine) == ["intercept", "noise", "place", "slopes", "width"]
    agree(mine, theirs)


@pytest.mark.parametrize("clip", [{"clip_norm": 0.5}, {"clip_value": 0.2}], ids=str)
def test_gradients_are_clipped_before_the_step(clip: dict[str, float]) -> None:
    results = [
        fresh(pyro.optim.PyroOptim(namespace.SGD, {"lr": 0.05, "momentum": 0.9}, clip)) for namespace in (optim, torch.optim)
    ]
    agree(*results)
    (limit,) = clip.values()
    inside = ps.clip_by_global_norm(limit) if "clip_norm" in clip else ps.clip(limit)  # the norm of one parameter
    transform = ps.chain(inside, ps.sgd(0.05, momentum=0.9))
    agree(fresh(pyro.optim.PyroOptim(optim.partial(transform), {})), results[1])


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("ExponentialLR", {"gamma": 0.7}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 9}),
        ("MultiStepLR", {"milestones": [2, 5], "gamma": 0.1}),
    ],
)
def test_a_scheduler_is_made_for_each_optimizer(scheduler: str, options: dict[str, Any]) -> None:
    results = []
    for namespace in (optim, torch.optim):
        arguments = {"optimizer": namespace.Adam, "optim_args": lambda name: {"lr": rates(name)["lr"]}, **options}
        optimizer = getattr(pyro.optim, scheduler)(arguments)
        found = fresh(optimizer, after=optimizer.step)
        name_of = pyro.get_param_store().param_name
        results.append((found, {name_of(p): s.optimizer.param_groups[0]["lr"] for p, s in optimizer.optim_objs.items()}))
    agree(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1])


def test_a_scheduler_that_is_told_the_loss() -> None:
    results = []
    for namespace in (optim, torch.optim):
        optimizer = pyro.optim.ReduceLROnPlateau(
            {"optimizer": namespace.SGD, "optim_args": {"lr": 0.01}, "patience": 1, "factor": 0.5}
        )
        results.append(fresh(optimizer, after=lambda o=optimizer: o.step(1.0)))
        assert {s.optimizer.param_groups[0]["lr"] for s in optimizer.optim_objs.values()} != {0.01}
    agree(*results)


def of_parameter(name: str) -> dict[str, Any]:
    """A transform for each parameter."""
    lr = ps.schedules.linear(0.1, 0.0, total_steps=6)
    matrices = ps.accumulate(ps.chain(ps.clip_by_global_norm(0.5), ps.adamw(lr, weight_decay=0.1)), 2)
    return {"transform": matrices if name == "slopes" else ps.sgd(lr, momentum=0.9)}


CONSTRUCTORS: dict[str, Callable[[], Any]] = {
    "class": lambda: pyro.optim.PyroOptim(optim.AdamW, rates),
    "partial": lambda: pyro.optim.PyroOptim(optim.partial(ps.chain(ps.clip_by_global_norm(0.5), ps.lion(0.05))), {}),
    "transform for each": lambda: pyro.optim.PyroOptim(optim.Optimizer, of_parameter),
    "scheduler": lambda: pyro.optim.ExponentialLR({"optimizer": optim.AdamW, "optim_args": rates, "gamma": 0.7}),
}


@pytest.mark.parametrize("make", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_a_run_goes_on_from_a_file(make: Any, tmp_path: Path) -> None:
    def after(optimizer: Any) -> Callable[[], Any]:
        return getattr(optimizer, "step", lambda: None)

    whole = make()
    svi(whole, 4, after(whole))
    pyro.get_param_store().save(str(tmp_path / "params"))
    whole.save(str(tmp_path / "optimizer"))
    expected = svi(whole, 4, after(whole), seed=1)
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "params"))
    resumed = make()
    resumed.load(str(tmp_path / "optimizer"))
    agree(svi(resumed, 4, after(resumed), seed=1), expected, rtol=0, atol=0)


def test_a_transform_for_each_parameter_is_the_loop_by_hand() -> None:
    expected = {}
    found = fresh(pyro.optim.PyroOptim(optim.Optimizer, of_parameter))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo, states = pyro.infer.Trace_ELBO(), {}
    for _ in range(8):
        elbo.loss_and_grads(model, guide)
        for name, p in pyro.get_param_store().named_parameters():
            transform = of_parameter(name)["transform"]
            state = states.get(name) or transform.init_state(p.detach())
            new, states[name] = transform.step(p.grad, state, p.detach())
            with torch.no_grad():
                p.copy_(new)
            p.grad, expected[name] = None, new
    agree(found, dict(sorted(expected.items())))


def test_one_optimizer_for_all_parameters_in_torchs_way() -> None:
    """Pyro's documentation writes this loop where parameters are to be treated together."""

    class Linear(pyro.nn.PyroModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.slopes = pyro.nn.PyroParam(torch.zeros(2, 3, dtype=torch.float64))
            self.noise = pyro.nn.PyroParam(torch.tensor([0.5], dtype=torch.float64), constraint=dist.constraints.positive)

        def forward(self) -> None:
            with pyro.plate("data", len(X)):
                pyro.sample("y", dist.Normal(self.slopes.sum() * X, self.noise), obs=Y)

    def lower_bound(net: Any, batch: Any) -> Tensor:
        return net.loss()

    class Bound(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Linear()

        def loss(self) -> Tensor:
            return pyro.infer.Trace_ELBO().differentiable_loss(self.model, lambda: None)

    net = Bound()
    optimizer = optim.Optimizer(net.named_parameters(), composed())
    for _ in range(8):
        optimizer.zero_grad()
        net.loss().backward()
        optimizer.step()
    agree(net, by_hand(Bound(), composed(), range(8), lower_bound))
