"""A state as a flat mapping from names to tensors, as files of tensors hold it, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from purestep._core import tree
from purestep._executors.leaf_function import STOP
from purestep.state import is_state, roles_of

S = TypeVar("S")

SHOWN = 5
"""An error names this many entries of a kind."""


def state_dict(state: Any) -> dict[str, Tensor]:
    """A state as a flat mapping: each tensor under the path that leads to it.

    A path names the transform (its number in a chain, its label in a partition), the field and the parameter, and ``inner``
    for the state that another wraps: ``"0.exp_avg.layer1.weight"``. What is None has no entry. All tensors are contiguous and
    none share memory, so files of the ``safetensors`` format take the mapping as it is.

    Args:
        state: the state of any transform.

    Returns:
        a dict of copies without a history, in the state's dtypes and on its devices, so that a donated step changes none.

    Raises:
        TypeError: `state` holds something that is neither a tensor nor None, or is not the state of a transform.
        ValueError: two parameters have one path: ``{"a": {"b": ...}, "a.b": ...}``.

    >>> import torch, purestep as ps
    >>> opt = ps.adamw(lr=0.1)
    >>> flat = ps.state_dict(opt.init_state({"weight": torch.zeros(2), "bias": torch.zeros(1)}))
    >>> list(flat)
    ['0.step.weight', '0.step.bias', '0.exp_avg.weight', '0.exp_avg.bias', '0.exp_avg_sq.weight', '0.exp_avg_sq.bias']
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Any, counts: bool = False) -> Any:
        if x is None:
            return None
        if not isinstance(x, Tensor):
            raise TypeError(f"state_dict takes the state of a transform, which holds tensors, but {name!r} is {x!r}.")
        if name in found:
            raise ValueError(f"Two entries of this state have the path {name!r}: give the parameters other names.")
        found[name] = x.detach().clone(memory_format=torch.contiguous_format)
        return None

    visit(state, "", keep, lambda name, entries, _: [keep(f"{name}.{k}", x) for k, x in enumerate(entries)])
    return found


def load_state_dict(template: S, flat: Mapping[str, Tensor]) -> S:
    """`state_dict` undone: a new state with the tensors of a flat mapping, in any order.

    Args:
        template: a state of the same transform for the same parameters, such as `init_state` makes; it stays as it is.
        flat: what `state_dict` returned, or a file of it.

    Returns:
        a state of the structure of `template`, on its devices. It shares no memory with `flat` or `template`. Parameters that
        share a counter in `template` share one afterwards where their counts are equal.

    Raises:
        ValueError: entries are missing, or more are there, or have another shape or dtype, or a counter is negative, NaN or
            no integer. The error lists them, and nothing is loaded.

    >>> import torch, purestep as ps
    >>> opt, params = ps.adamw(lr=0.1), {"weight": torch.zeros(2)}
    >>> _, state = opt.step({"weight": torch.ones(2)}, opt.init_state(params), params)
    >>> again = ps.load_state_dict(opt.init_state(params), ps.state_dict(state))
    >>> ps.find(again, ps.AdamState).exp_avg
    {'weight': tensor([0.1000, 0.1000])}
    >>> ps.load_state_dict(ps.sgd(lr=0.1, momentum=0.9).init_state(params), ps.state_dict(state))
    Traceback (most recent call last):
        ...
    ValueError: This is not a state like the template's:
    missing: '1.step.weight', '1.momentum_buffer.weight'
    unexpected: '0.step.weight', '0.exp_avg.weight', '0.exp_avg_sq.weight'
    """
    wrong: dict[str, list[str]] = {
        "missing": [],
        "unexpected": [],
        "not a tensor": [],
        "another shape": [],
        "another dtype": [],
        "of another kind": [],
        "no count of updates": [],
    }
    taken: set[str] = set()
    counters: dict[Any, Tensor] = {}

    def load(name: str, old: Any, counts: bool = False) -> Any:
        if old is None:
            return None
        taken.add(name)
        new = flat.get(name)
        if not isinstance(new, Tensor):
            wrong["missing" if new is None else "not a tensor"].append(repr(name))
            return old
        if new.shape != old.shape:
            wrong["another shape"].append(f"{name!r}, {tuple(new.shape)} instead of {tuple(old.shape)}")
            return old
        wide = new.dtype != old.dtype and old.dim() == 0 and (counts or whole_number(new)) and {old.dtype, new.dtype} == COUNTS
        if new.dtype != old.dtype and not wide:
            wrong["another dtype"].append(f"{name!r}, {new.dtype} instead of {old.dtype}")
            return old
        if (new.is_meta and not old.is_meta) or (new.layout is not old.layout):
            wrong["of another kind"].append(f"{name!r}, {new.layout} on {new.device}")
            return old
        made = torch.empty_like(old, requires_grad=False, dtype=torch.float64 if wide else old.dtype).copy_(new.detach())
        if counts and not made.dim() and not made.is_meta and not (made.item() >= 0 and float(made).is_integer()):
            wrong["no count of updates"].append(f"{name!r}, {made.item()}")
            return old
        # parameters that agree share a counter: a device is waited for here, once, so that no step has to compare them
        if made.dim() == 0 and made.dtype.is_floating_point and not made.is_meta:
            return counters.setdefault((id(old), made.item()), made)
        return made

    def load_history(name: str, old: tuple[Any, ...], around: Any) -> tuple[Any, ...]:
        names = [f"{name}.{k}" for k in range(len(flat))]
        found = [n for n in names if n in flat]
        if found != names[: len(found)]:
            wrong["missing"].append(repr(next(n for n in names if n not in flat)))
        taken.update(found)
        strange = [n for n in found if not isinstance(flat[n], Tensor)]
        wrong["not a tensor"] += map(repr, strange)
        device = next(x.device for x in around if isinstance(x, Tensor))
        return old if strange else tuple([flat[n].detach().to(device, copy=True) for n in found])

    result: S = visit(template, "", load, load_history)
    wrong["unexpected"] = [repr(name) for name in flat if name not in taken]
    lines = [f"{what}: {listed(names)}" for what, names in wrong.items() if names]
    if lines:
        raise ValueError("\n".join(["This is not a state like the template's:", *lines]))
    return result


COUNTS = {torch.float32, torch.float64}
"""The dtypes of counters: one that has outgrown the first is of the second."""


def whole_number(x: Tensor) -> bool:
    """Whether this is a count that a float32 may not hold."""
    return x.dtype is torch.float64 and not x.is_meta and abs(x.item()) > STOP and x.item() % 1 == 0


def visit(x: Any, name: str, leaf: Callable[..., Any], history: Callable[[str, tuple[Any, ...], Any], Any]) -> Any:
    """A state with a function applied to each tensor, and another to each tuple of tensors that grows, and their paths.

    The first is also told of tensors in fields that count updates; the second is given the state that the tuple belongs to.
    """
    before = f"{name}." if name else ""
    if isinstance(x, dict):
        return {key: visit(y, f"{before}{key}", leaf, history) for key, y in x.items()}
    if not isinstance(x, (tuple, list)):
        return leaf(name, x)
    if not is_state(x):
        made = [visit(y, f"{before}{k}", leaf, history) for k, y in enumerate(x)]
        return type(x)(*made) if hasattr(x, "_fields") else type(x)(made)
    fields = []
    for field, role, y in zip(x._fields, roles_of(type(x)), x):  # type: ignore[union-attr]  # is_state: a NamedTuple
        place = before + field
        if role == "own" and isinstance(y, tuple):
            fields.append(history(place, y, x))
        elif role == "state":
            fields.append(visit(y, place, leaf, history))
        else:
            leaves, spec = tree.flatten(y)
            counts, paths = field.endswith("step"), spec.paths()
            new = [leaf(f"{place}.{path}" if path else place, v, counts) for path, v in zip(paths, leaves)]
            fields.append(tree.unflatten(new, spec))
    return type(x)(*fields)


def listed(names: list[str]) -> str:
    """Some names, and how many more there are."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
