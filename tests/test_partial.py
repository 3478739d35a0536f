"""Transforms where a tool asks for a class of optimizers, and hyperparameters by name."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import optim

CHAIN = ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(lr=1e-3))


class Own(optim.Optimizer):
    """A class with its own step, of a dict of options."""


def trained(optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for k in range(steps):
        for p in params:
            p.grad = torch.full_like(p, k + 1.0)
        optimizer.step()
    return [p.detach().clone() for p in params]


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))]


MAKES: dict[str, Any] = {
    "by name": lambda given, **options: optim.Optimizer(given, CHAIN, **options),
    "functools": functools.partial(optim.Optimizer, transform=CHAIN),
    "class": optim.partial(CHAIN),
    "subclass": type("Mine", (optim.partial(CHAIN),), {}),
}


@pytest.mark.parametrize("how", MAKES)
def test_hyperparameters_by_name(how: str) -> None:
    expected = trained(optim.Optimizer(params(), CHAIN.replace(lr=0.1, betas=(0.5, 0.9), max_norm=0.5)))
    found = MAKES[how](params(), lr=0.1, betas=(0.5, 0.9), max_norm=0.5)
    assert isinstance(found, optim.Optimizer)
    assert (found.param_groups[0]["lr"], found.defaults["betas"]) == (0.1, (0.5, 0.9))
    torch.testing.assert_close(trained(found), expected, rtol=0, atol=0)
    torch.testing.assert_close(trained(MAKES[how](params())), trained(optim.Optimizer(params(), CHAIN)), rtol=0, atol=0)


def test_switches_flags_and_names_with_a_dot() -> None:
    partition = ps.partition({"m": ps.sgd(0.1, momentum=0.9), "v": ps.adam(0.1)}, lambda _, p: "m" if p.dim() > 1 else "v")
    found = optim.partial(partition, foreach=True)(params(), nesterov=True, **{"m.lr": 0.5})
    expected = optim.Optimizer(params(), partition.replace(nesterov=True, **{"m.lr": 0.5}), foreach=True)
    torch.testing.assert_close(trained(found), trained(expected), rtol=0, atol=0)
    assert [group["foreach"] for group in found.param_groups] == [True, True]
    assert optim.partial(partition, foreach=True)(params(), foreach=False).param_groups[0]["foreach"] is False


def test_groups_and_schedulers() -> None:
    weight, bias = params()
    found = optim.partial(CHAIN)([{"params": [weight], "lr": 0.5}, {"params": [bias]}], lr=0.1)
    assert [group["lr"] for group in found.param_groups] == [0.5, 0.1]
    scheduler = torch.optim.lr_scheduler.StepLR(found, 1, 0.5)
    trained(found, 1)
    scheduler.step()
    assert [group["lr"] for group in found.param_groups] == [0.25, 0.05]


def test_what_the_class_shows() -> None:
    made = optim.partial(CHAIN, name="Clipped", compile=True)
    assert made.__name__ == "Clipped"
    assert issubclass(made, torch.optim.Optimizer)
    shown = inspect.signature(made).parameters
    assert (shown["lr"].default, shown["max_norm"].default, shown["compile"].default) == (1e-3, 1.0, True)
    assert "clip_by_global_norm(1.0)" in str(made.__doc__)
    assert repr(made(params())).startswith("Clipped (")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_classes_and_optimizers_are_copied_and_pickled(again: Any) -> None:
    made = optim.partial(CHAIN, name="Clipped", foreach=True)
    torch.testing.assert_close(trained(again(made)(params(), lr=0.1)), trained(made(params(), lr=0.1)), rtol=0, atol=0)
    optimizer = made(params(), lr=0.1)
    trained(optimizer)
    other = again(optimizer)
    assert type(other).__name__ == "Clipped"
    assert (other.param_groups[0]["lr"], other.param_groups[0]["foreach"]) == (0.1, True)
    torch.testing.assert_close(trained(other), trained(optimizer), rtol=0, atol=0)
    other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optim.partial(torch.optim.Adam), TypeError, "partial takes a transform"),
        (lambda: optim.partial(CHAIN, forech=True), TypeError, "takes the flags .*foreach.*, but got forech"),
        (lambda: optim.partial(CHAIN)(params(), rate=0.1), TypeError, "There is no 'rate' .*'lr'"),
        (lambda: optim.Optimizer(params(), CHAIN, rate=0.1), TypeError, "There is no 'rate' .*'lr'"),
        (lambda: Own(params(), {"lr": 0.1}, rate=0.1), TypeError, "not both, but got a dict, and by name rate"),
        (lambda: optim.Optimizer(params(), CHAIN, lr=-1.0), ValueError, "lr must be a number of at least 0"),
        (lambda: optim.Optimizer(params(), ps.chain(ps.sgd(0.1), ps.sgd(0.1)), lr=0.2), TypeError, "'lr' is ambiguous here"),
    ],
    ids=["a class", "a flag", "a name", "a name of the transform's", "beside a dict", "a value", "two"],
)
def test_what_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
