"""Populations from lists, hyperparameters as tensors, what vmap maps over, and pytrees that are cut from their past."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import purestep as ps
from tests.cases import Case, each

SWEEP = (1e-3, 1e-2, 1e-1)


def test_members_are_stacked_where_they_differ() -> None:
    population = ps.stack([ps.adamw(lr=lr, weight_decay=wd) for lr, wd in zip(SWEEP, (0.0, 0.1, 0.1))])
    found = population.hyperparams
    assert found["lr"].tolist() == list(SWEEP)
    assert found["weight_decay"].tolist() == [0.0, 0.1, 0.1]
    assert found["lr"].dtype == torch.float64
    assert found["betas"] == (0.9, 0.999)
    assert pytree.tree_structure(population) == pytree.tree_structure(ps.adamw())
    dims = ps.in_dims(population).hyperparams
    assert (dims["lr"], dims["weight_decay"], dims["eps"]) == (0, 0, None)


def test_members_that_agree_are_stacked_everywhere() -> None:
    assert ps.stack([ps.scale(0.5)] * 2).hyperparams["factor"].tolist() == [0.5, 0.5]
    assert ps.stack([ps.scale(0.5)]).hyperparams["factor"].tolist() == [0.5]


def test_numbers_and_tensors_are_stacked_in_the_dtype_of_the_tensors() -> None:
    found = ps.stack([ps.scale(torch.tensor(0.5)), ps.scale(2.0)]).hyperparams["factor"]
    assert found.tolist() == [0.5, 2.0]
    assert found.dtype == torch.float32


def test_schedules_are_stacked_by_their_numbers() -> None:
    make = ps.schedules.cosine
    population = ps.stack([ps.sgd(make(lr, total_steps=4)) for lr in SWEEP])

    def rate(t: ps.Transform) -> torch.Tensor:
        p, _ = t.step(torch.ones(1), t.init_state(torch.zeros(1)), torch.zeros(1))
        return -p

    found = torch.func.vmap(rate, in_dims=(ps.in_dims(population),))(population)
    torch.testing.assert_close(found[:, 0], torch.tensor(SWEEP))


def test_parameters_and_states_are_stacked_too() -> None:
    each = [{"w": torch.full((2,), float(k)), "b": torch.tensor(k + 0.5)} for k in range(3)]
    population = ps.stack(each)
    assert population["w"].shape == (3, 2)
    assert population["b"].tolist() == [0.5, 1.5, 2.5]
    opt = ps.adam()
    state = ps.stack([opt.init_state(p) for p in each])
    batched = torch.func.vmap(opt.init_state)(population)
    assert pytree.tree_structure(state) == pytree.tree_structure(batched)
    for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(batched)):
        assert torch.equal(a, b)


def test_states_with_holes_come_out_of_vmap_and_go_in_again() -> None:
    opt, members = ps.rmsprop(lr=0.1), torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    dims = ps.out_dims(opt.init_state(members[0]))
    assert set(pytree.tree_leaves(dims)) == {0, None}
    assert pytree.tree_structure(dims) == pytree.tree_structure(opt.init_state(members[0]))
    state = torch.func.vmap(opt.init_state, out_dims=dims)(members)
    moved, _ = torch.func.vmap(opt.step, in_dims=(0, dims, 0), out_dims=(0, dims))(members, state, members)
    alone = torch.stack([opt.step(p, opt.init_state(p), p)[0] for p in members])
    torch.testing.assert_close(moved, alone)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "needs at least one member"),
        ([ps.sgd(), ps.adam()], "must have one structure, but number 1 is chain"),
        ([ps.trace(0.9), ps.trace(0.9), ps.trace(0.9, nesterov=True)], "must have one structure, but number 2 is trace"),
        ([{"a": torch.ones(2)}, {"a": torch.ones(3)}], r"must have one shape in 'a', but have \[\(2,\), \(3,\)\]"),
        ([{"a": torch.ones(2)}, {"a": 1.0}], r"must have one shape in 'a', but have \[\(\), \(2,\)\]"),
        ([{"a": 1.0}, {"a": "b"}], "differ in 'a' must have numbers or tensors there, but one has 'b'"),
        ([{"a": None}, {"a": 0.1}], "differ in 'a' must have numbers or tensors there, but one has None"),
    ],
    ids=["none", "algorithms", "switches", "shapes", "a number for a tensor", "words", "a hole"],
)
def test_what_is_no_population(members: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ps.stack(members)


@each()
def test_every_transform_as_tensors(case: Case) -> None:
    """All numbers are 0-d tensors, none is mapped over; as a population of one all are, and the first member is the same."""
    t = case.transform()
    made = ps.tensors(t)
    pairs = list(zip(pytree.tree_leaves(made), pytree.tree_leaves(t)))
    assert all(isinstance(a, torch.Tensor) and a.item() == b and a.dtype == torch.float64 for a, b in pairs if b is not None)
    assert all(a is None for a, b in pairs if b is None)
    assert not any(x == 0 for x in pytree.tree_leaves(ps.in_dims(made)))
    one = ps.stack([t])
    assert pytree.tree_map(lambda x: x if x is None else x[0].item(), one) == t
    assert [x for x in pytree.tree_leaves(ps.in_dims(one)) if x is not None] == [0 for _, b in pairs if b is not None]


def test_tensors_of_another_dtype_and_those_that_are_there_already() -> None:
    given = torch.tensor(0.5, dtype=torch.float32)
    made = ps.tensors(ps.adam(lr=given), dtype=torch.bfloat16).hyperparams
    assert made["lr"] is given
    assert made["eps"].dtype == torch.bfloat16


def test_detach_cuts_all_levels() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    cut = ps.detach({"a": 2 * x, "b": [None, "text", 3]})
    assert not cut["a"].requires_grad
    assert cut["b"] == [None, "text", 3]
    assert torch.func.grad(lambda x: (x * ps.detach(x)).sum())(torch.tensor([3.0])).item() == 3.0
    assert torch.func.grad(lambda x: torch.func.grad(lambda y: ps.detach(x) * y * x)(x))(torch.tensor(3.0)).item() == 3.0
    assert torch.func.jvp(lambda x: x * ps.detach(x), (torch.tensor(3.0),), (torch.tensor(1.0),))[1].item() == 3.0
    assert torch.func.vmap(torch.func.grad(lambda x: x * ps.detach(x)))(torch.tensor([2.0, 3.0])).tolist() == [2.0, 3.0]


def test_detach_keeps_one_tensor_one() -> None:
    state = ps.adam().init_state({"a": torch.ones(2), "b": torch.ones(3)})
    cut = ps.detach(state)
    steps = next(s.step for s in cut if hasattr(s, "step"))
    assert steps["a"] is steps["b"]
    assert type(cut[0]) is type(state[0])


def test_truncated_backpropagation() -> None:
    """Between two segments that are cut apart, the derivative is that of the last one alone."""
    opt = ps.sgd(0.1, momentum=0.9)

    def loss(p: torch.Tensor) -> torch.Tensor:
        return torch.cos(p).sum()

    p = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    first = ps.meta.unroll(opt, loss, p, 2)
    middle = ps.detach(first.params).requires_grad_()
    last = ps.meta.unroll(opt, loss, middle, 2, state=ps.detach(first.state))
    (found,) = torch.autograd.grad(last.params.sum(), middle)
    alone = torch.func.grad(lambda p: ps.meta.unroll(opt, loss, p, 2, state=ps.detach(first.state)).params.sum())(
        middle.detach()
    )
    torch.testing.assert_close(found, alone)


# ------------------------------------------------------------------------------------------------- members of populations


@each()
def test_a_population_is_its_members(case: Case) -> None:
    """Parameters, and the state of every transform with its own fields: counts of skips, averages, line searches."""
    t = case.transform()
    starts = [case.problem()[0]] * 3
    params = [{name: p * (k + 1) for name, p in start.items()} for k, start in enumerate(starts)]
    members = [(p, t.init_state(p)) for p in params]
    population = ps.stack(members)
    for found, (p, state) in zip(ps.unstack(population), members, strict=True):
        assert pytree.tree_structure(found) == pytree.tree_structure((p, state))
        for x, y in zip(pytree.tree_leaves(found), pytree.tree_leaves((p, state))):
            assert torch.equal(x, y) if isinstance(y, torch.Tensor) else x == y
    parents = [2, 0, 2]
    expected = pytree.tree_leaves(ps.stack([members[k] for k in parents]))
    for index in (parents, torch.tensor(parents)):
        for x, y in zip(pytree.tree_leaves(ps.take(population, index)), expected):
            assert torch.equal(x, y) if isinstance(y, torch.Tensor) else x == y


def test_what_is_one_member_in_several_ways() -> None:
    population = {"w": torch.arange(6.0).reshape(3, 2), "shared": torch.tensor(5.0), "rate": 0.1, "hole": None}
    one, some = ps.take(population, -1), ps.take(population, slice(1, None))
    assert one["w"].tolist() == [4.0, 5.0]
    assert one["shared"] is population["shared"]
    assert (one["rate"], one["hole"]) == (0.1, None)
    assert some["w"].tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert some["w"].data_ptr() == population["w"][1:].data_ptr()
    assert ps.take(population, torch.tensor([True, False, True]))["w"].tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert len(ps.unstack(population)) == 3
    twice = ps.take([population["w"]] * 2, [0, 1])
    assert twice[0] is twice[1]


def test_a_member_that_copies_another_goes_on_as_that_one() -> None:
    """Population based training: the skips of one that met a NaN, and the learning rate, come along."""
    opt = ps.skip_if_nonfinite(ps.adam(torch.tensor([0.1, 0.2, 0.3])))
    dims = ps.in_dims(opt)
    params = torch.ones(3, 2)
    state = torch.func.vmap(lambda t, p: t.init_state(p), in_dims=(dims, 0))(opt, params)
    step = torch.func.vmap(lambda t, g, s, p: t.step(g, s, p), in_dims=(dims, 0, 0, 0))
    params, state = step(opt, torch.tensor([[1.0, 1.0], [torch.nan, 1.0], [1.0, 1.0]]), state, params)
    assert state.skipped.tolist() == [0.0, 1.0, 0.0]
    opt, params, state = ps.take((opt, params, state), [1, 1, 2])
    assert state.skipped.tolist() == [1.0, 1.0, 0.0]
    assert opt.hyperparams["lr"].tolist() == pytest.approx([0.2, 0.2, 0.3])
    params, state = step(opt, torch.ones(3, 2), state, params)
    assert torch.equal(params[0], params[1])
    assert not torch.equal(params[1], params[2])


@pytest.mark.parametrize(
    ("population", "message"),
    [
        ({"a": torch.ones(2), "b": torch.ones(3, 2)}, "first dimension, but 'a' has 2, 'b' has 3"),
        ((ps.sgd(torch.ones(2)), torch.ones(3)), r"but '0.2.lr' has 2, '1' has 3"),
        ({"a": 1.0, "b": torch.tensor(1.0)}, "A population must have a tensor with a first dimension"),
    ],
    ids=["sizes", "a transform", "numbers"],
)
def test_what_has_no_members(population: object, message: str) -> None:
    for function in (ps.unstack, lambda x: ps.take(x, 0)):
        with pytest.raises(ValueError, match=message):
            function(population)
    with pytest.raises(IndexError):
        ps.take(torch.ones(2), 2)


# ---------------------------------------------------------------------------------------------------------------- vectors


def test_a_tree_as_a_vector_and_back() -> None:
    params = {"w": torch.randn(2, 3), "layer": [torch.randn(()), None, torch.randn(0, 4)], "b": torch.randn(3).t()}
    flat, unravel = ps.ravel(params)
    assert flat.shape == (10,)
    again = unravel(flat)
    assert pytree.tree_structure(again) == pytree.tree_structure(params)
    assert again["layer"][1] is None
    for x, y in zip(pytree.tree_leaves(again), pytree.tree_leaves(params)):
        assert y is None or torch.equal(x, y)
    assert flat.data_ptr() != params["w"].data_ptr()


def test_vectors_inside_torch_func() -> None:
    params = {"w": torch.randn(2, 3, dtype=torch.float64), "b": torch.randn(3, dtype=torch.float64)}
    flat, unravel = ps.ravel(params)

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return (p["w"] ** 3).sum() * p["b"].prod()

    hessian = torch.func.hessian(lambda x: loss(unravel(x)))(flat)
    assert hessian.shape == (9, 9)
    expected = ps.ravel(torch.func.grad(loss)(params))[0]
    torch.testing.assert_close(torch.func.grad(lambda x: loss(unravel(x)))(flat), expected)
    batch = torch.stack([flat, 2 * flat])
    back = torch.func.vmap(lambda x: ps.ravel(unravel(x))[0])(batch)
    assert torch.equal(back, batch)
    compiled = torch.compile(lambda p: ps.ravel(p)[0] * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(params), 2 * flat)


def test_what_is_no_vector() -> None:
    with pytest.raises(ValueError, match=r"but got torch\.float32 on cpu, torch\.float64 on cpu"):
        ps.ravel([torch.ones(1), torch.ones(1, dtype=torch.float64)])
    with pytest.raises(ValueError, match="but got none"):
        ps.ravel([None])
    with pytest.raises(ValueError, match=r"vector of 2 elements, but got a tensor of shape \(3,\)"):
        ps.ravel(torch.ones(2))[1](torch.ones(3))
