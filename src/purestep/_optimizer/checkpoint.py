"""Loading a state: what is loaded is checked before anything changes, and keeps its precision."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
import sys
import warnings
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from purestep._core.masks import listed
from purestep._core.primitives import Fields, Primitive, fields_of, fresh_state, fresh_whole_state
from purestep._engine.counters import together
from purestep._executors.leaf_function import stored
from purestep._optimizer.mirror import FLAGS
from purestep._optimizer.options import Options
from purestep._optimizer.selection import Contents
from purestep.transform import Transform

LONGEST, DEEPEST = 1000, 50
"""How long a string among the options may be, and how deep what is loaded may be nested."""


def check_form(loaded: Any) -> None:
    """Refuse what is no state dict: another form, or something that contains itself.

    Raises:
        TypeError: it is no dict.
        KeyError: it lacks the state or the groups, as what torch's distributed checkpoints make of flat names may.
        ValueError: something in it has another form.
    """
    if not isinstance(loaded, Mapping):
        raise TypeError(f"load_state_dict takes a dict, as state_dict returns it, but got {shown(loaded)}.")
    for name in ("state", "param_groups"):
        if name not in loaded:
            raise KeyError(
                f"A state dict of an optimizer has 'state' and 'param_groups', but this one has no {name!r}: its names are "
                f"{listed([str(k) for k in loaded])}."
            )
    if not isinstance(loaded["state"], Mapping):
        raise ValueError(
            f"The loaded state dict's 'state' must be a dict of the parameters' states, but is {shown(loaded['state'])}."
        )
    groups = loaded["param_groups"]
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"The loaded state dict's 'param_groups' must be a list of groups, but is {shown(groups)}.")
    for i, group in enumerate(groups):
        if not isinstance(group, dict) or not all([isinstance(name, str) for name in group]):
            raise ValueError(f"Group {i} of the loaded state must be a dict of its options by name, but is {shown(group)}.")
        for name in ("params", "param_names"):
            own = group.get(name, [])
            wanted: Any = str if name == "param_names" else (int, str)
            if not isinstance(own, (list, tuple)) or not all([isinstance(x, wanted) for x in own]):
                raise ValueError(f"Group {i} of the loaded state must have a list under {name!r}, but has {shown(own)}.")
        params = group.get("params", ())
        placed = bool(params) and all([isinstance(k, str) for k in params])  # by torch, which may leave other names: `by_place`
        if "param_names" in group and len(group["param_names"]) != len(params) and not placed:
            raise ValueError(
                f"Group {i} of the loaded state must have a name for each parameter under 'param_names', but has "
                f"{len(group['param_names'])} for {len(params)}."
            )
        for name, x in group.items():
            check_option(x, name, i)
    refuse_strange(dict(loaded), meta=True)


def check_option(x: Any, name: str, i: int) -> None:
    """Refuse what can be no option of the `i`-th group."""
    if name in (*FLAGS, "maximize") and not (x is None or isinstance(x, (bool, int))):
        raise ValueError(f"Group {i} of the loaded state must have True, False or None for {name!r}, but has {shown(x)}.")
    if isinstance(x, str) and len(x) > LONGEST:
        raise ValueError(
            f"Group {i} of the loaded state must have no string of more than {LONGEST} characters, but has one of {len(x)} for "
            f"{name!r}."
        )
    if isinstance(x, Tensor) and (x.grad_fn is not None or x.layout is not torch.strided):
        odd = "has a history" if x.grad_fn is not None else f"is {x.layout}"
        raise ValueError(
            f"Group {i} of the loaded state must have a dense tensor without a history for {name!r}, but has {shown(x)}, which "
            f"{odd}."
        )
    if isinstance(x, int) and abs(x) > sys.float_info.max:
        raise ValueError(
            f"Group {i} of the loaded state must have numbers that a float can hold, but has an integer of {x.bit_length()} "
            f"bits for {name!r}."
        )


def refuse_strange(x: Any, *, meta: bool, around: tuple[int, ...] = (), path: tuple[Any, ...] = ()) -> None:
    """Refuse tensors without values, unless parameters have none (`meta`), and containers inside of themselves or of too many.

    `around` are the containers that `x` is in, and `path` are the keys that lead to it.
    """
    if isinstance(x, Tensor) and x.is_meta and not meta:
        raise ValueError(f"The loaded state dict has a tensor on the meta device, where it has no values, under {shown(path)}.")
    if not isinstance(x, (dict, list, tuple)):
        return
    if id(x) in around or len(around) >= DEEPEST:
        odd = "contains itself" if id(x) in around else f"is nested more than {DEEPEST} deep"
        raise ValueError(f"The loaded state dict has a {type(x).__name__} that {odd}, under {shown(path)}.")
    for key, y in x.items() if isinstance(x, dict) else enumerate(x):
        refuse_strange(y, meta=meta, around=(*around, id(x)), path=(*path, key))


def cleaned(states: Mapping[Any, Any]) -> dict[Any, Any]:
    """The states of a state dict without the empty dicts that `torch.distributed.checkpoint` leaves for fields it lacks."""
    return {
        k: {n: x for n, x in v.items() if x is not None and x != {}} if isinstance(v, dict) else v for k, v in states.items()
    }


def with_labels(saved: list[dict[str, Any]], contents: Contents) -> list[dict[str, Any]]:
    """The groups of a state dict with the labels that a partition's groups have, where they have none."""
    if not contents.selection.partitioned or len(saved) != len(contents.groups):
        return saved
    return [{"label": g["label"], **old} for old, g in zip(saved, contents.groups)]


def by_name(saved: list[dict[str, Any]], contents: Contents) -> list[dict[str, Any]]:
    """The groups of a state dict with their parameters in the order that they have here, found by their names.

    Names that only one side knows are matched in the order in which they come, with a warning. Where no name is known to both
    sides (a model that was wrapped has other ones), all parameters are, as in torch. The groups of a partition are found by
    their labels, others by the names in them.

    Raises:
        ValueError: parameters of one group are in several here.
    """
    own = contents.groups
    if not all(["param_names" in g and "params" in g for g in (*saved, *own)]):
        return saved
    if contents.selection.partitioned:
        saved = by_label(saved, own)
    saved = by_place(saved, own)
    ids = {name: k for g in saved for name, k in zip(g["param_names"], g["params"])}
    known = ids.keys() & {name for g in own for name in g["param_names"]}
    if not known or len(ids) != sum([len(g["params"]) for g in saved]):
        return saved
    saved = by_members(saved, own, known)
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in own]:
        return saved  # refused by torch
    others = iter([k for g in saved for name, k in zip(g["param_names"], g["params"]) if name not in known])
    renamed = [name for g in own for name in g["param_names"] if name not in known]
    if renamed:
        gone = [name for name in ids if name not in known]
        warnings.warn(
            f"The loaded state has no parameters {listed(renamed)}. They take, in order, the states of {listed(gone)}, which "
            "this optimizer does not have.",
            stacklevel=5,
        )
    return [
        {**g, "params": [ids[n] if n in known else next(others) for n in names], "param_names": list(names)}
        for g, names in zip(saved, [g["param_names"] for g in own])
    ]


def by_label(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups of a state dict in the order in which a partition has them here, where each label has one group.

    Raises:
        ValueError: a parameter has another label here.
    """
    labels = {g.get("label"): g for g in saved}
    if labels.keys() != {g["label"] for g in own} or not len(labels) == len(own) == len(saved):
        return saved
    before = {name: g["label"] for g in saved for name in g["param_names"]}
    for g in own:
        for name in g["param_names"]:
            if before.get(name, g["label"]) != g["label"]:
                raise ValueError(
                    f"The loaded state has the parameter {name!r} under the label {before[name]!r}, but here its label is "
                    f"{g['label']!r}. Label the parameters as they were labelled when the state was saved."
                )
    return [labels[g["label"]] for g in own]


def by_place(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups that `set_optimizer_state_dict` has made, with the names that its parameters have here.

    It puts the parameters in their places here, each under its name in the model, but leaves their `param_names` in the order
    in which they were saved.

    Raises:
        ValueError: a parameter was in another group.
    """
    placed = [isinstance(k, str) for g in saved for k in g["params"]]
    if not placed or not all(placed) or all([g["params"] == g["param_names"] for g in saved]):
        return saved
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in own]:
        return saved  # refused by torch
    home = {name: i for i, g in enumerate(saved) for name in g["param_names"]}
    for i, (g, here) in enumerate(zip(saved, own)):
        complete = len(g["param_names"]) == len(g["params"])
        for name in here["param_names"]:
            if home.get(name, i if complete else None) != i:
                raise ValueError(
                    f"The loaded state has the parameter {name!r} in another group than here, where it is in group {i}. Give "
                    "the optimizer its parameters in the groups that they were in when the state was saved."
                )
    return [{**g, "param_names": list(here["param_names"])} for g, here in zip(saved, own)]


def by_members(saved: list[dict[str, Any]], own: list[dict[str, Any]], known: AbstractSet[str]) -> list[dict[str, Any]]:
    """The groups of a state dict in the order in which groups with the same parameters are here.

    Raises:
        ValueError: parameters of one group are in several here, so that no group has options for all of its own.
    """
    if len(saved) != len(own):
        return saved  # refused by torch
    home = {name: i for i, g in enumerate(saved) for name in g["param_names"]}
    places: list[int | None] = []
    for i, g in enumerate(own):
        found = {home[name]: name for name in g["param_names"] if name in known}
        if len(found) > 1:
            (a, first), (b, second) = sorted(found.items())[:2]
            raise ValueError(
                f"The loaded state has the parameters {first!r} and {second!r} in two groups, {a} and {b}, but here they "
                f"are in one, {i}. Give the optimizer its parameters in the groups that they were in when the state was saved."
            )
        places.append(next(iter(found), None))
    taken = [i for i in places if i is not None]
    if len(set(taken)) < len(taken):
        twice = next(i for i in taken if taken.count(i) > 1)
        raise ValueError(
            f"The loaded state has parameters in one group, {twice}, that are in several here. Give the optimizer its "
            "parameters in the groups that they were in when the state was saved."
        )
    free = iter([i for i in range(len(saved)) if i not in taken])
    return [saved[next(free) if i is None else i] for i in places]


# -- checks


def check_loaded(
    state_dict: dict[str, Any], contents: Contents, options: Options, owner: str, fallback: Mapping[str, Any]
) -> None:
    """Refuse a state dict that is not this optimizer's, the `owner`'s. Another number of groups is refused by torch."""
    saved = state_dict.get("param_groups", [])
    if len(saved) != len(contents.groups):
        return
    check_groups(saved, options, contents, owner, fallback)
    for old, group in zip(saved, contents.groups):
        for name, x in group.items():
            if isinstance(x, bool) and name not in FLAGS and not isinstance(old.get(name, x), int):
                raise ValueError(f"The loaded state must have True or False for {name!r}, but has {shown(old[name])}.")
        options.check({**group, **fallback, **old}, contents.groups)
        transform = options.transform({**fallback, **old}, contents.groups)
        check_states(state_dict["state"], old["params"], group, transform, contents)


def check_groups(
    saved: list[dict[str, Any]], options: Options, contents: Contents, owner: str, fallback: Mapping[str, Any]
) -> None:
    """Refuse loaded groups that have other labels or lack an option, for which there is no `fallback`."""
    for i, (group, own) in enumerate(zip(saved, contents.groups)):
        if contents.selection.partitioned and group["label"] != own["label"]:
            raise ValueError(
                f"Group {i} of the loaded state has the label {group['label']!r}, but here it is {own['label']!r}. Give "
                "the optimizer its parameters and groups in the order in which they were saved."
            )
        for name in options.names(group):
            if name not in group and name not in fallback:
                names = own.get("param_names", [])
                raise ValueError(
                    f"The loaded state has no option {name!r}, which {owner} needs for group {i}"
                    f"{f' of {listed(names)}' if names else ''}: it is another optimizer's, or its groups had other parameters."
                )


def check_states(
    states: Mapping[Any, Any], ids: list[Any], group: Mapping[str, Any], transform: Transform, contents: Contents
) -> None:
    """Refuse the loaded states of a group's parameters, under these ids, if they are not what its transform has."""
    links = [
        (link, keys, contents.selected(link.masks, group["params"]))
        for link, keys, off in zip(transform.links, transform.plan.keys, transform.plan.off)
        if keys and not off
    ]
    for k, (key, p, path) in enumerate(zip(ids, group["params"], group.get("param_names", ids))):
        state = states.get(key, {})
        if not isinstance(state, dict):
            raise ValueError(f"The loaded state of {path!r} must be a dict of its fields by name, but is {shown(state)}.")
        acting = [(link.transform, keys) for link, keys, on in links if on[k] and not is_lazy(p) and state]
        here = [any([state.get(name) is not None for name in keys if name != "step"]) for _, keys in acting]
        for (value, keys), found in zip(acting, here):
            if found or value.declaration.off is None or not any(here):  # what was switched on later begins anew
                check_fields(value, keys, state, contents, p, path)


def check_fields(
    value: Primitive, keys: tuple[str, ...], state: dict[str, Any], contents: Contents, p: Tensor, path: str
) -> None:
    """Refuse what is loaded for one parameter if it is not what a transform has for it."""
    info, owner, whole = fields_of(value), value.declaration.name, value.declaration.whole
    own = contents.of(p)
    fresh = [own.get(name) for name in keys] if whole else fresh_state(value, like_meta(p))
    for name, like, encoded, scalar, leaf, new in zip(keys, info.like, info.encoded, info.scalars, info.leaves, fresh):
        x = state.get(name)
        if not leaf:
            continue
        if x is None:
            if (like or encoded) and new is not None:
                raise ValueError(
                    f"The loaded state has no {name!r} for {path!r}, which {owner} needs: it is another algorithm's."
                )
            continue
        if scalar:
            check_number(x, f"The loaded state's {name!r} for {path!r}", owner, p, counts(name))
        elif isinstance(new, Tensor) or not whole:
            check_tensor(x, new, f"The loaded state has {name!r}", f"for {path!r}", owner, p)


def check_shared(loaded: Mapping[str, Any], here: Mapping[str, Any], p: Tensor) -> None:
    """Refuse what is loaded for all parameters together if it is not what is here. `p` is the parameter that keeps it."""
    owner = "the transform that keeps it"
    for name, new in here.items() if loaded else ():
        x = loaded.get(name)
        if x is None:
            continue
        if isinstance(new, Tensor) and not new.dim():
            check_number(x, f"The loaded state's {name!r}", owner, p, counts(name))
        elif isinstance(new, Tensor):
            check_tensor(x, new, f"The loaded state has {name!r}", "for all parameters", owner, p)
        elif isinstance(new, tuple) and not (
            isinstance(x, (tuple, list)) and all([isinstance(y, (Tensor, int, float)) for y in x])
        ):
            raise ValueError(f"The loaded state's {name!r} must be several tensors, but is {shown(x)}.")


def check_order(
    saved: list[dict[str, Any]], here: list[dict[str, Any]], loaded: Mapping[str, Any], params: list[Tensor]
) -> None:
    """Refuse vectors over all parameters, as L-BFGS has them, where `by_name` has put the parameters in another order."""
    if [k for g in saved for k in g["params"]] == [k for g in here for k in g["params"]]:
        return
    size = sum([p.numel() for p in params])
    for name, x in loaded.items():
        entries = x if isinstance(x, (list, tuple)) else [x]
        if any([isinstance(y, Tensor) and y.shape == (size,) for y in entries]):
            raise ValueError(
                f"The loaded state's {name!r} is a vector over all parameters in their order, which is another one here. Give "
                "the optimizer its parameters in the order in which they were saved."
            )


def check_number(x: Any, subject: str, owner: str, p: Tensor, count: bool = False) -> None:
    """Refuse a loaded number that is not one real number that can be read; with `count`, one that counts nothing."""
    if isinstance(x, Tensor):
        good = x.numel() == 1 and not x.dim() and not x.is_complex() and (p.is_meta or not x.is_meta)
        good &= x.layout is torch.strided and not x.is_quantized and x.dtype is not torch.bool
        found = f"a tensor of shape {tuple(x.shape)} and dtype {x.dtype} on {x.device}"
    else:
        good, found = isinstance(x, numbers.Real) and not isinstance(x, bool), shown(x)
    value: float | None = None
    if good and not (isinstance(x, Tensor) and x.is_meta):
        try:
            value = float(x)
        except OverflowError:
            good = False
    if not good:
        raise ValueError(f"{subject} must be one real number, as {owner} needs it, but is {found}.")
    if count and value is not None and not (math.isfinite(value) and value >= 0 and value.is_integer()):
        raise ValueError(f"{subject} counts updates, so it must be 0, 1, 2, ..., but is {value}.")


def counts(name: str) -> bool:
    """Whether a field with this name in a state counts updates."""
    return name.endswith("step")


def shown(x: Any) -> str:
    """What was loaded, for an error: what does not belong there may be very long."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)} and dtype {x.dtype} on {x.device}"
    return reprlib.repr(x)


def check_tensor(x: Any, new: Tensor | None, subject: str, where: str, owner: str, p: Tensor) -> None:
    """Refuse a loaded field that is not a tensor of the shape that it has here, or has no values."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{subject} {where} as {shown(x)}, but {owner} needs a tensor.")
    if new is None or x.shape != new.shape:
        raise ValueError(
            f"{subject} of shape {tuple(x.shape)} {where}, but {owner} needs "
            f"{'none' if new is None else tuple(new.shape)} for a parameter of shape {tuple(p.shape)}. Load a "
            "checkpoint of the same model, with its parameters in the same order."
        )
    if x.layout is not torch.strided and new.layout is torch.strided:
        raise ValueError(f"{subject} of the layout {x.layout} {where}, but {owner} needs a dense tensor. Load its to_dense().")
    if x.is_quantized or (x.layout is torch.strided and any([n > 1 and not k for n, k in zip(x.shape, x.stride())])):
        kind = "a quantized tensor" if x.is_quantized else "a tensor whose elements share memory (expand)"
        plain = "dequantize" if x.is_quantized else "clone"
        raise ValueError(f"{subject} {where} as {kind}, but {owner} needs one that can be written to. Load its {plain}().")
    if x.is_meta and not p.is_meta:
        raise ValueError(f"{subject} {where} on the meta device, where it has no values. Load one that has values.")


# -- after torch has loaded


def keep_precision(state_dict: dict[str, Any], contents: Contents, transforms: list[Transform]) -> None:
    """Counters, codes, and the float32 state of half-precision parameters, as they were saved; torch has just cast them.

    What `state_dtype` keeps is in its dtype, also where a state was saved without it.
    """
    for old, group, transform in zip(state_dict["param_groups"], contents.groups, transforms):
        own = scalars_of(transform) | names_of(transform, operator.attrgetter("encoded"))
        for key, p in zip(old["params"], group["params"]):
            half, wide = p.dtype in (torch.bfloat16, torch.float16), state_dtypes(transform, p)
            for name, x in state_dict["state"].get(key, {}).items():
                if isinstance(x, Tensor) and name in wide and name not in own:
                    contents.state[p][name] = x.to(p.device, wide[name], copy=True)
                elif isinstance(x, Tensor) and (name in own or (half and x.dtype == torch.float32)):
                    contents.state[p][name] = x.to(p.device, copy=True)


def state_dtypes(transform: Transform, p: Tensor) -> dict[str, torch.dtype]:
    """The dtypes of the fields of a parameter's state that `state_dtype` asks for."""
    found: dict[str, torch.dtype] = {}
    for link, names in zip(transform.links, transform.plan.keys):
        d = link.transform.declaration
        if d.state_dtype is not None and names:
            like = like_meta(p)
            fresh = [x[0] if isinstance(x, list) else x for x in fresh_whole_state(link.transform, [like])] if d.whole else None
            for name, x in zip(names, fresh_state(link.transform, like) if fresh is None else fresh):
                if isinstance(x, Tensor) and x.is_floating_point():
                    found[name] = x.dtype
    return found


def lay_out(contents: Contents, group: dict[str, Any], transform: Transform, anew: bool) -> None:
    """Give each parameter of a group counters of its own, one after the other in memory.

    Copies of an optimizer keep their counters, which other processes may share, where these are tensors of their own.
    """
    for name in scalars_of(transform):
        kinds: dict[Any, list[tuple[dict[str, Any], Tensor]]] = {}
        for p in group["params"]:
            state = contents.state.get(p, {})
            x = state.get(name)
            if isinstance(x, dict):  # torch's distributed checkpoints: no such entry
                del state[name]
            elif x is not None:  # numbers, as torch saved them before 1.12, become tensors
                x = x if isinstance(x, Tensor) else stored(torch.zeros((), dtype=torch.float32), float(x))
                kinds.setdefault((x.dtype, x.device), []).append((state, x))
        for entries in kinds.values():
            xs = [x for _, x in entries]
            if anew or not all([state[name] is x for state, x in entries]) or len({x.data_ptr() for x in xs}) < len(xs):
                for (state, _), x in zip(entries, together(xs)):
                    state[name] = x


def scalars_of(transform: Transform) -> set[str]:
    """The names of the fields that hold one number per parameter."""
    return names_of(transform, operator.attrgetter("scalars"))


def names_of(transform: Transform, role: Callable[[Fields], tuple[bool, ...]]) -> set[str]:
    """The names of the fields that play a role."""
    return {
        name
        for link, keys in zip(transform.links, transform.plan.keys)
        for name, yes in zip(keys, role(fields_of(link.transform)))
        if yes
    }


def like_meta(p: Tensor) -> Tensor:
    """A tensor of the same shape and dtype, and of no other type, without memory."""
    return torch.empty(p.shape, dtype=p.dtype, device="meta")
