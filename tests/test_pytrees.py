"""Every container torch knows, parameters without gradients, and what is said when a tree is not what it should be."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps
from purestep.state import places, roles_of
from tests.cases import Case, each
from tests.problems import clone, difference


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor | None


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


TREES: dict[str, Any] = {
    "dict": lambda: {"b": leaf(2), "a": leaf(3, 2)},
    "list": lambda: [leaf(2), leaf(3, 2)],
    "tuple": lambda: (leaf(2), leaf(3, 2)),
    "tensor": lambda: leaf(3, 2),
    "NamedTuple": lambda: Layer(leaf(3, 2), leaf(3)),
    "OrderedDict": lambda: collections.OrderedDict(b=leaf(2), a=leaf(3, 2)),
    "nested": lambda: {"layers": [Layer(leaf(3, 2), None), Layer(leaf(3), leaf(()))], "head": (leaf(1), {"x": leaf(2, 1, 2)})},
    "empty dict": dict,
    "empty list": list,
    "empty nested": lambda: {"a": [], "b": ()},
    "Parameter": lambda: {"w": torch.nn.Parameter(leaf(2)), "b": torch.nn.Parameter(leaf(()))},
    "empty tensor": lambda: {"none": leaf(0, 3), "some": leaf(2)},
    "transposed": lambda: [leaf(3, 2).t(), leaf(4, 2)[::2]],
}


def like(tree: Any) -> Any:
    return pytree.tree_map(lambda x: torch.randn_like(x).detach() if isinstance(x, Tensor) else x, tree)


@each("containers")
@pytest.mark.parametrize("kind", TREES)
@pytest.mark.in_turn("kind")
def test_every_container(case: Case, kind: str) -> None:
    """The same leaves in any container give the same numbers, in the same container, state included."""
    t = case.transform()
    params = given = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) and case.treats(x) else None, TREES[kind]())
    flat = {f"{i}": x for i, x in enumerate(pytree.tree_leaves(params)) if x is not None}
    state, flat_state = t.init_state(params), t.init_state(flat)
    for _ in range(3):
        g = like(params)
        flat_g = {f"{i}": x for i, x in enumerate(pytree.tree_leaves(g)) if x is not None}
        params, state = t.step(g, state, params)
        flat, flat_state = t.step(flat_g, flat_state, flat)
    assert pytree.tree_structure(params) == pytree.tree_structure(given)
    assert difference([x for x in pytree.tree_leaves(params) if x is not None], list(flat.values())) == 0
    for _, own in places(state):
        for column, role in zip(own, roles_of(type(own))):
            if role in ("like", "other"):  # else it is not kept per parameter
                assert pytree.tree_structure(column) == pytree.tree_structure(params)


@each("moving")
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("executor", [None, "leaf", "foreach"])
@pytest.mark.in_turn("executor")
def test_a_none_gradient_leaves_everything_as_it_was(case: Case, donate: bool, executor: Any) -> None:
    t = case.transform()
    shape = (2,) if case.treats(leaf(2)) else (2, 3)
    params = {"still": leaf(3, 2), "moving": leaf(*shape), "also": leaf(*shape)}
    params, state = t.step(like(params), t.init_state(params), params)
    g = {**like(params), "still": None}
    before, copy = clone((params, state)), clone(params)
    updates, _ = t.update(g, clone(state), params, executor=executor)
    assert updates["still"] is None
    new, after = t.step(g, state, params, donate=donate, executor=executor)
    assert torch.equal(new["still"], copy["still"])
    assert not torch.equal(new["moving"], copy["moving"])
    for a, b in zip(pytree.tree_leaves_with_path(after), pytree.tree_leaves_with_path(before[1])):
        if any(getattr(k, "key", None) == "still" for k in a[0]) and a[1] is not None:
            assert torch.equal(a[1], b[1])
    # the others do what they would have done alone (but for what a whole transform makes of them together)
    if "alone" not in case.lacks and not case.name.startswith(("clip_by", "chain")):
        alone, _ = t.step({"moving": g["moving"]}, only(before[1], "moving"), {"moving": before[0]["moving"]})
        assert difference(new["moving"], alone["moving"]) <= 1e-15


def only(state: Any, key: str) -> Any:
    return pytree.tree_map(lambda d: {key: d[key]} if type(d) is dict else d, state, is_leaf=lambda x: type(x) is dict)


def test_all_gradients_none() -> None:
    t, p = ps.chain(ps.clip_by_global_norm(1.0), ps.adamw()), {"a": leaf(2)}
    s = t.init_state(p)
    new, after = t.step({"a": None}, s, p)
    assert torch.equal(new["a"], p["a"])
    assert torch.equal(after[1].step["a"], s[1].step["a"])
    given, kept = t.step({"a": None}, s, p, donate=True)
    assert given["a"] is p["a"]
    assert kept[1].step["a"] is s[1].step["a"]


def test_a_dict_may_hold_its_keys_in_any_order() -> None:
    t = ps.adam(lr=0.1)
    p = {"a": leaf(2), "b": leaf(3)}
    g = {"b": leaf(3), "a": leaf(2)}
    new, _ = t.step(g, t.init_state(p), p)
    same, _ = t.step({"a": g["a"], "b": g["b"]}, t.init_state(p), p)
    assert difference(new, same) == 0
    nested, _ = t.step({"x": g}, t.init_state({"x": p}), {"x": p})
    assert difference(nested, {"x": same}) == 0


@settings(deadline=None, max_examples=25)
@given(
    st.recursive(
        st.just(None) | st.lists(st.integers(0, 3), max_size=3).map(tuple),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3) | st.tuples(inner, inner)
        ),
        max_leaves=6,
    )
)
def test_any_tree(shapes: Any) -> None:
    """Any nesting of lists, dicts and tuples, with any shapes and holes: what comes back has the same form."""
    is_shape = lambda x: x is None or (isinstance(x, tuple) and all(isinstance(n, int) for n in x))  # noqa: E731
    params = pytree.tree_map(lambda s: None if s is None else torch.ones(s), shapes, is_leaf=is_shape)
    t = ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(lr=0.1))
    state = t.init_state(params)
    new, after = t.step(params, state, params)
    assert pytree.tree_structure(new) == pytree.tree_structure(params)
    assert pytree.tree_structure(after) == pytree.tree_structure(state)
    for a, b in zip(pytree.tree_leaves(new), pytree.tree_leaves(params)):
        assert (a is None) == (b is None)
        assert a is None or a.shape == b.shape


# -------------------------------------------------------------------------------------------------------------- bad input


def bad(match: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=match)


NET = {"layer1.weight": torch.ones(2, 3), "layer1.bias": torch.ones(2)}


@pytest.fixture
def started() -> Any:
    t = ps.chain(ps.clip_by_global_norm(1.0), ps.adamw())
    return t, t.init_state(NET)


@pytest.mark.parametrize(
    ("g", "error", "message"),
    [
        ({"layer1.weight": torch.ones(2, 3)}, ValueError, r"grads must have the structure of params, but there is no leaf at 'layer1.bias'"),
        ({**NET, "extra": torch.ones(1)}, ValueError, r"params have no leaf at 'extra'"),
        ([torch.ones(2, 3), torch.ones(2)], ValueError, r"grads must have the structure of params, but there is no leaf at 'layer1.weight'"),
        ({**NET, "layer1.bias": torch.ones(3)}, ValueError, r"gradient of 'layer1.bias' has shape \(3,\), but the parameter has shape \(2,\)"),
        ({**NET, "layer1.bias": torch.ones(2).double()}, ValueError, r"gradient of 'layer1.bias' has dtype torch.float64, but the parameter has dtype torch.float32"),
        ({**NET, "layer1.bias": torch.ones(2, device="meta")}, ValueError, r"gradient of 'layer1.bias' has device meta, but the parameter has device cpu"),
        ({**NET, "layer1.bias": torch.ones(2).to_sparse()}, RuntimeError, r"gradient of 'layer1.bias' is sparse, .* Make it dense"),
        ({**NET, "layer1.bias": 1.0}, TypeError, r"'layer1.bias' is a float: 1.0"),
    ],
    ids=["missing", "extra", "container", "shape", "dtype", "device", "sparse", "float"],
)  # fmt: skip
def test_gradients_that_do_not_match(started: Any, g: Any, error: type[Exception], message: str) -> None:
    t, state = started
    copy = clone((state, NET))
    for donate in (False, True):
        with bad(message, error):
            t.step(g, state, NET, donate=donate)
    assert difference((state, NET), copy) == 0


def test_nested_paths_are_dotted() -> None:
    t, p = ps.sgd(), {"blocks": [{"w": torch.ones(2)}, {"w": torch.ones(3)}]}
    with bad(r"gradient of 'blocks\.1\.w' has shape \(4,\)"):
        t.step({"blocks": [{"w": torch.ones(2)}, {"w": torch.ones(4)}]}, t.init_state(p), p)
    with bad(r"the root \(a bare tensor\) has shape"):
        t.step(torch.ones(2), t.init_state(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize(("p", "match"), [(torch.ones(2).long(), "torch.int64"), (torch.ones(2).bool(), "torch.bool")])
def test_integer_parameters(p: Tensor, match: str) -> None:
    with bad(rf"Only floating-point and complex parameters can be optimized, but 'w' is {match}", TypeError):
        ps.adam().init_state({"w": p})
    with bad(r"Parameters must be tensors, but 'w' is a float", TypeError):
        ps.adam().init_state({"w": 1.0})


def test_a_state_of_something_else(started: Any) -> None:
    t, state = started
    with bad("scale_by_adam needs its own state, AdamState, but got TraceState", TypeError):
        t.step(NET, (state[0], ps.trace(0.9).init_state(NET), *state[2:]), NET)
    with bad("state of a chain of 4 must be a tuple of 4 states, but got tuple of 2", TypeError):
        t.step(NET, state[:2], NET)
    with bad("must be a tuple of 4 states, but got AdamState", TypeError):
        t.step(NET, state[1], NET)
    with bad(r"AdamState.step must have the structure of params, but there is no leaf at 'layer1.weight'"):
        t.step(NET, t.init_state({"other": torch.ones(2)}), NET)
    larger = {k: torch.ones(5) for k in NET}
    for executor in (None, "leaf", "foreach"):
        with bad(
            r"scale_by_adam: the state's 'exp_avg' at 'layer1.weight' has shape \(5,\), but the parameter has shape \(2, 3\)"
        ):
            t.step(NET, t.init_state(larger), NET, executor=executor)
    with bad("needs its own state, ScheduleState, but got EmptyState", TypeError):
        ps.scale(lambda step: 1.0).step(NET, ps.EmptyState(), NET)


@pytest.mark.parametrize("mask", [lambda path, p: "yes", {"layer1.weight": 1, "layer1.bias": True}], ids=["function", "tree"])
def test_a_mask_of_the_wrong_type(mask: Any) -> None:
    t = ps.add_decayed_weights(0.1, mask=mask)
    with bad(r"A mask must be True or False for every parameter, but for 'layer1.weight' it is ", TypeError):
        t.step(NET, ps.EmptyState(), NET)


def test_a_mask_of_another_structure() -> None:
    with bad("mask must have the structure of params, but there is no leaf at 'layer1.bias'"):
        ps.add_decayed_weights(0.1, mask={"layer1.weight": True}).step(NET, ps.EmptyState(), NET)


def test_masks() -> None:
    """A function and a tree of bools are the same mask; masks of masks are both."""
    matrices = lambda path, p: p.ndim > 1  # noqa: E731
    g = like(NET)
    for t in (
        ps.masked(ps.scale(2.0), matrices),
        ps.masked(ps.scale(2.0), {"layer1.weight": True, "layer1.bias": False}),
        ps.masked(ps.masked(ps.scale(2.0), lambda path, p: "layer1" in path), matrices),
        ps.masked(ps.chain(ps.scale(4.0), ps.scale(0.5)), matrices),
    ):
        u, _ = t.update(g, t.init_state(NET), NET)
        assert torch.equal(u["layer1.weight"], 2 * g["layer1.weight"])
        assert torch.equal(u["layer1.bias"], g["layer1.bias"])


def test_a_masked_parameter_holds_no_state() -> None:
    t = ps.masked(ps.trace(0.9), lambda path, p: p.ndim > 1)
    state = t.init_state(NET)
    assert state.momentum_buffer["layer1.bias"] is None
    _, state = t.step(like(NET), state, NET)
    assert state.momentum_buffer["layer1.bias"] is None
    assert state.momentum_buffer["layer1.weight"] is not None


def test_a_masked_whole_transform_sees_only_its_parameters() -> None:
    t = ps.masked(ps.clip_by_global_norm(1.0), lambda path, p: "bias" in path)
    g = {"layer1.weight": torch.full((2, 3), 100.0), "layer1.bias": torch.tensor([3.0, 4.0])}
    u, _ = t.update(g, t.init_state(NET), NET)
    torch.testing.assert_close(u["layer1.bias"], torch.tensor([0.6, 0.8]))
    assert torch.equal(u["layer1.weight"], g["layer1.weight"])


def test_momentum_switched_on_later_begins_then() -> None:
    """A transform that was off has no state; switched on, it starts its own."""
    off, on = ps.sgd(lr=0.1), ps.sgd(lr=0.1, momentum=0.9)
    assert off == on.replace(momentum=0.0)
    p = {"w": torch.zeros(2)}
    state = off.init_state(p)
    assert state[1].momentum_buffer == {"w": None}
    p, state = off.step({"w": torch.ones(2)}, state, p)
    for _ in range(2):
        p, state = on.step({"w": torch.ones(2)}, state, p)
    torch.testing.assert_close(p["w"], torch.full((2,), -0.1 - 0.1 - 0.19))
