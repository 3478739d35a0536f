"""Parameters in containers of a user's: registered dataclasses, and what is like a TensorDict or has no keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import purestep as ps


@dataclasses.dataclass
class Layer:
    weight: Any
    bias: Any


@dataclasses.dataclass
class Model:
    first: Any
    scale: Any
    rest: Any


pytree.register_dataclass(Layer)
pytree.register_dataclass(Model)


class Tensors:
    """A mapping of tensors that takes no None, as a TensorDict."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items = {k: v for k, v in items.items() if v is not None}


pytree.register_pytree_node(
    Tensors,
    lambda x: (list(x.items.values()), list(x.items)),
    lambda values, keys: Tensors(dict(zip(keys, values))),
    serialized_type_name="tests.Tensors",
    flatten_with_keys_fn=lambda x: ([(pytree.MappingKey(k), v) for k, v in x.items.items()], list(x.items)),
)


class Whole(MutableMapping):  # type: ignore[type-arg]
    """A mapping of tensors that torch makes None of where one of them is None, as of a TensorDict."""

    def __init__(self, items: dict[str, Any]) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_[key] = value

    def __delitem__(self, key: str) -> None:
        del self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


pytree.register_pytree_node(
    Whole,
    lambda x: (list(x.values()), list(x)),
    lambda values, keys: None if any(x is None for x in values) else Whole(dict(zip(keys, values))),
    serialized_type_name="tests.Whole",
    flatten_with_keys_fn=lambda x: ([(pytree.MappingKey(k), v) for k, v in x.items()], list(x)),
)


class Pair:
    """Two attributes that torch makes None of where one of them is None, as of a tensorclass."""

    def __init__(self, **values: Any) -> None:
        self.one, self.two = values.get("one"), values.get("two")

    def there(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}


pytree.register_pytree_node(
    Pair,
    lambda x: (list(x.there().values()), list(x.there())),
    lambda values, keys: None if any(x is None for x in values) else Pair(**dict(zip(keys, values))),
    serialized_type_name="tests.Pair",
    flatten_with_keys_fn=lambda x: ([(pytree.GetAttrKey(k), v) for k, v in x.there().items()], list(x.there())),
)


class Bag:
    """A container that was registered without keys."""

    def __init__(self, values: Iterable[Any]) -> None:
        self.values = list(values)


pytree.register_pytree_node(Bag, lambda x: (x.values, None), lambda values, _: Bag(values), serialized_type_name="tests.Bag")

FLAT = {
    "w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "b": torch.tensor([0.5, -0.5]),
    "s": torch.tensor(2.0),
    "r": torch.tensor([[0.3, -0.7]]),
}
CONTAINERS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "dataclasses": lambda w, b, s, r: Model(Layer(w, b), s, {"r": [r]}),
    "tensors": lambda w, b, s, r: Tensors({"w": w, "b": b, "more": Tensors({"s": s, "r": r})}),
    "mappings without None": lambda w, b, s, r: Whole({"1": Whole({"w": w, "b": b}), "2": Whole({"s": s}), "r": r}),
    "attributes without None": lambda w, b, s, r: Pair(one=Pair(one=w, two=b), two=Pair(one=s, two=r)),
    "mixed": lambda w, b, s, r: [Layer(w, Tensors({"b": b})), (s, Model(r, None, None))],
    "without keys": lambda w, b, s, r: Bag([w, Bag([b, s]), {"r": r}]),
}


def named(tree: Any) -> dict[str, Any]:
    """The leaves by their names, where all are there."""
    return dict(zip(FLAT, pytree.tree_leaves(tree)))


TRANSFORMS: dict[str, Callable[[], ps.Transform]] = {
    "sgd": lambda: ps.sgd(lr=0.1),
    "momentum": lambda: ps.sgd(lr=0.1, momentum=0.9),
    "adamw": lambda: ps.adamw(lr=lambda t: 0.1),
    "partition": lambda: ps.partition(
        {"m": ps.adam(0.1), "v": ps.sgd(0.1, momentum=0.9)}, lambda path, p: "m" if p.ndim == 2 else "v"
    ),
    "freeze": lambda: ps.chain(ps.freeze(lambda path, p: p.ndim == 1), ps.adam(0.1)),
    "masked": lambda: ps.chain(ps.masked(ps.trace(0.9), lambda path, p: p.ndim == 2), ps.scale(-0.1)),
    "adafactor": lambda: ps.adafactor(0.1),
    "sm3": lambda: ps.sm3(0.1),
    "clip": lambda: ps.chain(ps.clip_by_global_norm(1.0), ps.adam(0.1)),
    "accumulate": lambda: ps.accumulate(ps.adam(0.1), 2),
    "quantized": lambda: ps.quantize_state(ps.adam(0.1), bits=8, min_size=4),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_steps_are_those_of_a_dict(container: str, name: str) -> None:
    """Pure, given away, and as updates; the state comes back in the same containers."""
    opt, build = TRANSFORMS[name](), CONTAINERS[container]
    for donate in (False, True):
        flat: Any = {k: p.clone() for k, p in FLAT.items()}
        tree = build(*[p.clone() for p in FLAT.values()])
        states = [opt.init_state(flat), opt.init_state(tree)]
        for k in range(3):
            grads = {n: torch.sin(p + k) for n, p in flat.items()}
            if k == 2 and not donate:
                updates, states[0] = opt.update(grads, states[0], flat)
                flat = ps.apply_updates(flat, updates)
                found, states[1] = opt.update(build(*grads.values()), states[1], tree)
                tree = ps.apply_updates(tree, found)
            else:
                flat, states[0] = opt.step(grads, states[0], flat, donate=donate)
                tree, states[1] = opt.step(build(*grads.values()), states[1], tree, donate=donate)
            assert type(tree) is type(build(*FLAT.values()))
            torch.testing.assert_close(named(tree), flat, rtol=0, atol=0)
        for old, new in zip(*[[x for x in pytree.tree_leaves(s) if x is not None] for s in states]):
            assert torch.equal(old, new) if isinstance(old, Tensor) else old == new


@pytest.mark.parametrize("container", ["dataclasses", "tensors", "mixed", "attributes without None"])
def test_a_gradient_that_is_none(container: str) -> None:
    """A container that leaves it out has said so."""
    opt, build = ps.adam(0.1), CONTAINERS[container]
    tree = build(*FLAT.values())
    grads = [*FLAT.values()]
    grads[1] = None
    new, _ = opt.step(build(*grads), opt.init_state(tree), tree)
    flat, _ = opt.step(dict(zip(FLAT, grads)), opt.init_state(FLAT), FLAT)
    torch.testing.assert_close(named(new), flat, rtol=0, atol=0)


@pytest.mark.parametrize("container", ["mappings without None", "attributes without None"])
def test_a_state_without_some_of_its_leaves_keeps_the_others(container: str) -> None:
    """What has no state is left out of the container, and only that."""
    opt = ps.partition({"m": ps.adam(0.1), "v": ps.sgd(0.1)}, ps.by_ndim({2: "m"}, default="v"))
    tree = CONTAINERS[container](*FLAT.values())
    state = opt.init_state(tree)
    adam = ps.find(state["m"], ps.AdamState)
    assert type(adam.exp_avg) is type(tree)
    assert [x.shape for x in pytree.tree_leaves(adam.exp_avg)] == [FLAT["w"].shape, FLAT["r"].shape]
    buffers = ps.find(state["v"], ps.TraceState).momentum_buffer
    assert buffers is None  # nothing is there to leave something out of
    loaded = ps.load_state_dict(state, ps.state_dict(state))
    for a, b in zip(opt.step(tree, state, tree), opt.step(tree, loaded, tree)):
        for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b)):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(pytree.TreeSpec, "children"), reason="torch 2.9 does not trace contextlib.suppress")
@pytest.mark.parametrize("container", ["mappings without None", "attributes without None"])
def test_a_compiled_step_leaves_it_out_too(container: str) -> None:
    opt = ps.partition({"m": ps.adam(0.1), "v": ps.sgd(0.1)}, ps.by_ndim({2: "m"}, default="v"))
    tree = CONTAINERS[container](*FLAT.values())
    state = opt.init_state(tree)
    compiled = torch.compile(opt.step, backend="eager", fullgraph=True)(tree, state, tree)
    for x, y in zip(pytree.tree_leaves(compiled[0]), pytree.tree_leaves(opt.step(tree, state, tree)[0])):
        torch.testing.assert_close(x, y)


def test_errors_name_the_place() -> None:
    """What is missing from a dict, or of another type, is no None."""
    opt, tree = ps.sgd(0.1), Model(Layer(FLAT["w"], FLAT["b"]), FLAT["s"], {"r": [FLAT["r"]]})
    with pytest.raises(ValueError, match=r"grads must have the structure of params, but there is no leaf at 'rest.r.0'"):
        opt.step(Model(tree.first, tree.scale, {}), opt.init_state(tree), tree)
    with pytest.raises(ValueError, match=r"grads must have the structure of params"):
        opt.step(Model({"weight": FLAT["w"], "bias": FLAT["b"]}, tree.scale, tree.rest), opt.init_state(tree), tree)
    whole = Whole({"a": Whole({"w": FLAT["w"]}), "b": Layer(FLAT["b"], None)})
    with pytest.raises(ValueError, match=r"grads must have the structure of params, but there is no leaf at 'b.weight'"):
        opt.step(Whole({"a": whole["a"], "b": None}), opt.init_state(whole), whole)  # a dataclass does hold None
    bag = Bag([FLAT["w"], FLAT["b"]])
    with pytest.raises(ValueError, match=r"The gradient of '1' has shape \(\), but the parameter has shape \(2,\)"):
        opt.step(Bag([FLAT["w"], FLAT["s"]]), opt.init_state(bag), bag)
    with pytest.raises(ValueError, match=r"grads must have the structure of params, but there is no leaf at '1'"):
        opt.step(Bag([FLAT["w"]]), opt.init_state(bag), bag)


def test_implicit_and_unrolled_training_in_containers() -> None:
    """Learning to learn takes them too."""
    start = Model(Layer(torch.ones(2), None), torch.tensor(1.0), None)

    def loss(p: Any) -> Tensor:
        return ((p.first.weight - 3) ** 2).sum() + p.scale**2

    found = ps.meta.unroll(ps.sgd(0.1), loss, start, 2).params
    torch.testing.assert_close(found.first.weight, torch.full((2,), 3 - 2 * 0.64))
