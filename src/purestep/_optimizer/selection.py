"""The paths of an optimizer's parameters, and which of the parameters masks select."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

from purestep._core.masks import Label, Not, select
from purestep._core.tree import Spec
from purestep._optimizer.shared import NOTHING, Place, Shared


class Selection:
    """Asks masks once about each parameter, by its path."""

    def __init__(self, partitioned: bool, numbers: dict[Tensor, int] | None = None) -> None:
        self.partitioned = partitioned  # a mask of one part of a partition is not asked about parameters of other parts
        self.numbers = numbers or {}  # of unnamed parameters in a partition: the order in which they were given
        self.agreed: set[tuple[int, ...]] = set()  # groups of sharded parameters that all processes are known to have alike
        self._known: dict[Any, dict[Tensor, bool]] = {}  # by mask

    def paths(self, groups: list[dict[str, Any]]) -> dict[Tensor, str]:
        """The path of each parameter: its name or, without names, its number in the order in which parameters were given."""
        paths: dict[Tensor, str] = {}
        unnamed: list[Tensor] = []
        for group in groups:
            if "param_names" in group:
                paths.update(zip(group["params"], group["param_names"]))
            else:
                unnamed += group["params"]
        if not self.numbers:  # only a partition, which parts the groups anew, changes the order
            return paths | {p: str(k) for k, p in enumerate(dict.fromkeys(unnamed), start=len(paths))}
        numbers = {p: self.numbers[p] for p in unnamed if p in self.numbers}  # others have left the groups
        free = iter(set(range(len(unnamed) + len(self.numbers))) - set(numbers.values()))
        numbers |= {p: next(free) for p in unnamed if p not in numbers}
        self.numbers = numbers
        return paths | {p: str(n) for p, n in sorted(numbers.items(), key=operator.itemgetter(1))}

    def of(self, masks: tuple[Any, ...], params: list[Tensor], groups: list[dict[str, Any]]) -> list[bool]:
        """For each of these parameters, whether the masks select it."""
        if not masks:
            return [True] * len(params)
        key = tuple(map(identity, masks))
        known = self._known.get(key, {})
        new = {p for p in params if p not in known and not is_lazy(p)}  # a lazy parameter has no shape to be asked for
        if new or len(known) > sum([len(group["params"]) for group in groups]):
            paths = self.paths(groups)
            spec = spec_of(paths, masks, "param_names" in groups[0])
            asked = new if self.partitioned else {p for p in paths if not is_lazy(p)}
            values = select(masks, [p if p in asked else None for p in paths], spec)
            kept = {p: yes for p, yes in known.items() if p in paths}  # what has left the groups is not kept alive
            known = self._known[key] = kept | {p: yes for p, yes in zip(paths, values) if p in asked}
        return [known.get(p, False) for p in params]


class Contents(NamedTuple):
    """What an optimizer holds, as its parts see it."""

    groups: list[dict[str, Any]]
    state: Any  # by parameter, a dict of fields
    selection: Selection
    place: Place
    restarts: frozenset[str]  # fields without which the count of a parameter's updates begins anew

    @property
    def shared(self) -> Shared:
        """The fields that are kept for all parameters together."""
        return self.place.of(self.state, self.groups)

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [p for group in self.groups for p in group["params"]]

    def of(self, p: Tensor) -> Mapping[str, Any]:
        """The state of a parameter, empty where it has none."""
        return self.state.get(p, NOTHING)

    def selected(self, masks: tuple[Any, ...], params: list[Tensor]) -> list[bool]:
        """For each of these parameters, whether the masks select it."""
        return self.selection.of(masks, params, self.groups)


def identity(mask: Any) -> Any:
    """What a mask is known by while the transform that it is part of is remade."""
    if isinstance(mask, Label):
        return id(mask.labels), mask.label
    return ("not", identity(mask.mask)) if isinstance(mask, Not) else id(mask)


def spec_of(paths: Mapping[Tensor, str], masks: Iterable[Any], named: bool) -> Spec:
    """How masks that are pytrees are laid out: by the parameters' names, or by their numbers."""

    def tree(mask: Any) -> Any:
        return tree(mask.mask) if isinstance(mask, Not) else mask.labels.labels if isinstance(mask, Label) else mask

    keys = tuple(paths.values())
    if named or any([isinstance(tree(m), dict) for m in masks]):
        return Spec(dict, keys, None)
    return Spec(list, tuple(range(len(keys))), None)
