"""The states of Adam in libraries whose states are trees: optax and TorchOpt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from purestep._core import tree
from purestep.convert.bridge import Bridge, PyTree
from purestep.transform import Transform

DEEPEST = 50
"""No state is nested as deep."""


def from_optax(transform: Transform, params: PyTree, state: Any) -> Any:
    """The state of an Adam, as optax has it; its arrays may be numpy's.

    Args:
        transform: `adam`, `adamw` or another chain with `scale_by_adam`.
        params: the parameters, a pytree of the structure that they have in optax, in dicts, lists and tuples.
        state: optax's state: a chain's, or a ``ScaleByAdamState`` with its fields ``count``, ``mu`` and ``nu``.

    Returns:
        the state, as `from_torch` returns it.

    Raises:
        ValueError: there is no such field, or more than one; or the structure or a shape is another.

    >>> import collections, numpy as np, torch, purestep as ps
    >>> ScaleByAdamState = collections.namedtuple("ScaleByAdamState", "count mu nu")
    >>> theirs = (ScaleByAdamState(np.int32(3), {"w": np.ones(2)}, {"w": np.ones(2)}), ())
    >>> state = ps.convert.from_optax(ps.adam(), {"w": torch.zeros(2)}, theirs)
    >>> ps.step_count(state)
    3
    """
    bridge = Bridge.over(transform, params)
    theirs = adam_in(state)
    mu, nu = (bridge.leaves_of(x, name) for x, name in ((theirs.mu, "mu"), (theirs.nu, "nu")))
    return bridge.adam([theirs.count] * len(mu), mu, nu)


def from_torchopt(transform: Transform, params: PyTree, state: Any) -> Any:
    """The state of an Adam, as TorchOpt's functional ``adam`` or ``adamw`` has it.

    Args:
        transform: `adam`, `adamw` or another chain with `scale_by_adam`.
        params: the parameters, a pytree of the structure that they have in TorchOpt, in dicts, lists and tuples.
        state: TorchOpt's state: a chain's, or a ``ScaleByAdamState`` with its fields ``mu``, ``nu`` and ``count``, each a list
            with an entry for each parameter, by their sorted keys.

    Returns:
        the state, as `from_torch` returns it.

    Raises:
        ValueError: as for `from_optax`.
    """
    bridge = Bridge.over(transform, params)
    theirs = adam_in(state)
    places = [k for k in sorted_leaves(tree.unflatten(list(range(len(bridge.spec.paths()))), bridge.spec)) if k in bridge.rows]
    lists = []
    for name in ("count", "mu", "nu"):
        entries = getattr(theirs, name)
        if len(entries) != len(places):
            raise ValueError(
                f"TorchOpt's {name} must have one entry for each parameter, {len(places)}, but has {len(entries)}."
            )
        found = dict(zip(places, entries))
        lists.append([found[k] for k in bridge.rows])
    return bridge.adam(*lists)


def adam_in(state: Any) -> Any:
    """The state of Adam in a state of optax's or TorchOpt's."""
    found = [x for x in walk(state) if all([hasattr(x, name) for name in ("count", "mu", "nu")])]
    if len(found) != 1:
        raise ValueError(f"There must be one state of Adam, with the fields count, mu and nu, but there are {len(found)}.")
    return found[0]


def sorted_leaves(x: Any) -> Iterator[Any]:
    """The leaves of nested dicts, lists and tuples, dicts by their sorted keys."""
    if isinstance(x, (dict, list, tuple)):
        for y in [x[key] for key in sorted(x)] if isinstance(x, dict) else x:
            yield from sorted_leaves(y)
    else:
        yield x


def walk(x: Any, depth: int = 0) -> Iterator[Any]:
    """A state and all that is nested in it."""
    if depth > DEEPEST:
        raise ValueError(f"The state contains itself, or is nested more than {DEEPEST} times.")
    yield x
    for y in x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else ():
        yield from walk(y, depth + 1)
