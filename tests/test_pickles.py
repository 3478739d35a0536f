"""Files that were pickled by earlier versions load, and continue as what they were made from."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from purestep import optim
from tests.pickles import make

FOLDER = Path(make.__file__).parent
OLD = make.transforms()


def load(name: str) -> Any:
    return pickle.loads((FOLDER / f"{name}.pkl").read_bytes())


@pytest.mark.parametrize("name", OLD)
def test_a_transform_and_its_state_continue(name: str) -> None:
    transform, params, state = load(name)
    assert transform == OLD[name]
    new, newer = make.steps(OLD[name])
    torch.testing.assert_close((params, state), (new, newer), rtol=1e-6, atol=1e-6)
    grads = {n: torch.ones_like(x) for n, x in params.items()}
    extras = {"value_and_grad": make.value_and_grad} if transform.plan.extras else {}
    found = transform.step(grads, state, params, **extras)
    torch.testing.assert_close(found, OLD[name].step(grads, newer, new, **extras), rtol=1e-6, atol=1e-6)


def test_an_optimizer_continues() -> None:
    params, optimizer = load("optimizer")
    others, other = make.optimizer()
    assert type(optimizer) is optim.AdamW
    for own, o in ((params, optimizer), (others, other)):
        assert o.param_groups[0]["params"][0] is own[0]
        for p in own:  # pickled parameters lose their gradients
            p.grad = torch.ones_like(p)
        o.step()
    torch.testing.assert_close(params, others)


def test_an_optimizer_before_its_first_step() -> None:
    results = []
    for optimizer in (load("fresh"), make.fresh()):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        results.append((params, optimizer.state_dict()["state"]))
    torch.testing.assert_close(*results)


def test_schedules() -> None:
    schedule = load("schedules")
    assert schedule == make.schedule()
    assert [schedule(k) for k in (0, 5, 50)] == [make.schedule()(k) for k in (0, 5, 50)]
