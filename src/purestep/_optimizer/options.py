"""The options of an optimizer's groups, and the transforms that they make."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from purestep._core.hyper import several
from purestep._core.primitives import is_off
from purestep._core.torch_api import tree_flatten, tree_leaves
from purestep._core.tree import quote
from purestep._core.values import same
from purestep._engine.checks import flattened, refuse_flat
from purestep._engine.plan import ParamSlice
from purestep._optimizer.following import Following, Schedules, follows
from purestep._optimizer.routing import Routing
from purestep._optimizer.selection import Contents
from purestep.compose import chain
from purestep.transform import Transform
from purestep.transforms.scale import maximize as ascend


class Options:
    """Makes the transform of a group from the group's options.

    `recipe` is a transform, or the factory that makes one from options; `first` are the options that the optimizer was made
    with, none where a partition has its own for each part.
    """

    def __init__(self, recipe: Any, first: dict[str, Any], flags: Iterable[str], routing: Routing) -> None:
        self.recipe, self.first, self.flags, self.routing = recipe, first, tuple(flags), routing
        self.schedules = Schedules()  # that options of the groups follow
        self.rates: dict[tuple[int, str], Tensor] = {}  # by group and name, what a captured step reads
        self._made: list[tuple[list[Any] | None, Transform]] = []  # by group, its options and its transform at the last step

    @functools.cached_property
    def base(self) -> Transform:
        """The transform with the options that the optimizer was made with."""
        return self.recipe if isinstance(self.recipe, Transform) else self.recipe(**self.first)

    def names(self, group: Mapping[str, Any]) -> Iterable[str]:
        """The names of a group's options."""
        return self.routing.routes[group["label"]].first if self.routing.routes else self.first

    # -- transforms

    def transforms(self, groups: list[dict[str, Any]]) -> list[Transform]:
        """Each group's transform; made anew only where an option has changed."""
        if torch.compiler.is_compiling():  # what was made before would be a guard, and a new number a new graph
            return [
                self._captured(i, groups) if g.get("capturable") else self.transform(g, groups) for i, g in enumerate(groups)
            ]
        made = self._made
        if len(made) != len(groups):
            made[:] = [(None, chain())] * len(groups)
        together = bool(self.routing.routes) and self.recipe.plan.whole
        for i, group in enumerate(groups):
            sources = groups if together else (group,)
            options = self._current(sources)
            old = made[i][0]
            if old is None or (not all(map(operator.is_, old, options)) and not all(map(unchanged, old, options))):
                if any(map(follows, options)) or self.schedules.found:
                    for g in sources:
                        self.schedules.take(g, self.names(g))
                    self.schedules.settle(sources)
                    options = self._current(sources)
                made[i] = (options, self._captured(i, groups) if group.get("capturable") else self.transform(group, groups))
        return [t for _, t in made]

    def transform(self, group: Mapping[str, Any], groups: list[dict[str, Any]], strict: bool = False) -> Transform:
        """The transform with a group's options: the first one with what is different, or another where it has no such part.

        Only `strict` asks that numbers are within their ranges; a scheduler may leave them by a rounding error.
        """
        group = self.schedules.options(group)
        if self.routing.routes:
            transform = self._routed(group, groups, strict)
            return chain(ascend(), transform) if group["maximize"] else transform
        options = {name: group[name] for name in self.first}
        changes = {name: x for name, x in options.items() if not unchanged(self.first[name], x)}
        transform = self.base
        if isinstance(self.recipe, Transform) or changes.keys() <= transform.hyperparams.keys() | transform.switches.keys():
            transform = transform._replace(changes, strict)
        else:  # made of other parts: with these switches, and numbers that are known to be good, which are then replaced
            switches = {n: x for n, x in changes.items() if n not in transform.hyperparams}
            try:
                transform = self.recipe(**options)
            except ValueError as error:  # where a scheduler has left the range
                try:
                    transform = self.recipe(**{**self.first, **switches})
                except ValueError:
                    raise error from None
            transform = transform._replace({n: x for n, x in options.items() if n in transform.hyperparams}, strict)
        climbs = isinstance(self.recipe, Transform) and "maximize" in self.flags and group["maximize"]
        return chain(ascend(), transform) if climbs else transform

    def _routed(self, group: Mapping[str, Any], groups: list[dict[str, Any]], strict: bool) -> Transform:
        """The part of a partition that a group's label has, with the group's options.

        A transform that sees all parameters together is kept whole, with the options of all groups: this group's own, and for
        every other label those of its first group.
        """
        routes = self.routing.routes
        mine, group = routes[group["label"]], self.schedules.options(group)
        changes = {n: group[n] for n, x in mine.first.items() if not unchanged(x, group[n])}
        transform = mine.transform._replace(changes, strict)
        if not self.recipe.plan.whole:
            return transform
        every: dict[str, Any] = {}
        for g in [*reversed([g for g in groups if g["label"] != group["label"]]), group]:
            own, g = routes[g["label"]], self.schedules.options(g)
            every |= {own.names[n]: g[n] for n in own.first}
        return self.recipe._replace(every, strict)

    def _captured(self, i: int, groups: list[dict[str, Any]]) -> Transform:
        """A group's transform, with its learning rates in tensors that stay. No step that is captured writes to them."""
        params, transform = groups[i]["params"], self.transform(groups[i], groups)
        if not params or not captures(params[0]):
            return transform
        rates: dict[str, Any] = {}
        for name, x in transform.hyperparams.items():
            if name.split(".")[-1] == "lr" and isinstance(x, float):
                rate = self.rates.get((i, name))
                if rate is None:
                    rate = self.rates[i, name] = torch.full((), x, dtype=torch.float32, device=params[0].device)
                elif not capturing():
                    rate.fill_(x)
                rates[name] = rate
        return transform._replace(rates, strict=False)

    def _current(self, groups: Iterable[Mapping[str, Any]]) -> list[Any]:
        """The options of these groups as the transform takes them."""
        if self.schedules.found:
            groups = map(self.schedules.options, groups)
        routes, first = self.routing.routes, self.first
        return [
            tuple(x) if type(x := g[name]) is list else x
            for g in groups
            for name in (routes[g["label"]].first if routes else first)
        ]

    def forget(self) -> None:
        """Make all transforms anew at the next step."""
        self._made.clear()

    def resumed(self, groups: list[dict[str, Any]], schedules: list[dict[str, Any]]) -> Options:
        """The same for groups that were loaded, with their schedules. A graph that was captured reads its learning rates on."""
        new = copy.copy(self)
        new._made, new.schedules = [], Schedules.resumed(groups, schedules)
        new.take_schedules(groups)
        return new

    # -- groups

    def check(self, group: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
        """Refuse options that are out of their range; a tensor must be one number, and is read once, here."""

        def number(name: str, x: Any) -> Any:
            if several(x):
                return tuple([number(f"{name}[{i}]", y) for i, y in enumerate(x)])
            if isinstance(x, Tensor) and x.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element, but got one of shape {tuple(x.shape)}.")
            return x.item() if isinstance(x, Tensor) else x

        routes = self.routing.routes
        weights = (routes[group["label"]].transform if routes else self.base)._weights()
        read = {name: group[name] if name in weights else number(name, group[name]) for name in self.names(group)}
        self.transform({**group, **read}, groups, strict=True)

    def refuse(self, contents: Contents, groups: list[dict[str, Any]]) -> None:
        """Refuse parameters that the transforms of these groups cannot treat."""
        paths = contents.selection.paths(contents.groups)
        for group in groups:
            params = group["params"]
            flat = any(map(flattened, params))
            for link in self.transform(group, contents.groups).links:
                requires = link.transform.declaration.requires
                if (requires is None and not flat) or is_off(link.transform):
                    continue
                for p, yes in zip(params, contents.selected(link.masks, params)):
                    if yes and flattened(p):
                        refuse_flat(link.transform, quote(paths[p]), p)
                    if yes and requires is not None and not is_lazy(p):
                        requires(quote(paths[p]), p)

    def take_schedules(self, groups: list[dict[str, Any]]) -> None:
        """Keep the schedules among the options of these groups, and show numbers in their place."""
        for group in groups:
            self.schedules.take(group, [name for name in self.names(group) if name in group])

    def set_defaults(self, defaults: dict[str, Any], constants: Iterable[str]) -> dict[str, Any]:
        """The options of a group that names none: numbers in place of schedules, as torch's tools expect them.

        Of a partition these are the options that all its parts have: `OneCycleLR` looks here whether it may change momentum.
        """
        options = self.first
        if self.routing.routes:
            first, *others = [route.first for route in self.routing.routes.values()]
            options = {name: x for name, x in first.items() if all([name in other for other in others])}
            defaults = {**options, **{name: x for name, x in defaults.items() if name in self.flags or name in constants}}
        defaults.update({name: Following(x).at(0) for name, x in options.items() if follows(x)})
        return defaults

    def fallback(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """The options and flags that a checkpoint may be too old to know, with the values they had before they existed.

        `before` are those that a class has of its own. A checkpoint that was saved without a seed, before rounding or noise
        were put around its transform, takes the one here.
        """
        switches = {name: False for name, x in self.first.items() if isinstance(x, bool)}
        seeds = {name: x for name, x in self.first.items() if name.split(".")[-1] == "seed"}
        return {**switches, **seeds, **{name: None if name in ("foreach", "fused") else False for name in self.flags}, **before}


def captures(p: Tensor) -> bool:
    """Whether a graph can capture what is done to this parameter."""
    return p.is_cuda


def capturing() -> bool:
    """Whether a graph is capturing now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def unchanged(a: Any, b: Any) -> bool:
    """Whether a group's option is still what it was."""
    b = tuple(b) if type(b) is list else b
    if a is b or isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b):
        return a is b
    if isinstance(a, (dict, tuple)) and any([isinstance(x, Tensor) for x in tree_leaves(a)]):
        (xs, spec), (ys, other) = tree_flatten(a), tree_flatten(b)
        return spec == other and all(map(unchanged, xs, ys))
    return bool(a == b)


def refuse_flags(flags: Mapping[str, Any]) -> None:
    """Refuse flags of torch's that exclude each other."""
    if flags.get("fused") and flags.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if flags.get("fused") and flags.get("differentiable"):
        raise RuntimeError("`fused` does not support `differentiable`")
    others = [name for name in ("foreach", "fused", "differentiable") if flags.get(name)]
    if flags.get("compile") and others:
        raise RuntimeError(f"`compile` and `{others[0]}` cannot be `True` together.")


def refuse_disagreement(groups: list[ParamSlice]) -> None:
    """A transform that sees all groups together has one set of hyperparameters."""
    if len({len(g.plan.links) for g in groups}) > 1:
        raise ValueError(
            "A transform that sees the parameters of all groups together needs the same maximize in all groups, but it differs."
        )
    for k, link in enumerate(groups[0].plan.links):
        value = link.transform
        others = [g.plan.links[k].transform for g in groups[1:]]
        if value.declaration.whole and any([x != value for x in others]):
            names = [n for n, x in value.arguments.items() if any([not same(x, y.arguments[n]) for y in others])]
            raise ValueError(
                f"{value.declaration.name} sees the parameters of all groups together, so {' and '.join(names)} must be the "
                f"same in all groups, but there are {', '.join(map(repr, [value, *others]))}."
            )
