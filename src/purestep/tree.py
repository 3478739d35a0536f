"""Pytrees in, lists out: the boundary between what a user holds and what the engine works on.

`flatten` takes any pytree torch knows apart into its leaves and a `Spec`, `unflatten` puts it together again, and
`flatten_like` takes apart a second tree that must match the first, naming the first place where it does not. `None` is a
leaf: a parameter without a gradient, or a state that a leaf does not have.

Flat dicts, lists and tuples of tensors, which is what almost every call is given, take a path of their own: it costs what
`list(tree.values())` costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

LEAVES = frozenset({Tensor, torch.nn.Parameter, type(None)})


class Spec(NamedTuple):
    """How a tree is put together again: a flat container's type and keys, or torch's own description."""

    kind: type | None  # dict, list or tuple when flat; Tensor for a bare leaf; None for anything else
    keys: tuple[Any, ...]
    general: pytree.TreeSpec | None

    @property
    def size(self) -> int:
        return len(self.keys) if self.general is None else self.general.num_leaves

    def paths(self) -> list[str]:
        """One dotted path per leaf: `'layer1.weight'`, `'0.bias'`; a bare tensor's is `''`."""
        if self.general is None:
            return [str(key) for key in self.keys]
        holes = pytree.tree_unflatten(range(self.size), self.general)
        return [dotted(path) for path, _ in pytree.tree_flatten_with_path(holes)[0]]


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
    leaves, general = pytree.tree_flatten(tree)
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
    return leaves[0] if general is None else pytree.tree_unflatten(leaves, general)


def flatten_like(tree: Any, spec: Spec, name: str, other: str = "params") -> list[Any]:
    """The leaves of `tree`, in the order of `spec`; a dict may hold its keys in any order.

    Raises:
        ValueError: if `tree` is not put together as `spec`, with the first path at which it differs.
    """
    kind, keys, general = spec
    same = type(tree) is kind
    if kind is dict and same and len(tree) == len(keys):
        try:
            return [tree[key] for key in keys]
        except KeyError:
            pass  # named below
    elif (kind is list or kind is tuple) and same and len(tree) == len(keys):
        return list(tree)
    elif kind is Tensor and type(tree) in LEAVES:
        return [tree]
    elif general is not None:
        leaves, found = pytree.tree_flatten(tree)
        if found == general:
            return leaves
        try:
            return list(general.flatten_up_to(tree))  # the same keys in another order, or objects where leaves should be
        except ValueError:
            pass
    elif isinstance(tree, Mapping) and kind is dict and set(tree) == set(keys):
        return [tree[key] for key in keys]
    raise ValueError(difference(tree, spec, name, other))


def difference(tree: Any, spec: Spec, name: str, other: str) -> str:
    """One sentence: where `tree` departs from `spec`."""
    expected = spec.paths()
    found = [dotted(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    for path in expected:
        if path not in found:
            return f"{name} must have the structure of {other}, but they have no leaf at {quote(path)}."
    for path in found:
        if path not in expected:
            return f"{name} must have the structure of {other}, but {other} have no leaf at {quote(path)}."
    return (
        f"{name} must have the structure of {other}: the paths are the same, but the containers are not "
        f"({name}: {type(tree).__name__})."
    )


def dotted(path: Sequence[Any]) -> str:
    """A key path as a user would write it."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def quote(path: str) -> str:
    """A path as it stands in an error; the empty path is the tree itself."""
    return repr(path) if path else "the root (a bare tensor)"
