"""Transforms and schedules as values: repr, equality, pickling, pytrees, replace, and the checks on what they are given."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from purestep import optim
from tests.cases import Case, Options, each_options


def namespace() -> dict[str, Any]:
    return {"torch": torch, **vars(ps.schedules), **vars(ps)}  # `scale` is the transform


@each_options()
def test_the_repr_is_the_recipe(case: Case, options: Options) -> None:
    """Evaluating the repr makes an equal value (a function is shown by its name, and cannot be)."""
    t = case.transform(options)
    if "<" in repr(t) or re.search(r"\b_", repr(t)):
        assert repr(t) == repr(copy.deepcopy(t))
    else:
        assert eval(repr(t), namespace()) == t


@each_options()
def test_equality_copies_and_pickles(case: Case, options: Options) -> None:
    t = case.transform(options)
    assert t == case.transform(options) or "lambda" in repr(t)
    assert hash(t) == hash(copy.deepcopy(t))
    assert copy.deepcopy(t) == t
    assert copy.copy(t) == t
    if "lambda" not in repr(t):
        assert pickle.loads(pickle.dumps(t)) == t
    assert t != ps.chain(t, t)
    assert t != "something else"


def test_equal_means_equal_arguments() -> None:
    assert ps.adamw(1e-3) == ps.adamw()
    assert ps.adamw(1e-3) != ps.adamw(1e-4)
    assert ps.adamw() != ps.adam()
    assert ps.scale(torch.tensor(0.5)) == ps.scale(torch.tensor(0.5))
    assert ps.scale(torch.tensor(0.5)) != ps.scale(0.5)
    assert ps.scale(torch.tensor([0.5, 1.0])) != ps.scale(torch.tensor(0.5))
    assert ps.trace(0.9, nesterov=True) != ps.trace(0.9)


@each_options()
def test_a_pytree_of_hyperparameters(case: Case, options: Options) -> None:
    """Flattening gives the numbers in order; any leaves in their place make a value of the same structure."""
    t = case.transform(options)
    leaves, spec = pytree.tree_flatten(t)
    assert pytree.tree_unflatten(leaves, spec) == t
    doubled = pytree.tree_map(lambda x: x and 2 * x, t)
    assert pytree.tree_leaves(doubled) == [x and 2 * x for x in leaves]
    assert pytree.tree_structure(doubled) == pytree.tree_structure(t) == pytree.tree_structure(ps.tensors(t))
    assert pytree.tree_structure(ps.in_dims(t)) == spec
    paths = [path for path, _ in pytree.tree_flatten_with_path(t)[0]]
    assert len(set(map(str, paths))) == len(leaves)


def test_the_structure_does_not_depend_on_numbers() -> None:
    assert pytree.tree_structure(ps.sgd(momentum=0.0)) == pytree.tree_structure(ps.sgd(momentum=0.9, weight_decay=0.1))
    assert pytree.tree_structure(ps.sgd()) != pytree.tree_structure(ps.sgd(momentum=0.9, nesterov=True))


def test_frozen() -> None:
    t = ps.chain(ps.scale(1.0))
    for value in (t, t.links[0].transform, ps.schedules.constant(1.0)):
        with pytest.raises(AttributeError, match="frozen"):
            value.lr = 2.0  # type: ignore[union-attr]


def test_named_chains() -> None:
    parts = {"clip": ps.clip_by_global_norm(1.0), "adam": ps.adamw(0.1), "rate": ps.scale(0.5)}
    named, plain = ps.named_chain(*parts.items()), ps.chain(*parts.values())
    params = {"w": torch.ones(3, 2), "b": torch.ones(3)}
    state = named.init_state(params)
    assert list(state) == ["clip", "adam", "rate"]
    assert type(state["adam"]) is tuple
    found, after = named.step(params, state, params)
    expected, _ = plain.step(params, plain.init_state(params), params)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert ps.find(after, ps.AdamState).step["w"] == 1
    assert ps.step_count(after) == 1
    assert ps.chain(named, ps.scale(1.0)).init_state(params)[0].keys() == state.keys()  # a chain keeps the names
    assert named != plain
    assert named == pickle.loads(pickle.dumps(named)) == eval(repr(named), vars(ps))
    assert "adam.0.exp_avg.w" in ps.state_dict(after)


def test_hyperparameters_of_named_chains() -> None:
    two = ps.named_chain(("a", ps.sgd(0.1)), ("b", ps.chain(ps.scale(2.0), ps.sgd(0.2))))
    assert {"a.lr": 0.1, "b.lr": 0.2, "factor": 2.0}.items() <= two.hyperparams.items()
    assert two.replace(**{"b.lr": 0.5}).hyperparams["b.lr"] == 0.5
    nested = ps.named_chain(("x", two), ("y", ps.sgd(0.3)))
    assert {"x.a.lr": 0.1, "x.b.lr": 0.2, "y.lr": 0.3}.items() <= nested.hyperparams.items()
    partition = ps.partition({"m": two, "v": ps.sgd(0.4)}, lambda _, p: "m" if p.dim() > 1 else "v")
    assert {"m.a.lr": 0.1, "m.b.lr": 0.2, "v.lr": 0.4}.items() <= partition.hyperparams.items()
    weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = optim.Optimizer(weights, partition)
    assert {len(group["params"]) for group in optimizer.param_groups} == {1}
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params = {"w": torch.ones(3, 2), "b": torch.ones(3)}
    expected, _ = partition.step(params, partition.init_state(params), params)
    torch.testing.assert_close([p.detach() for p in weights], list(expected.values()))


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([ps.sgd(0.1)], TypeError, "argument 0 is chain"),
        ([("a", ps.sgd(0.1)), ("b", torch.optim.SGD)], TypeError, "argument 1 is"),
        ([("a", ps.sgd(0.1)), ("a", ps.sgd(0.1))], ValueError, "must be different, and not empty, but are 'a', 'a'"),
        ([("", ps.sgd(0.1))], ValueError, "not empty"),
    ],
    ids=["no pair", "no transform", "twice", "empty"],
)
def test_what_is_no_named_chain(pairs: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ps.named_chain(*pairs)
    opt = ps.named_chain(("a", ps.sgd(0.1)), ("b", ps.scale(1.0)))
    for state in (ps.chain(ps.sgd(0.1), ps.scale(1.0)).init_state(torch.ones(1)), {"b": (), "a": ()}):
        with pytest.raises(TypeError, match="must be a dict with the keys 'a', 'b', in this order"):
            opt.step(torch.ones(1), state, torch.ones(1))


def test_chains_are_associative() -> None:
    a, b, c = ps.scale(1.0), ps.trace(0.9), ps.scale(3.0)
    assert ps.chain(a, ps.chain(b, c)) == ps.chain(ps.chain(a, b), c) == ps.chain(a, b, c)
    assert ps.chain(ps.chain(), a) == ps.chain(a)
    p = torch.ones(2)
    assert ps.chain().step(torch.ones(2), (), p)[0].tolist() == [2.0, 2.0]
    assert isinstance(ps.chain(a).init_state(p), tuple)


# ------------------------------------------------------------------------------------------------------- hyperparams, replace


def test_hyperparams_and_switches() -> None:
    t = ps.chain(ps.clip_by_global_norm(1.0), ps.sgd(0.1, momentum=0.9, nesterov=True))
    assert t.hyperparams == {"max_norm": 1.0, "weight_decay": 0.0, "momentum": 0.9, "dampening": 0.0, "lr": 0.1}
    assert t.switches == {"nesterov": True}


def test_replace_makes_a_new_value() -> None:
    t = ps.adamw(lr=0.1)
    changed = t.replace(lr=0.2, betas=(0.5, 0.6))
    assert t == ps.adamw(lr=0.1)
    assert changed == ps.adamw(lr=0.2, betas=(0.5, 0.6))
    assert ps.sgd(momentum=0.5).replace(nesterov=True) == ps.sgd(momentum=0.5, nesterov=True)
    masked = ps.masked(ps.chain(ps.scale(1.0), ps.trace(0.9)), {"a": True})
    assert masked.replace(momentum=0.5) == ps.masked(ps.chain(ps.scale(1.0), ps.trace(0.5)), {"a": True})


def test_replace_by_place() -> None:
    t = ps.chain(ps.scale(1.0), ps.trace(0.9), ps.scale(3.0))
    assert t.replace(**{"2.factor": 4.0}) == ps.chain(ps.scale(1.0), ps.trace(0.9), ps.scale(4.0))
    with pytest.raises(TypeError, match=r"'factor' is ambiguous here: say which one, '0.factor', '2.factor'"):
        t.replace(factor=1.0)


def test_replace_with_an_unknown_name_or_a_bad_value() -> None:
    with pytest.raises(
        TypeError,
        match=r"There is no 'learning_rate' to replace in chain\(.*its names are 'betas', 'eps', 'lr', 'weight_decay'",
    ):
        ps.adamw().replace(learning_rate=0.1)
    with pytest.raises(ValueError, match="lr must be a number of at least 0"):
        ps.adamw().replace(lr=-1.0)


# ------------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ps.sgd(lr=-0.1), ValueError, r"lr must be a number of at least 0, a 0-d tensor or a schedule, but got -0.1"),
        (lambda: ps.sgd(lr=math.nan), ValueError, r"lr must be a number of at least 0.*nan"),
        (lambda: ps.sgd(lr="fast"), TypeError, r"lr must be a number of at least 0, a 0-d tensor or a schedule \(step -> value\), but got 'fast'"),
        (lambda: ps.sgd(lr=None), TypeError, "lr must be"),
        (lambda: ps.sgd(lr=True), TypeError, "lr must be"),
        (lambda: ps.sgd(lr=torch.tensor(True)), TypeError, "dtype torch.bool"),
        (lambda: ps.sgd(lr=torch.tensor(1j)), TypeError, "dtype torch.complex64"),
        (lambda: ps.sgd(momentum=-1.0), ValueError, "momentum must be a number of at least 0"),
        (lambda: ps.sgd(nesterov=True), ValueError, "Nesterov momentum requires a momentum and zero dampening"),
        (lambda: ps.sgd(momentum=0.9, dampening=0.1, nesterov=True), ValueError, "Nesterov momentum"),
        (lambda: ps.adam(betas=(1.0, 0.9)), ValueError, r"betas\[0\] must be a number in \[0, 1\), .* but got 1.0"),
        (lambda: ps.adam(betas=(0.9, -0.1)), ValueError, r"betas\[1\]"),
        (lambda: ps.adam(betas=0.9), ValueError, "betas must be 2 numbers, but got 0.9"),
        (lambda: ps.adam(betas=(0.9,)), ValueError, "betas must be 2 numbers"),
        (lambda: ps.adam(eps=-1.0), ValueError, "eps must be"),
        (lambda: ps.adamw(weight_decay=-1.0), ValueError, "add_decayed_weights: weight_decay must be"),
        (lambda: ps.clip_by_global_norm(-1.0), ValueError, "clip_by_global_norm: max_norm must be"),
        (lambda: ps.clip(), TypeError, r"clip\(max_value.*missing a required argument: 'max_value'"),
        (lambda: ps.trace(0.9, nestrov=True), TypeError, "unexpected keyword argument 'nestrov'"),
        (lambda: ps.chain(ps.adam, ps.scale(1.0)), TypeError, "chain takes transforms, but argument 0 is"),
        (lambda: ps.chain(ps.scale), TypeError, r"Did you mean to call it: scale\(...\)"),
        (lambda: ps.masked(0.1, {}), TypeError, "masked takes a transform and a mask"),
        (lambda: ps.leafwise(lambda g, p: g), TypeError, r"For a transform without state write @leafwise\(\)"),
        (lambda: ps.whole(3), TypeError, "whole takes a state"),
        (lambda: ps.schedules.cosine(1.0, total_steps=-1), ValueError, "total_steps must be an integer of at least 0, but got -1"),
        (lambda: ps.schedules.cosine(1.0, total_steps=2.5), TypeError, "total_steps must be an integer"),
        (lambda: ps.schedules.warmup_cosine(1.0, warmup_steps=9, total_steps=5), ValueError, "warmup_steps must be at most total_steps"),
    ],
)  # fmt: skip
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_numbers_of_every_kind() -> None:
    import numpy as np

    assert ps.scale(2) == ps.scale(2.0)
    assert ps.scale(np.float32(0.5)) == ps.scale(0.5)
    assert ps.adam(betas=[0.8, 0.9]) == ps.adam(betas=(0.8, 0.9))
    for value in (torch.tensor(0.1), torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64)):
        t = ps.sgd(lr=value)
        for executor in (None, "leaf", "foreach"):
            torch.testing.assert_close(
                t.step(torch.ones(2), t.init_state(torch.ones(2)), torch.ones(2), executor=executor)[0], torch.full((2,), 0.9)
            )


class Momentum(NamedTuple):
    buffer: Tensor

    @classmethod
    def init(cls, p: Tensor) -> Momentum:
        return cls(torch.zeros_like(p))


def test_a_schedule_needs_a_counter() -> None:
    @ps.leafwise(Momentum)
    def plain(g: Tensor, s: Momentum, p: Tensor, k: float) -> tuple[Tensor, Momentum]:
        return g * k, s

    with pytest.raises(
        TypeError,
        match=r"plain cannot follow a schedule, because Momentum does not count its updates; add the field 'step: Scalar'",
    ):
        plain(lambda step: 1.0)


def test_fused_says_why_it_cannot() -> None:
    t, p = ps.chain(ps.sgd(0.1), ps.clip(1.0)), torch.ones(2)
    with pytest.raises(
        RuntimeError,
        match=r"A fused step \(fused=True, executor='fused'\) needs a chain that ends in what a torch._fused_\* kernel computes.*clip",
    ):
        t.step(p, t.init_state(p), p, executor="fused")
