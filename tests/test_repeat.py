"""A step like the last one takes a shorter way. Whatever has changed in between, no one can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import purestep as ps
from purestep import optim
from purestep._engine import step_cache as repeated

Event = Callable[[torch.optim.Optimizer], None]


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _set(**options: Any) -> Event:
    return lambda optimizer: optimizer.param_groups[0].update(options)


def no_gradient(optimizer: torch.optim.Optimizer) -> None:
    _params(optimizer)[1].grad = None


def transposed_gradient(optimizer: torch.optim.Optimizer) -> None:
    p = _params(optimizer)[0]
    assert p.grad is not None
    p.grad = p.grad.t().contiguous().t()


def transposed_parameter(optimizer: torch.optim.Optimizer) -> None:
    p = _params(optimizer)[0]
    p.data = p.data.t().contiguous().t()


def other_state(optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[_params(optimizer)[0]]
    for name, x in state.items():
        if isinstance(x, Tensor) and x.dim():
            state[name] = x.abs() + 1.0


def other_count(optimizer: torch.optim.Optimizer) -> None:
    state = optimizer.state[_params(optimizer)[0]]
    if "step" in state:
        state["step"] = state["step"] + 7


def loaded(optimizer: torch.optim.Optimizer) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def new_group(optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "lr": 0.5})


def fewer_parameters(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.param_groups[0]["params"][-1]


EVENTS: dict[str, Event] = {
    "nothing": lambda optimizer: None,
    "lr": _set(lr=0.003),
    "weight decay": _set(weight_decay=0.2),
    "tensor lr": _set(lr=torch.tensor(0.02, dtype=torch.float64)),
    "maximize": _set(maximize=True),
    "loop": _set(foreach=False),
    "no gradient": no_gradient,
    "transposed gradient": transposed_gradient,
    "transposed parameter": transposed_parameter,
    "other state": other_state,
    "other count": other_count,
    "loaded": loaded,
    "new group": new_group,
    "fewer parameters": fewer_parameters,
}


def run(cls: Any, event: Event, **options: Any) -> tuple[list[Tensor], list[Any]]:
    """Four steps, the event, and four more: the parameters and state at the end."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in ((3, 2), (4,), ())]
    optimizer = cls(params, **options)
    for step in range(8):
        for p in _params(optimizer):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if step == 4:
            event(optimizer)
        optimizer.step()
    return params, [{n: x for n, x in optimizer.state[p].items() if n != "step"} for p in params]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"lr": 0.01}),
        ("Adam", {"lr": 0.01, "amsgrad": True}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
        ("SGD", {"lr": 0.1}),
        ("Adagrad", {"lr": 0.1}),
        ("Adamax", {"lr": 0.1}),
        ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.9}),
        ("Rprop", {"lr": 0.01}),
        ("RAdam", {"lr": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("event", EVENTS)
def test_whatever_changed_the_numbers_are_torchs(event: str, name: str, options: dict[str, Any]) -> None:
    ours, our_state = run(getattr(optim, name), EVENTS[event], **options)
    theirs, their_state = run(getattr(torch.optim, name), EVENTS[event], **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(our_state, their_state, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"compile": True}], ids=str)
@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("name", ["RAdam", "NAdam", "AdamW", "ASGD"])
def test_the_shorter_way_is_the_same_way(name: str, count: int, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: with few parameters and with so many that they are packed."""
    results = []
    for way in ("shorter", "whole"):
        if way == "whole":
            monkeypatch.setattr(repeated.RepeatedStep, "again", lambda *args: False)
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(3, k + 1, generator=generator)) for k in range(count)]
        optimizer = getattr(optim, name)(params, **flags)
        for step in range(6):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
        results.append([params, [optimizer.state[p] for p in params]])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_shorter_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    original = repeated.RepeatedStep.again
    monkeypatch.setattr(repeated.RepeatedStep, "again", lambda *args: taken.append(original(*args)) or taken[-1])
    for cls in (optim.AdamW, optim.NAdam):
        taken.clear()
        run(cls, EVENTS["no gradient"], lr=0.01)
        assert taken == [True] * 3 + [False] * 4  # the first step makes the state known; in the end the counters differ


def test_a_frozen_parameter_gets_no_entry_in_the_state() -> None:
    trained, frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = optim.AdamW([trained, frozen])
    for _ in range(3):
        trained.grad = torch.ones(2)
        optimizer.step()
    assert frozen not in optimizer.state


def test_version_counters_move_as_torchs_do() -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.AdamW([p])
    for _ in range(4):
        p.grad = torch.ones(2)
        before = p._version
        optimizer.step()
        assert p._version > before


def test_a_state_with_one_tensor_of_another_dtype_keeps_off_the_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    params = {k: torch.randn(5, generator=generator) for k in "ab"}
    grads = {k: torch.randn(5, generator=generator) for k in "ab"}
    opt = ps.adamw(0.1)
    _, state = opt.step(grads, opt.init_state(params), params)
    adam = ps.find(state, ps.AdamState)
    mixed = (adam._replace(exp_avg={**adam.exp_avg, "b": adam.exp_avg["b"].double()}), *state[1:])
    assert isinstance(state[0], ps.AdamState)
    found, after = opt.step(grads, mixed, params)
    expected, _ = opt.step(grads, state, params)
    torch.testing.assert_close(found, expected)
    assert ps.find(after, ps.AdamState).exp_avg["b"].dtype == torch.float64
