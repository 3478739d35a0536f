"""A partition in an optimizer: each part gets the groups of the parameters that have its label.

Parameters without a shape yet (of `torch.nn.LazyLinear` and its like) have no label yet: before the first step each is moved to
the group that its label says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from purestep._core.masks import Label, MaskCache, refuse_unnamed, refuse_unused, route, select
from purestep._core.primitives import Link
from purestep._optimizer.selection import Selection, spec_of
from purestep.compose import chain
from purestep.transform import Transform
from purestep.transforms.mask import masked

Entry = tuple[dict[str, Any], str | None, Tensor]
"""A group as it was given, and one of its parameters after the parameter's name."""


class Route(NamedTuple):
    """What the parameters with one label are optimized with."""

    transform: Transform  # the part of the partition that acts on them
    first: dict[str, Any]  # its hyperparameters: the options of their groups
    names: dict[str, str]  # what these are called in the whole partition
    links: tuple[int, ...]  # where it stands in the partition: in this order the groups are made


class Routing:
    """Splits groups of parameters by the labels that a partition gives. Any other transform has no routes."""

    def __init__(
        self,
        recipe: Any,
        routes: dict[str, Route] | None = None,
        lazy: dict[Tensor, range] | None = None,
        paths: dict[Tensor, str] | None = None,
    ) -> None:
        self.recipe = recipe
        self.routes = routes or {}  # by label
        self.lazy = lazy or {}  # parameters without a shape, and the numbers of the groups that each may move to
        self.paths = paths or {}  # of all parameters, in order, while there are lazy ones

    # -- groups with one label each

    def split(self, groups: list[Any], selection: Selection, present: list[dict[str, Any]] | None) -> list[Any]:
        """Groups of parameters as groups with one label each, and the options that go with it.

        `present` are the groups that the optimizer has; None while it is made.
        """
        groups = [g if isinstance(g, dict) else {"params": groups} for g in groups][: None if is_groups(groups) else 1]
        entries: list[Entry] = [(g, *entry) for g in groups for entry in entries_of(g.get("params"))]
        if not all([isinstance(p, Tensor) for _, _, p in entries]) or any([isinstance(g.get("params"), set) for g in groups]):
            return groups  # refused by torch
        paths = {} if present is None else selection.paths(present)
        for _, name, p in entries:
            paths.setdefault(p, str(len(paths)) if name is None else name)
        named = any([name is not None for _, name, _ in entries])
        selection.numbers = selection.numbers | {p: int(paths[p]) for _, name, p in entries if name is None}
        active, memo = self._active([None if is_lazy(p) else p for p in paths], paths, named)
        lazy = {p for p in paths if is_lazy(p)}
        if present is None and not lazy:
            refuse_unused(self._masks(), memo)
        labels = {p: self.label(active[p]) for _, _, p in entries if p not in lazy}
        if lazy:
            self.paths = paths
            labels |= dict.fromkeys(lazy, self._routes_ahead())  # until they have a shape
        made: list[dict[str, Any]] = []
        for g in groups:
            own = [(name, p) for mine, name, p in entries if mine is g]
            made += self._parts(g, own, labels, named, len(made) + len(present or ()))
        return made

    def _parts(
        self,
        group: dict[str, Any],
        entries: list[tuple[str | None, Tensor]],
        labels: dict[Tensor, str],
        named: bool,
        start: int,
    ) -> list[dict[str, Any]]:
        """A group as one group for each label. `start` is the number that the first of them will have in the optimizer."""
        parts: dict[str, list[Any]] = {}
        waiting = [p for _, p in entries if is_lazy(p)]
        if waiting:  # groups for all labels, so that a scheduler that is made before the first step drives them
            parts = {label: [] for label in (list(self.routes) if "label" not in group else [str(group["label"])])}
            self.lazy.update(dict.fromkeys(waiting, range(start, start + len(parts))))
            if "label" in group:
                labels |= dict.fromkeys(waiting, group["label"])
        for name, p in entries:
            parts.setdefault(labels[p], []).append(p if name is None else (name, p))
        made: list[dict[str, Any]] = []
        for label in sorted(parts, key=lambda label: self.routes[label].links):
            if group.get("label", label) != label:
                raise ValueError(
                    f"A group is labelled {group['label']!r}, but some of its parameters are {label!r}. Leave the label out: "
                    "partition gives it."
                )
            first = self.routes[label].first
            others = {n for r in self.routes.values() for n in r.first} - set(first)
            given = {n: x for n, x in group.items() if n not in others}
            names: dict[str, Any] = {"param_names": []} if not parts[label] and named else {}
            made.append({**first, **given, "label": label, "params": parts[label], **names})
        return made or [group]

    # -- labels

    def label(self, active: tuple[bool, ...]) -> str:
        """The label of the parameters on which these links of the partition act. A new one gets its route."""
        links = [(i, link) for i, (link, yes) in enumerate(zip(self.recipe.links, active)) if yes]
        places = tuple([i for i, _ in links])
        plain = "+".join(dict.fromkeys([name for _, link in links if (name := route(link.masks))])) or "unlabelled"
        names = (plain, *[f"{plain}#{k}" for k in range(2, len(self.routes) + 2)])
        alike = [label for label in names if label in self.routes]
        label = next((x for x in alike if self.routes[x].links == places), f"{plain}#{len(alike) + 1}" if alike else plain)
        if label not in self.routes:
            self.routes[label] = self._route(links)
        return label

    def _route(self, links: list[tuple[int, Link]]) -> Route:
        """The part of the partition that is made of these links, each after its place."""
        parts: list[Transform] = []
        for _, link in links:
            part: Any = link.transform
            for mask in link.masks[: len(link.masks) - len(outer(link.masks))]:
                part = masked(part, mask)
            parts.append(part)
        own = chain(*parts)
        full = {(i, plain): name for name, i, plain, _ in self.recipe._named(hypers=True)}
        names = {name: full[links[k][0], plain] for name, k, plain, _ in own._named(hypers=True)}
        return Route(own, own.hyperparams, names, tuple([i for i, _ in links]))

    def _routes_ahead(self) -> str:
        """Make a route for each label that a parameter may yet get; the first of them."""
        stacks = [[m for m in outer(link.masks) if isinstance(m, Label)] for link in self.recipe.links]
        found = []
        for top in {id(stack[-1].labels): stack[-1].labels for stack in stacks if stack}.values():
            for label in top.known:
                active = [
                    all([m.label == (label if m.labels is top else m.labels.known[0]) for m in stack]) for stack in stacks
                ]
                found.append(self.label(tuple(active)))
        return found[0]

    def _active(
        self, known: list[Any], paths: dict[Tensor, str], named: bool
    ) -> tuple[dict[Tensor, tuple[bool, ...]], MaskCache]:
        """Which links of the partition act on each parameter, and the labels found; `known` has None for lazy parameters."""
        memo: MaskCache = {}
        spec = spec_of(paths, self._masks(), named)
        ways = [select(outer(link.masks), known, spec, memo) for link in self.recipe.links]
        return dict(zip(paths, zip(*ways))), memo

    def _masks(self) -> list[Any]:
        return [m for link in self.recipe.links for m in link.masks]

    # -- lazy parameters

    def decide(self, groups: list[dict[str, Any]], add: Callable[[dict[str, Any], str], None]) -> set[Tensor]:
        """Move the parameters that have got a shape to the group that their label says; these parameters.

        Where there is no such group, `add` is called with one like the parameter's own, and the label.

        Raises:
            ValueError: a label that no parameter has. Nothing has changed then.
        """
        ready = {p for p in self.lazy if not is_lazy(p)}
        if not ready:
            return ready
        known = [None if is_lazy(p) else p for p in self.paths]
        active, memo = self._active(known, self.paths, any(["param_names" in g for g in groups]))
        if None not in known:
            refuse_unused(self._masks(), memo)
        for p in [p for p in self.paths if p in ready]:
            self._move(p, self.label(active[p]), groups, add)
        if None in known:
            self.lazy = {p: numbers for p, numbers in self.lazy.items() if p not in ready}
        else:
            self.lazy, self.paths = {}, {}
        return ready

    def _move(self, p: Tensor, label: str, groups: list[dict[str, Any]], add: Callable[[dict[str, Any], str], None]) -> None:
        """Move a parameter to the group with this label, among those that its own was split into."""
        order = {q: k for k, q in enumerate(self.paths)}
        old = next(g for g in groups if any([q is p for q in g["params"]]))
        new = next((groups[k] for k in self.lazy[p] if groups[k]["label"] == label), None)
        if new is None:
            add(old, label)
            new = groups[-1]
        if new is old:
            return
        at = next(k for k, q in enumerate(old["params"]) if q is p)
        to = len([q for q in new["params"] if order[q] < order[p]])
        for name in ("params", "param_names") if "param_names" in old else ("params",):
            new[name] = [*new[name][:to], old[name][at], *new[name][to:]]
            old[name] = [*old[name][:at], *old[name][at + 1 :]]


def routed(transform: Transform) -> bool:
    """Whether a transform has different parts for different parameters."""
    return any([isinstance(m, Label) for link in transform.links for m in link.masks])


def outer(masks: tuple[Any, ...]) -> tuple[Any, ...]:
    """The masks down to the innermost label: those that decide which part of a transform a parameter is given to."""
    return masks[next((k for k, m in enumerate(masks) if isinstance(m, Label)), len(masks)) :]


def is_groups(params: list[Any]) -> bool:
    """Whether an optimizer's first argument is a list of groups."""
    return bool(params) and isinstance(params[0], dict)


def entries_of(params: Any) -> list[tuple[Any, Any]]:
    """The parameters of a group with their names, if they have any."""
    entries = [params] if isinstance(params, Tensor) else list(params)
    return [e if isinstance(e, tuple) and len(e) == 2 else (None, e) for e in entries]


def with_lists(params: Any, masks: list[Any]) -> list[Any]:
    """An optimizer's first argument with lists for iterators; masks that read names refuse parameters without names."""
    given: Any = list(params)
    groups = [g for g in given if isinstance(g, dict)] if is_groups(given) else [{"params": given}]
    for g in groups:
        if isinstance(g.get("params"), Iterator):
            g["params"] = list(g["params"])
    if not any([name is not None for g in groups for name, _ in entries_of(g.get("params", ()))]):
        refuse_unnamed(masks)
    return given
