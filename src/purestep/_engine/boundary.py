"""Where pytrees become lists and lists become pytrees again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep._core import maths, sharded, tree
from purestep._core.lists import pick, put
from purestep._core.plain import plain
from purestep._core.primitives import (
    Fields,
    Link,
)
from purestep._core.torch_api import foreach_copy_, is_batched
from purestep._engine.checks import check_gradients, check_like, spread_alike
from purestep._engine.plan import Plan

PyTree = Any


def columns_of(plan: Plan, states: Sequence[Any], spec: tree.Spec) -> list[list[Any]]:
    """The states of a plan's transforms, with lists for what they keep per parameter.

    Raises:
        TypeError: a state is that of another transform.
    """
    found: list[list[Any]] = []
    for link, expected, info, state in zip(plan.links, plan.types, plan.fields, states):
        if type(state) is not expected:
            raise TypeError(
                f"{link.transform.declaration.name} needs its own state, {expected.__name__}, but got {type(state).__name__}. "
                "A state belongs to the transform whose init_state made it."
            )
        own: list[Any] = []
        for c, name, leaf in zip(state, info.names, info.leaves):
            own.append(tree.flatten_like(c, spec, f"{expected.__name__}.{name}") if leaf else c)
        found.append(own)
    return found


def trees_of(plan: Plan, states: Sequence[Any], spec: tree.Spec) -> list[Any]:
    """`columns_of` undone: the states with trees again."""
    return [tree_of(*given, spec) for given in zip(plan.links, plan.types, plan.fields, states)]


def tree_of(link: Link, kind: Any, info: Fields, columns: Sequence[Any], spec: tree.Spec) -> Any:
    """The state of one transform, of the type `kind`, with trees in place of lists."""
    own: list[Any] = []
    for c, leaf in zip(columns, info.leaves):
        own.append(tree.unflatten(c, spec) if leaf else c)
    return kind(*own, None) if link.transform.declaration.inner else kind(*own)


def kept_in_place(out: list[Any], news: list[Any], olds: list[Any], plan: Plan) -> None:
    """Move new states into the memory of the old ones, which was given away: what a graph has captured is to be found there.

    Only memory is written to that no result is in. `news` is changed.
    """
    held = set(map(maths.memory, out))
    pairs: list[tuple[Any, Any]] = []
    for own, before, info in zip(news, olds, plan.fields):
        for new, old, leaf in zip(own, before, info.leaves):
            held.update(map(maths.memory, new if leaf else [new]))
            pairs += zip(new, old) if leaf else [(new, old)]
    moved: dict[int, Tensor] = {}
    sources: list[Tensor] = []
    for new, old in pairs:
        if new is old or id(new) in moved or not plain([new, old]) or maths.memory(old) in held:
            continue
        if (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device):
            held.add(maths.memory(old))
            moved[id(new)] = old
            sources.append(new)
    if not moved:
        return
    foreach_copy_([*moved.values()], sources)
    for own, info in zip(news, plan.fields):
        for f, leaf in enumerate(info.leaves):
            own[f] = [moved.get(id(x), x) for x in own[f]] if leaf else moved.get(id(own[f]), own[f])


def unshared(
    out: list[Any], news: list[Any], given: tuple[list[Any], list[Any], list[Any]], plan: Plan, views: bool
) -> tuple[list[Any], list[Any]]:
    """The results of a pure update, with copies of those that are its inputs: results may be given away, inputs were not.

    What is one tensor in several places, as counters are, is one copy. A field that holds anything but tensors is never
    overwritten, and stays.

    Args:
        out: the new parameters, or the updates.
        news: the new states, per transform and field.
        given: the parameters, the gradients and the old states.
        plan: of the transform.
        views: whether results may be views of inputs.
    """
    leaves, gradients, states = given
    lists: list[tuple[Any, Any, bool]] = []
    for own, olds, info in zip(news, states, plan.fields):
        lists += zip(own, olds, info.leaves)
    if torch.compiler.is_compiling():  # which has no identities; the same list is compared place by place
        made = [copied(new, old, leaves, gradients) if leaf else new for new, old, leaf in lists]
        out = copied(out, leaves, gradients)
    else:
        mark = maths.memory if views else id  # results may be views of inputs, or not
        held = set(map(mark, leaves)) | set(map(mark, gradients))
        for _, old, leaf in lists:
            held.update(map(mark, old) if leaf else (mark(old),))
        held.discard(mark(None))
        copies: dict[int, Any] = {}

        def copy(x: Any) -> Any:
            if mark(x) not in held or not isinstance(x, Tensor):
                return x
            if id(x) not in copies:
                copies[id(x)] = x.clone()
            return copies[id(x)]

        made = []
        for new, _, leaf in lists:
            if leaf:
                made.append(new if held.isdisjoint(map(mark, new)) else [*map(copy, new)])
            else:
                made.append(copy(new))
        out = out if held.isdisjoint(map(mark, out)) else [*map(copy, out)]
    result: list[Any] = []
    start = 0
    for own in news:
        result.append(made[start : start + len(own)])
        start += len(own)
    return out, result


def copied(new: list[Any], *olds: list[Any]) -> list[Any]:
    """A list with copies of those tensors that one of the others has in the same place; the same copy for the same tensor."""
    if not any([x is old[k] for old in olds for k, x in enumerate(new)]):
        return new
    originals: list[Any] = []
    copies: list[Any] = []
    result: list[Any] = []
    for k, x in enumerate(new):
        if x is None or not any([x is old[k] for old in olds]):
            result.append(x)
            continue
        place = next((j for j, y in enumerate(originals) if y is x), None) if originals and originals[0] is x else None
        if place is None:
            originals.append(x)
            copies.append(x.clone())
            place = len(copies) - 1
        result.append(copies[place])
    return result


def pick_leaves(state: list[Any], info: Fields, rows: list[int]) -> list[Any]:
    """The fields of a state for some of the parameters."""
    return [pick(c, rows) if leaf else c for c, leaf in zip(state, info.leaves)]


def share(column: list[Any], params: list[Any]) -> list[Any]:
    """One counter for all parameters on a device, instead of one each: they begin equal."""
    shared: dict[Any, Any] = {}
    result = []
    for x, p in zip(column, params):
        if x is None or is_batched(x):
            result.append(x)
        else:
            result.append(shared.setdefault((p.device, x.dtype), x))
    return result


def distinct(plan: Plan, states: list[Any]) -> list[Any]:
    """All that is in these states, of links that do something; counters, which parameters share, once each."""
    found: list[Any] = []
    counters: dict[int, Any] = {}
    for s, info, off in zip(states, plan.fields, plan.off):
        for c, leaf, scalar in zip(s, info.leaves, info.scalars):
            if off:
                continue
            if leaf and scalar:
                counters.update(zip(map(id, c), c))
            else:
                found += [x for x in c if x is not None] if leaf else [c]
    return found + [x for x in counters.values() if x is not None]


def like_params(
    given: PyTree,
    name: str,
    plan: Plan,
    params: tuple[list[Any], list[int] | None, tree.Spec],
    mask: Callable[[tuple[Any, ...]], list[bool]],
) -> list[Any]:
    """An extra argument that is a tree, as the list of the parameters that have a gradient; None where no one looks at it."""
    leaves, rows, spec = params
    found, live, paths = [pick(xs, rows) for xs in (tree.flatten_like(given, spec, name), leaves, spec.paths())]
    needed: list[Any] = [None] * len(found)
    for link in plan.links:
        d = link.transform.declaration
        for k, yes in enumerate(mask(link.masks) if name in d.trees else ()):
            if yes and not isinstance(found[k], Tensor):
                raise TypeError(f"{d.name} needs {name} for every gradient, but at {tree.quote(paths[k])} it is {found[k]!r}.")
            if yes:
                check_like(found[k], live[k], f"{name} at {tree.quote(paths[k])}")
                needed[k] = found[k]
    return needed


def on_lists(function: Callable[[PyTree], Any], leaves: list[Any], rows: list[int] | None, spec: tree.Spec) -> Any:
    """`value_and_grad` as a function of the list of the parameters that have a gradient; the others are held fixed."""

    def listed(params: list[Tensor]) -> tuple[Any, list[Any]]:
        whole = params if rows is None else put(leaves, rows, params)
        result = function(tree.unflatten(whole, spec))
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Tensor) or result[0].dim():
            got = f"({', '.join(map(tree.described, result))})" if isinstance(result, tuple) else tree.described(result)
            raise TypeError(
                f"value_and_grad must return (value, gradients), the value a 0-d tensor, but it returned {got}. "
                "torch.func.grad_and_value returns them the other way around: lambda p: grad_and_value(loss)(p)[::-1]."
            )
        found = tree.flatten_like(result[1], spec, "the gradients of value_and_grad")
        check_gradients(found, leaves, [p if p is None else p.shape for p in leaves], spec)
        if not plain(leaves, found, optional=True):
            found = spread_alike(found, leaves, [], spec)
        for k in range(len(leaves)) if rows is None else rows:
            if found[k] is None:
                raise ValueError(f"value_and_grad gives no gradient at {tree.quote(spec.paths()[k])}, where grads have one.")
        return sharded.whole(result[0]), pick(found, rows)

    return listed
