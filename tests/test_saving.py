"""States as flat mappings from names to tensors: what is saved comes back to the last bit, and what is another's is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from tests.cases import Case, Options, each_options
from tests.problems import difference
from tests.test_state import begun, extras, noise, shares

PARAMS = {"layer.weight": torch.ones(3, 2), "layer.bias": torch.ones(2)}


def stepped(opt: ps.Transform, params: Any = PARAMS, steps: int = 2, **how: Any) -> Any:
    state = opt.init_state(params)
    for _ in range(steps):
        params, state = opt.step(params, state, params, **how)
    return params, state


@each_options()
def test_there_and_back_through_a_file(case: Case, options: Options, tmp_path: Path) -> None:
    """Of every algorithm, in any order; the next step is the one that would have been."""
    t, params, state = begun(case, options)
    flat = ps.state_dict(state)
    shuffled = random.Random(0).sample(sorted(flat), len(flat))
    safetensors.torch.save_file({name: flat[name] for name in shuffled}, tmp_path / "state")
    again = ps.load_state_dict(t.init_state(case.problem()[0]), safetensors.torch.load_file(tmp_path / "state"))
    leaves, spec = pytree.tree_flatten(state)
    others, other = pytree.tree_flatten(again)
    assert spec == other
    for x, y in zip(leaves, others):
        assert type(x) is type(y)
        assert not isinstance(x, Tensor) or (x.dtype == y.dtype and torch.equal(x, y))
    grads = noise(params, 7)
    assert difference(t.step(grads, again, params, **extras(t)), t.step(grads, state, params, **extras(t))) == 0


def test_names() -> None:
    opt = ps.chain(
        ps.clip_by_global_norm(1.0),
        ps.partition({"m": ps.muon(0.1), "v": ps.sgd(0.1, momentum=0.9)}, lambda _, p: "m" if p.dim() > 1 else "v"),
    )
    assert sorted(ps.state_dict(opt.init_state(PARAMS))) == [
        "1.m.0.momentum_buffer.layer.weight", "1.m.0.step.layer.weight",
        "1.v.1.momentum_buffer.layer.bias", "1.v.1.step.layer.bias",
    ]  # fmt: skip
    wrapped = ps.state_dict(ps.skip_if_nonfinite(ps.scale_by_adam()).init_state(PARAMS["layer.bias"]))
    assert sorted(name for name in wrapped if name.startswith("inner")) == ["inner.exp_avg", "inner.exp_avg_sq", "inner.step"]
    nested = {"layer": {"weight": torch.ones(3, 2), "bias": torch.ones(2)}}
    opt = ps.adam(0.1)
    assert sorted(ps.state_dict(opt.init_state(nested))) == sorted(ps.state_dict(opt.init_state(PARAMS)))


def test_two_parameters_of_one_name() -> None:
    params = {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}
    with pytest.raises(ValueError, match=r"'1.step.a.b'.*other names"):
        ps.state_dict(ps.adam(0.1).init_state(params))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("count", [2, 30])
def test_nothing_is_shared(count: int, donate: bool) -> None:
    """Neither with the state nor among the entries: also of many small parameters, whose moments are pieces of one tensor."""
    params = {f"p{k}": torch.ones(3) for k in range(count)}
    _, state = stepped(ps.nadam(0.1), params, donate=donate)
    flat = ps.state_dict(state)
    memory = [x.untyped_storage().data_ptr() for x in flat.values()]
    assert len(set(memory)) == len(memory)
    assert set(memory).isdisjoint(x.untyped_storage().data_ptr() for x in pytree.tree_leaves(state))
    again = ps.load_state_dict(state, flat)
    held = {x.untyped_storage().data_ptr() for x in [*flat.values(), *pytree.tree_leaves(state)]}
    assert held.isdisjoint(x.untyped_storage().data_ptr() for x in pytree.tree_leaves(again))


def test_counters_are_shared_where_they_are_equal() -> None:
    opt = ps.adamw(0.1)
    params, state = stepped(opt)
    again = ps.load_state_dict(opt.init_state(params), ps.state_dict(state))
    assert shares(pytree.tree_leaves(again)) == shares(pytree.tree_leaves(state))
    _, late = opt.step({**params, "layer.bias": None}, state, params)
    again = ps.load_state_dict(opt.init_state(params), ps.state_dict(late))
    assert [x.item() for x in again[0].step.values()] == [3.0, 2.0]


def test_the_layout_and_the_history_of_what_is_saved() -> None:
    params = {"w": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    opt = ps.scale_by_adam()
    _, state = stepped(opt, params)
    flat = ps.state_dict(pytree.tree_map(lambda x: x.clone().requires_grad_(), state))
    assert all(x.is_contiguous() and not x.requires_grad for x in flat.values())
    again = ps.load_state_dict(opt.init_state(params), flat)
    assert again.exp_avg["w"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(again.exp_avg["w"], state.exp_avg["w"])


def test_lbfgs_has_a_history_of_any_length() -> None:
    opt, p = ps.lbfgs(0.5, max_iter=4), torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)

    def value_and_grad(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x**4).sum() + (x * x).sum(), 4 * x**3 + 2 * x

    state = opt.init_state(p)
    p, state = opt.step(value_and_grad(p)[1], state, p, value_and_grad=value_and_grad)
    flat = ps.state_dict(state)
    assert "old_dirs.0" in flat
    again = ps.load_state_dict(opt.init_state(p), flat)
    steps = [opt.step(value_and_grad(p)[1], s, p, value_and_grad=value_and_grad) for s in (state, again)]
    assert difference(*steps) == 0
    elsewhere = ps.load_state_dict(pytree.tree_map(lambda x: x.to("meta"), opt.init_state(p)), flat)
    assert {x.device.type for x in pytree.tree_leaves(elsewhere)} == {"meta"}
    with pytest.raises(ValueError, match=r"not a tensor: 'ro.1'"):
        ps.load_state_dict(opt.init_state(p), {**flat, "ro.1": 1.0})  # type: ignore[dict-item]
    del flat["old_dirs.0"]
    with pytest.raises(ValueError, match=r"missing: 'old_dirs.0'"):
        ps.load_state_dict(opt.init_state(p), flat)


def test_what_is_wrong_is_listed() -> None:
    opt = ps.adamw(0.1)
    template = opt.init_state(PARAMS)
    flat: dict[str, Any] = ps.state_dict(template)
    del flat["0.exp_avg.layer.bias"]
    flat["0.exp_avg.layer.weight"] = torch.zeros(2, 3)
    flat["0.exp_avg_sq.layer.bias"] = torch.zeros(2, dtype=torch.float64)
    flat["0.exp_avg_sq.layer.weight"] = [1.0]
    flat |= {f"x{k}": torch.zeros(1) for k in range(8)}
    before = [x.clone() for x in pytree.tree_leaves(template)]
    with pytest.raises(ValueError, match="not a state like") as caught:
        ps.load_state_dict(template, flat)
    assert str(caught.value).splitlines()[1:] == [
        "missing: '0.exp_avg.layer.bias'",
        "unexpected: 'x0', 'x1', 'x2', 'x3', 'x4', and 3 more",
        "not a tensor: '0.exp_avg_sq.layer.weight'",
        "another shape: '0.exp_avg.layer.weight', (2, 3) instead of (3, 2)",
        "another dtype: '0.exp_avg_sq.layer.bias', torch.float64 instead of torch.float32",
    ]
    assert all(map(torch.equal, before, pytree.tree_leaves(template)))


def test_what_is_no_state() -> None:
    with pytest.raises(TypeError, match=r"holds tensors, but 'lr' is 0\.1"):
        ps.state_dict({"lr": 0.1})
