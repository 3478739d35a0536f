"""Read a state, and operate on it.

A state is a tree of named tuples, one for each transform, and its type declares what every field is: like the parameters,
something else that is kept per parameter (a counter, a factor), or neither. The functions here go by these declarations, and
not by shapes: a counter is no parameter of shape `()`, and a factor of a matrix with one column is no matrix.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from purestep._core import tree
from purestep._core.maths import readable
from purestep._core.primitives import EmptyState, ScheduleState, state_type
from purestep._core.torch_api import tree_map
from purestep._core.values import Schedule
from purestep.transform import PyTree, Transform

S = TypeVar("S", bound=tuple[Any, ...])


def find(state: Any, kind: type[S]) -> S:
    """The state of one transform, by its type, wherever it is in the state of a composed one.

    Args:
        state: the state of any transform.
        kind: the type of the state that is looked for, such as `AdamState`.

    Returns:
        the state itself, a `NamedTuple` of type `kind`, not a copy.

    Raises:
        LookupError: there is none of this type, or there are several; the error lists what there is, and where.
        TypeError: `state` is not the state of a transform, or `kind` is not a type of states.

    >>> import torch, purestep as ps
    >>> opt = ps.chain(ps.clip_by_global_norm(1.0), ps.adamw(lr=0.1))
    >>> params = {"weight": torch.ones(2)}
    >>> params, state = opt.step({"weight": torch.tensor([0.6, 0.8])}, opt.init_state(params), params)
    >>> ps.find(state, ps.AdamState).exp_avg
    {'weight': tensor([0.0600, 0.0800])}
    """
    check_kind(kind, "find")
    every = states_in(state, "find")
    found = [(place, x) for place, x in every if isinstance(x, kind)]
    if len(found) == 1:
        return found[0][1]
    if found:
        there = ", ".join([place for place, _ in found])
        raise LookupError(
            f"There are {len(found)} states of type {kind.__name__} here: {there}. find_all(...) gives all of them."
        )
    named = ", ".join([f"{type(x).__name__} ({place})" for place, x in every if type(x) is not EmptyState])
    raise LookupError(f"There is no {kind.__name__} in this state; there is {named or 'nothing, as its transforms keep none'}.")


def find_all(state: Any, kind: type[S]) -> list[S]:
    """The states of all transforms of one kind, in order.

    Args:
        state: the state of any transform.
        kind: the type of the states that are looked for, such as `TraceState`.

    Returns:
        a list of the states themselves, in the order of the transforms; empty if there is none.

    Raises:
        TypeError: `state` is not the state of a transform, or `kind` is not a type of states.

    >>> import torch, purestep as ps
    >>> opt = ps.chain(ps.trace(0.5), ps.trace(0.9), ps.scale(-0.1))
    >>> [type(s).__name__ for s in ps.find_all(opt.init_state(torch.zeros(1)), ps.TraceState)]
    ['TraceState', 'TraceState']
    """
    check_kind(kind, "find_all")
    return [x for _, x in states_in(state, "find_all") if isinstance(x, kind)]


def step_count(state: Any) -> Any:
    """How many updates a state has seen: the count of the parameter that has had the most.

    Each parameter has a counter of its own, ``find(state, AdamState).step``, which a missing gradient leaves as it is.

    Args:
        state: the state of any transform.

    Returns:
        an int; inside `torch.func`, and for a state that is not on the CPU, a 0-d tensor, which is not waited for.

    Raises:
        LookupError: no transform in it counts its updates.
        TypeError: `state` is not the state of a transform.

    >>> import torch, purestep as ps
    >>> opt, p = ps.adamw(), torch.zeros(2)
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     p, state = opt.step(torch.ones(2), state, p)
    >>> ps.step_count(state)
    3
    """
    every = [x for _, x in states_in(state, "step_count")]
    count = latest(every)
    if count is None:
        named = ", ".join([type(x).__name__ for x in every]) or "nothing"
        raise LookupError(f"This state counts no updates, because no transform needs to know their number. It holds {named}.")
    return count


def get_hyperparams(transform: Transform, state: Any) -> dict[str, Any]:
    """The hyperparameters that the next update will use: `Transform.hyperparams`, with every schedule at the state's step.

    A schedule is evaluated at the step of the transform that follows it, of the parameter that has had the most updates.

    Args:
        transform: any transform.
        state: its state.

    Returns:
        a dict with the names of `Transform.hyperparams`: numbers, tuples of them, and tensors where a hyperparameter is one.

    Raises:
        TypeError: the state is another transform's.

    >>> import torch, purestep as ps
    >>> opt, p = ps.sgd(lr=ps.schedules.linear(1.0, 0.0, total_steps=4)), torch.zeros(1)
    >>> state = opt.init_state(p)
    >>> for _ in range(3):
    ...     p, state = opt.step(torch.ones(1), state, p)
    >>> ps.get_hyperparams(opt, state)["lr"]
    0.25
    """
    states = transform._split(state)
    for link, own in zip(transform.links, states):
        expected = state_type(link.transform)
        if type(own) is not expected:
            raise TypeError(
                f"{link.transform!r} has a state of type {expected.__name__}, but got {type(own).__name__}. A state "
                "belongs to the transform whose init_state made it."
            )

    def current(x: Any, own: Any) -> Any:
        if type(x) is tuple and any([isinstance(y, Schedule) for y in x]):
            return tuple([current(y, own) for y in x])
        count = latest([own])
        return current(x(0 if count is None else count), own) if isinstance(x, Schedule) else x

    return {name: current(x, states[i]) for name, i, _, x in transform._named(hypers=True)}


def map_params(function: Callable[..., Any], state: Any, *others: PyTree, rest: Callable[..., Any] | None = None) -> Any:
    """The state with a function applied to exactly those tensors that are like a parameter: moments, but not counters.

    So the state follows what is done to the rows of a parameter: they are dropped, appended, permuted, sharded. Which tensors
    these are is declared by the type of the state: a field annotated `Tensor` (in a `whole` transform, `list[Tensor]`). The
    structure stays; a parameter that has no state (None) has none afterwards. All other tensors are copied: the new state
    shares no memory with the old one, except what the function returns of it, so ``map_params(torch.clone, state)`` is a
    snapshot.

    Args:
        function: called with each such tensor and what `others` have in its place; returns what replaces it.
        state: the state of any transform.
        *others: further arguments of the function: pytrees of the structure of the parameters, or other states of the same
            transform.
        rest: a function for the other tensors that are kept per parameter, such as counters and the factors of Adafactor,
            called in the same way. By default they keep their values. (What is not kept per parameter, such as the history
            of L-BFGS, always does.)

    Returns:
        the new state, of the type and structure of `state`.

    Raises:
        TypeError: it is not the state of a transform.
        ValueError: one of `others` is neither shaped like the parameters nor a state of the same transform.

    >>> import torch, purestep as ps
    >>> opt, points = ps.adam(), {"x": torch.zeros(4, 3), "weight": torch.zeros(4)}
    >>> state = opt.init_state(points)
    >>> keep = torch.tensor([True, False, True, True])
    >>> state = ps.map_params(lambda m: m[keep], state)
    >>> {name: m.shape for name, m in ps.find(state, ps.AdamState).exp_avg.items()}
    {'x': torch.Size([3, 3]), 'weight': torch.Size([3])}
    """
    kinds = {type(x) for _, x in states_in(state, "map_params")}
    along = [any([type(y) in kinds for _, y in places(x)]) for x in others]  # a state; all else is shaped like the parameters
    made: dict[tuple[int, ...], Any] = {}  # parameters that shared a counter share the new one

    def apply(f: Callable[..., Any], name: str, tensors: Any, given: Sequence[Any], shared: bool) -> Any:
        leaves, spec = tree.flatten(tensors)
        columns = [tree.flatten_like(x, spec, name if s else "others") for x, s in zip(given, along)]
        new = []
        for row in zip(leaves, *columns):
            key = tuple(map(id, row))
            y = None if row[0] is None else made[key] if shared and key in made else f(*row)
            if shared:
                made[key] = y
            new.append(y)
        return tree.unflatten(new, spec)

    copies: dict[int, Any] = {}

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return copies[id(x)] if id(x) in copies else copies.setdefault(id(x), x.clone())

    def visit(x: Any, place: str, given: Sequence[Any]) -> Any:
        for y, s in zip(given, along):
            if s and (type(y) is not type(x) or (isinstance(x, (tuple, list, dict)) and len(y) != len(x))):
                raise ValueError(
                    f"map_params takes other states of the same transform, but at {place} one is {type(x).__name__} and the "
                    f"other {type(y).__name__}."
                )
        form = getattr(type(x), "form", None)
        if form is not None:  # quantized: what a function sees are the means themselves
            return form.again(visit(form.full(x), place, [form.full(y) if s else y for y, s in zip(given, along)]))
        if isinstance(x, dict):
            return {k: visit(v, f"{place}[{k!r}]", [y[k] if s else y for y, s in zip(given, along)]) for k, v in x.items()}
        if not isinstance(x, (tuple, list)):
            return x
        names = field_names(x)
        roles = roles_of(type(x)) if is_state(x) else ["state"] * len(x)
        new = []
        for i, (v, name, role) in enumerate(zip(x, names, roles)):
            inner = [y[i] if s else y for y, s in zip(given, along)]
            if role == "state":
                new.append(visit(v, place + name, inner))
            elif role == "like" or (rest is not None and role == "other"):
                new.append(apply(function if role == "like" else rest, place + name, v, inner, role == "other"))  # type: ignore[arg-type]
            else:
                new.append(tree_map(copied, v))
        return type(x)(*new) if hasattr(x, "_fields") else type(x)(new)

    return visit(state, "state", others)


# --------------------------------------------------------------------------------------------------------------- helpers


def is_state(x: Any) -> bool:
    """Whether this is the state of one transform: a named tuple that knows how it begins."""
    return isinstance(x, tuple) and hasattr(x, "_fields") and (hasattr(x, "init") or isinstance(x, (EmptyState, ScheduleState)))


def places(state: Any, place: str = "state") -> Iterator[tuple[str, Any]]:
    """The states of all transforms in a state, each with the expression that finds it."""
    if is_state(state):
        yield place, state
    if isinstance(state, dict):
        for key, x in state.items():
            yield from places(x, f"{place}[{key!r}]")
    elif isinstance(state, (tuple, list)):
        roles = roles_of(type(state)) if is_state(state) else ["state"] * len(state)
        for name, role, x in zip(field_names(state), roles, state):
            if role == "state":
                yield from places(x, place + name)


def states_in(state: Any, name: str) -> list[tuple[str, Any]]:
    """The same as a list, of what is a state.

    Raises:
        TypeError: it is not one; what an optimizer keeps is none, and is read by the names of its fields.
    """
    found = list(places(state))
    if not found and not (isinstance(state, (tuple, list, dict)) and len(state) == 0):
        raise TypeError(
            f"{name} takes the state of a transform, which init_state makes, but got {type(state).__name__}. An optimizer of "
            "purestep.optim keeps one for each parameter: optimizer.state[p]['exp_avg'], as in torch."
        )
    return found


def field_names(x: Any) -> list[str]:
    """How the entries of a tuple or list are written after its name."""
    return [f".{name}" for name in x._fields] if hasattr(x, "_fields") else [f"[{i}]" for i in range(len(x))]


@functools.lru_cache(maxsize=256)  # it keeps the types alive
def roles_of(kind: type) -> list[str]:
    """What each field of a state is: ``like`` the parameters, ``other`` tensors, one for each of them, or perhaps a ``state``.

    In the state of a whole transform only lists have an entry for each parameter; its own tensors are ``own``.
    """
    names: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    hints, plain = typing.get_type_hints(kind, include_extras=True), typing.get_type_hints(kind)
    whole = takes_list(kind) or any([typing.get_origin(hints[n]) is list for n in names])
    roles = []
    for n in names:
        if typing.get_origin(hints[n]) is list:
            (entry,), (bare,) = typing.get_args(hints[n]), typing.get_args(plain[n])
            tensors = "like" if entry in (Tensor, Tensor | None) else "other"
        else:
            bare, tensors = plain[n], "own" if whole else "like" if hints[n] in (Tensor, Tensor | None) else "other"
        history = typing.get_origin(bare) is tuple and set(typing.get_args(bare)) <= {Tensor, ...}
        roles.append(tensors if bare in (Tensor, Tensor | None) else "own" if history else "state")
    return roles


def takes_list(kind: type) -> bool:
    """Whether a state begins with a list of all parameters."""
    first = next(iter(inspect.signature(kind.init).parameters.values()), None) if hasattr(kind, "init") else None
    return first is not None and "list[" in str(first.annotation)


def check_kind(kind: Any, name: str) -> None:
    """Refuse what is not the type of a state."""
    if not (isinstance(kind, type) and hasattr(kind, "_fields")):
        raise TypeError(f"{name} takes a state and the type of one, such as purestep.AdamState, but got {kind!r}.")


def latest(states: Sequence[Any]) -> Any:
    """The largest counter of these states, an int where it can be read; None where there is no counter."""
    counters = {id(t): t for x in states if "step" in x._fields for t in tree.flatten(x.step)[0] if t is not None}
    found = list(counters.values())
    if not found:
        return None
    if all(map(readable, found)):
        return int(max([t.max().item() for t in found]))
    return torch.stack([t.to(found[0]) for t in found]).amax(0)
