"""Pytrees in, lists out: the boundary between what a user holds and what the engine works on.

`flatten` takes any pytree torch knows apart into its leaves and a `Spec`, `unflatten` puts it together again, and
`flatten_like` takes apart a second tree that must match the first, naming the first place where it does not. `None` is a
leaf: a parameter without a gradient, or a state that a leaf does not have.

Flat dicts, lists and tuples of tensors, which is what almost every call is given, take a path of their own: it costs what
`list(tree.values())` costs.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purestep._core.torch_api import (
    SUPPORTED_NODES,
    SequenceKey,
    TreeSpec,
    node_type,
    spec_children,
    tree_flatten,
    tree_unflatten,
)

LEAVES = frozenset({Tensor, torch.nn.Parameter, type(None)})


class Spec(NamedTuple):
    """How a tree is put together again: a flat container's type and keys, or torch's own description."""

    kind: type | None  # dict, list or tuple when flat; Tensor for a bare leaf; None for anything else
    keys: tuple[Any, ...]
    general: TreeSpec | None

    @property
    def size(self) -> int:
        return len(self.keys) if self.general is None else self.general.num_leaves

    def paths(self) -> list[str]:
        """One dotted path per leaf: `'layer1.weight'`, `'0.bias'`; a bare tensor's is `''`."""
        if self.general is None:
            return [str(key) for key in self.keys]
        return paths_of(tree_unflatten(range(self.size), self.general))


BARE = Spec(Tensor, ("",), None)


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """The leaves of `tree`, in order, and what `unflatten` needs to put them back."""
    kind = type(tree)
    if kind in LEAVES:
        return [tree], BARE
    if kind is dict:
        leaves = list(tree.values())
        if all([type(x) in LEAVES for x in leaves]):
            return leaves, Spec(dict, tuple(tree), None)
    elif (kind is list or kind is tuple) and all([type(x) in LEAVES for x in tree]):
        return list(tree), Spec(kind, tuple(range(len(tree))), None)
    leaves, general = tree_flatten(tree)
    return leaves, Spec(None, (), general)


def unflatten(leaves: Sequence[Any], spec: Spec) -> Any:
    """The tree that `spec` describes, with these leaves."""
    kind, keys, general = spec
    if kind is dict:
        return dict(zip(keys, leaves))
    if kind is list:
        return list(leaves)
    if kind is tuple:
        return tuple(leaves)
    if general is None:
        return leaves[0]
    return without(iter(leaves), general) if any([x is None for x in leaves]) else tree_unflatten(leaves, general)


def without(leaves: Iterator[Any], spec: TreeSpec) -> Any:
    """The tree that `spec` describes, where some leaves are None. A container that holds no None, and becomes None itself where
    torch puts it together with one, as a TensorDict does, leaves them out.
    """
    if spec.is_leaf():
        return next(leaves)
    values = [without(leaves, child) for child in spec_children(spec)]
    build = SUPPORTED_NODES[spec.type].unflatten_fn
    made = build(values, spec.context)
    given = [x for x in values if x is not None]
    if made is not None or not given:
        return made
    made = build([given[0] if x is None else x for x in values], spec.context)
    for (entry, _), x in zip(children(made) or (), values):
        key = getattr(entry, "key", getattr(entry, "name", entry))
        if x is None and isinstance(made, MutableMapping):
            del made[key]
        elif x is None:
            setattr(made, key, None)
    return made


def flatten_like(tree: Any, spec: Spec, name: str, other: str = "params") -> list[Any]:
    """The leaves of `tree`, in the order of `spec`; a dict may hold its keys in any order.

    Raises:
        ValueError: if `tree` is not put together as `spec`, with the first path at which it differs.
    """
    kind, keys, general = spec
    same = type(tree) is kind
    if kind is dict and same and len(tree) == len(keys):
        try:
            return list(map(tree.__getitem__, keys))
        except KeyError:
            pass  # named below
    elif (kind is list or kind is tuple) and same and len(tree) == len(keys):
        return list(tree)
    elif kind is Tensor and type(tree) in LEAVES:
        return [tree]
    elif general is not None:
        leaves, found = tree_flatten(tree)
        if found == general:
            return leaves
        with suppress(ValueError):  # the same keys in another order, or objects where leaves should be
            return list(general.flatten_up_to(tree))
        with suppress(ValueError):
            return filled(tree, general)
    elif isinstance(tree, Mapping) and kind is dict and set(tree) == set(keys):
        return [tree[key] for key in keys]
    raise ValueError(difference(tree, spec, name, other))


BUILT_IN = frozenset({dict, list, tuple, OrderedDict, defaultdict, deque})


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """The keys and the children of a container, which are numbered where it was registered without keys; None for a leaf."""
    known = SUPPORTED_NODES.get(node_type(node))
    if known is None:
        return None
    if known.flatten_with_keys_fn is not None:
        return list(known.flatten_with_keys_fn(node)[0])
    return [(SequenceKey(k), child) for k, child in enumerate(known.flatten_fn(node)[0])]


def paths_of(tree: Any) -> list[str]:
    """One dotted path per leaf."""

    def below(node: Any, path: tuple[Any, ...]) -> list[str]:
        found = children(node)
        return [dotted(path)] if found is None else [x for key, child in found for x in below(child, (*path, key))]

    return below(tree, ())


def filled(tree: Any, spec: TreeSpec) -> list[Any]:
    """The leaves of `tree` in the order of `spec`, and None where a container has left one out, as dataclasses that are
    registered with torch do with what is None.

    Raises:
        ValueError: if there is more that is different.
    """
    if spec.is_leaf():
        return [tree]
    known = SUPPORTED_NODES[spec.type]
    if tree is None and without(iter([None] * spec.num_leaves), spec) is None:
        return [None] * spec.num_leaves
    found = children(tree)
    if found is None or node_type(tree) is not spec.type:
        raise ValueError
    whole = known.unflatten_fn(range(spec.num_children), spec.context)
    keys = [key for key, _ in children(whole) or ()]
    given = dict(found)
    drops = spec.type not in BUILT_IN and not hasattr(spec.type, "_fields") and known.flatten_with_keys_fn is not None
    if len(keys) != spec.num_children or given.keys() - set(keys) or (len(given) < len(keys) and not drops):
        raise ValueError
    result: list[Any] = []
    for key, child in zip(keys, spec_children(spec)):
        result += filled(given[key], child) if key in given else [None] * child.num_leaves
    return result


def difference(tree: Any, spec: Spec, name: str, other: str) -> str:
    """One sentence: where `tree` departs from `spec`."""
    expected = spec.paths()
    found = paths_of(tree)
    for path in expected:
        if path not in found:
            return f"{name} must have the structure of {other}, but there is no leaf at {quote(path)}."
    for path in found:
        if path not in expected:
            return f"{name} must have the structure of {other}, but {other} have no leaf at {quote(path)}."
    pairs = zip(containers(tree), containers(unflatten(range(spec.size), spec)))
    odd = [
        f"{a.__name__} in place of {b.__name__} at {repr(path) if path else 'the root'}"
        for (path, a), (_, b) in pairs
        if a is not b
    ]
    return (
        f"{name} must have the structure of {other}: the paths are the same, but the containers are not ({''.join(odd[:1])})."
    )


def containers(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, type]]:
    """The paths and the types of all containers, from the root on."""
    found = children(node)
    if found is not None:
        yield dotted(path), type(node)
        for key, child in found:
            yield from containers(child, (*path, key))


def dotted(path: Sequence[Any]) -> str:
    """A key path as a user would write it."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def quote(path: str) -> str:
    """A path as it is shown in an error; the empty path is the tree itself."""
    return repr(path) if path else "the root (a bare tensor)"


def described(x: Any) -> str:
    """What something is, in an error: of a tensor or a container no elements are shown."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    if not isinstance(x, (tuple, list, dict)):
        return repr(x)
    name = type(x).__name__
    named = isinstance(x, dict) and len(x) <= 5
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name} " + (f"with the keys {list(x)}" if named else f"of {len(x)}")
